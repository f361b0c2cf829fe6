"""Promises 1 and 2 with adapters on quantized weights, and AdamW's moments in 8 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.echo import ECHO, play
from test_promise_1_tokens import batch_of, disturb_lora, plain_logprobs
from turnwise.learning import Learner, LearnerOptions

KINDS = ["nf4", "int8"]
# int8 rounds activations, so the rounding of a sum moves some of them by a step
CLOSE = {"nf4": 1e-4, "int8": 5e-2}


def load(folder: Path, kind: str, **options: Any) -> turnwise.Policy:
    torch.manual_seed(0)
    policy = turnwise.Policy.from_pretrained(folder, quantize=kind, lora={"r": 4}, **options)
    disturb_lora(policy)
    return policy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral-window"])
def test_what_was_sampled_is_what_is_trained(
    kind: str, architecture: str, model_folder: Callable[..., Path]
) -> None:
    """Promise 1: the sampler, with its cache, batches and shared beginnings; the update, padded;
    and a plain pass over each conversation alone."""
    policy = load(model_folder(architecture), kind)
    linear = policy.model.model.layers[0].mlp.down_proj.base_layer
    assert "bit" in type(linear).__name__
    episodes = play(policy, 3, group=2, tokens=6)
    batch = batch_of(episodes)
    found = policy.logprobs(batch)
    for e, episode in enumerate(episodes):
        sampled = [p for t in episode.turns for p in t.logprobs]
        assert found[e, batch.mask[e]].tolist() == pytest.approx(sampled, abs=CLOSE[kind])
        assert plain_logprobs(policy, episode) == pytest.approx(sampled, abs=CLOSE[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_no_division_changes_a_gradient(kind: str, model_folder: Callable[..., Path]) -> None:
    """Promise 2: one row at a time, all at once, and in another order."""
    gradients = []
    for tokens, share, backwards in ((1, False, False), (8192, True, False), (200, False, True)):
        policy = load(model_folder(), kind)
        assert policy.network.can_share
        policy.network.can_share = share
        episodes = play(policy, 2, group=2, tokens=6)
        rows = batch_of(episodes).rows
        learner = Learner(policy, LearnerOptions(micro_tokens=tokens))
        for micro in learner.micro_batches(rows[:: -1 if backwards else 1], range(len(episodes))):
            learner.backward(policy.score(micro).logprobs.sum(), micro)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    norm = float(gradients[0].norm())
    assert norm > 1e-3
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm()) < {"nf4": 1e-4, "int8": 2e-2}[kind] * norm


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_and_goes_on(
    kind: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights stand still, adapters move; a run that was stopped ends with the same ones."""
    config = {
        "policy": {"model": str(model_folder()), "quantize": kind, "lora": {"r": 4}}, "threads": 1,
        "stages": [{"rl": {"env": ECHO, "updates": 3, "groups": 2, "group_size": 3,
            "max_new_tokens": 5, "credit": "outcome",
            "optimizer": {"name": "grpo", "lr": 1e-2, "kl": 0.1, "warmup": 0}}}],
    }  # fmt: skip
    whole = turnwise.Run(config, folder=tmp_path / "whole").finish()
    for update in (begun := turnwise.Run(config, folder=tmp_path / "parts")):
        if update.number == 2:
            begun.stopping = True
    again = turnwise.Run(config, folder=tmp_path / "parts", resume=True).finish()
    names = dict(whole.policy.network.named_parameters())
    assert all(float(p.abs().sum()) for n, p in names.items() if "lora_B" in n), "they began at 0"
    fresh = dict(turnwise.Policy.from_pretrained(model_folder(), quantize=kind, lora={"r": 4})
        .network.named_parameters())  # fmt: skip
    still = [n for n in names if "lora" not in n]
    assert still
    assert all(torch.equal(names[n], fresh[n]) for n in still)
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(turnwise.PolicyError, match="load them on the plain model"):
        whole.policy.save_pretrained(tmp_path / "merged", merge=True)
    plain = turnwise.Policy.from_pretrained(whole.folder / "policy")
    plain.save_pretrained(tmp_path / "merged", merge=True)
    assert turnwise.Policy.from_pretrained(tmp_path / "merged").context_length == 256


def test_what_cannot_be_is_refused(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = turnwise.Policy.from_pretrained
    with pytest.raises(turnwise.PolicyError, match="only adapters on them can be trained"):
        load(model_folder(), quantize="nf4")
    with pytest.raises(turnwise.PolicyError, match="quantize must be one of nf4, int8, got 'int4'"):
        load(model_folder(), quantize="int4", lora={"r": 4})
    with pytest.raises(turnwise.PolicyError, match="leave `quantize` out"):
        load(model_folder(), quantize="nf4", gguf="config.json", lora={"r": 4})
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a)
    )
    with pytest.raises(turnwise.PolicyError, match=r"bitsandbytes: pip install 'bitsandbytes"):
        load(model_folder(), quantize="nf4", lora={"r": 4})


def updated(folder: Path, moments: str, steps: int, saved_after: int = 0) -> tuple[Any, Learner]:
    """Makes some steps; after some of them the learner is replaced by one that takes up its
    state."""
    policy = turnwise.Policy.from_pretrained(folder)
    options = LearnerOptions(lr=1e-2, warmup=0, weight_decay=0.1, moments=moments)
    learner = Learner(policy, options)
    batch = batch_of(play(policy, 2, group=2, tokens=6))
    for step in range(steps):
        for micro in learner.micro_batches(batch.rows, range(4)):
            learner.backward(-policy.score(micro).logprobs.mean(), micro)
        learner.step(0.0, ["all"])
        if step + 1 == saved_after:
            state, learner = learner.state_dict(), Learner(policy, options)
            learner.load_state_dict(state)
    return policy, learner


def flat(policy: turnwise.Policy) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for w in policy.parameters()])


def test_moments_in_8_bits(model_folder: Callable[..., Path]) -> None:
    """Nearly the same steps from a quarter of the memory; taken up exactly."""
    start = turnwise.Policy.from_pretrained(model_folder())
    whole, _ = updated(model_folder(), "float32", 4)
    small, learner = updated(model_folder(), "8bit", 4)
    again, _ = updated(model_folder(), "8bit", 4, saved_after=2)
    moved, other = flat(whole) - flat(start), flat(small) - flat(start)
    assert float(torch.cosine_similarity(moved, other, dim=0)) > 0.99
    assert torch.equal(flat(small), flat(again))
    large = [s for p, s in learner.adam.state.items() if p.numel() >= 4096]
    assert large
    for state in large:
        assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}


def test_a_run_with_moments_in_8_bits_goes_on_exactly(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = {
        "policy": str(model_folder()), "threads": 1, "checkpoint_every": 1,
        "stages": [{"sft": {"env": "turnwise/SupportDesk-v0", "player": "demonstrator",
            "episodes": 16, "epochs": 2, "batch_size": 4, "steps_per_update": 2, "lr": 1e-2,
            "moments": "8bit"}}],
    }  # fmt: skip
    whole = turnwise.Run(config, folder=tmp_path / "whole").finish()
    for update in (begun := turnwise.Run(config, folder=tmp_path / "parts")):
        begun.stopping = update.number == 2
    again = turnwise.Run(config, folder=tmp_path / "parts", resume=True).finish()
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)
