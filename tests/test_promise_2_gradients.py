"""Promise 2: padding, packing, batch order, micro-batch size and the number of processes never
change a gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.echo import play
from support.gradients import change
from test_promise_1_tokens import ARCHITECTURES, batch_of, disturb_lora
from turnwise.engine.policy.activations import fitted, kept_bytes
from turnwise.engine.policy.network import divide
from turnwise.engine.records.batch import Row
from turnwise.learning import Learner, LearnerOptions, trunk

OUTCOMES = [0.3, -1.0, 2.0, 0.1, 0.9, -0.4, 1.5, 0.0]


@pytest.fixture
def episodes(policy: turnwise.Policy) -> list[turnwise.Episode]:
    found = play(policy, 2, group=2, tokens=5) + play(
        policy, 1, group=2, cut=True, turns=2, update=2
    )
    found += play(policy, 1, group=2, cut=True, turns=1, update=3)
    assert len({sum(len(t.action_ids) for t in e.turns) for e in found}) >= 3
    return found


def fresh(model_folder: Callable[..., Path]) -> turnwise.Policy:
    return turnwise.Policy.from_pretrained(model_folder())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    norm = torch.cat([v.flatten() for v in a.values()]).norm()
    assert norm > 1e-3, "there should be a gradient to compare"
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-6 * float(norm), rtol=1e-4), (
            f"{name}: {(a[name] - b[name]).abs().max()}"
        )


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_micro_batches_padding_and_order(
    algorithm: str, model_folder: Callable[..., Path], episodes: list[turnwise.Episode]
) -> None:
    whole = change(fresh(model_folder), algorithm, episodes, OUTCOMES)
    one_by_one = change(fresh(model_folder), algorithm, episodes, OUTCOMES, micro_tokens=1)
    few = change(
        fresh(model_folder), algorithm, episodes, OUTCOMES, micro_tokens=150, shuffle_rows=True
    )
    order = [5, 2, 7, 0, 1, 4, 6, 3]
    permuted = change(
        fresh(model_folder), algorithm, [episodes[i] for i in order], [OUTCOMES[i] for i in order]
    )
    for other in (one_by_one, few, permuted):
        assert_same(whole, other)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_are_computed_again(
    architecture: str, lora: dict[str, Any] | None, model_folder: Callable[..., Path]
) -> None:
    """The same gradient to the last bit, from less that is kept."""
    gradients, kept = [], []
    for room in (None, 1e-6):
        torch.manual_seed(0)
        policy = turnwise.Policy.from_pretrained(
            model_folder(architecture),
            lora=lora and {**lora, "fan_in_fan_out": architecture == "gpt2"},
        )
        disturb_lora(policy)
        learner = Learner(policy, LearnerOptions(activation_memory=room, micro_tokens=1))
        rows = batch_of(play(policy, 2, tokens=6)).rows
        for micro in learner.micro_batches(rows, range(2)):
            size = [0]

            def keep(tensor: torch.Tensor, size: list[int] = size) -> torch.Tensor:
                size[0] += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = policy.score(micro).logprobs.sum()
            learner.backward(loss, micro)
            kept.append(size[0])
        found = [p.grad for p in policy.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in found]))
    assert torch.equal(*gradients)
    assert max(kept[len(kept) // 2 :]) < min(kept[: len(kept) // 2])


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_beginnings_are_computed_once(
    architecture: str, lora: dict[str, Any] | None, model_folder: Callable[..., Path]
) -> None:
    """The same log-probs, entropies, states and gradient as row by row, from fewer tokens."""
    outputs, gradients, computed = [], [], []
    for share in (False, True):
        torch.manual_seed(0)
        policy = turnwise.Policy.from_pretrained(
            model_folder(architecture),
            lora=lora and {**lora, "fan_in_fan_out": architecture == "gpt2"},
        )
        disturb_lora(policy)
        assert policy.network.can_share == policy.network.head_is_plain
        policy.network.can_share &= share
        episodes = play(policy, 2, group=3, tokens=6)
        batch = batch_of(episodes)
        learner = Learner(policy, LearnerOptions())
        found, tokens = torch.zeros(3, *batch.mask.shape), 0
        for micro in learner.micro_batches(batch.rows, range(len(episodes))):
            out = policy.score(micro)
            found[:, micro.episode, micro.action] = torch.stack(
                [out.logprobs, out.entropy, out.hidden.sum(1)]
            )
            ends = out.end_hidden.sum() * 0.01
            learner.backward(
                (out.logprobs * batch.behaviour_logprobs.abs().sum()).sum() + ends, micro
            )
            rows, length = micro.ids.shape
            tokens += micro.shared + rows * (length - micro.shared)
        outputs.append(found.detach())
        gradients.append(
            torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        )
        computed.append(tokens)
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5
    assert computed[1] < computed[0] if policy.network.head_is_plain else computed[1] == computed[0]


def test_rows_stand_together_by_what_they_share_where_that_is_less() -> None:
    """Two groups with long instructions of their own, uneven ends; and rows that share nothing."""

    def row(beginning: int, length: int) -> Row:
        return Row((*([beginning] * 40), *range(length)), 0, (41, 40 + length - 1), (0, 1))

    rows = [row(group, length) for length in (9, 5, 3) for group in (1, 2)]
    found = divide(rows, 100, torch.device("cpu"), shares=True)
    assert [(m.shared, tuple(m.ids.shape)) for m in found] == [(40, (3, 49)), (40, (3, 49))]
    assert all(len({r.ids[0] for r in m.rows}) == 1 for m in found)
    apart = divide(rows, 100, torch.device("cpu"))
    assert [(m.shared, tuple(m.ids.shape)) for m in apart] == [
        (0, (2, 49)),
        (0, (2, 45)),
        (0, (2, 43)),
    ]


@pytest.mark.parametrize("alike", [0, 8, 15, 16, 40])
@pytest.mark.parametrize("positions", [True, False])
def test_sharing_never_costs_more(alike: int, positions: bool) -> None:
    """Rows of uneven length that begin alike in so many tokens, with action tokens or none; a pass
    counts as 64 tokens."""
    rows = [
        Row((*([7] * alike), *range(1000 * i, 1000 * i + 20 + 3 * i)), 0,
            (alike + 10,) if positions else (), (0,) if positions else ())
        for i in range(1, 33)
    ]  # fmt: skip
    plain, shared = (divide(rows, 2048, torch.device("cpu"), shares=s) for s in (False, True))
    cost = [
        sum(m.shared + len(m.rows) * (m.ids.shape[1] - m.shared) + 64 for m in ms)
        for ms in (plain, shared)
    ]
    assert (cost[1] < cost[0]) == (alike >= 16)
    assert alike >= 16 or [m.rows for m in shared] == [m.rows for m in plain]
    assert sorted(r.ids for m in shared for r in m.rows) == sorted(r.ids for r in rows)
    for micro in shared:
        begin = {r.ids[: micro.shared] for r in micro.rows}
        assert len(begin) == 1
        assert all(micro.shared < p for r in micro.rows for p in r.positions)


def test_many_rows_of_one_long_prompt_are_not_held_at_once() -> None:
    """Each has keys and values of the prompt: an eighth of what its tokens take."""
    rows = [Row((*([7] * 1500), *range(i, i + 10)), 0, (1501,), (0,)) for i in range(64)]
    for micro in divide(rows, 2048, torch.device("cpu"), shares=True):
        assert micro.shared == 1500
        assert len(micro.rows) <= 4


def test_a_critic_of_its_own_after_layers_were_recomputed(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The trunk is a copy of a policy that an earlier stage trained within little memory."""
    demonstrations = {"env": "turnwise/SupportDesk-v0", "player": "demonstrator"}
    play = {"env": "turnwise/SupportDesk-v0", "updates": 2, "groups": 2, "group_size": 2}
    ppo = {"name": "ppo", "critic": "separate"}
    done = turnwise.Run(
        {"policy": str(model_folder()), "threads": 1, "stages": [
            {"sft": {**demonstrations, "episodes": 4, "activation_memory": 1e-6}},
            {"rl": {**play, "max_new_tokens": 4, "optimizer": ppo, "credit": "gae"}},
        ]},
        folder=tmp_path / "run",
    ).finish()  # fmt: skip
    assert [m["stage"] for m in done.metrics][-2:] == ["rl", "rl"]


def test_a_pass_is_fitted_into_memory() -> None:
    """100 bytes a token as it is, 10 where layers are computed again."""
    assert fitted((100.0, 10.0), 1e9, 2048, 300) == (2048, False)
    assert fitted((100.0, 10.0), 60_000, 2048, 300) == (600, False)
    assert fitted((100.0, 10.0), 30_000, 2048, 300) == (300, False), "one conversation at a time"
    assert fitted((100.0, 10.0), 29_999, 2048, 300) == (2048, True)
    assert fitted((100.0, 10.0), 5_000, 2048, 300) == (500, True)
    assert fitted((100.0, 10.0), 500, 2048, 300) == (300, True), "no conversation is divided"


def test_what_a_pass_keeps_is_measured(policy: turnwise.Policy) -> None:
    """Against a count at another length."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = trunk(policy.model)(
            input_ids=torch.zeros(1, 300, dtype=torch.long), use_cache=False
        ).last_hidden_state
    counted = sum(size for place, size in kept.items() if place not in own) / 300
    plain, again = kept_bytes(policy.model)
    assert plain == pytest.approx(counted, rel=0.05)
    assert again < plain / 1.5
    assert states.requires_grad


def test_chunking_the_head_changes_nothing(
    model_folder: Callable[..., Path],
    episodes: list[turnwise.Episode],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = change(fresh(model_folder), "grpo", episodes, OUTCOMES)
    # Five tokens at a time.
    monkeypatch.setattr("turnwise.engine.policy.head.ELEMENTS", 5 * 320)
    assert_same(whole, change(fresh(model_folder), "grpo", episodes, OUTCOMES))


def test_full_logits_never_exist(policy: turnwise.Policy, episodes: list[turnwise.Episode]) -> None:
    """No tensor of the update has a vocabulary axis over all positions, prompts and padding
    included."""
    shapes: list[torch.Size] = []
    hook = policy.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: shapes.append(out.shape)
    )
    change(policy, "grpo", episodes, OUTCOMES)
    hook.remove()
    actions = sum(len(t.action_ids) for e in episodes for t in e.turns)
    tokens = sum(len(t.prompt_ids) + len(t.action_ids) for e in episodes for t in e.turns)
    scored = [s for s in shapes if len(s) == 2]
    assert scored
    assert all(s[0] <= actions < tokens for s in scored)
