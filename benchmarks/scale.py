"""A model of what an update costs on many machines: fitted here, checked here, and then on paper.

    python benchmarks/scale.py check      # fits it on this machine; predicts 1 and 2 Ray workers
    python benchmarks/scale.py paper      # 7B and 70B on 8 to 256 GPUs
    python benchmarks/scale.py waiting    # 10,000 conversations with slow environments

Play: a worker samples its conversations together. A step of decoding takes `step` seconds and `row`
for each conversation in it, a token of a prompt `prompt`; environments take their time, drawn for
each turn. `deterministic` waits for the slowest of a turn; `ready-first` replies to whoever waits.
Update: `update` seconds and `token` for each token. Versions of the weights take `send`, and every
conversation `hand_over`. With `overlap: N` a round begins when the update N + 1 before it is made,
on each worker after the one before it; it is judged when it is played, and trains when it is judged
and the update before it is made.

`check` times play and updates of few conversations in process, and a small round on Ray, fits the
constants to these, and compares what they say of larger rounds, on one worker and on two, with
runs. It ends with an error where a prediction is more than 20 % off.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SIGMA = 1.2  # of the lognormal time of an environment's step


@dataclass(frozen=True)
class Speed:
    """What takes how long, in seconds.

    Attributes:
        step, row: of decoding a token for all conversations of a worker, and more for each.
        prompt: of a token that is read.
        update, token: of an update, and more for each token in it.
        send: of a version of the weights to all workers.
        hand_over: of a conversation, from a worker to the run.
        rows: conversations that a worker has memory for at a time; not a time.
    """

    step: float
    row: float
    prompt: float
    update: float
    token: float
    send: float = 0.0
    hand_over: float = 0.0
    rows: int = 1_000_000


@dataclass(frozen=True)
class Work:
    """What is played and learned from in an update.

    Attributes:
        conversations, turns: how many, and replies of each.
        reply, read: tokens of a reply, and of what is read before one.
        vary: whether replies' lengths differ (uniform between nothing and twice the mean).
        latency: mean seconds of an environment's step, heavy-tailed.
        judge: seconds until feedback comes.
    """

    conversations: int
    turns: int
    reply: int
    read: int
    vary: bool = True
    latency: float = 0.0
    judge: float = 0.0

    @property
    def tokens(self) -> int:
        """How many an update reads."""
        return self.conversations * self.turns * (self.reply + self.read)

    def length(self, draw: random.Random) -> int:
        """Returns the tokens of a reply."""
        return 1 + int(draw.random() * 2 * self.reply) if self.vary else self.reply

    def wait(self, draw: random.Random) -> float:
        """Returns the seconds of an environment's step."""
        if not self.latency:
            return 0.0
        return draw.lognormvariate(math.log(self.latency) - SIGMA**2 / 2, SIGMA)


def play(speed: Speed, work: Work, own: int, schedule: str, draw: random.Random) -> float:
    """Returns the seconds in which a worker plays `own` conversations: one part of them after the
    other, where it has no memory for all."""
    parts = -(-own // speed.rows)
    way = together if schedule == "deterministic" else ready_first
    return sum(way(speed, work, len(range(part, own, parts)), draw) for part in range(parts))


def together(speed: Speed, work: Work, own: int, draw: random.Random) -> float:
    """Plays turn by turn: all reply, then all environments answer."""
    took = 0.0
    for _ in range(work.turns):
        lengths = [work.length(draw) for _ in range(own)]
        took += (
            own * work.read * speed.prompt + max(lengths) * speed.step + sum(lengths) * speed.row
        )
        took += max(work.wait(draw) for _ in range(own))
    return took


def ready_first(speed: Speed, work: Work, own: int, draw: random.Random) -> float:
    """Plays event by event: who is ready joins the steps that are being made.

    `made` counts steps; a reply of n tokens that begins after step k ends after step k + n.
    """
    now, made = 0.0, 0.0
    replying: list[tuple[float, int]] = []  # the step that each ends with
    waiting = [(0.0, each) for each in range(own)]  # when each environment has answered
    left = [work.turns] * own
    while replying or waiting:
        pace = speed.step + len(replying) * speed.row
        ends = now + (replying[0][0] - made) * pace if replying else math.inf
        if waiting and waiting[0][0] <= ends:
            made += (max(waiting[0][0] - now, 0.0) / pace) if replying else 0.0
            now = max(now, waiting[0][0])
            _, each = heapq.heappop(waiting)
            now += work.read * speed.prompt  # the others wait for what it reads
            heapq.heappush(replying, (made + work.length(draw), each))
            continue
        now, (made, each) = ends, heapq.heappop(replying)
        left[each] -= 1
        answered = now + work.wait(draw)
        if left[each]:
            heapq.heappush(waiting, (answered, each))
    return now


@dataclass(frozen=True)
class Course:
    """How a run goes: seconds per update, the share of it in which workers play and the policy is
    updated, and how many updates later a conversation trains, in the mean."""

    seconds: float
    playing: float
    updating: float
    staleness: float


def course(
    speed: Speed, work: Work, workers: int, overlap: int, schedule: str, rounds: int = 18
) -> Course:
    """Returns how a run goes, by the rounds in the middle of it."""
    draw = random.Random(0)
    free, ends = [0.0] * workers, list[float]()
    played: list[tuple[float, float]] = []  # from when to when a worker did
    updating = speed.update + speed.token * work.tokens
    shares = [len(range(w, work.conversations, workers)) for w in range(workers)]
    starts = []
    for i in range(rounds):
        allowed = ends[i - overlap - 1] if i > overlap else 0.0
        starts.append(allowed)
        for w, own in enumerate(shares):
            begins = max(free[w], allowed + speed.send)
            free[w] = begins + play(speed, work, own, schedule, draw)
            played.append((begins, free[w]))
        judged = max(free) + work.conversations * speed.hand_over + work.judge
        ends.append(max(judged, ends[-1] if ends else 0.0) + updating)
    # From the middle on, and not the last: what is played beside it would be missing.
    first, last = rounds // 2, rounds - overlap - 1
    since, until = ends[first - 1], ends[last]
    seconds = (until - since) / (last + 1 - first)
    busy = sum(max(min(end, until) - max(begin, since), 0.0) for begin, end in played)
    made = [sum(start >= end for end in ends) for start in starts]
    stale = statistics.mean(i - made[i] for i in range(first, rounds))
    return Course(seconds, busy / (workers * (until - since)), updating / seconds, stale)


# Fitted and checked here.


def fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns intercept and slope of the line through points, neither below 0."""
    xs, ys = zip(*points, strict=True)
    slope = max(statistics.linear_regression(xs, ys).slope, 0.0)
    return max(statistics.mean(ys) - slope * statistics.mean(xs), 0.0), slope


def check(given: argparse.Namespace) -> None:
    """Fits on this machine, predicts, runs, and says how far apart they are."""
    import gymnasium
    import torch
    import turnwise
    from speed_turnwise import Talk
    from speed_work import GROUP, REPLY, WORKS, make

    torch.set_num_threads(1)

    class Small(Talk):  # type: ignore[misc]
        work = WORKS["A-small"]

    gymnasium.register("speed/Small-v0", Small)
    turns = Small.work.turns

    def run(folder: Path, groups: int, backend: Any, updates: int = 3) -> tuple[float, float, int]:
        """Returns medians of play and update in seconds, and the tokens of an update."""
        stage = {
            "env": "speed/Small-v0", "updates": updates, "groups": groups, "group_size": GROUP,
            "max_new_tokens": REPLY, "backend": backend,
            "optimizer": {"name": "grpo", "lr": 1e-6, "kl": 0.0},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as runs:
            config = {"policy": str(folder), "threads": 1, "checkpoint_every": 1000,
                      "stages": [{"rl": stage}]}  # fmt: skip
            made = list(turnwise.Run(config, folder=Path(runs) / "run"))[1:]
        tokens = statistics.median(
            sum(len(t.prompt_ids) + len(t.action_ids or ()) for e in u.episodes for t in e.turns)
            for u in made
        )
        play_, update = (
            statistics.median(u.metrics[f"seconds/{name}"] for u in made)
            for name in ("play", "update")
        )
        return play_, update, int(tokens)

    ray = {"name": "ray", "workers": 1, "rows": 128}
    with tempfile.TemporaryDirectory() as root:
        folder = make(Small.work, Path(root))
        plays, updates = list[tuple[float, float]](), list[tuple[float, float]]()
        for groups in (1, 2, 3):
            took, learned, tokens = run(folder, groups, "in-process")
            plays.append((groups * GROUP, took))
            updates.append((tokens, learned))
            print(f"{groups * GROUP} conversations in process: play {took:.2f} s,"
                  f" update of {tokens} tokens {learned:.2f} s", flush=True)  # fmt: skip
        step, row = (each / (turns * REPLY) for each in fitted(plays))
        update, token = fitted(updates)
        speed = Speed(step, row, 0.0, update, token)  # what is read is in `row`: both grow alike
        small = Work(GROUP, turns, REPLY, tokens // (3 * GROUP * turns) - REPLY, vary=False)
        over = run(folder, 1, ray)[0] - together(speed, small, GROUP, random.Random(0))
        speed = replace(speed, send=max(over, 0.0))
        print(f"step {1e3 * step:.2f} ms, row {1e3 * row:.3f} ms, update {update:.2f} s and"
              f" {1e6 * token:.0f} us a token, Ray {1e3 * speed.send:.0f} ms")  # fmt: skip
        print("| workers | conversations | predicted s | measured s | off by |")
        print("| --- | --- | --- | --- | --- |")
        worst = 0.0
        for workers, groups in itertools.product((1, 2), given.groups):
            work = replace(small, conversations=groups * GROUP)
            says = course(speed, work, workers, 0, "deterministic").seconds
            took, learned, _ = run(folder, groups, {**ray, "workers": workers})
            off = says / (took + learned) - 1
            worst = max(worst, abs(off))
            print(f"| {workers} | {groups * GROUP} | {says:.2f} | {took + learned:.2f} |"
                  f" {off:+.0%} |", flush=True)  # fmt: skip
    if worst > 0.2:
        sys.exit("a prediction is more than 20 % off")


# On paper.


@dataclass(frozen=True)
class Model:
    """A model's shape. parameters, layers, and bytes of keys and values for a token (bfloat16)."""

    name: str
    parameters: float
    cache: float


MODELS = [
    Model("7B", 7.6e9, 2 * 2 * 28 * 4 * 128),  # 28 layers, 4 heads of keys and values, 128 wide
    Model("70B", 70.6e9, 2 * 2 * 80 * 8 * 128),  # 80 layers, 8 heads
]
# An H100's data sheet; 400 Gb/s a GPU.
GPU = {"flops": 989e12, "memory": 3.35e12, "link": 50e9, "bytes": 80e9}
SHARE = {"flops": 0.4, "memory": 0.6, "link": 0.6}  # of it, assumed; nothing was measured on a GPU
ROOM = {"7B": 1, "70B": 4}  # GPUs of a worker: weights and a cache must fit into nine tenths


def on_gpus(model: Model, work: Work, players: int, learners: int) -> tuple[Speed, int]:
    """Returns what takes how long, and how many workers the players' GPUs are."""
    longest = work.turns * (work.reply + work.read)
    context = longest / 2  # in the mean
    flops, memory, link = (GPU[k] * SHARE[k] for k in ("flops", "memory", "link"))
    each = ROOM[model.name]
    weights = 2 * model.parameters
    speed = Speed(
        step=weights / (each * memory),
        row=context * model.cache / (each * memory) + 2 * model.parameters / (each * flops),
        prompt=2 * model.parameters / (each * flops),
        # Gathered for the forward and the backward pass, and gradients scattered, of each share.
        update=3 * weights / link + 0.5,
        token=8 * model.parameters / (learners * flops),  # 6, and 2 of the reference
        send=weights / (each * link),
        hand_over=1e-4,
        rows=int((0.9 * each * GPU["bytes"] - weights) / (longest * model.cache)),
    )
    return speed, max(players // each, 1)


def paper(given: argparse.Namespace) -> None:
    """Prints where the time goes for models and numbers of GPUs, and what helps."""
    work = Work(1024, 8, 300, 200, latency=0.2, judge=10.0)
    print(f"1,024 conversations of {work.turns} turns, {work.reply} tokens a reply and {work.read}"
          " read, environments of 0.2 s, a judge of 10 s:\n")  # fmt: skip
    print("| model | GPUs: play, update | of a worker | update s | play s | in step | `overlap: 1`"
          " | `overlap: 2` | ready-first, `overlap: 1` | versions old |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, gpus in itertools.product(MODELS, (8, 32, 64, 256)):
        if gpus < 2 * ROOM[model.name] or 16 * model.parameters > gpus / 2 * 80e9:
            print(f"| {model.name} | {gpus} | | does not fit: weights, gradients and moments take"
                  f" {16 * model.parameters / 1e9:,.0f} GB | | | | | | |")  # fmt: skip
            continue
        halves = range(1, 8)
        found = []
        for eighths in halves:  # of the GPUs that play
            players = gpus * eighths // 8
            if players < ROOM[model.name] or 16 * model.parameters > (gpus - players) * 80e9:
                continue
            speed, workers = on_gpus(model, work, players, gpus - players)
            found.append((course(speed, work, workers, 1, "ready-first").seconds, players))
        _, players = min(found)
        speed, workers = on_gpus(model, work, players, gpus - players)

        def at(overlap: int, schedule: str, speed: Speed = speed, workers: int = workers) -> Course:
            return course(speed, work, workers, overlap, schedule)

        step, one, two = (at(n, "deterministic").seconds for n in (0, 1, 2))
        ready = at(1, "ready-first")
        own = -(-work.conversations // workers)
        took = play(speed, work, own, "deterministic",
                    random.Random(0))  # fmt: skip
        learned = speed.update + speed.token * work.tokens
        print(f"| {model.name} | {players}, {gpus - players} |"
              f" {own} ({min(own, speed.rows)} at a time) | {learned:.1f} | {took:.1f} |"
              f" {step:.1f} | {one:.1f} | {two:.1f} | {ready.seconds:.1f} |"
              f" {ready.staleness:.1f} |")  # fmt: skip


def waiting(given: argparse.Namespace) -> None:
    """Prints what schedules and overlap buy where environments are slow."""
    work = Work(10_000, 8, 300, 200, judge=5.0)
    speed, workers = on_gpus(MODELS[0], work, 48, 80)
    assert workers * speed.rows >= work.conversations
    print("10,000 conversations at a time on 48 workers of one GPU, 80 GPUs that learn, a 7B")
    print("policy, 8 turns; steps of environments heavy-tailed (lognormal, sigma 1.2):\n")
    print("| mean s | schedule | overlap | s an update | workers busy | update's share |"
          " versions old |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for latency, schedule in itertools.product(
        (0.0, 0.2, 2.0, 10.0), ("deterministic", "ready-first")
    ):
        for overlap in (0, 1, 2):
            made = course(speed, replace(work, latency=latency), workers, overlap, schedule)
            print(f"| {latency:g} | {schedule} | {overlap} | {made.seconds:.0f} |"
                  f" {made.playing:.0%} | {made.updating:.0%} | {made.staleness:.1f} |",
                  flush=True)  # fmt: skip


def main() -> None:
    """Does what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what: dict[str, Callable[[argparse.Namespace], None]] = {
        "check": check, "paper": paper, "waiting": waiting,
    }  # fmt: skip
    parser.add_argument("what", choices=list(what))
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8])
    given = parser.parse_args()
    since = time.perf_counter()
    what[given.what](given)
    print(f"\n({time.perf_counter() - since:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
