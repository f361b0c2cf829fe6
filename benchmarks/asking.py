"""Does it pay to ask first what would teach most? Pairs chosen by `information` against pairs
chosen at random, on SupportDesk.

    python benchmarks/road.py --seeds 1   # once: policies, and a reward model whose body is used
        here
    python benchmarks/asking.py --road runs/bench-road/seed-1 --seeds 10   # about 7 minutes on one
        core; writes docs/people-asking.md

- Pool: groups of 4 conversations, and every pair of each, 400 groups drawn per seed. "mixed" is
  what people see in an rl stage after a while: 100 groups by the SFT policy (40 % success) and 300
  by the policy that GRPO made of it (97 %), whose conversations are mostly alike in outcome. "weak"
  is 400 groups by the SFT policy alone, where half of all pairs differ in outcome.
- People: a simulated panel of 20 with its default tastes (0.05) and noise 0.25 (or 0.5); one rater
  per pair, no ties, no bias.
- Reward model: 5 heads on the frozen body of the road's reward model, drawn anew, so that nothing
  of what it preferred is left but what it can tell apart. Its states are computed once: a
  conversation is one row of a table. Loss, ensemble, bootstrap (0.7) and training are those of
  plugins/reward_model; after each batch of 40 ratings it learns on from where it stands (6 epochs
  over all ratings), as a judge with `retrain` does.
- Order: the first 40 pairs are drawn at random for everybody. Then each task is drawn as `turnwise
  rate` draws it: a random `random_share` of all pairs is kept for tasks drawn at random, which are
  that share of all tasks; else it is the open pair of highest `information` among the others, by
  the five members. All open pairs are valued anew after each batch.
- Measured: accuracy of the members' mean on all pairs that differ in true outcome, of 600 groups of
  held-out stories in the pool's mixture.
- Ratings needed: where the mean curve over the seeds, made monotone (isotonic regression), reaches
  what random choice reaches at its end (its mean over the last three batches); the same rule for
  both. The ratio's 90 % interval: the seeds are drawn anew 10,000 times, both arms of a seed
  together, and level, curves and ratio made from those. A curve that never gets there counts as
  twice the ratings there were.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import turnwise
from scipy.optimize import isotonic_regression
from turnwise.engine.environments.registry import starts
from turnwise.engine.policy.network import divide
from turnwise.engine.records.batch import Row
from turnwise.engine.rollout.conversation import Where
from turnwise.engine.rollout.rollout import rollout
from turnwise.engine.util.ids import derive_id
from turnwise.judges.simulated import SimulatedPanel
from turnwise.plugins.demo.support_desk import ENV, policy_player
from turnwise.plugins.human.information import information
from turnwise.plugins.reward_model.model import RewardModel
from turnwise.plugins.reward_model.training import Data, Ensemble, Training, finals

PAGE = Path(__file__).parents[1] / "docs" / "people-asking.md"
FIGURE = PAGE.parent / "figures" / "asking.png"
MARKS = "<!-- tables: benchmarks/asking.py -->", "<!-- end of tables -->"
# Groups of a seed's pool.
POOLS: dict[str, dict[str, int]] = {"mixed": {"sft": 100, "grpo": 300}, "weak": {"sft": 400}}
SETTINGS = [("mixed", 0.25), ("mixed", 0.5), ("weak", 0.25)]  # pool, noise
# Share of tasks drawn at random.
ARMS: dict[str, float] = {"random": 1.0, "value, 20 % random": 0.2, "value": 0.0}
BATCH, TOTAL, MEMBERS = 40, 480, 5
FIT = Training(epochs=6, lr=1e-2, batch_size=16, warmup=0, weight_decay=3.0, bootstrap=0.7)
KEY = tuple[str, str]  # split, policy


class Heads(RewardModel):
    """A reward model whose body is frozen and has read everything: states [N, D], and each
    conversation's row in them."""

    def __init__(self, states: torch.Tensor, row: Mapping[str, int]) -> None:
        self.states, self.row = states, row
        self.members = [torch.nn.Linear(states.shape[1], 1) for _ in range(MEMBERS)]
        self.offsets, self.notes = [0.0] * MEMBERS, {}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def fits(self, episode: turnwise.Episode) -> bool:
        return True

    def rows(self, episodes: Sequence[turnwise.Episode]) -> list[Row]:
        return [Row((self.row[episode.id],), e, (0,), (0,)) for e, episode in enumerate(episodes)]

    def read(self, member: Any, micro: Any) -> torch.Tensor:
        return member(self.states[micro.ids[micro.row, micro.position]]).squeeze(-1)


class Played:
    """All conversations, by split and policy, and what the frozen body makes of them; `episodes` as
    a ledger has it."""

    def __init__(self, road: Path) -> None:
        self.groups: dict[KEY, list[tuple[turnwise.Episode, ...]]] = {}
        for split, count in (("train", 1000), ("held_out", 600)):
            for name in ("sft", "grpo"):
                player = policy_player(turnwise.Policy.from_pretrained(road / name / "policy"))
                seed = int(derive_id("asking", split, name)[:8], 16)
                begun = starts(ENV, seed, count, {"split": split})
                played = rollout(
                    player,
                    [(s, slot) for s in begun for slot in range(4)],
                    Where("asking", f"{split}-{name}", 1, 0),
                )
                self.groups[split, name] = [
                    tuple(played[i : i + 4]) for i in range(0, len(played), 4)
                ]
        everything = [e for groups in self.groups.values() for group in groups for e in group]
        self.known = {e.id: e for e in everything}
        self.row = {e.id: i for i, e in enumerate(everything)}
        body = RewardModel.from_pretrained(
            sorted((road / "road" / "reward-model").iterdir())[-1], device="cpu"
        )
        rows, states = body.rows(everything), []
        last = {e: len(row.positions) - 1 for e, row in enumerate(rows)}
        place = []
        with torch.no_grad():
            for micro in divide(rows, 16384, body.device):
                found = (
                    body.members[0]
                    .base_model(input_ids=micro.ids, use_cache=False)
                    .last_hidden_state[micro.row, micro.position]
                )
                keep = [
                    i
                    for i, (e, k) in enumerate(
                        zip(micro.episode.tolist(), micro.action.tolist(), strict=True)
                    )
                    if k == last[e]
                ]
                states.append(found[keep])
                place += [micro.episode.tolist()[i] for i in keep]
        self.states = torch.cat(states)[torch.tensor(place).argsort()]

    def episodes(self, ids: Sequence[str]) -> dict[str, turnwise.Episode]:
        return {id_: self.known[id_] for id_ in ids}


def curve(
    played: Played, pool: str, noise: float, share: float, seed: int
) -> tuple[list[float], float]:
    """The accuracy after each batch, and the share of the pairs asked about that differed in true
    outcome."""
    rng = random.Random(seed)
    groups = [
        g
        for name, count in POOLS[pool].items()
        for g in rng.sample(played.groups["train", name], count)
    ]
    held = [
        g
        for name, count in POOLS[pool].items()
        for g in played.groups["held_out", name][: 3 * count // 2]
    ]
    mine = torch.tensor([played.row[e.id] for g in groups for e in g])
    states = (played.states - played.states[mine].mean(0)) / (played.states[mine].std(0) + 1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Heads(states, played.row)
    ensemble_seeds = [derive_id("asking", seed, m) for m in range(MEMBERS)]
    pairs = [pair for g in groups for pair in itertools.combinations(g, 2)]
    by_luck = list(range(len(pairs)))
    rng.shuffle(by_luck)
    tests = [
        pair
        for g in held
        for pair in itertools.combinations(g, 2)
        if pair[0].env_return != pair[1].env_return
    ]
    shown = list({e.id: e for pair in tests for e in pair}.values())
    candidates = [e for g in groups for e in g]
    panel = SimulatedPanel(noise=noise, seed=seed)
    open_ = dict.fromkeys(by_luck)
    said: list[turnwise.Comparison] = []
    found, differed = [], []
    ledger: Any = played  # as far as `Data` needs one
    while len(said) < TOTAL:
        worth: dict[int, float] = {}
        if said and share < 1:
            scores = dict(
                zip(
                    (e.id for e in candidates),
                    finals(model, candidates, 10**6).numpy(),
                    strict=True,
                )
            )
            worth = {i: information(np.stack([scores[e.id] for e in pairs[i]], 1)) for i in open_}
        lucky = iter([i for i in by_luck[: round(share * len(pairs))] if i in open_])
        valued = iter(
            sorted(
                (i for i in by_luck[round(share * len(pairs)) :] if i in open_),
                key=lambda i: -worth.get(i, 0.0),
            )
        )
        for k in range(BATCH):
            chosen = next(lucky if rng.random() < share else valued) if said else by_luck[k]
            del open_[chosen]
            a, b = pairs[chosen]
            differed.append(a.env_return != b.env_return)
            panel.request([turnwise.Request("group", a.group, "panel", episodes=(a, b))])
        said += panel.receive()
        data = Data(ledger, said)
        for _ in FIT.fit(Ensemble(model, FIT), data, range(len(data.members)), ensemble_seeds):
            pass
        score = dict(
            zip((e.id for e in shown), finals(model, shown, 10**6).mean(1).tolist(), strict=True)
        )
        right = [(a.env_return > b.env_return) == (score[a.id] > score[b.id]) for a, b in tests]
        found.append(sum(right) / len(right))
    return found, sum(differed) / len(differed)


def needed(accuracy: np.ndarray, level: float) -> float:
    """Ratings until a monotone fit of the curve reaches a level; twice the total if it never
    does."""
    smooth = isotonic_regression(accuracy).x
    at = next((i for i, a in enumerate(smooth) if a >= level), None)
    if at is None:
        return 2.0 * TOTAL
    return BATCH * (at + ((level - smooth[at - 1]) / (smooth[at] - smooth[at - 1]) if at else 1.0))


def ratio(arm: np.ndarray, at_random: np.ndarray) -> tuple[float, float]:
    """Ratings that an arm needs for what random choice reaches at its end, and their ratio to those
    that random choice needs; [S, B] curves."""
    level = float(at_random[:, -3:].mean())
    mine = needed(arm.mean(0), level)
    return mine, mine / needed(at_random.mean(0), level)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--road", type=Path, default=Path("runs/bench-road/seed-1"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-asking"))
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    torch.set_num_threads(1)
    began = time.time()
    played = Played(arguments.road)
    print(
        f"{len(played.known)} conversations played and read in {time.time() - began:.0f} s",
        flush=True,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for pool, noise in SETTINGS:
        for seed in range(arguments.seeds):
            for arm, share in ARMS.items():
                accuracy, differed = curve(played, pool, noise, share, seed)
                results.append(
                    {
                        "pool": pool,
                        "noise": noise,
                        "seed": seed,
                        "arm": arm,
                        "accuracy": accuracy,
                        "differed": differed,
                    }
                )
                print(
                    pool,
                    noise,
                    seed,
                    arm,
                    " ".join(f"{a:.3f}" for a in accuracy),
                    f"{differed:.2f}",
                    f"{time.time() - began:.0f} s",
                    flush=True,
                )
    (arguments.out / "results.json").write_text(json.dumps(results) + "\n")
    write(results, arguments.seeds, time.time() - began)


def write(results: Sequence[Mapping[str, Any]], seeds: int, seconds: float) -> None:
    """The table in the page, and the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    of = lambda pool, noise, arm: [  # noqa: E731
        r for r in results if (r["pool"], r["noise"], r["arm"]) == (pool, noise, arm)
    ]
    marks = [BATCH * k for k in (1, 2, 3, 6, 9, 12)]
    lines = [
        (
            f"Command: `python benchmarks/asking.py --road runs/bench-road/seed-1 --seeds {seeds}`,"
            f" {seconds / 60:.0f} minutes. Accuracy on held-out pairs after so many ratings, mean"
            f" over seeds 0 to {seeds - 1} (standard deviation over the seeds at the end); ratings"
            " needed, and their ratio with its 90 % interval."
        ),
        "",
        (
            f"| pool, noise | order | pairs that differ | {' | '.join(map(str, marks))} | sd |"
            " needed | ratio |"
        ),
        "| --- " * (len(marks) + 6) + "|",
    ]
    verdicts = []
    rng = np.random.default_rng(0)
    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(4.2 * len(SETTINGS), 3.6), sharex=True)
    for axis, (pool, noise) in zip(axes, SETTINGS, strict=True):
        at_random = np.array([r["accuracy"] for r in of(pool, noise, "random")])
        drawn = rng.integers(0, seeds, (10_000, seeds))
        for arm in ARMS:
            table = np.array([r["accuracy"] for r in of(pool, noise, arm)])
            ratings, found = ratio(table, at_random)
            low, high = np.quantile([ratio(table[d], at_random[d])[1] for d in drawn], (0.05, 0.95))
            shown = "1" if arm == "random" else f"{found:.2f} ({low:.2f} to {high:.2f})"
            means = " | ".join(f"{table[:, n // BATCH - 1].mean():.3f}" for n in marks)
            differed = np.mean([r["differed"] for r in of(pool, noise, arm)])
            lines.append(
                f"| {pool}, {noise:g} | {arm} | {differed:.0%} | {means} | {table[:, -1].std():.3f}"
                f" | {ratings:.0f} | {shown} |"
            )
            if arm == "value, 20 % random":
                held = found <= 0.5 and high < 0.7
                verdicts.append(
                    f"- {'yes' if held else '**NO**'}: {pool} pool, noise {noise:g}: at most half"
                    " the ratings, interval below 0.7"
                )
            x = BATCH * np.arange(1, table.shape[1] + 1)
            axis.plot(x, table.mean(0), label=arm)
            error = 1.645 * table.std(0) / seeds**0.5
            axis.fill_between(x, table.mean(0) - error, table.mean(0) + error, alpha=0.2)
        axis.set(title=f"{pool} pool, noise {noise:g}", xlabel="ratings")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out pairs")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    page = PAGE.read_text() if PAGE.exists() else f"# Asking\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, rest = page.split(MARKS[0])
    PAGE.write_text(
        "\n".join([before + MARKS[0], *lines, "", *verdicts, MARKS[1]]) + rest.split(MARKS[1])[1]
    )
    print("\n".join([*lines, *verdicts]))


if __name__ == "__main__":
    main()
