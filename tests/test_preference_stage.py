"""`preference` with `dpo`: from rankings and from files, with the gradient of the whole
minibatch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import turnwise
from support.echo import play
from turnwise.engine.analysis.preferences import Pair, pairs
from turnwise.engine.stages.preference import _rows, preference_batch
from turnwise.plugins.optimizers.dpo import DPO, dpo_loss


def batch_of(policy: turnwise.Policy, episodes: list[turnwise.Episode], found: list[Pair]) -> Any:
    known = {e.id: e for e in episodes}
    return preference_batch(found, known, {id_: _rows(policy, e) for id_, e in known.items()})


def test_the_gradient_is_that_of_the_whole_minibatch(model_folder: Callable[..., Path]) -> None:
    """Micro-batches of one conversation against the loss written out over full log-probs and
    differentiated by autograd."""
    policy = turnwise.Policy.from_pretrained(model_folder())
    episodes = play(policy, 3, group=2, tokens=5)
    found = [
        Pair(a.id, b.id, p, 0.0, 1)
        for (a, b), p in zip(
            zip(episodes[::2], episodes[1::2], strict=True), (1.0, 0.7, 0.2), strict=True
        )
    ]
    batch = batch_of(policy, episodes, found)
    optimizer = DPO(lr=1e-3, beta=0.5, label_smoothing=0.1, micro_tokens=1)
    optimizer.setup(policy)
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    optimizer.prepare(policy, batch)
    grads: list[torch.Tensor] = []
    optimizer._learner.step = lambda *a: (
        grads.extend(p.grad.clone() for p in policy.parameters()) or 1.0
    )  # type: ignore[method-assign]
    metrics = optimizer.update(policy, batch)
    policy.network.zero_grad()

    ratio = []
    for e, row in enumerate(batch.rows):
        ids = torch.tensor([row.ids])
        logits = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        own = sum(logits[p - 1, row.ids[p]] for p in row.positions)
        ratio.append(own - batch.reference_logprobs[e].sum())
    r = torch.stack(ratio)
    p = batch.pairs
    loss = dpo_loss(r[p.better], r[p.worse], p.probability, 0.5, 0.1).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-4)
    for ours, parameter in zip(grads, policy.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, atol=1e-4), (ours - parameter.grad).abs().max()
    assert p.probability.tolist() == pytest.approx([1.0, 0.7, 0.8]), "the better one stands first"


def test_it_learns_from_rankings_and_from_a_file_alike(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    class Letters(turnwise.GroupJudge):
        def rank(self, group: Any) -> turnwise.Comparison:
            ordered = sorted(group, key=lambda e: -sum(t.action.count("e") for t in e.turns))
            return turnwise.Comparison(group[0].group, tuple((e.id,) for e in ordered))

    rank = {
        "env": "test/Echo-v0",
        "updates": 2,
        "groups": 12,
        "group_size": 4,
        "max_new_tokens": 8,
        "poll": 0.0,
        "feedback": [Letters()],
    }
    prefer = {"optimizer": {"name": "dpo", "lr": 5e-3, "beta": 0.2}, "epochs": 3, "batch_size": 24}
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "stages": [{"rank": rank}, {"preference": prefer}],
    }
    done = turnwise.Run(config, folder=tmp_path / "ranked").finish()
    learned = [m for m in done.metrics if m["stage"] == "preference"]
    assert learned[-1]["accuracy"] > max(0.65, learned[0]["accuracy"])
    assert learned[-1]["margin"] > 0.1

    from turnwise.engine.exchange.writing import export_pairs

    comparisons = done.ledger.feedback(run=done.id, kind="comparison", status="scored", late=True)
    known = {e.id: e for e in done.ledger.run_episodes(done.id)}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in export_pairs(known, comparisons)))
    written = {**config, "stages": [{"preference": {**prefer, "data": file}}]}
    other = turnwise.Run(written, folder=tmp_path / "written").finish()
    assert other.metrics[-1]["accuracy"] > 0.65
    assert other.metrics[-1]["pairs"] == sum(p.probability != 0.5 for p in pairs(comparisons))
    imported = {
        "policy": str(model_folder()),
        "threads": 1,
        "stages": [{"rank": {"data": file}}, {"preference": prefer}],
    }
    third = turnwise.Run(imported, folder=tmp_path / "imported").finish()
    weights = [torch.cat([p.flatten() for p in run.policy.parameters()]) for run in (other, third)]
    assert third.metrics[-1]["accuracy"] > 0.65
    assert weights[0].shape == weights[1].shape


def test_conversations_that_do_not_fit_are_left_out_and_counted(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    talk = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    prompt = [{"role": "user", "content": "hello"}]
    lines = [
        {"prompt": prompt, "chosen": talk("yes"), "rejected": talk("no")},
        {"prompt": prompt, "chosen": talk("yes " * 400), "rejected": talk("no")},
        {"prompt": prompt, "chosen": talk("maybe"), "rejected": talk("no"), "probability": 0.5},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = {
        "policy": str(model_folder()),
        "threads": 1,
        "stages": [{"preference": {"data": file}}],
    }
    done = turnwise.Run(config, folder=tmp_path / "r").finish()
    assert (done.metrics[-1]["pairs"], done.metrics[-1]["undecided_or_too_long"]) == (1.0, 2.0)
    with pytest.raises(turnwise.ConfigError, match="there is no file or folder"):
        turnwise.Run(
            {**config, "stages": [{"preference": {"data": tmp_path / "none"}}]},
            folder=tmp_path / "s",
        )


def test_replies_to_different_prompts_are_no_pair(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The loss compares replies to one prompt: the prompt's own likelihood would not cancel. Labels
    of each reply alone do not mind."""
    talk = lambda heard, said: [  # noqa: E731
        {"role": "user", "content": heard},
        {"role": "assistant", "content": said},
    ]
    rows = [
        {"chosen": talk("hello", "yes"), "rejected": talk("hello", "no")},
        {"chosen": talk("hello", "yes"), "rejected": talk("so", "no")},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(
        UserWarning,
        match=(
            r"1 rankings .the first at .*pairs.jsonl:2. compare conversations that began"
            r" differently"
        ),
    ):
        [last] = _done(model_folder, tmp_path / "dpo", data=file).metrics
    assert (last["pairs"], last["different_prompts"], last["undecided_or_too_long"]) == (
        1.0,
        1.0,
        0.0,
    )
    [last] = _done(model_folder, tmp_path / "kto", data=file, optimizer="kto").metrics
    assert (last["labelled"], last["different_prompts"]) == (4.0, 0.0)
    file.write_text(json.dumps(rows[1]))
    with pytest.raises(
        turnwise.ConfigError, match="none of 1 pairs is decided, of answers to one prompt"
    ):
        _done(model_folder, tmp_path / "none", data=file)


def _done(model_folder: Callable[..., Path], folder: Path, **preference: Any) -> turnwise.Run:
    config = {"policy": str(model_folder()), "threads": 1, "stages": [{"preference": preference}]}
    return turnwise.Run(config, folder=folder).finish()


class Letters(turnwise.GroupJudge):
    """Prefers replies with many of a letter, or with few."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def rank(self, group: Any) -> turnwise.Comparison:
        score = {e.id: self.sign * sum(t.action.count("e") for t in e.turns) for e in group}
        tiers = [
            tuple(e for e in score if score[e] == value)
            for value in sorted(set(score.values()), reverse=True)
        ]
        return turnwise.Comparison(group[0].group, tuple(tiers))


FOR_AND_AGAINST = {
    "env": "test/Echo-v0", "updates": 1, "groups": 8, "group_size": 3, "max_new_tokens": 6,
    "poll": 0.0,
    "feedback": [{"judge": Letters(1), "name": "people"}, {"judge": Letters(-1), "name": "judge"}],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["preference", "reward-model"])
def test_stages_train_on_sources_by_their_weights(
    kind: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Two sources that say the opposite of each other: what is trained on is exactly the weighed
    mean of their opinions."""
    from turnwise.plugins.reward_model import training

    kept: list[Any] = []
    options: dict[str, Any] = {"batch_size": 100} if kind == "preference" else {"held_out": 0.0}

    def seen(weights: dict[str, float]) -> dict[tuple[str, str], tuple[float, float]]:
        stages = [{"rank": FOR_AND_AGAINST}, {kind: {**options, "weights": weights}}]
        config = {"policy": str(model_folder()), "threads": 1, "stages": stages}
        run = turnwise.Run(config, folder=tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "turnwise.engine.stages.preference.preference_batch",
                lambda f, *a: kept.append(f) or preference_batch(f, *a),
            )
            loss = training.Training._loss
            patch.setattr(
                training.Training, "_loss",
                lambda self, model, member, rows, data,
                groups, *more: kept.append([p for g in groups for p in data.pairs[g]])
                or loss(self, model, member, rows, data, groups, *more),
            )  # fmt: skip
            run.finish()
        score = {
            e.id: sum(t.action.count("e") for t in e.turns) for e in run.ledger.run_episodes(run.id)
        }
        found = kept.pop()
        assert not kept
        return {
            (p.first, p.second): (score[p.first] > score[p.second], p.probability, p.weight)
            for p in found
        }

    for weights, people, total in (
        ({"judge": 0.25}, 0.8, 1.25),
        ({"people": 0.0}, 0.0, 1.0),
        ({"judge": 0.0, "people": 2.0}, 1.0, 2.0),
    ):
        found = seen(weights)
        decided = [(p if more else 1 - p, w) for more, p, w in found.values() if p != 0.5]
        assert len(decided) > 8
        assert decided == [(pytest.approx(people), pytest.approx(total))] * len(decided)


@pytest.mark.parametrize("kind", ["preference", "reward-model"])
def test_weights_of_nobody_are_refused_before_anything_is_played(
    kind: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def run(weights: dict[str, float], **more: Any) -> turnwise.Run:
        stages = [{"rank": FOR_AND_AGAINST}, {kind: {"weights": weights, **more}}]
        return turnwise.Run(
            {"policy": str(model_folder()), "threads": 1, "stages": stages}, folder=tmp_path / "r"
        )

    with pytest.raises(
        turnwise.ConfigError,
        match=f"{kind}.weights: no source 'peopel' .* Did you mean 'people'. Known: judge, people",
    ):
        run({"peopel": 2.0})
    with pytest.raises(turnwise.ConfigError, match="all sources weigh 0"):
        run({"people": 0.0, "judge": 0.0})
    with pytest.raises(turnwise.ConfigError, match="weights"):
        run({"people": -1.0})
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    pair = {
        "prompt": said("user", "hello"),
        "chosen": said("assistant", "fine"),
        "rejected": said("assistant", "no"),
    }
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair))
    with pytest.raises(
        turnwise.ConfigError, match="Known: imported, judge, people"
    ):  # whom a file names is known when it is read
        run({"importd": 2.0}, data=file).finish()
