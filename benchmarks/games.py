"""Does a tiny policy learn games that nobody here wrote? TextArena's GuessTheNumber and
TowerOfHanoi; its KuhnPoker, GameOfPureStrategy and TicTacToe against a random player, in either
seat; and where it is installed a world of TextWorld, by its own score at the end.

    python benchmarks/games.py --seeds 0 1 2 --out runs/bench-games

A Llama of two layers, made on the spot, first copies a weak player (300 conversations, so that it
knows what a move looks like): one that moves at random, or in the games that such a player hardly
ever wins one that plays well in 15 % of the conversations and at random in all others. Then it
trains by RL on wins alone. The policy before RL, after it and the random player play 100 starts of
other seeds; the table has their success, and the 95 % interval of the paired difference to the
random player. The bar: the interval lies above 0, for each game and seed.

Writes `results.json` and `results.md` into --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import turnwise
from turnwise.engine.pipeline.progress import quiet
from turnwise.learning import build_policy

WINS = {"wins_only": True}


def both_seats(game: str) -> list[dict[str, Any]]:
    """Returns a game of two against a random player, once in each seat."""
    return [
        {"id": f"textarena/{game}-v0", "kwargs": WINS, "seats": seats}
        for seats in ({"0": "policy", "1": "random"}, {"1": "policy", "0": "random"})
    ]


GAMES: dict[str, dict[str, Any]] = {
    "GuessTheNumber": {
        "env": [{"id": "textarena/GuessTheNumber-v0", "kwargs": WINS}], "updates": 80,
        "expert": 0.15,
    },
    "TowerOfHanoi": {
        "env": [{"id": "textarena/TowerOfHanoi-v0", "kwargs": WINS}], "updates": 40,
        "expert": 0.15,
    },
    "KuhnPoker": {"env": both_seats("KuhnPoker"), "updates": 60},
    "GameOfPureStrategy": {"env": both_seats("GameOfPureStrategy"), "updates": 60},
    "TicTacToe": {"env": both_seats("TicTacToe"), "updates": 60},
}  # fmt: skip
if importlib.util.find_spec("textworld"):
    WORLD = {"rooms": 3, "objects": 5, "quest": 3, "steps": 20}
    GAMES["TextWorld"] = {
        "env": [{"id": "textworld/Game-v0", "kwargs": WORLD}],
        "updates": 30, "groups": 8, "tokens": 16, "context": 4096,
    }  # fmt: skip
TOKENS = 6
RL = {
    "groups": 16, "group_size": 8, "max_turns": 20,
    "optimizer": {"name": "grpo", "lr": 2e-3, "micro_tokens": 16384},
    "backend": {"name": "in-process", "rows": 128},
}  # fmt: skip


def copied(env: list[dict[str, Any]], seed: int, file: Path, expert: float) -> list[str]:
    """Writes conversations of the weak player as demonstrations, and returns their texts."""
    episodes = []
    for each in env:
        start = turnwise.starts(each["id"], seed, 300 // len(env), kwargs=each["kwargs"])
        seats = each.get("seats", {})
        mine = next((seat for seat, who in seats.items() if who == "policy"), "")
        others = {seat: "random" for seat in seats if seat != mine}
        chosen = [
            (turnwise.Start(s.env, s.seed, s.options, s.kwargs, mine, others), 0) for s in start
        ]
        good = round(expert * len(chosen))
        for name, some in (("expert", chosen[:good]), ("random", chosen[good:])):
            if some:
                episodes += turnwise.rollout(turnwise.ScriptPlayer(name), some, max_turns=20)
    talks = [[{"role": m.role, "content": m.content} for m in e.messages] for e in episodes]
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return [m["content"] for talk in talks for m in talk]


def one(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains on a game and returns its row."""
    game, began = GAMES[name], time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    texts = copied(game["env"], seed, folder / "weak.jsonl", game.get("expert", 0.0))
    model = build_policy(
        folder / "model", texts, seed=seed, hidden=64, layers=2, heads=4,
        context=game.get("context", 2048),
    )  # fmt: skip
    tokens = game.get("tokens", TOKENS)
    rl = {
        **RL, "env": game["env"], "updates": game["updates"], "max_new_tokens": tokens,
        "groups": game.get("groups", RL["groups"]),
    }  # fmt: skip
    evaluate = [
        {"evaluate": {
            "env": env, "episodes": 100, "players": ["policy", "random"],
            "max_new_tokens": tokens,
        }}
        for env in game["env"]
    ]  # fmt: skip
    stages: list[dict[str, Any]] = [
        {"sft": {"data": str(folder / "weak.jsonl"), "epochs": 10, "batch_size": 16, "lr": 5e-3}},
        *evaluate,
        {"rl": rl},
        *evaluate,
    ]
    config = {
        "policy": str(model), "seed": seed, "name": name, "threads": 1, "stages": stages,
        "checkpoint_every": 1000,
    }  # fmt: skip
    run = turnwise.Run(config, folder=folder / "run").finish()
    both = [m for m in run.metrics if m["stage"].startswith("evaluate")]
    before, found = both[: len(evaluate)], both[len(evaluate) :]
    key = "policy - random"
    return {
        "game": name, "seed": seed,
        "random": [m["random/success"] for m in found],
        "before": [m["policy/success"] for m in before],
        "policy": [m["policy/success"] for m in found],
        "gain": [m[f"{key}/success"] for m in found],
        "low": [m[f"{key}/success_low"] for m in found],
        "high": [m[f"{key}/success_high"] for m in found],
        "curve": [m["success"] for m in run.metrics if m["stage"] == "rl"],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the rows, one per game, seat and seed."""
    text = ["| game | seat | seed | random | before RL | after RL | gain | 95 % interval |"]
    text.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in lines:
        for i, policy in enumerate(r["policy"]):
            seat = ("first", "second")[i] if len(r["policy"]) > 1 else ""
            text.append(
                f"| {r['game']} | {seat} | {r['seed']} | {r['random'][i]:.2f}"
                f" | {r['before'][i]:.2f} | {policy:.2f}"
                f" | {r['gain'][i]:+.2f} | {r['low'][i]:+.2f} to {r['high'][i]:+.2f} |"
            )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--games", nargs="+", default=list(GAMES), choices=list(GAMES))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-games"))
    given = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    quiet()
    lines = []
    for name in given.games:
        for seed in given.seeds:
            lines.append(one(name, seed, given.out / f"{name}-{seed}"))
            print({k: v for k, v in lines[-1].items() if k != "curve"}, flush=True)
    (given.out / "results.json").write_text(json.dumps(lines, indent=2) + "\n")
    held = all(low > 0 for r in lines for low in r["low"])
    text = table(lines) + f"\n- {'yes' if held else 'NO'}: every interval lies above 0\n"
    (given.out / "results.md").write_text(text)
    print(text)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
