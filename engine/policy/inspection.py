"""Says what a model is and how it will be used: what its config names, and what its chat template
does when it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnfitModel
from ..records.episode import Message
from .in_process import InProcess
from .policy import Policy

EXCHANGE = (Message("user", "one"), Message("assistant", " two\n"), Message("user", "three"))
THOUGHT = Message("assistant", "<think>\nfour\n</think>\n\nfive")


def inspect(policy: Policy) -> dict[str, str]:
    """Returns what there is to know of a policy before it is trained, a line for each thing."""
    model, config = policy.model, policy.model.config.get_text_config()
    count = sum(p.numel() for p in model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ends = sorted(policy.chat.stop_ids)
    shown = ", ".join(f"{policy.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ends)
    return {
        "architecture": f"{type(model).__name__}, {config.num_hidden_layers} layers,"
        f" {config.hidden_size} wide, vocabulary {model.get_input_embeddings().weight.shape[0]:,}",
        "parameters": f"{count:,} in {str(model.dtype).removeprefix('torch.')},"
        f" {size / 2**20:,.0f} MiB",
        "context": f"{policy.context_length:,} tokens; an episode that outgrows it is truncated",
        "system prompt": _system(policy),
        "history": _history(policy),
        "thinking": _thinking(policy),
        "tools": _tools(policy),
        "a reply ends with": shown,
        "sampling": _sampling(policy),
        "log-probs": (
            "from hidden states, the head in chunks"
            if policy.network.head_is_plain
            else "from the model's own logits (it caps or scales them), row by row"
        ),
    }


def _sampling(policy: Policy) -> str:
    try:
        return f"in process, with a KV cache across turns (masks: {InProcess(policy).masks})"
    except UnfitModel as error:
        return f"cannot be done; `sft` and preferences can train it. {error}"


def _render(policy: Policy, messages: Sequence[Message], **more: Any) -> str:
    return policy.chat.template.render(messages, generate=True, **more)


def _system(policy: Policy) -> str:
    if policy.chat.template.system == "first":
        return "the template has no such role: it goes into the first user turn"
    default = _render(policy, [Message("system", ""), EXCHANGE[0]]) != _render(policy, EXCHANGE[:1])
    written = default and "system" in _render(policy, EXCHANGE[:1])
    return "a message of its own" + ("; without one the template writes its own" * written)


def _history(policy: Policy) -> str:
    """Returns whether replies stay as they were sampled when the conversation goes on."""
    before = _render(policy, EXCHANGE[:1]) + EXCHANGE[1].content
    if _render(policy, EXCHANGE).startswith(before):
        return "kept as it was: `history: append` trains exactly what was sampled"
    return (
        "the template rewrites earlier replies (white space, at least): `history: append` trains"
        " what was sampled, its drift from the template is measured; `rerender` follows the"
        " template, a row per turn"
    )


def _thinking(policy: Policy) -> str:
    source = policy.tokenizer.get_chat_template()
    if "enable_thinking" not in source and "think" not in source:
        return "the template knows none"
    whole = _render(policy, [EXCHANGE[0], THOUGHT, EXCHANGE[2]])
    return (
        "kept in earlier replies"
        if "four" in whole
        else "dropped from earlier replies by the template; use `history: rerender` to follow it"
    )


def _tools(policy: Policy) -> str:
    template = policy.chat.template
    listed = (
        "the template shows their schemas"
        if template.lists_tools
        else "the template does not show their schemas: they are written into the system prompt"
    )
    return f"{listed}; results are messages of role `{template.results}`"
