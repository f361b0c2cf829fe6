"""Reads answers of the Responses and Chat Completions APIs, exact or almost: text, end, usage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..llm.transcript import Unreadable, json_within
from .model import BatchFailed, ModelError, Reply, Token, Usage
from .wire import (
    FILTERED,
    count,
    error_within,
    part,
    plain_word,
)

_STOPS = {  # plain words of finish reasons
    "": "end", "stop": "end", "eos": "end", "eostoken": "end", "endturn": "end",
    "stopsequence": "end", "complete": "end",
    "length": "length", "maxtokens": "length", "modellength": "length", "maxoutputtokens": "length",
}  # fmt: skip


# The server's own failures.
_BROKEN = ("error", "networkerror", "abort", "insufficientsystemresource")


def read_response(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """Reads a response of the Responses API: the last message that is no commentary.

    Raises:
        ModelError: it is none, or says that it failed.
    """
    usage = _usage(body)
    if body.get("status") == "failed" or (body.get("error") and not body.get("output")):
        raise error_within(body, usage)
    if isinstance(body.get("choices"), list):
        raise ModelError(
            "account",
            "this server speaks Chat Completions: use the provider openai-chat",
            usage=usage,
        )
    if not isinstance(body.get("output"), list):
        raise ModelError("form", f"the answer is no response: {str(body)[:200]}", usage=usage)
    output = [each for each in body["output"] if isinstance(each, Mapping)]
    messages = [
        each
        for each in output
        if each.get("type") == "message" and each.get("phase") != "commentary"
    ]
    text, refusal = _parts(messages[-1].get("content") if messages else None)
    found = messages[-1].get("content") if messages else None
    parts = [p for p in found if isinstance(p, Mapping)] if isinstance(found, list) else []
    tokens = _tokens(t for p in parts for t in p.get("logprobs") or ())
    model = str(body.get("model") or "")
    if refusal:
        return Reply("refused", "", usage, refusal, model, request, limits)
    if body.get("status") not in ("completed", None):
        why = str(part(body, "incomplete_details").get("reason") or body.get("status"))
        return Reply(_stop(why), text, usage, why, model, request, limits)
    return Reply("end", text, usage, "", model, request, limits, tokens)


def read_completion(body: Mapping[str, Any], request: str = "", limits: float = 0.0) -> Reply:
    """Reads a chat completion.

    Raises:
        ModelError: it is none, or an error that came as one.
    """
    usage, choices = _usage(body), body.get("choices")
    first = (
        choices[0]
        if isinstance(choices, list) and choices and isinstance(choices[0], Mapping)
        else {}
    )
    text, refusal = _parts(
        first["message"].get("content") if part(first, "message") else first.get("text")
    )
    message, model = part(first, "message"), str(body.get("model") or "")
    if first.get("error"):
        raise error_within(first, usage, lost=bool(text) and usage == Usage())
    if not text and (body.get("error") or body.get("object") == "error"):
        raise error_within(body, usage)
    blocked = part(body, "promptFeedback") or part(body, "prompt_feedback")
    if why := blocked.get("blockReason") or blocked.get("block_reason"):
        return Reply("filtered", "", usage, str(why), model, request, limits)
    if not isinstance(choices, list) and isinstance(body.get("output"), list):
        raise ModelError(
            "account", "this server speaks Responses: use the provider openai", usage=usage
        )
    if not isinstance(choices, list):
        raise ModelError("form", f"the answer is no completion: {str(body)[:200]}", usage=usage)
    refusal = str(message.get("refusal") or refusal)
    why, native = (
        str(first.get("finish_reason") or ""),
        str(first.get("native_finish_reason") or ""),
    )
    stop = _stop(why)
    if stop == "end" and not text and plain_word(native) in FILTERED:
        stop, why = _stop(native), native
    if stop == "refused" or (refusal and stop != "filtered"):
        return Reply("refused", "", usage, refusal or why, model, request, limits)
    if plain_word(why) in _BROKEN:
        raise ModelError(
            "server", f"ended by {why}", lost=bool(text) and usage == Usage(), usage=usage
        )
    if stop == "other" and _is_object(text := text or _called_with(message)):
        stop = "end"  # an unknown finish reason, with a complete answer
    if stop != "end":
        return Reply(stop, text, usage, why, model, request, limits)
    thought = next(
        (name for name in ("reasoning_content", "reasoning", "thinking") if message.get(name)), ""
    )
    reason = f"the server put all its text into `{thought}`" if thought and not text.strip() else ""
    tokens = _tokens(_list(part(first, "logprobs").get("content")))
    return Reply("end", text, usage, reason, model, request, limits, tokens)


def _stop(why: str) -> Any:
    """Returns how an answer ended, from a finish reason in any server's words ("content_filter:
    RECITATION" in Gemini's)."""
    word = plain_word(why.split(":")[0])
    if word == "refusal":
        return "refused"
    return "filtered" if word in FILTERED else _STOPS.get(word, "other")


def _is_object(text: str) -> bool:
    try:
        found = json_within(text)[1]
        return isinstance(found, dict) and bool(found)
    except Unreadable:
        return False


def _called_with(message: Mapping[str, Any]) -> str:
    """Returns the arguments of a message's only tool call: some servers make the answer to a schema
    one."""
    tools = [each for each in _list(message.get("tool_calls")) if isinstance(each, Mapping)]
    calls = [part(each, "function") for each in tools] or [part(message, "function_call")]
    return str(calls[0].get("arguments") or "") if len(calls) == 1 else ""


def _parts(content: Any) -> tuple[str, str]:
    """Returns the text and the refusal in a message's content: text, a list of parts less thoughts,
    or data that the server has parsed."""
    if isinstance(content, Mapping) and "type" not in content and "text" not in content:
        return json.dumps(content), ""
    if not isinstance(content, (list, Mapping)):
        return str(content or ""), ""
    texts, refusals = [], []
    for each in content if isinstance(content, list) else [content]:
        if isinstance(each, str):
            texts.append(each)
        elif isinstance(each, Mapping) and each.get("type") == "refusal":
            refusals.append(str(each.get("refusal") or "refused"))
        elif isinstance(each, Mapping) and each.get("type", "text") in ("text", "output_text"):
            texts.append(str(each.get("text") or ""))
    return "".join(texts), " ".join(refusals)


def batch_failure(batch: str, state: Mapping[str, Any]) -> BatchFailed:
    """Returns the error of a batch that ended without an answer to any of its questions."""
    errors = [e for e in _list(part(state, "errors").get("data")) if isinstance(e, Mapping)]
    reasons = "; ".join(
        ": ".join(str(e[k]) for k in ("code", "message") if e.get(k)) for e in errors[:3]
    )
    what = (
        f"the batch {batch} as a whole is {state.get('status')}:"
        f" {reasons or 'no question was answered'}"
    )
    return BatchFailed(error_within(errors).kind if errors else "busy", what[:500])


def _usage(body: Mapping[str, Any]) -> Usage:
    """Returns the tokens used, in any server's way of counting; 0 where it gives no number, which
    `judges/asking/calls.py` takes for unknown.

    Their input tokens include those read from and written to the cache; ours do not. Some servers
    count reasoning in the total but not in the output (xAI, Gemini), or as a number of its own: the
    largest reading is booked, which is the output itself where reasoning is part of it. A total
    without one of its parts gives that part; alone, it counts as output, which costs more.
    """
    used = part(body, "usage")
    details = part(used, "prompt_tokens_details") or part(used, "input_tokens_details")
    thoughts = part(used, "completion_tokens_details") or part(used, "output_tokens_details")

    def first(*names: str) -> int:
        return next((n for n in (count(used.get(name)) for name in names) if n), 0)

    read, output, total = (
        first("prompt_tokens", "input_tokens"),
        first("completion_tokens", "output_tokens"),
        first("total_tokens"),
    )
    cached = count(details.get("cached_tokens")) or first(
        "prompt_cache_hit_tokens", "cached_tokens", "cache_read_input_tokens"
    )
    stored = count(details.get("cache_write_tokens")) or first("cache_creation_input_tokens")
    if not read and output and total > output:
        read = total - output
    # More than was read: counted separately.
    fresh = max(read - cached - stored, 0) if cached + stored <= read else read
    reasoning = count(thoughts.get("reasoning_tokens")) or first("reasoning_tokens")
    if reasoning > output:
        output += reasoning
    return Usage(fresh, cached, stored, max(output, total - max(read, fresh + cached + stored)))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tokens(found: Any) -> tuple[Token, ...]:
    """Returns the log-probabilities that are well formed: malformed ones must not cost an answer
    that is paid for."""
    tokens = []
    for each in found:
        if not isinstance(each, Mapping):
            return ()
        others = [a for a in _list(each.get("top_logprobs")) if isinstance(a, Mapping)]
        try:
            tokens.append(
                Token(
                    str(each.get("token") or ""),
                    {str(a.get("token") or ""): float(a["logprob"]) for a in others},
                )
            )
        except (KeyError, TypeError, ValueError):
            return ()
    return tuple(tokens)


def rate_limits(headers: Mapping[str, str]) -> float:
    """Returns the seconds until there is room again ("1m6.5s", or a number), where the headers tell
    of none now."""
    waits = [0.0]
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    for name in ("requests", "tokens"):
        reset = headers.get(f"x-ratelimit-reset-{name}", "").strip()
        number = r"\d+(?:\.\d+)?"
        if headers.get(f"x-ratelimit-remaining-{name}", "").strip() != "0":
            continue
        if re.fullmatch(rf"(?:{number}(?:ms|h|m|s))+", reset) or re.fullmatch(
            r"\d{1,6}(?:\.\d+)?", reset
        ):
            waits.append(
                sum(
                    float(n) * units[unit]
                    for n, unit in re.findall(rf"({number})(ms|h|m|s|)", reset)
                )
            )
    return max(waits)
