"""Is the demo's gain real, and fair? Runs `turnwise demo` for several seeds, and then tries to
explain the gain away.

    python benchmarks/demo.py --seeds 0 1 2 3 4 --out runs/bench-demo   # about 4 minutes per seed
        on 2 cores

Checks, on held-out stories:

- the share of the distance random -> expert that PPO and GRPO close, and their gain over SFT;
- SFT against its own teachers: a weak SFT would make any RL look good;
- the best *fixed script*: every sequence of questions followed by a resolution, whatever the
  customer says, the best one chosen on training stories;
- the trained policy with the *observations of other conversations*: it must fall below SFT, or it
  is not reading;
- everything greedily, since RL may only have sharpened what SFT knew;
- the share of replies that are still sentences a demonstrator might say: the customer listens for
  keywords, and a policy could earn its reward with strings of them.

Writes `results.json` and `results.md` into --out; docs/demo.md quotes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.analysis.scores import score
from turnwise.engine.pipeline.progress import quiet
from turnwise.engine.stages.environments import EnvConfig
from turnwise.engine.stages.evaluate import play_held_out
from turnwise.envs.support_desk import QUESTIONS, RESOLUTIONS
from turnwise.plugins.demo.support_desk import ENV, EVALUATION_SEED, HELD_OUT, policy_player

STORIES = 400


def fixed_scripts() -> list[tuple[str, ...]]:
    """Every order of every subset of the questions, and then each resolution: 390 scripts."""
    topics = [
        order for n in range(len(QUESTIONS) + 1) for order in itertools.permutations(QUESTIONS, n)
    ]
    return [
        (*(QUESTIONS[topic][0] for topic in order), sentences[0])
        for order in topics
        for sentences in RESOLUTIONS.values()
    ]


def play_script(script: tuple[str, ...], env: EnvConfig, stories: int) -> dict[str, float]:
    def reply(conversation: Any) -> str:
        said = sum(m.role == "assistant" for m in conversation)
        return script[min(said, len(script) - 1)]

    result = score(play_held_out(turnwise.ScriptPlayer(reply), env, stories, EVALUATION_SEED))
    return {"success": result.success, "outcome": result.outcome}


class Misheard(turnwise.PolicyPlayer):
    """A policy that hears, at every turn, what the customer of another conversation said at that
    turn."""

    def __init__(self, player: turnwise.PolicyPlayer, others: list[turnwise.Episode]) -> None:
        super().__init__(player.policy, player.sampling, player.backend)
        self._said: dict[int, list[str]] = {}
        for episode in others:
            for k, turn in enumerate(episode.turns):
                self._said.setdefault(k, []).append(turn.observation.content)
        self._rng = random.Random(0)

    def _swap(self, talk: Any) -> None:
        pool = self._said[min(len(talk.turns), max(self._said))]
        talk.observation = turnwise.Message(talk.observation.role, self._rng.choice(pool))

    def begin(self, talk: Any, where: Any) -> None:
        self._swap(talk)
        super().begin(talk, where)

    def reply(self, talks: Any, where: Any, arriving: Any = tuple) -> Any:
        for talk in talks:
            if talk.turns:
                self._swap(talk)
        return super().reply(talks, where)


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    summary_file = folder / "summary.json"
    if not summary_file.exists():
        command = [
            sys.executable,
            "-m",
            "turnwise",
            "demo",
            "--seed",
            str(seed),
            "--folder",
            str(folder),
        ]
        subprocess.run(command, check=True)
    summary = json.loads(summary_file.read_text())
    players = summary["players"]
    low, high = players["random"]["outcome"], players["expert"]["outcome"]
    result: dict[str, Any] = {
        "seed": seed,
        "seconds": summary["seconds"],
        "teachers": summary["demonstrator"]["success"],
    }
    for name, player in players.items():
        result[name] = {
            "outcome": player["outcome"],
            "success": player["success"],
            "closed": (player["outcome"] - low) / (high - low),
            "gain": 100 * (player["success"] - players["sft"]["success"]),
        }
    best = max(("ppo", "grpo"), key=lambda name: players[name]["outcome"])
    sentences = {s for some in (*QUESTIONS.values(), *RESOLUTIONS.values()) for s in some}
    policies = {
        name: turnwise.Policy.from_pretrained(folder / name / "policy")
        for name in ("sft", "ppo", "grpo")
    }
    for name, policy in policies.items():
        greedy = score(
            play_held_out(policy_player(policy, 0.0), HELD_OUT, STORIES, EVALUATION_SEED)
        )
        result[name]["greedy"] = greedy.success
        sampled = play_held_out(policy_player(policy), HELD_OUT, STORIES, EVALUATION_SEED)
        replies = [turn.action for episode in sampled for turn in episode.turns]
        result[name]["sentences"] = sum(reply in sentences for reply in replies) / len(replies)
    others = play_held_out(policy_player(policies[best]), HELD_OUT, STORIES, EVALUATION_SEED + 1)
    misheard = score(
        play_held_out(
            Misheard(policy_player(policies[best]), others), HELD_OUT, STORIES, EVALUATION_SEED
        )
    )
    result |= {"best": best, "misheard": misheard.success}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-demo"))
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    quiet()
    scripts = fixed_scripts()
    train = EnvConfig(id=ENV)
    best_script = max(scripts, key=lambda script: play_script(script, train, STORIES)["success"])
    fixed = play_script(best_script, HELD_OUT, STORIES)
    results = [one_seed(seed, arguments.out / f"seed-{seed}") for seed in arguments.seeds]

    def median(get: Any) -> float:
        return statistics.median(get(r) for r in results)

    bests = [max(r["ppo"]["closed"], r["grpo"]["closed"]) for r in results]
    gains = [max(r["ppo"]["gain"], r["grpo"]["gain"]) for r in results]
    others = [min(r["ppo"]["gain"], r["grpo"]["gain"]) for r in results]
    checks = {
        "the better one closes 85 % of random -> expert (median)": statistics.median(bests) >= 0.85,
        "the better one gains 40 points over SFT (median)": statistics.median(gains) >= 40,
        "it gains 25 points on all seeds but one at most": (
            sum(g >= 25 for g in gains) >= len(gains) - 1
        ),
        "it is below SFT on none": min(gains) >= 0,
        "the other one gains 25 points (median)": statistics.median(others) >= 25,
        "SFT reaches 80 % of its teachers' success (every seed)": all(
            r["sft"]["success"] >= 0.8 * r["teachers"] for r in results
        ),
        "the better one beats the best fixed script by 20 points (every seed)": all(
            r[r["best"]]["success"] >= fixed["success"] + 0.2 for r in results
        ),
        "with other conversations' observations it falls below SFT (every seed)": all(
            r["misheard"] < r["sft"]["success"] for r in results
        ),
    }
    lines = [
        (
            f"Command: `python benchmarks/demo.py --seeds {' '.join(map(str, arguments.seeds))}`."
            f" Success on {STORIES} held-out stories, by sampling at temperature 1; *greedy* in"
            " brackets."
        ),
        "",
        (
            "| seed | teachers | SFT | PPO | GRPO | distance closed (better) | misheard (better) |"
            " whole sentences: SFT, PPO, GRPO | seconds | CPU seconds |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = ("sft", "ppo", "grpo")

    def row(label: str, closed: float, get: Any) -> str:
        """One line of the table; `get` takes a function of a seed's result to its number."""
        cells = [
            f"{get(lambda r, n=n: r[n]['success']):.3f} ({get(lambda r, n=n: r[n]['greedy']):.3f})"
            for n in names
        ]
        whole = ", ".join(f"{get(lambda r, n=n: r[n]['sentences']):.2f}" for n in names)
        return (
            f"| {label} | {get(lambda r: r['teachers']):.3f} | {' | '.join(cells)} | {closed:.3f} |"
            f" {get(lambda r: r['misheard']):.3f} | {whole} |"
            f" {get(lambda r: r['seconds']['total']):.0f} |"
            f" {get(lambda r: r['seconds']['cpu']):.0f} |"
        )

    lines += [
        row(str(r["seed"]), closed, lambda f, r=r: f(r))
        for r, closed in zip(results, bests, strict=True)
    ]
    lines.append(row("median", statistics.median(bests), median))
    lines += [
        "",
        (
            f"The best of {len(scripts)} fixed scripts, chosen on training stories, succeeds in"
            f" {fixed['success']:.3f} of the held-out ones: {' / '.join(best_script)}"
        ),
        "",
        *(f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()),
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.md").write_text("\n".join(lines))
    data = {"results": results, "fixed_script": {**fixed, "script": best_script}, "checks": checks}
    (arguments.out / "results.json").write_text(json.dumps(data, indent=2) + "\n")
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
