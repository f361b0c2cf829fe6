"""Reward models: they learn what raters prefer, say how well, read any tokenizer's conversations,
and judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import turnwise
from support.echo import play
from support.models import WORDS
from turnwise.engine.exchange.reading import import_data
from turnwise.engine.exchange.writing import export_pairs
from turnwise.learning import build_policy
from turnwise.plugins.combiners.weighted import Weighted
from turnwise.plugins.reward_model.judge import RewardModelJudge
from turnwise.plugins.reward_model.losses import bradley_terry
from turnwise.plugins.reward_model.model import RewardModel, RewardModelError
from turnwise.plugins.reward_model.training import Data, Ensemble


class LikesLetters(turnwise.GroupJudge):
    """Prefers replies with many of a letter; exactly, or hardly."""

    def __init__(self, letter: str = "e") -> None:
        self.letter = letter

    def rank(self, group: Sequence[turnwise.Episode]) -> turnwise.Comparison:
        score = {e.id: sum(t.action.count(self.letter) for t in e.turns) for e in group}
        tiers = [
            [e for e in score if score[e] == value]
            for value in sorted(set(score.values()), reverse=True)
        ]
        return turnwise.Comparison(group[0].group, tuple(map(tuple, tiers)))


def config(model: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"policy": str(model), "threads": 1, "stages": list(stages), **more}


TWO = {"id": "test/Echo-v0", "kwargs": {"turns": 2}}
RANK = {"env": TWO, "updates": 4, "groups": 48, "group_size": 4, "max_new_tokens": 8, "poll": 0.0,
        "backend": {"name": "in-process", "rows": 192}}  # fmt: skip
FIT = {
    "lr": 3e-3,
    "epochs": 8,
    "batch_size": 12,
    "held_out": 0.25,
    "steps_per_update": 8,
    "weight_decay": 0.1,
}


def test_what_is_never_compared_is_no_one_batch(tmp_path: Path) -> None:
    """Rows of one start that share no conversation are steps of their own: else 20,000 of them
    would be read at once."""
    talk = lambda reply: [  # noqa: E731
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": reply},
    ]
    words = WORDS.split()
    pairs = [(f"{words[i]} {words[i + 1]}", words[i]) for i in range(10)] + [(words[0], words[1])]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "\n".join(json.dumps({"chosen": talk(a), "rejected": talk(b)}) for a, b in pairs)
    )
    found = import_data(file, run="r", stage="rank", update=1)
    ledger = turnwise.Ledger(tmp_path / "ledger.sqlite")
    ledger.add_episodes(found.episodes)
    data = Data(ledger, found.comparisons)
    assert len({c.group for c in found.comparisons}) == 1
    assert sorted(map(len, data.members)) == [2] * 8 + [4], "the last pair joins the first two"
    assert len(set(data.starts)) == 1, "and all are held out together or not at all"


@pytest.fixture(scope="module")
def trained(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> turnwise.Run:
    stages = (
        {"rank": {**RANK, "feedback": [LikesLetters()]}},
        {"reward-model": {**FIT, "members": 2}},
    )
    return turnwise.Run(
        config(model_folder(), *stages), folder=tmp_path_factory.mktemp("rm") / "run"
    ).finish()


def folder_of(run: turnwise.Run) -> Path:
    return next((run.folder / "reward-model").iterdir())


def test_it_learns_what_raters_prefer_and_measures_it_on_other_starts(
    trained: turnwise.Run,
) -> None:
    last = trained.metrics[-1]
    assert last["held_out/accuracy"] > 0.65, last
    assert last["loss"] < trained.metrics[4]["loss"]
    assert last["held_out/pairs"] > 50
    assert 0 <= last["held_out/calibration_error"] < 0.3
    assert trained.policy.version == 0, "the policy was not trained"


def test_the_policy_it_was_trained_from_scores_zero_on_average(trained: turnwise.Run) -> None:
    model = RewardModel.from_pretrained(folder_of(trained))
    episodes = [e for e in trained.ledger.run_episodes(trained.id) if e.stage == "rank"]
    finals = torch.stack([v[:, -1] for v in model.values(episodes)])
    assert torch.allclose(finals.mean(0), torch.zeros(2), atol=1e-4)
    assert finals.std(0).min() > 0.1
    assert not torch.allclose(finals[:, 0], finals[:, 1], atol=1e-2), "the members differ"


def test_scores_do_not_depend_on_batch_or_padding(trained: turnwise.Run) -> None:
    model = RewardModel.from_pretrained(folder_of(trained))
    episodes = trained.ledger.run_episodes(trained.id)[:12]
    together = model.values(episodes)
    alone = [model.values([e])[0] for e in episodes]
    few = model.values(episodes[::-1], micro_tokens=60)[::-1]
    for a, b, c in zip(together, alone, few, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(a, c, atol=1e-5)
    twice = model.values([*episodes, *reversed(episodes)], micro_tokens=60)
    for one, other in zip(twice[:12], reversed(twice[12:]), strict=True):
        assert torch.equal(one, other), (
            "equal conversations have equal scores: what differed would be rounding, and be trained"
        )


def test_a_members_value_is_the_models_own_logit_and_reads_no_answer_to_the_last_reply(
    trained: turnwise.Run,
) -> None:
    """transformers' forward pools at the last token: the same number, on the ids we say it
    reads."""
    folder = folder_of(trained)
    model = RewardModel.from_pretrained(folder)
    single = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "member-1")
    episode = trained.ledger.run_episodes(trained.id)[0]
    [row] = model.rows([episode])
    assert row.positions[-1] == len(row.ids) - 1
    text = model.tokenizer.decode(row.ids)
    assert episode.turns[-1].action.strip() in text
    assert episode.final is not None
    assert not text.rstrip().endswith(episode.final.content)
    single.config.pad_token_id = None
    with torch.no_grad():
        logit = float(single(torch.tensor([row.ids])).logits[0, 0])
    assert float(model.values([episode])[0][1, -1]) == pytest.approx(
        logit - model.offsets[1], abs=1e-4
    )


def test_it_judges_by_the_ensemble_and_keeps_the_members(trained: turnwise.Run) -> None:
    folder = folder_of(trained)
    episodes = trained.ledger.run_episodes(trained.id)[:6]
    members = [v[:, -1] for v in RewardModel.from_pretrained(folder).values(episodes)]
    said = {
        how: RewardModelJudge(str(folder), combine=how).score(episodes)
        for how in ("mean", "min", "uwo")
    }
    for e, v in enumerate(members):
        assert said["mean"][e].score == pytest.approx(float(v.mean()), abs=1e-5)
        assert said["min"][e].score == pytest.approx(float(v.min()), abs=1e-5)
        assert said["uwo"][e].score == pytest.approx(
            float(v.mean() - v.var(correction=0)), abs=1e-5
        )
        assert said["mean"][e].details["members"] == pytest.approx(v.tolist(), abs=1e-5)
    versions = {f.stamp.version for each in said.values() for f in each}
    assert len(versions) == 1
    assert next(iter(versions)).startswith("rm-")
    clipped = RewardModelJudge(str(folder), clip=0.05, per="turn").score(episodes)
    assert all(abs(f.score) <= 0.05 for f in clipped)
    for f in clipped:
        assert sum(f.turn_scores) == pytest.approx(f.score, abs=1e-5), (
            "what the replies added sums to the score"
        )


def test_rl_against_it_raises_it_per_outcome_and_per_turn(
    trained: turnwise.Run, tmp_path: Path
) -> None:
    judge = {"judge": "reward-model", "path": str(folder_of(trained))}
    for name, more in (
        ("outcome", {"feedback": [judge]}),
        (
            "turn",
            {
                "feedback": [{**judge, "per": "turn"}],
                "combiner": {"name": "weighted", "turns": ["reward-model"]},
            },
        ),
    ):
        rl = {
            "env": TWO, "updates": 12, "groups": 32, "group_size": 1, "max_new_tokens": 8,
            "poll": 0.0,
            "optimizer": {"name": "ppo", "lr": 1e-2, "warmup": 2, "kl": 0.01}, **more,
        }  # fmt: skip
        done = turnwise.Run(
            config(trained.folder / "policy", {"rl": rl}), folder=tmp_path / name
        ).finish()
        outcomes = [m["outcome"] for m in done.metrics]
        assert sum(outcomes[-3:]) / 3 > sum(outcomes[:3]) / 3 + 0.2, (name, outcomes)
        assert "kl_episode" in done.metrics[-1]


def test_in_one_pipeline_each_stage_uses_the_latest(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rank = {
        **RANK,
        "updates": 1,
        "groups": 4,
        "feedback": [{"judge": "simulated-panel", "raters": 2}],
    }
    rl = {
        **{k: RANK[k] for k in ("env", "max_new_tokens", "poll")},
        "updates": 2,
        "groups": 2,
        "group_size": 4,
    }
    loop = [
        {"rank": rank}, {"reward-model": {"lr": 1e-3, "held_out": 0}},
        {"rl": {**rl, "feedback": ["reward-model"]}},
    ]  # fmt: skip
    done = turnwise.Run(
        config(
            model_folder(),
            {"repeat": {"times": 2, "stages": loop}},
            {"evaluate": {"env": "test/Echo-v0", "episodes": 3}},
        ),
        folder=tmp_path / "r",
    ).finish()
    names = list(dict.fromkeys(m["stage"] for m in done.metrics))
    assert names == ["rank", "reward-model", "rl", "rank-2", "reward-model-2", "rl-2", "evaluate"]
    folders = sorted((tmp_path / "r" / "reward-model").iterdir())
    assert len(folders) == 2
    versions = {name: set() for name in ("rl", "rl-2")}
    for name in versions:
        for e in done.ledger.run_episodes(done.id, stage=name):
            versions[name] |= {f.stamp.version for f in done.ledger.feedback([e.group])}
    assert [versions["rl"], versions["rl-2"]] == [
        {RewardModel.from_pretrained(f).version} for f in folders
    ]
    first, second = (done.ledger.run_episodes(done.id, stage=name) for name in ("rank", "rank-2"))
    assert not {e.start.key for e in first} & {e.start.key for e in second}, (
        "fresh starts every time"
    )
    assert done.metrics[-3]["stage"] == "rl-2"
    compared = [m["comparisons"] for m in done.metrics if m["stage"].startswith("reward-model")]
    assert compared == [8.0, 16.0], "the second one learns from all there is"


def test_it_may_have_another_tokenizer_than_the_policy(
    trained: turnwise.Run, policy: turnwise.Policy, tmp_path: Path
) -> None:
    other = build_policy(
        tmp_path / "other", [WORDS * 3, "quite another vocabulary"], hidden=32, layers=1, heads=2
    )
    pairs = tmp_path / "pairs.jsonl"
    comparisons = trained.ledger.feedback(
        run=trained.id, kind="comparison", status="scored", late=True
    )
    episodes = {e.id: e for e in trained.ledger.run_episodes(trained.id)}
    pairs.write_text("\n".join(json.dumps(r) for r in export_pairs(episodes, comparisons)))
    stage = {
        "model": str(other),
        "data": pairs,
        "lr": 5e-3,
        "epochs": 4,
        "batch_size": 32,
        "held_out": 0.2,
    }
    done = turnwise.Run(
        config(trained.folder / "policy", {"reward-model": stage}), folder=tmp_path / "r"
    ).finish()
    assert done.metrics[-1]["held_out/accuracy"] > 0.55
    model = RewardModel.from_pretrained(folder_of(done))
    assert len(model.tokenizer) != len(policy.tokenizer)
    [said] = RewardModelJudge(str(folder_of(done))).score(play(policy, 1))
    assert said.status == "scored"


def test_folders_that_are_no_reward_model_say_so(
    trained: turnwise.Run, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        RewardModelError, match="is a language model, not a reward model.*reward-model"
    ):
        RewardModel.from_pretrained(model_folder())
    with pytest.raises(RewardModelError, match="cannot load the reward model 'nowhere'"):
        RewardModel.from_pretrained("nowhere")
    with pytest.raises(RewardModelError, match="Did you mean"):
        RewardModel.from_pretrained(trained.folder)
    folder = tmp_path / "copy"
    shutil.copytree(folder_of(trained), folder)
    big = build_policy(
        tmp_path / "big", [" ".join(f"word{i}" for i in range(500))], hidden=16, layers=1, heads=2
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (big / name).exists():
            shutil.copy(big / name, folder / "member-0" / name)
    with pytest.raises(
        RewardModelError, match="tokens but the model embeds .* do not belong together"
    ):
        RewardModel.from_pretrained(folder)
    shutil.copytree(folder_of(trained), tmp_path / "plain")
    (tmp_path / "plain" / "member-0" / "chat_template.jinja").unlink()
    with pytest.raises(RewardModelError, match="has no chat template"):
        RewardModel.from_pretrained(tmp_path / "plain")


def test_a_conversation_it_cannot_read_has_failed_and_scores_nothing(
    trained: turnwise.Run, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(folder_of(trained), folder)
    for name in ("member-0", "member-1"):
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 30}))
    from turnwise.engine.feedback.specs import make_source

    episodes = trained.ledger.run_episodes(trained.id)[:4]
    source = make_source({"judge": "reward-model", "path": str(folder)}, turnwise.Plugins())
    source.given.request(
        [turnwise.Request("episode", e.id, "reward-model", episodes=(e,)) for e in episodes]
    )
    said = source.given.receive()
    assert all(
        f.status == "failed" and "more than the reward model's context of 30" in f.reason
        for f in said
    )


def test_what_has_nothing_to_learn_from_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    for stage in ("reward-model", "preference"):
        with pytest.raises(turnwise.ConfigError, match="put a `rank` stage before it"):
            turnwise.Run(config(model_folder(), {stage: {}}), folder=tmp_path / "r")
    with pytest.raises(
        turnwise.ConfigError,
        match="trains on advantages: use 'dpo'|but the optimizer trains on advantages",
    ):
        turnwise.Run(
            config(
                model_folder(),
                {"rank": {**RANK, "feedback": [LikesLetters()]}},
                {"preference": {"optimizer": "grpo"}},
            ),
            folder=tmp_path / "r",
        )
    with pytest.raises(turnwise.ConfigError, match="'length' scores single conversations"):
        turnwise.Run(
            config(model_folder(), {"rank": {**RANK, "feedback": ["length"]}}),
            folder=tmp_path / "r",
        )
    rl = {
        "env": "test/Echo-v0",
        "updates": 1,
        "groups": 1,
        "group_size": 2,
        "max_new_tokens": 4,
        "feedback": ["reward-model"],
    }
    with pytest.raises(turnwise.PluginError, match="needs what a 'reward-model' stage makes"):
        turnwise.Run(config(model_folder(), {"rl": rl}), folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("loss", ["pairs", "k-wise", "plackett-luce"])
def test_the_stages_loss_is_the_formula(loss: str, trained: turnwise.Run) -> None:
    """The loss over some starts, against one computed pair by pair from the model's own scores."""
    import itertools

    from turnwise.engine.stages.preference import Chosen
    from turnwise.plugins.reward_model.stage import TrainRewardModel

    data = Data(trained.ledger, Chosen().comparisons(trained, None))
    model = RewardModel.from_pretrained(folder_of(trained))
    stage = TrainRewardModel(
        loss=loss,
        centering=0.1,
        prefixes=0.0,
        label_smoothing=0.1 if loss != "plackett-luce" else 0,
    )
    rows = model.rows(data.episodes)
    groups = [0, 3, 5]
    raw = {
        data.index[e.id]: float(v[0, -1]) + model.offsets[0]
        for e, v in zip(data.episodes, model.values(data.episodes), strict=True)
    }
    found = float(stage._loss(Ensemble(model, stage), model.members[0], rows, data, groups))
    expected, centre, per_group = [], [], []
    for g in groups:
        own = []
        for p in data.pairs[g]:
            a, b = (
                torch.tensor(raw[data.index[x]], dtype=torch.float64) for x in (p.first, p.second)
            )
            own.append(
                float(bradley_terry(a, b, torch.tensor(p.probability), 0.0, stage.label_smoothing))
            )
            centre.append(float((a + b) ** 2))
        expected += own
        per_group.append(sum(own) / len(own))
    if loss == "plackett-luce":
        per_ranking = []
        for g in groups:
            for c in data.by_group[g]:
                left, total = list(itertools.chain(*c.ranking)), 0.0
                for tier in c.ranking:
                    among = torch.logsumexp(
                        torch.tensor([raw[data.index[e]] for e in left], dtype=torch.float64), 0
                    )
                    total += sum(float(among) - raw[data.index[e]] for e in tier)
                    left = left[len(tier) :]
                per_ranking.append(total)
        main = sum(per_ranking) / len(per_ranking)
    else:
        main = sum(expected) / len(expected) if loss == "pairs" else sum(per_group) / len(per_group)
    assert found == pytest.approx(main + 0.1 * sum(centre) / len(centre), abs=1e-4)


def test_prefixes_train_a_value_after_every_reply(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    stages = (
        {"rank": {**RANK, "feedback": [LikesLetters()]}},
        {"reward-model": {**FIT, "prefixes": 1.0}},
    )
    done = turnwise.Run(config(model_folder(), *stages), folder=tmp_path / "r").finish()
    model = RewardModel.from_pretrained(folder_of(done))
    episodes = play(
        turnwise.Policy.from_pretrained(model_folder()), 120, group=2, tokens=8, rows=120, turns=2
    )
    right = []
    for a, b in zip(episodes[::2], episodes[1::2], strict=True):
        va, vb = model.values([a, b])  # after the first of two replies
        truth = [e.turns[0].action.count("e") for e in (a, b)]
        if truth[0] != truth[1]:
            right.append((float(va[0, 0]) > float(vb[0, 0])) == (truth[0] > truth[1]))
    assert sum(right) / len(right) > 0.58, sum(right) / len(right)


def test_the_weighted_combiner_places_what_is_said_of_turns(policy: turnwise.Policy) -> None:
    [episode] = play(policy, 1)
    said = turnwise.Feedback(
        episode.id, score=1.0, turn_scores=(0.5, 0.25, 0.25), stamp=turnwise.Stamp(source="rm")
    )
    [rewards] = Weighted({"rm": 2.0}, turns=["rm"]).combine([episode], [said])
    assert rewards.turns == (1.0, 0.5, 0.5)
    partial = turnwise.Feedback(
        episode.id, turn_scores=(0.5, None, 0.25), stamp=turnwise.Stamp(source="rm")
    )
    [missing] = Weighted({"rm": 2.0}, turns=["rm"]).combine([episode], [partial])
    assert isinstance(missing, turnwise.NoReward)
    with pytest.raises(ValueError, match="Did you mean 'rm'"):
        Weighted({"rm": 1.0}, turns=["mr"])


def test_verdicts_on_held_out_starts_train_nothing(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    evaluate = {
        "env": TWO, "episodes": 5, "max_new_tokens": 5, "poll": 0.0, "judge": LikesLetters("a"),
        "players": ["policy", {"name": "other", "policy": str(model_folder())}],
    }  # fmt: skip
    rank = {**RANK, "updates": 1, "groups": 6, "feedback": [LikesLetters()]}
    stages = (
        {"rank": rank},
        {"evaluate": evaluate},
        {"reward-model": {"lr": 1e-3}},
        {"preference": {}},
    )
    done = turnwise.Run(config(model_folder(), *stages), folder=tmp_path / "r").finish()
    last = {m["stage"]: m for m in done.metrics}
    assert last["reward-model"]["comparisons"] == 6.0, (
        "the ten verdicts of the evaluation are not among them"
    )
    assert last["preference"]["pairs"] + last["preference"]["undecided_or_too_long"] == 6 * 6


def test_an_imported_file_holds_out_whole_starts(
    trained: turnwise.Run, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from turnwise.engine.exchange.reading import import_data

    comparisons = trained.ledger.feedback(
        run=trained.id, kind="comparison", status="scored", late=True
    )
    known = {e.id: e for e in trained.ledger.run_episodes(trained.id)}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in export_pairs(known, comparisons)))
    episodes, imported, _ = import_data(file, run="r", stage="rank", update=1)
    texts = [tuple(m.content for m in e.messages) for e in episodes]
    groups: dict[tuple[str, ...], set[str]] = {}
    for e, text in zip(episodes, texts, strict=True):
        groups.setdefault(text, set()).add(e.group)
    assert all(len(g) == 1 for g in groups.values()), (
        "a conversation stands in one group, so it is held out or it is not"
    )
    assert max(len(c.ranking) for c in imported) == 2
    by_group: dict[str, int] = {}
    for e in episodes:
        by_group[e.group] = by_group.get(e.group, 0) + 1
    assert max(by_group.values()) >= 3


def test_long_conversations_are_left_out_and_counted(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    talk = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    prompt = lambda k: [{"role": "user", "content": f"hello {k}"}]  # noqa: E731
    lines = [{"prompt": prompt(k), "chosen": talk("yes"), "rejected": talk("no")} for k in range(6)]
    lines.append({"prompt": prompt(9), "chosen": talk("yes " * 400), "rejected": talk("no")})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    done = turnwise.Run(
        config(model_folder(), {"reward-model": {"data": file, "held_out": 0}}),
        folder=tmp_path / "r",
    ).finish()
    assert (done.metrics[-1]["too_long"], done.metrics[-1]["comparisons"]) == (1.0, 6.0)


def test_scores_are_zero_on_average_for_the_latest_round(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rank = {**RANK, "updates": 1, "groups": 8, "feedback": [LikesLetters()]}
    rl = {"env": TWO, "updates": 2, "groups": 4, "group_size": 4, "max_new_tokens": 8, "poll": 0.0,
          "optimizer": {"name": "grpo", "lr": 3e-2, "warmup": 0}}  # fmt: skip
    stages = {"rank": rank}, {"rl": rl}, {"rank": rank}, {"reward-model": {"lr": 1e-3}}
    done = turnwise.Run(config(model_folder(), *stages), folder=tmp_path / "r").finish()
    model = RewardModel.from_pretrained(folder_of(done))
    means = {}
    for stage in ("rank", "rank-2"):
        values = model.values(done.ledger.run_episodes(done.id, stage=stage))
        means[stage] = float(torch.stack([v[:, -1] for v in values]).mean())
    assert means["rank-2"] == pytest.approx(0.0, abs=1e-4)


def test_the_runs_name_changes_nothing(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    rank = {
        **RANK,
        "updates": 1,
        "groups": 6,
        "feedback": [{"judge": "simulated-panel", "raters": 2}],
    }
    stages = (
        {"rank": rank},
        {"reward-model": {"lr": 1e-3}},
        {"preference": {"optimizer": {"name": "dpo", "lr": 1e-3}, "batch_size": 8}},
    )
    runs = [
        turnwise.Run(config(model_folder(), *stages, name=n), folder=tmp_path / n).finish()
        for n in ("one", "other")
    ]
    said = []
    for done in runs:
        place = {e.id: (e.start.key, e.slot) for e in done.ledger.run_episodes(done.id)}
        said.append(
            sorted(
                [
                    [sorted(place[e] for e in tier) for tier in c.ranking]
                    for c in done.ledger.feedback(
                        run=done.id, kind="comparison", status="scored", late=True
                    )
                ]
            )
        )
    assert said[0] == said[1], "the same raters say the same of the same conversations"
    for a, b in zip(*(r.metrics for r in runs), strict=True):
        assert a["stage"] == b["stage"]
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
