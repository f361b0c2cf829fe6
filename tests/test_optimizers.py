"""Optimizers on a small model: gradients against the formula written out, and every pairing of
credit and optimizer that is not refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.echo import ECHO, play
from support.episodes import conversation
from torch import Tensor
from turnwise.engine.policy.batching import make_batch, written_batch
from turnwise.engine.stages.preference import Label, _rows, label_batch, pair_labels
from turnwise.engine.tensors import turn_sums
from turnwise.plugins.optimizers.dpo import DPO, dpo_loss, parting
from turnwise.plugins.optimizers.grpo import GRPO
from turnwise.plugins.optimizers.kto import KTO, kto_loss, mismatched, segments
from turnwise.plugins.optimizers.ppo import PPO
from turnwise.plugins.optimizers.rejection import Rejection, best_of_groups


def moved(policy: turnwise.Policy, seed: int = 1) -> None:
    """The policy some way from where its episodes were played, so that ratios are not 1."""
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(seed)
        )


def token_logprobs(policy: turnwise.Policy, batch: turnwise.Batch) -> Tensor:
    """[E, A] with gradient, by the model's own forward pass, one row at a time."""
    rows = []
    for e, row in enumerate(batch.rows):
        logits = policy.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        own = torch.stack([logits[p - 1, row.ids[p]] for p in row.positions])
        rows.append(torch.cat([own, own.new_zeros(batch.mask.shape[1] - len(own))]))
        assert row.episode == e
    return torch.stack(rows)


def gradient_of(
    policy: turnwise.Policy, optimizer: Any, batch: turnwise.Batch
) -> tuple[Tensor, dict[str, float]]:
    """What an update would step along, whole."""
    found: list[Tensor] = []
    optimizer._learner.step = lambda *a: (
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters()])) or 1.0
    )
    metrics = dict(optimizer.update(policy, batch))
    policy.network.zero_grad()
    return found[0], metrics


def flat_gradient(policy: turnwise.Policy, loss: Tensor) -> Tensor:
    policy.network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])  # type: ignore[union-attr]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float(theirs.norm()) > 1e-3
    assert float((ours - theirs).norm()) < 2e-4 * float(theirs.norm()), float(
        (ours - theirs).norm() / theirs.norm()
    )


def credited(episodes: list[turnwise.Episode]) -> turnwise.Batch:
    rewards = [turnwise.Rewards(e.env_return, tuple(t.reward for t in e.turns)) for e in episodes]
    batch = make_batch(episodes, rewards)
    advantage = (
        torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(3)) * batch.mask
    )
    batch.credit = turnwise.Credit(advantage, None, torch.zeros(batch.turn_mask.shape))
    batch.weight = torch.linspace(0.5, 1.5, len(episodes))
    return batch


@pytest.mark.parametrize(
    ("form", "mean", "divisor"),
    [
        ("ppo", "sequence", None),
        ("gspo", "token", None),
        ("cispo", "constant", 20.0),
        ("gspo", "constant", 9.0),
    ],
)
def test_loss_forms_have_the_gradient_of_the_whole_minibatch(
    form: Any, mean: Any, divisor: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    batch = credited(play(policy, 3, group=2, tokens=5))
    optimizer = GRPO(
        loss=form, loss_mean=mean, divisor=divisor, clip=0.1, clip_high=0.15, micro_tokens=1
    )
    optimizer.setup(policy)
    prox = policy.logprobs(batch)
    optimizer.prepare(policy, batch)
    batch.extras["prox"] = prox  # the update began before the policy moved
    moved(policy)
    ours, metrics = gradient_of(policy, optimizer, batch)

    own, mask = token_logprobs(policy, batch), batch.mask
    assert batch.credit is not None
    advantage, apart = batch.credit.advantages, own - prox
    ratio = apart.exp()
    if form == "gspo":  # the sequence's ratio, its gradient shared out over the tokens
        whole = ((apart * mask).sum(1) / mask.sum(1)).detach().exp().unsqueeze(1)
        ratio = whole * (own - own.detach()).exp()
    if form == "cispo":
        each = -ratio.detach().clamp(max=1.15) * advantage * own
    else:
        each = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.15) * advantage)
    weight = batch.weight.unsqueeze(1) * mask
    if mean == "sequence":
        weight = weight / mask.sum(1, keepdim=True)
    total = batch.weight.sum() * divisor if mean == "constant" else weight.sum()
    close(ours, flat_gradient(policy, (each * weight).sum() / total))
    assert 0 < metrics["clip_fraction"] < 1
    assert metrics["approx_kl"] > 0
    assert "weight/stale-0" in metrics


@pytest.mark.parametrize("form", ["ppo", "gspo", "cispo"])
def test_one_step_on_its_own_episodes_needs_no_pass_before_it(
    form: Any, model_folder: Callable[..., Path]
) -> None:
    """The log-probs of the forward passes it trains with are those the update began with."""
    found = []
    for given in (False, True):
        policy = turnwise.Policy.from_pretrained(model_folder())
        batch = credited(play(policy, 3, group=2, tokens=5))
        batch.signal[0] = False  # an episode that is not run
        optimizer = GRPO(loss=form, micro_tokens=60)
        optimizer.setup(policy)
        optimizer.prepare(policy, batch)
        assert "prox" not in batch.extras
        if given:
            batch.extras["prox"] = policy.logprobs(batch)
        found.append(gradient_of(policy, optimizer, batch))
    (one, ours), (other, theirs) = found
    close(one, other)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours["approx_kl"] == 0
    stale = credited(play(policy, 3, group=2, tokens=5))
    stale.staleness[1] = 1
    optimizer.prepare(policy, stale)
    assert "prox" in stale.extras


def test_loss_options_that_contradict_each_other_are_refused() -> None:
    for options, why in (
        ({"loss": "ppp"}, "grpo.loss: Input should be 'ppo', 'gspo' or 'cispo' (got 'ppp'"),
        ({"divisor": 5.0}, "grpo: divisor is the number of tokens that loss_mean='constant'"),
        ({"loss_mean": "constant"}, "grpo: divisor is the number of tokens"),
        ({"clip": 0.0}, "grpo.clip: Input should be greater than 0"),
        ({"normalise": "std"}, "grpo.normalise: Input should be 'none' or 'whiten'"),
        ({"kl": 0.1, "kl_place": "measure"}, "grpo: kl_place 'measure' holds nothing back"),
        ({"kl": 0.1, "kl_estimator": "k1"}, "k1 in the loss has a gradient whose mean is zero"),
        ({"kl_target": 0.1}, "kl_target needs kl to be positive"),
        ({"lr": float("nan")}, "grpo.lr: Input should be a finite number"),
        ({"max_grad_norm": float("inf")}, "grpo.max_grad_norm: Input should be a finite number"),
        ({"clop": 0.1}, "grpo has no key 'clop'. Did you mean 'clip'"),
    ):
        with pytest.raises(turnwise.ConfigError, match=re.escape(why)):
            GRPO(**options)


@pytest.mark.parametrize("kind", ["shared", "detached", "separate"])
def test_the_critic_trains_the_trunk_that_is_its_own(
    kind: Any, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 3, group=2, tokens=5, cut=True)
    rewards = [turnwise.Rewards(e.env_return, tuple(t.reward for t in e.turns)) for e in episodes]
    batch = make_batch(episodes, rewards)
    optimizer = PPO(lr=1e-2, critic=kind, warmup=0, epochs=1, minibatches=1)
    optimizer.setup(policy)
    optimizer.prepare(policy, batch)
    nothing = torch.zeros(batch.mask.shape)
    batch.credit = turnwise.Credit(
        nothing, torch.ones(batch.mask.shape), torch.zeros(batch.turn_mask.shape)
    )
    for parameter in optimizer._values.parameters():
        parameter.data += 0.1  # a new critic's last layer is zero, and so is the gradient behind it
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    optimizer.update(policy, batch)
    after = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.equal(before, after) == (kind != "shared"), "only a shared critic moves the policy"
    own = optimizer.state_dict()
    assert any(name.startswith("trunk.") for name in own) == (kind == "separate")
    again = PPO(lr=1e-2, critic=kind)
    again.setup(turnwise.Policy.from_pretrained(model_folder()))
    again.load_state_dict({k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()})
    if optimizer._trunk is not None:
        start = torch.cat([p.flatten() for p in policy.network.parameters()])
        trunk = torch.cat([p.flatten() for p in optimizer._trunk.parameters()])
        assert not torch.equal(start, trunk)
        assert again._trunk is not None
        assert torch.equal(trunk, torch.cat([p.flatten() for p in again._trunk.parameters()]))


def test_no_step_is_taken_beyond_the_target_kl(model_folder: Callable[..., Path]) -> None:
    steps = {}
    for target in (None, 1e-6):
        policy = turnwise.Policy.from_pretrained(model_folder())
        batch = credited(play(policy, 3, group=2, tokens=5))
        optimizer = PPO(lr=1e-2, warmup=0, epochs=3, minibatches=1, target_kl=target)
        optimizer.setup(policy)
        optimizer.prepare(policy, batch)
        steps[target] = optimizer.update(policy, batch)["steps"]
    assert steps == {
        None: 3,
        1e-6: 1,
    }, "the first step starts from no distance; before the second it is far beyond"


def same_question(policy: turnwise.Policy) -> tuple[list[turnwise.Episode], turnwise.Batch]:
    """Pairs that differ from their second turn on, as written conversations."""

    def written(slot: int, seed: int, *replies: str) -> turnwise.Episode:
        heard = ["hello", "what is it", "tell me more"][: len(replies)]
        return conversation(*replies, heard=heard, id=f"{seed}-{slot}", seed=seed, slot=slot)

    episodes = [
        written(0, 1, "yes", "the cat", "no no no"), written(1, 1, "yes", "a mat on"),
        written(0, 2, "fine", "thanks"), written(1, 2, "maybe", "thanks"),
        written(0, 3, "yes", "yes"), written(1, 3, "yes", "yes"),
    ]  # fmt: skip
    rows = [_rows(policy, e) or [] for e in episodes]
    return episodes, written_batch(
        episodes, rows, [(0, 1, 1.0, 0.0, 1.0), (3, 2, 0.8, 0.0, 2.0), (4, 5, 1.0, 0.0, 1.0)]
    )


@pytest.mark.parametrize(
    ("form", "normalise"), [("sigmoid", False), ("ipo", True), ("hinge", False)]
)
def test_dpo_on_turns_has_the_gradient_of_the_first_turn_that_differs(
    form: Any, normalise: bool, model_folder: Callable[..., Path]
) -> None:
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes, batch = same_question(policy)
    assert [parting(episodes[a], episodes[b]) for a, b in ((0, 1), (3, 2), (4, 5))] == [1, 0, None]
    optimizer = DPO(beta=0.5, loss=form, unit="turn", length_normalise=normalise, micro_tokens=1)
    optimizer.setup(policy)
    optimizer.prepare(policy, batch)
    moved(policy)
    ours, metrics = gradient_of(policy, optimizer, batch)
    assert metrics["pairs_without_turn"] == 1

    assert batch.reference_logprobs is not None
    ratio, count = turn_sums(
        token_logprobs(policy, batch) - batch.reference_logprobs, batch.turn, batch.mask, 3
    )
    if normalise:
        ratio = ratio / count.clamp(min=1)
    better, worse = torch.stack([ratio[0, 1], ratio[3, 0]]), torch.stack([ratio[1, 1], ratio[2, 0]])
    each = dpo_loss(better, worse, torch.tensor([1.0, 0.8]), 0.5, 0.0, form)
    close(ours, flat_gradient(policy, (each * torch.tensor([1.0, 2.0])).sum() / 3))


def test_kto_has_the_gradient_of_the_paper(model_folder: Callable[..., Path]) -> None:
    """Against the loss written out; z0 from every conversation behind the opening of the next."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 4, tokens=5)
    found = [
        Label(e.id, liked) for e, liked in zip(episodes, (True, False, False, True), strict=True)
    ]
    known = {e.id: e for e in episodes}
    batch = label_batch(found, known, {id_: _rows(policy, e) for id_, e in known.items()})
    optimizer = KTO(beta=0.4, up=1.2, micro_tokens=1)
    optimizer.setup(policy)
    optimizer.prepare(policy, batch)
    moved(policy, 5)
    aside = dataclasses.replace(batch, rows=tuple(mismatched(batch.rows)))
    for row, own, other in zip(
        aside.rows, batch.rows, [*batch.rows[1:], batch.rows[0]], strict=True
    ):
        mine, theirs = segments(own), segments(other)
        assert [said for _, said in segments(row)] == [said for _, said in mine], "its own replies"
        assert [read for read, _ in segments(row)] == [read for read, _ in theirs], (
            "to what the next one was told"
        )
    told_alike = [batch.rows[0], dataclasses.replace(batch.rows[0], episode=1)]
    assert mismatched(told_alike) == []
    with torch.no_grad():
        strange = (token_logprobs(policy, aside) * batch.mask).sum(1)
        with policy.reference() as network:
            reference = torch.stack([
                sum(network.lm(input_ids=torch.tensor([r.ids])).logits[0].log_softmax(-1)[p - 1,
                        r.ids[p]] for p in r.positions)
                for r in aside.rows
            ])  # fmt: skip
        z0 = (strange - reference).mean().clamp(min=0)
    ours, metrics = gradient_of(policy, optimizer, batch)
    assert metrics["kl"] == pytest.approx(float(z0), abs=1e-4)
    ratio = ((token_logprobs(policy, batch) - batch.reference_logprobs) * batch.mask).sum(1)
    each = kto_loss(ratio, torch.tensor([True, False, False, True]), z0, 0.4, 1.2)
    close(ours, flat_gradient(policy, each.mean()))


def test_rejection_imitates_the_best_of_each_group(model_folder: Callable[..., Path]) -> None:
    outcome, group = (
        torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 1.0, 4.0, 4.0]),
        torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
    )
    assert best_of_groups(outcome, group, 1) == [
        1,
        3,
        4,
    ], "ties for the first place, and a silent group has no best"
    assert best_of_groups(outcome, group, 2) == [1, 2, 3, 4]
    assert best_of_groups(outcome, group, 9) == [0, 1, 2, 3, 4, 5]
    policy = turnwise.Policy.from_pretrained(model_folder())
    batch = credited(play(policy, 2, group=3, tokens=5))
    batch.outcome = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0, 2.0])
    optimizer = Rejection(micro_tokens=1)
    optimizer.setup(policy)
    ours, metrics = gradient_of(policy, optimizer, batch)
    assert (metrics["chosen"], metrics["chosen_outcome"]) == (0.5, pytest.approx(5 / 3))
    weight = (batch.mask * batch.weight.unsqueeze(1))[[1, 3, 5]]
    close(
        ours,
        flat_gradient(
            policy, -(token_logprobs(policy, batch)[[1, 3, 5]] * weight).sum() / weight.sum()
        ),
    )


def test_kto_learns_from_labels_and_from_pairs(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Liked: replies full of "yes"; from a file of labels, and from the same as pairs."""
    prompts = [
        [{"role": "user", "content": f"hello {w}"}]
        for w in ("there", "you", "cat", "mat", "1", "2", "3", "please")
    ]
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    labels = [
        {"prompt": p, "completion": said(t), "label": t == "yes yes"}
        for p in prompts
        for t in ("yes yes", "no no")
    ]
    pairs = [{"prompt": p, "chosen": said("yes yes"), "rejected": said("no no")} for p in prompts]
    ends = {}
    for name, lines in (("labels", labels), ("pairs", pairs)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        stage = {
            "data": file,
            "optimizer": {"name": "kto", "lr": 2e-3, "warmup": 0},
            "epochs": 4,
            "batch_size": 8,
        }
        config = {"policy": str(model_folder()), "threads": 1, "stages": [{"preference": stage}]}
        done = turnwise.Run(config, folder=tmp_path / name).finish()
        assert done.metrics[-1]["labelled"] == 16
        ends[name] = done.metrics[-1]
        assert ends[name]["reward/liked"] > 0.1 > -0.1 > ends[name]["reward/disliked"], ends[name]
    from turnwise.engine.stages.preference import Chosen

    chosen, again = Chosen(), Chosen()
    file.write_text("\n".join(map(json.dumps, labels)))
    decided = chosen.labels(done, file)
    again.load_state_dict(chosen.state_dict())
    file.write_text(json.dumps(labels[0]))
    assert again.labels(done, file) == decided, (
        "a file that changes later does not change a run that goes on"
    )
    file.write_text(json.dumps({**labels[0], "label": "good"}))
    with pytest.raises(Exception, match="must be true .liked. or false"):
        turnwise.Run(config, folder=tmp_path / "bad").finish()


def test_a_conversation_that_won_and_lost_is_labelled_both_ways() -> None:
    from turnwise.engine.analysis.preferences import Pair

    found = pair_labels(
        [Pair("a", "b", 0.9, 0.0, 1), Pair("b", "c", 0.2, 0.0, 1), Pair("a", "c", 0.1, 0.0, 1)]
    )
    assert set(found) == {Label("a", True), Label("b", False), Label("c", True), Label("a", False)}


def letters(episode: turnwise.Episode) -> turnwise.Feedback:
    """The share of "e" in the replies, and in each reply, as outcome and as turn scores."""
    share = lambda text: text.count("e") / (1 + len(text))  # noqa: E731
    scores = tuple(share(t.action) for t in episode.turns)
    return turnwise.Feedback(episode.id, score=sum(scores) / len(scores), turn_scores=scores)


CREDIT = [
    "outcome",
    "turn-returns",
    "gae",
    "gigpo",
    "branch",
    "counterfactual",
    "redistribute",
    "judged",
]
EVERY = [(o, c) for o in ("ppo", "grpo") for c in CREDIT if (o, c) != ("grpo", "gae")] + [
    ("rejection", None)
]
FEW = [("ppo", "branch"), ("grpo", "turn-returns"), ("grpo", "judged"), ("rejection", None)]


def learns(optimizer: str, credit: str | None, model: Path, folder: Path) -> None:
    options: dict[str, Any] = {"name": credit} if credit else {}
    if credit in ("branch", "counterfactual"):
        options["rollouts"] = 2
    if credit == "redistribute":
        options["features"] = 128
    stage = {
        "env": {"id": ECHO, "kwargs": {"turns": 2}}, "updates": 15, "groups": 8, "group_size": 4,
        "max_new_tokens": 6, "poll": 0.0,
        "feedback": [letters], "optimizer": {"name": optimizer, "lr": 1e-2, "warmup": 2},
        "credit": options or None,
    }  # fmt: skip
    done = turnwise.Run(
        {"policy": str(model), "threads": 1, "stages": [{"rl": stage}]}, folder=folder
    ).finish()
    outcomes = [m["outcome"] for m in done.metrics]
    assert sum(outcomes[-3:]) > 1.5 * sum(outcomes[:3]), outcomes
    shown = {f"credit/turn-{k}/{what}" for k in (1, 2) for what in ("mean", "std")} & set(
        done.metrics[0]
    )
    assert len(shown) == (4 if credit else 0), "what copies whole conversations gives no credit"


@pytest.mark.parametrize(("optimizer", "credit"), FEW)
def test_pairings_learn(
    optimizer: str, credit: str | None, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    learns(optimizer, credit, model_folder(), tmp_path / "r")


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "credit"), [pair for pair in EVERY if pair not in FEW])
def test_every_pairing_that_is_not_refused_learns(
    optimizer: str, credit: str | None, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    learns(optimizer, credit, model_folder(), tmp_path / "r")
