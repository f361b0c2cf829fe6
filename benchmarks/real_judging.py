"""What is a small pretrained chat model worth as a reward model, and as a judge?

    python benchmarks/real_judging.py --out runs/bench-real-judging   # about 50 minutes on 1 core

*As a reward model's body*: SmolLM2-135M-Instruct and a model made on the spot learn from the same
comparisons, and order pairs that neither has seen.

- `who`: two sentences and a question, whose right answer is preferred ("Ann has a cat. Ben has a
  dog. Who has a dog?"). In held-out pairs the names and things are others than in training.
- `staff`: two conversations of SupportDesk's staff about the same story, of which one ended better
  for the customer. In held-out pairs the stories are held out.

*As a judge*: `local:smollm2-135m` scores 64 conversations of a small policy on SupportDesk, by the
README's rubric and by a checklist of one point. Beside it stands the true outcome, as people's
scores would, and what is printed is what `turnwise judges` says.

What an earlier call finished is not run again. Writes `results.json` and `results.md` into --out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.analysis.scores import bootstrap
from turnwise.engine.pipeline.progress import quiet
from turnwise.learning import build_policy
from turnwise.plugins.demo.support_desk import SFT, play_run, small_model
from turnwise.protocols import Episode, Feedback, Judge, starts
from turnwise.running import ScriptPlayer, Where, rollout
from turnwise.tools import derive_id

SMOL = "smollm2-135m"
PAIRS = {"who": (400, 200), "staff": (240, 120)}  # that train, and that are held out
NAMES = re.findall(r"\w+", "Ann Ben Cleo Dan Eve Finn Gus Hope Ivy Jack Kim Leo Mia Noah Olga Paul")
THINGS = re.findall(
    r"\w+", "cat dog kite lamp boat drum coat ring cake book bike tent vase fork harp sled"
)
RUBRIC = "Did the agent solve the problem?"
POINTS = {"solved": "The agent solved the customer's problem."}
BODIES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"lr": 2e-5, "epochs": 1},
    "made on the spot": {"lr": 1e-3, "epochs": 8},
}
Pair = dict[str, list[dict[str, str]]]


def who(count: int, held_out: bool) -> list[Pair]:
    """Questions whose right answer is preferred; held-out ones are about other names and things."""
    rng = random.Random(int(held_out))
    half = slice(len(NAMES) // 2, None) if held_out else slice(len(NAMES) // 2)
    found = []
    for _ in range(count):
        (a, b), (x, y) = rng.sample(NAMES[half], 2), rng.sample(THINGS[half], 2)
        right, wrong = rng.sample([a, b], 2)
        thing = x if right == a else y
        asked = f"{a} has a {x}. {b} has a {y}. Who has a {thing}?"
        found.append(_pair([_m("user", asked)], *(
            [_m("assistant", f"{name} has a {thing}.")] for name in (right, wrong)
        )))  # fmt: skip
    return found


def staff(count: int, held_out: bool) -> list[Pair]:
    """Two conversations about the same story, of which the first one ended better."""
    options = {"split": "held_out" if held_out else "train"}
    found: list[Pair] = []
    for start in starts("turnwise/SupportDesk-v0", int(held_out), 4 * count, options):
        chosen = [(start, 0), (start, 1)]
        where = Where("bench-real-judging", "staff", 0, 0)
        two = rollout(ScriptPlayer("demonstrator"), chosen, where, max_turns=12)
        worse, better = sorted(two, key=lambda e: e.env_return)
        if better.env_return > worse.env_return + 0.3 and len(found) < count:
            told = [[_m(m.role, m.content) for m in e.messages if m.role != "system"] for e in
                (better, worse)]  # fmt: skip
            found.append(_pair(told[0][:1], *(t[1:] for t in told)))
    assert len(found) == count, f"{len(found)} of {count} pairs"
    return found


def _m(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    # A conversation ends with a reply, or what came after it would say how it went.
    cut = [side[: 1 + max(i for i, m in enumerate(side) if m["role"] == "assistant")]
        for side in (chosen, rejected)]  # fmt: skip
    return {"prompt": prompt, "chosen": cut[0], "rejected": cut[1]}


def order(body: str, task: str, folder: Path) -> dict[str, Any]:
    """Trains a reward model on the task's pairs, and returns how it orders those held out."""
    done = folder / "result.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    make = {"who": who, "staff": staff}[task]
    train, held = (make(n, apart) for n, apart in zip(PAIRS[task], (False, True), strict=True))
    (folder / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in train))
    if body == "SmolLM2-135M":
        model = SMOL
    else:
        texts = [m["content"] for p in (*train, *held) for side in p.values() for m in side]
        model = str(build_policy(folder / "model", texts * 3, seed=0, hidden=128, layers=4))
    began = time.perf_counter()
    stage = {
        "data": str(folder / "train.jsonl"), "model": model, "held_out": 0.0,
        "micro_tokens": 1024, "batch_size": 16, "warmup": 5, **BODIES[body],
    }  # fmt: skip
    run = turnwise.Run(
        {"policy": model, "seed": 0, "name": "order", "stages": [{"reward-model": stage}]},
        folder=folder / "run",
    ).finish()
    [saved] = sorted((run.folder / "reward-model").iterdir())
    judge = turnwise.Plugins().create("judge", "reward-model", path=str(saved))
    episodes = [_episode(p, side) for p in held for side in ("chosen", "rejected")]
    scores = [f.score for f in judge.score(episodes)]
    right = [float(a > b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    low, high = bootstrap(right)
    found = {
        "body": body, "task": task, "pairs": len(train), "held_out": len(held),
        "accuracy": sum(right) / len(right), "low": low, "high": high,
        "minutes": (time.perf_counter() - began) / 60,
    }  # fmt: skip
    done.write_text(json.dumps(found) + "\n")
    return found


def _episode(pair: Pair, side: str) -> Episode:
    messages = [turnwise.Message(**m) for m in (*pair["prompt"], *pair[side])]  # type: ignore[arg-type]
    turns = tuple(
        turnwise.protocols.Turn(asked, reply.content, 0.0)
        for asked, reply in zip(messages[::2], messages[1::2], strict=True)
    )
    key = derive_id(pair, side)
    return Episode(key, turnwise.Start("pairs", int(key[:6], 16)), turns, "terminated")


class Truth(Judge):
    """Scores by the true outcome, as people would who know it."""

    def score(self, episodes: Any) -> list[Feedback]:
        return [Feedback(e.id, min(max(e.env_return, 0.0), 1.0)) for e in episodes]


def judged(folder: Path) -> list[dict[str, Any]]:
    """Has conversations scored by the model and by the truth; returns what `turnwise judges` says
    of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sft" / "policy").is_dir():
        play_run(folder, "sft", small_model(folder, 0), [{"sft": SFT}], 0, threads=1)
    asked = {"model": f"local:{SMOL}", "canaries": 0, "max_tokens": 256}
    rubric = {"judge": "rubric", "name": "rubric", "rubric": RUBRIC, **asked}
    checklist = {"judge": "checklist", "name": "checklist", "points": POINTS, **asked}
    stage = {
        "env": "turnwise/SupportDesk-v0", "groups": 16, "group_size": 4, "max_new_tokens": 24,
        "updates": 1, "feedback": [rubric, checklist, {"judge": Truth(), "name": "truth"}],
        "optimizer": {"name": "grpo", "lr": 0.0},
    }  # fmt: skip
    config = {
        "policy": str(folder / "sft" / "policy"), "seed": 0, "name": "judged",
        "stages": [{"rl": stage}],
    }  # fmt: skip
    turnwise.Run(config, folder=folder / "run", resume=(folder / "run").exists()).finish()
    command = [sys.executable, "-m", "turnwise", "judges", str(folder / "run"), "--people", "truth"]
    shown = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    return list(json.loads(shown.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-real-judging"))
    parser.add_argument("--parts", nargs="+", default=["order", "judge"])
    given = parser.parse_args()
    turnwise.Plugins()
    quiet()
    given.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    results: dict[str, Any] = {}
    if "order" in given.parts:
        rows = [
            order(body, task, given.out / f"{task}-{derive_id(body)[:6]}")
            for task in PAIRS
            for body in BODIES
        ]
        results["order"] = rows
        lines += [
            "| comparisons | body | pairs | held-out pairs in the right order | 95 % interval |"
            " minutes |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['task']} | {r['body']} | {r['pairs']} | {r['accuracy']:.3f} of {r['held_out']} |"
            f" {r['low']:.3f} to {r['high']:.3f} | {r['minutes']:.0f} |"
            for r in rows
        ]
    if "judge" in given.parts:
        results["judge"] = judged(given.out / "judge")
        for section in results["judge"]:
            lines += ["", f"*{section['title']}*", "", *section["lines"]]
            if section["columns"]:
                lines.append(" | ".join(section["columns"]))
                lines += [" | ".join(row) for row in section["rows"]]
    (given.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
