"""Log-probs in chunks have the values and gradients of logits that are made at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from turnwise.engine.policy import head
from turnwise.engine.tensors import log_softmax_at

TOKENS, HIDDEN, VOCABULARY = 37, 12, 50


def parts(kind: torch.dtype, bias: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    made = [draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN), draw(VOCABULARY) if bias else None]
    return [None if m is None else m.to(kind).requires_grad_() for m in made]


def at_once(hidden: Any, weight: Any, bias: Any, target: Any, temperature: float, missing: Any):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.index_fill(-1, missing, torch.finfo(logits.dtype).min)
    return log_softmax_at(logits / temperature, target)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_change_nothing(
    kind: torch.dtype, bias: bool, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "ELEMENTS", chunk * VOCABULARY)
    target = torch.randint(0, VOCABULARY - 2, (TOKENS,), generator=torch.Generator().manual_seed(1))
    missing = torch.tensor([VOCABULARY - 1, VOCABULARY - 2])
    share = torch.linspace(-1, 1, TOKENS)
    found = []
    for run in (at_once, head.HeadLogprobs.apply):
        own = parts(kind, bias)
        logprobs, entropy = run(*own, target, temperature, missing)
        (logprobs * share).sum().backward()
        found.append([logprobs, entropy, *(p.grad for p in own if p is not None)])
        assert not entropy.requires_grad
    close = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.03}[kind]
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm()) <= close * (1 + float(theirs.norm()))


def test_a_frozen_head_makes_no_gradient_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ELEMENTS", 5 * VOCABULARY)
    hidden, weight, _ = parts(torch.float32, False)
    target, none = torch.zeros(TOKENS, dtype=torch.long), torch.tensor([], dtype=torch.long)
    logprobs, _ = head.HeadLogprobs.apply(hidden, weight.detach(), None, target, 1.0, none)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_autocast_holds_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ELEMENTS", 5 * VOCABULARY)
    target, none = torch.arange(TOKENS), torch.tensor([], dtype=torch.long)
    found = []
    for run in (at_once, head.HeadLogprobs.apply):
        hidden, weight, _ = parts(torch.float32, False)
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _ = run(hidden, weight, None, target, 1.0, none)
        logprobs.sum().backward()
        found.append((logprobs, hidden.grad, weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == theirs.dtype == torch.float32
        assert float((ours - theirs).norm()) <= 0.02 * float(theirs.norm())
