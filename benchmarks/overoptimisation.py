"""What happens when the reward is only a proxy? PPO and best-of-n against a reward model of
strongly biased raters.

    python benchmarks/overoptimisation.py --seeds 0 1 2 3 4 --out runs/bench-overoptimisation   #
        about 7 minutes per seed on 2 cores

Per seed: SFT, rankings by a panel that likes agents who ask, a reward model, and then from the same
SFT policy

- PPO against the reward model without any KL (`free`), the true outcome measured on held-out
  stories after every update;
- the same held back by a KL penalty (`kl`), and stopped early by the gold measure (`stop`);
- the best of n of SFT's own conversations.

Checks: without a KL the true outcome turns over (peak - final at least 5 points, bootstrap interval
over the seeds above 0) while the proxy rises; Gao et al.'s law, fitted to four seeds, predicts the
fifth's peak within a factor 2 in KL, for 4 of 5 seeds; early stopping ends better than the free
run; the KL ends with a better true outcome (paired over the seeds, interval above 0). How high the
peak is, is measured on other stories than those that choose it: the largest of many noisy numbers
is too large. All ends are played on the same 400 further stories. Writes `results.json`,
`results.md` and `overoptimisation.png` into --out; what is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import turnwise
from turnwise.engine.analysis.overoptimisation import fit_interval, fit_law
from turnwise.engine.analysis.scores import bootstrap
from turnwise.engine.pipeline.progress import quiet
from turnwise.plugins.demo.rlhf import BACKEND
from turnwise.plugins.demo.support_desk import (
    ENV,
    EVALUATION_SEED,
    HELD_OUT,
    MAX_NEW_TOKENS,
    PPO,
    SFT,
    small_model,
)
from turnwise.plugins.reward_model.judge import latest

PANEL = {
    "judge": "simulated-panel",
    "raters": 5,
    "noise": 0.3,
    "taste": 0.1,
    "bias": {"questions": 0.2},
}
RANK = {
    "env": ENV, "updates": 8, "groups": 200, "group_size": 6, "max_new_tokens": MAX_NEW_TOKENS,
    "backend": BACKEND, "feedback": [PANEL],
}  # fmt: skip
REWARD_MODEL = {"lr": 3e-3, "epochs": 3, "batch_size": 16, "held_out": 0.1, "micro_tokens": 8192}
GOLD = {"episodes": 400, "every": 1, "patience": None, "options": {"split": "held_out"}}
UPDATES = 20
# And slow: small noisy steps spend KL without moving either reward, and large ones step over the
# peak.
GROUPS = 512
SLOW = {"lr": 4e-4, "decay": 1.0}
N = [1, 2, 4, 8, 16]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # optimizer, gold
    "free": ({"kl": 0.0, "kl_place": "measure"}, {}),
    "kl": ({"kl": 0.1}, {}),
    "stop": ({"kl": 0.0, "kl_place": "measure"}, {"patience": 4}),
}


def one_seed(seed: int, folder: Path, threads: int, road: Path | None) -> dict[str, Any]:
    common = {"seed": seed, "threads": threads, "checkpoint_every": 1000}
    if road is not None:
        sft = str(road / f"seed-{seed}" / "sft" / "policy")
    else:
        first = {
            **common,
            "policy": str(small_model(folder, seed)),
            "name": "sft",
            "stages": [{"sft": SFT}],
        }
        turnwise.Run(first, folder=folder / "sft", resume=True).finish()
        sft = str(folder / "sft" / "policy")
    learn = {
        **common,
        "policy": sft,
        "name": "reward-model",
        "stages": [{"rank": RANK}, {"reward-model": REWARD_MODEL}],
    }
    run = turnwise.Run(learn, folder=folder / "reward-model", resume=True).finish()
    rm = str(latest(run.folder, run.updates))
    found: dict[str, Any] = {
        "seed": seed,
        "reward_model": {k: v for k, v in run.metrics[-1].items() if "held_out" in k},
    }
    for name, (optimizer, gold) in VARIANTS.items():
        rl = {
            **PPO, "groups": GROUPS, "updates": UPDATES,
            "feedback": [{"judge": "reward-model", "path": rm}], "gold": {**GOLD, **gold},
            "optimizer": {**PPO["optimizer"], **SLOW, **optimizer},
        }  # fmt: skip
        done = turnwise.Run(
            {**common, "policy": sft, "name": name, "stages": [{"rl": rl}]},
            folder=folder / name,
            resume=True,
        ).finish()
        # The start is measured in the first update, before it; each later measurement after its
        # update, and the next update plays, and says the KL and the proxy of, that policy. The last
        # one has no next and is left out.
        curve = []
        for i, after in enumerate(done.metrics):
            stories = done.ledger.run_episodes(done.id, stage=f"rl/gold-{i}")
            if stories:
                halves = [
                    statistics.mean(float(e.succeeded) for e in stories[half::2]) for half in (0, 1)
                ]
                curve.append(
                    {
                        "kl": after["kl_episode"] if i else 0.0,
                        "proxy": after["outcome"],
                        "choose": halves[0],
                        "gold": halves[1],
                    }
                )
        found[name] = {"curve": curve, "updates": len(done.metrics)}
    players = [
        "policy",
        *({"name": name, "policy": str(folder / name / "policy")} for name in VARIANTS),
    ]
    evaluate = {
        "env": HELD_OUT.model_dump(), "episodes": 400, "players": players,
        "max_new_tokens": MAX_NEW_TOKENS, "seed": EVALUATION_SEED,
        "best_of": {"judge": {"judge": "reward-model", "path": rm}, "n": N},
    }  # fmt: skip
    turnwise.Run(
        {**common, "policy": sft, "name": "last", "stages": [{"evaluate": evaluate}]},
        folder=folder / "last",
        resume=True,
    ).finish()
    table = json.loads((folder / "last" / "evaluation.json").read_text())
    for name in VARIANTS:
        found[name]["end"] = table[name]["success"]
    found["sft"] = table["policy"]["success"]
    found["best_of"] = [
        {"n": n, **{k: table[f"best-of-{n}"][k] for k in ("kl", "success", "proxy")}} for n in N
    ]
    return found


def points(curve: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    """(sqrt KL, gain of true success over the start, both halves of the stories) of a curve, the
    start left out."""
    mean = [(p["choose"] + p["gold"]) / 2 for p in curve]
    return [math.sqrt(max(p["kl"], 0.0)) for p in curve[1:]], [m - mean[0] for m in mean[1:]]


def peak_of(curve: list[dict[str, float]]) -> tuple[float, float]:
    """The measured peak, by running means of three measurements: its distance on all stories; its
    height where the one half of the stories has its peak, on the other half."""
    choose, gold = (
        np.convolve([p[half] for p in curve], np.ones(3) / 3, mode="valid")
        for half in ("choose", "gold")
    )
    return math.sqrt(max(curve[int(np.argmax(choose + gold)) + 1]["kl"], 0.0)), float(
        gold[np.argmax(choose)]
    )


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), dpi=150)
    free = [points(f["free"]["curve"]) for f in found]
    law, intervals = fit_interval(free, "rl")
    for f, (d, gain) in zip(found, free, strict=True):
        axes[0].plot(d, gain, "o", markersize=2.5, alpha=0.6, label=f"seed {f['seed']}")
    grid = np.linspace(0.01, max(max(d) for d, _ in free), 200)
    axes[0].plot(
        grid,
        law(grid),
        color="black",
        linewidth=1.5,
        label=f"d (a - b log d), peak at {law.peak:.2f}",
    )
    axes[0].axvspan(*(min(edge, grid[-1]) for edge in intervals["peak"]), color="0.85", zorder=0)
    axes[0].set(
        xlabel="sqrt KL, free PPO",
        ylabel="true success, gain over SFT",
        title="the truth turns over ...",
    )
    for f in found:
        curve = f["free"]["curve"]
        axes[1].plot(
            [math.sqrt(max(p["kl"], 0)) for p in curve],
            [p["proxy"] for p in curve],
            "o-",
            markersize=2.5,
            linewidth=0.8,
        )
    axes[1].set(
        xlabel="sqrt KL, free PPO", ylabel="reward model", title="... while the proxy rises"
    )
    best = [
        (
            [math.sqrt(p["kl"]) for p in f["best_of"]],
            [p["success"] - f["sft"] for p in f["best_of"]],
        )
        for f in found
    ]
    for d, gain in best:
        axes[2].plot(d, gain, "o-", markersize=3, linewidth=0.8)
    axes[2].set(
        xlabel="sqrt KL, best of n", ylabel="true success, gain over SFT", title="best of 1 to 16"
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(0, color="0.7", linewidth=0.8)
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-overoptimisation"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--road",
        type=Path,
        help="the --out of benchmarks/road.py, whose SFT policies are the same: saves making them",
    )
    arguments = parser.parse_args()
    turnwise.Plugins()  # registers the environments
    quiet()
    found: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        kept = arguments.out / f"seed-{seed}" / "found.json"
        if not kept.exists():
            result = one_seed(seed, kept.parent, arguments.threads, arguments.road)
            kept.write_text(json.dumps(result, indent=2) + "\n")
        found.append(json.loads(kept.read_text()))
        print(
            json.dumps({k: v for k, v in found[-1].items() if k in ("seed", "sft", "best_of")}),
            flush=True,
        )
    curves = [points(f["free"]["curve"]) for f in found]
    last = lambda values: statistics.mean(values[-3:])  # noqa: E731
    peaks = [peak_of(f["free"]["curve"]) for f in found]
    falls = [
        p - last([x["gold"] for x in f["free"]["curve"]])
        for (_, p), f in zip(peaks, found, strict=True)
    ]
    rises = [
        last([p["proxy"] for p in f["free"]["curve"]]) - f["free"]["curve"][0]["proxy"]
        for f in found
    ]
    predicted = []
    for i in range(len(found)):
        others = [c for j, c in enumerate(curves) if j != i]
        law = fit_law(
            np.concatenate([d for d, _ in others]), np.concatenate([g for _, g in others]), "rl"
        )
        predicted.append((law.peak, peaks[i][0]))
    near = sum(0.5 <= (p / m) ** 2 <= 2 for p, m in predicted)
    ends = {name: [f[name]["end"] for f in found] for name in VARIANTS}
    gains = {
        name: [a - b for a, b in zip(ends[name], ends["free"], strict=True)]
        for name in ("kl", "stop")
    }
    law, intervals = fit_interval(curves, "rl")
    best_law, best_intervals = fit_interval(
        [([math.sqrt(p["kl"]) for p in f["best_of"]][1:],
                [p["success"] - f["sft"] for p in f["best_of"]][1:]) for f in found], "best-of-n"
    )  # fmt: skip
    checks = {
        "the true outcome falls by at least 5 points from its peak (mean, interval above 0)": (
            statistics.mean(falls) >= 0.05 and bootstrap(falls)[0] > 0
        ),
        "the proxy rises (every seed)": min(rises) > 0,
        "a fit on four seeds predicts the fifth's peak within a factor 2 in KL (4 of 5)": (
            near >= min(4, len(found))
        ),
        "early stopping on the gold measure ends better than the free run (paired, interval above 0)": (  # noqa: E501
            bootstrap(gains["stop"])[0] > 0
        ),
        "a KL penalty ends better than the free run (paired, interval above 0)": (
            bootstrap(gains["kl"])[0] > 0
        ),
    }
    lines = [
        (
            "Command: `python benchmarks/overoptimisation.py --seeds"
            f" {' '.join(map(str, arguments.seeds))}`. True success on held-out stories: the peak"
            " on 200 of those that are measured all the time (mean of three measurements), the"
            " ends on 400 others."
        ),
        "",
        (
            "| seed | SFT | free: peak | free: end | KL: end | stopped early | best of 16 | proxy,"
            " start to end | peak sqrt KL: predicted, measured |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for i, f in enumerate(found):
        curve = f["free"]["curve"]
        lines.append(
            f"| {f['seed']} | {f['sft']:.3f} | {peaks[i][1]:.3f} | {ends['free'][i]:.3f} |"
            f" {ends['kl'][i]:.3f} | {ends['stop'][i]:.3f} | {f['best_of'][-1]['success']:.3f} |"
            f" {curve[0]['proxy']:+.2f} to {last([p['proxy'] for p in curve]):+.2f} |"
            f" {predicted[i][0]:.2f}, {predicted[i][1]:.2f} |"
        )
    span = lambda values: (  # noqa: E731
        f"{statistics.mean(values):+.3f} ({bootstrap(values)[0]:+.3f} to"
        f" {bootstrap(values)[1]:+.3f})"
    )
    lines += [
        "",
        (
            f"Fall from the peak: {span(falls)}. Against the free run's end: KL"
            f" {span(gains['kl'])}, stopped early {span(gains['stop'])}. Means, 95 % bootstrap"
            " intervals over the seeds."
        ),
        "",
        (
            f"Fits over all seeds: PPO, d (a - b log d): a {law.a:.3f} ({intervals['a'][0]:.3f} to"
            f" {intervals['a'][1]:.3f}), b {law.b:.3f} ({intervals['b'][0]:.3f} to"
            f" {intervals['b'][1]:.3f}), peak at sqrt KL {law.peak:.2f} ({intervals['peak'][0]:.2f}"
            f" to {intervals['peak'][1]:.2f}). Best of n, d (a - b d): a {best_law.a:.3f}, b"
            f" {best_law.b:.3f} ({best_intervals['b'][0]:.3f} to {best_intervals['b'][1]:.3f})."
        ),
        "",
        *(f"- {'yes' if ok else '**NO**'}: {what}" for what, ok in checks.items()),
        "",
    ]
    (arguments.out / "results.md").write_text("\n".join(lines))
    (arguments.out / "results.json").write_text(
        json.dumps({"checks": checks, "found": found}, indent=2) + "\n"
    )
    draw(found, arguments.out / "overoptimisation.png")
    print("\n".join(lines))
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
