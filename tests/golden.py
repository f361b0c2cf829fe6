"""Runs short pipelines over every stage and prints hashes of all they leave behind, to hold a
rebuilding to "nothing changed".

    python tests/golden.py --save before.json       at the commit before
    python tests/golden.py --against before.json    at any later one: exit status 1 and what differs

What is hashed: the weights of every policy and reward model, the metrics without seconds, and the
rows of the ledger without times, row ids of people and versions of judges (those hash source text).
Numbers must agree to the last bit, which only one machine with one build of torch can promise; the
file says which, and another one is refused.

A rebuilding that renames a metric, a column or a field of the ledger writes the new name and the
old one into `RENAMED`, which gives everything its old name before it is hashed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import sqlalchemy as sa
import torch
import transformers
import turnwise
import yaml
from safetensors.torch import load_file
from support import judges
from support.model_server import ModelServer
from support.rating import next_task, person
from turnwise.engine.exchange import reading
from turnwise.engine.util.ids import derive_id
from turnwise.learning import build_policy
from turnwise.plugins.human.desk import Desk
from turnwise.testing import Clock

RENAMED: dict[str, str] = {}  # new name -> name at the commit where the hashes were recorded
IMPORTED = {"messages": "talk"}  # the same, of the fields of records that are imported
# New words of a reason that the ledger keeps -> its recorded words.
REWORDED = {
    "uncertain: the raters' answers left": "uncertain: what raters said left",
}
LEFT_OUT = {"time", "version", "seconds"}  # of rows and of what they hold
BY_CHANCE = {"id", "request", "rater", "shown"}  # of rows about people: drawn anew in every run

DESK = "turnwise/SupportDesk-v0"
PLAY = {"env": DESK, "groups": 3, "group_size": 4, "max_new_tokens": 8, "poll": 0}
SFT = {"sft": {"env": DESK, "episodes": 96, "batch_size": 8, "steps_per_update": 4, "lr": 3e-3}}
SHORT = {"judge": "length", "max_words": 4}
PANEL = {"judge": "simulated-panel", "raters": 2, "noise": 0.5}


def rl(
    optimizer: Mapping[str, Any], *feedback: Any, updates: int = 2, **options: Any
) -> dict[str, Any]:
    options = {"feedback": list(feedback) or [SHORT], **options}
    return {"rl": {**PLAY, "updates": updates, "optimizer": {"lr": 1e-3, **optimizer}, **options}}


def road() -> list[Any]:
    """Supervised fine-tuning, ranking, reward model, PPO with its own critic and held-out stopping,
    DPO, GRPO, evaluation."""
    reward = {"judge": "reward-model", "combine": "min"}
    return [
        SFT,
        {"rank": {**PLAY, "groups": 4, "updates": 3, "feedback": [PANEL]}},
        {"reward-model": {"members": 2, "lr": 1e-3, "batch_size": 4, "epochs": 2, "held_out": 0.2,
                "steps_per_update": 1}},
        rl({"name": "ppo", "kl": 0.1, "kl_target": 0.1}, reward, SHORT, updates=4,
            gold={"episodes": 3, "every": 2, "patience": 9}),
        {"preference": {"optimizer": {"name": "dpo", "lr": 1e-3}, "batch_size": 16}},
        rl({"name": "grpo", "kl": 0.1}, "environment", {"judge": "questions", "weight": 0.1},
            SHORT),
        {"evaluate": {"env": DESK, "episodes": 6, "players": ["policy", "expert"],
                "max_new_tokens": 6,
                      "best_of": {"judge": "reward-model", "n": [1, 2]}}},
    ]  # fmt: skip


def credit() -> list[Any]:
    """Every credit method, with branches and an audit among them; a separate critic; history
    rendered anew."""
    by_turn = {"name": "judged"}
    return [
        SFT,
        rl({"name": "grpo"}, credit={"name": "redistribute", "features": 16}, resample=1,
            audit={"episodes": 1, "rollouts": 2}),
        rl({"name": "ppo", "critic": "separate"}, credit={"name": "branch", "rollouts": 2},
            max_turns=3, updates=1),
        rl({"name": "grpo"}, credit={"name": "counterfactual", "rollouts": 2}, max_turns=3,
            updates=1),
        rl({"name": "grpo", "kl": 0.1, "kl_place": "loss"}, credit="gigpo"),
        rl({"name": "grpo", "minibatches": 2}, credit="turn-returns"),
        rl({"name": "grpo"}, "environment", SHORT, credit=by_turn, history="rerender"),
        rl({"name": "rejection"}, "environment", SHORT,
            env=[[DESK, 2], ["turnwise/TwentyQuestions-v0", 1]]),
        rl({"name": "ppo"}, "environment", credit={"name": "gae", "unit": "turn",
                "turn_gamma": 0.9}, backend={"name": "in-process", "rows": 4}),
    ]  # fmt: skip


def late() -> list[Any]:
    """Raters who answer late or never while play goes on; estimates of many raters."""
    slow = {**PANEL, "delay": 4, "unanswered": 0.2, "deadline": 9}
    return [
        SFT,
        rl({"name": "grpo"}, slow, updates=5, pending=18, staleness=2),
        rl({"name": "grpo"}, PANEL, combiner={"name": "aggregate",
                "aggregator": "rater-bradley-terry"}),
        rl({"name": "grpo"}, PANEL, combiner={"name": "aggregate", "aggregator": "plackett-luce"}),
    ]  # fmt: skip


def people() -> list[Any]:
    """People at their pages, who score conversations and mark replies, and are waited for or
    not."""
    plain = {"judge": "people", "raters": 1, "gold_share": 0.0, "random_share": 0.0, "undo": 0.0}
    return [
        SFT,
        {"rank": {**PLAY, "updates": 1, "feedback": [{**plain, "task": "rank", "name": "ranks"}]}},
        rl({"name": "grpo"}, {**plain, "task": "score", "name": "scores"}),
        rl({"name": "grpo"}, {**plain, "task": "compare", "name": "pairs"}, pending=12, updates=3),
    ]  # fmt: skip


def models(url: str, folder: Path) -> list[Any]:
    """A model behind a server as judge in every way of judging, as critic of replies, and in an
    evaluation."""
    asked = {"model": {"provider": "openai-chat", "model": "judge-1", "url": f"{url}/v1",
            "api_key": judges.KEY},
             "prices": {"judge-1": [1, 1]}, "budget": 5.0}  # fmt: skip
    (folder / "manners.md").write_text(
        "---\nname: manners\nprinciples:\n  - {name: polite, critique: Impolite, revise: Add"
        " courtesy, better: The kinder one}\n---\nManners matter.\n"
    )
    (folder / "helpful.md").write_text(f"---\n{yaml.safe_dump(judges.RUBRIC)}---\nHelp.\n")
    manners, helpful = str(folder / "manners.md"), str(folder / "helpful.md")
    return [
        {"revise": {"env": DESK, "updates": 2, "groups": 3, "max_new_tokens": 6,
                "critic": {**asked, "constitution": manners}}},
        {"sft": {"stage": "revise", "batch_size": 4, "steps_per_update": 1, "lr": 1e-3}},
        rl({"name": "grpo"}, {"judge": "rubric", "rubric": helpful, **asked},
            {"judge": "length", "max_words": 3, "weight": 0.1}),
        {"rank": {**PLAY, "updates": 2, "feedback": [{"judge": "pairwise",
                        "rubric": "The kinder one.", **asked}]}},
        rl({"name": "grpo"}, {"judge": "listwise", "rubric": "The kinder one.", **asked},
            updates=1),
        rl({"name": "grpo"}, {"judge": "constitution", "constitution": manners, **asked},
            updates=1),
        {"preference": {"optimizer": {"name": "dpo", "lr": 1e-3}, "batch_size": 16}},
        {"evaluate": {"env": DESK, "episodes": 4, "players": ["policy", "expert"],
                "max_new_tokens": 6,
                      "judge": {"judge": "pairwise", "rubric": "The kinder one.", **asked}}},
    ]  # fmt: skip


def labels(folder: Path) -> list[Any]:
    """KTO on labelled replies and a reward model on pairs, from files; LoRA.

    What is imported has ids that hash the names of the records' fields, so the old names stand in
    for the new ones while it is read.
    """
    reading._digest = lambda record: derive_id(
        {
            IMPORTED.get(name, name): "" if name == "where" else value
            for name, value in dataclasses.asdict(record).items()
        }
    )
    said = ["yes please", "no", "trace the parcel", "refund", "a new one", "wait"]
    prompt = [{"role": "user", "content": "my kettle is broken"}]
    rows = [
        {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": text}],
            "label": i % 2 == 0,
        }
        for i, text in enumerate(said)
    ]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": a}],
            "rejected": [{"role": "assistant", "content": b}],
        }
        for a, b in zip(said[::2], said[1::2], strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return [
        {"preference": {"data": str(folder / "labels.jsonl"),
                "optimizer": {"name": "kto", "lr": 1e-3}, "batch_size": 2}},
        {"reward-model": {"data": str(folder / "pairs.jsonl"), "lr": 1e-3, "batch_size": 2,
                "held_out": 0, "steps_per_update": 1}},
        rl({"name": "grpo", "kl": 0.1}, {"judge": "reward-model"}),
    ]  # fmt: skip


def rate(run: turnwise.Run, rater: str) -> None:
    """One rater answers all there is, by the number of characters of the replies, so that chance in
    the order shown means nothing."""
    desk = Desk(run.ledger)
    while (task := next_task(desk, rater, run.id)) is not None:
        lengths = [sum(len(turn.action) for turn in episode.turns) for episode in task.shown]
        kind = task.study["task"]
        if kind == "rank":
            form = {
                f"rank-{i}": str(1 + sum(other > own for other in lengths))
                for i, own in enumerate(lengths)
            }
        elif kind == "compare":
            form = {"preference": str(max(-3, min(3, lengths[1] - lengths[0])))}
        else:
            form = {
                f"aspect-{a}": str(1 + lengths[0] % task.study["scale"])
                for a in task.study["aspects"]
            }
        desk.answer(task.id, rater, form)


def plain(value: Any, left_out: set[str] = LEFT_OUT) -> Any:
    """A value under its recorded names, without what differs between two runs."""
    if isinstance(value, Mapping):
        named = {RENAMED.get(k, k): plain(v, left_out) for k, v in value.items()}
        return {
            k: v
            for k, v in sorted(named.items())
            if k not in left_out and not k.startswith("seconds/")
        }
    if isinstance(value, str):
        for new, old in REWORDED.items():
            value = value.replace(new, old)
        return value
    if isinstance(value, (list, tuple)):
        return [plain(v, left_out) for v in value]
    return value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def rows(url: str, by_chance: bool) -> dict[str, list[Any]]:
    """The ledger's tables, unpacked."""
    found: dict[str, list[Any]] = {}
    left_out = LEFT_OUT | (BY_CHANCE if by_chance else set())
    with closing(sa.create_engine(url).connect()) as db:
        for table in ("episodes", "requests", "feedback", "members"):
            unpacked = []
            for row in db.execute(sa.text(f"select * from {table}")).mappings():
                each = dict(row)
                if isinstance(each.get("content"), bytes):
                    each["content"] = zlib.decompress(each["content"]).decode()
                for name, text in each.items():
                    if isinstance(text, str) and text[:1] in ("{", "["):
                        each[name] = json.loads(text)
                if table == "members" and by_chance:
                    each["feedback"] = len(each["feedback"])
                unpacked.append(
                    plain(each, left_out if table in ("requests", "feedback") else LEFT_OUT)
                )
            found[table] = sorted(unpacked, key=lambda row: json.dumps(row, sort_keys=True))
    return found


def weights(folder: Path) -> dict[str, str]:
    """A hash of every set of weights that a run saved, by where it lies."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        if "checkpoints" in file.parts:
            continue
        tensors = load_file(file)
        state = hashlib.sha256()
        for name in sorted(tensors):
            state.update(
                name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
            )
        found[str(file.relative_to(folder))] = state.hexdigest()[:16]
    return found


def play(name: str, stages: list[Any], policy: Any, folder: Path) -> dict[str, Any]:
    """Plays one pipeline. Returns the hashes of what it leaves."""
    clock = Clock()
    config = {
        "policy": policy,
        "name": name,
        "seed": 3,
        "threads": 1,
        "checkpoint_every": 100,
        "stages": stages,
    }
    run = turnwise.Run(config, folder=folder / name, clock=clock, sleep=clock.sleep)
    # It is derived from the config, names of keys and paths included, and all other ids and noise
    # from it.
    run.id = name
    if name == "people":
        ada = cache(
            lambda: person(run.ledger, "Ada", run=run.id)
        )  # the tables of raters are made by the first stage that asks them
        clock.meanwhile = lambda: rate(run, ada())
    run.finish()
    run.policy.save_pretrained(folder / name / "last")
    metrics = plain(run.metrics)
    tables = rows(f"sqlite:///{folder / name / 'ledger.sqlite'}", name == "people")
    (folder / f"{name}.json").write_text(json.dumps({"metrics": metrics, **tables}, indent=1))
    return {
        "weights": weights(folder / name),
        "metrics": digest(metrics),
        **{table: f"{digest(found)} ({len(found)})" for table, found in tables.items()},
    }


def pipelines(url: str, model: Path, folder: Path) -> Iterator[tuple[str, list[Any], Any]]:
    yield "road", road(), str(model)
    yield "credit", credit(), str(model)
    yield "late", late(), str(model)
    yield "people", people(), str(model)
    yield "models", models(url, folder), str(model)
    yield (
        "labels",
        labels(folder),
        {"model": str(model), "lora": {"r": 4, "target_modules": "all-linear"}},
    )


def here() -> dict[str, str]:
    """What the last bits depend on."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def texts() -> list[str]:
    """What the tokenizer is made for."""
    turnwise.Plugins()  # registers the environments
    starts = [(start, 0) for start in turnwise.starts(DESK, 0, 40)]
    return [
        turn.action
        for e in turnwise.rollout(turnwise.ScriptPlayer("expert"), starts)
        for turn in e.turns
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--save", type=Path, help="write the hashes to this file")
    options.add_argument("--against", type=Path, help="compare with the hashes in this file")
    options.add_argument(
        "--keep",
        type=Path,
        help="keep the runs and what was hashed in this folder, to look at differences",
    )
    options.add_argument("--only", nargs="*", help="these pipelines")
    given = options.parse_args()
    before = json.loads(given.against.read_text()) if given.against else None
    if before and before["here"] != here():
        raise SystemExit(
            f"{given.against} was recorded on {before['here']}; this is {here()}: record it here,"
            " at the commit before."
        )
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    judges.worth = lambda text: (
        text.count("e") % 3
    )  # what the judge behind the server likes, in replies of a policy that knows nothing
    folder = given.keep or Path(tempfile.mkdtemp(prefix="golden-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = build_policy(folder / "model", texts(), hidden=32, layers=2)
    found: dict[str, Any] = {"here": here()}
    with ModelServer(answer) as server:
        for name, stages, policy in pipelines(server.url, model, folder):
            if given.only and name not in given.only:
                continue
            since = time.monotonic()
            found[name] = play(name, stages, policy, folder)
            print(
                f"{name}: {json.dumps(found[name])}  [{time.monotonic() - since:.0f} s]", flush=True
            )
    if given.save:
        given.save.write_text(json.dumps(found, indent=1) + "\n")
    if before:
        differ = [
            f"{name}: {key}"
            for name in found
            for key in found[name]
            if before[name].get(key) != found[name][key]
        ]
        print("\n".join(["differs:", *differ]) if differ else "equal to the last bit")
        sys.exit(bool(differ))


def answer(asked: Any) -> dict[str, Any]:
    """What the model behind the server says: a verdict, or as a critic a revision."""
    assert asked.schema is not None
    said = judges.bound(asked)["properties"]
    if "answer_id" in said:
        draft = len(asked.user)
        return {
            "answer_id": said["answer_id"]["enum"][0],
            "critique": "So so.",
            "change": draft % 2 == 0,
            "revision": "please wait",
        }
    return judges.unbiased(asked)


if __name__ == "__main__":
    main()
