"""`turnwise estimate PIPELINE`: what judging will take, before a run: questions, tokens, dollars.

A few starts of each stage are played by the policy as it is, the very prompts are written for these
conversations, and counted; nothing is sent. A token is taken to be four bytes of prompt, an answer
to have 250 tokens (or `max_tokens`, where that is fewer); "at most" takes two bytes and
`max_tokens`. What the policy will say when it has learned is not known: conversations that grow
cost more. Caches, canaries and repeated questions are left out.

`turnwise run --dry-run` counts the same questions on conversations of one word and one reply of one
word: what is written for every one of them, and the answers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from ...judging import Source, Sources, with_members
from ...protocols import Episode, Message, Question, Request, Start, Turn, starts
from ...running import RL, Evaluate, PolicyPlayer, Rank, Run, Where, rollout
from ..asking.options import Asking
from ..asking.prices import cost
from ..combined.escalation import Escalation
from ..constitutional.revise import Revise
from ..llm.judge import ModelJudge
from ..models.model import Usage

ANSWER = 250  # tokens
USERS = "turnwise.judges.users.simulated_user:SimulatedUser"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one judge will take in one stage.

    Attributes:
        questions: requests to the model.
        tokens: of all prompts and answers.
        dollars, most: None where the price is unknown.
        budget: dollars that the judge may spend in a run; None: no limit.
    """

    stage: str
    judge: str
    model: str
    questions: int
    tokens: int
    dollars: float | None
    most: float | None
    budget: float | None


def estimate(run: Run, sample: int = 2) -> list[Estimate]:
    """Estimates for every model that a run will ask.

    Args:
        run: the run whose stages are gone through.
        sample: starts that are played per environment of a stage. 0: nothing is loaded or played,
            and all conversations are taken to be as short as they can be.
    """
    found: list[Estimate] = []
    for label, stage in run.stages:
        if isinstance(stage, Evaluate):
            found += _of_evaluate(label, stage, run, sample)
        if not isinstance(stage, (RL, Rank, Revise)) or stage.env is None:
            continue
        env = stage.env
        run.stage = label
        groups = stage.groups * stage.updates
        weights = sum(each.weight for each in env)
        for each in env:
            judges = (
                [("critic", stage.make_critic(run), None)]
                if isinstance(stage, Revise)
                else list(_sources(stage.feedback if each.feedback is None else each.feedback, run))
            )
            if not judges:
                continue
            played = _played(
                run, stage, each, sample, stage.group_size, max_turns=stage.max_turns,
                step_limit=stage.step_limit, schedule=stage.schedule,
            )  # fmt: skip
            share = groups * each.weight / weights / max(sample, 1)
            for name, judge, source in judges:
                if isinstance(judge, ModelJudge):
                    assert source is not None  # a critic alone has none
                    prompts = _prompts(judge, _requests(judge, source, played))
                    asked = share * source.share * source.raters * _let_up(source, name)
                else:
                    prompts, asked = _critics(judge, played), share
                found.append(_estimate(label, name, judge, prompts, asked))
    run.stage = ""
    return found


def without_words(run: Run) -> list[str]:
    """Returns what every model that a run asks costs, the words of the conversations left out, as
    lines; and which environments have users that a model plays, which nothing is known of."""
    lines = []
    for each in estimate(run, sample=0):
        price = "whose price is unknown: give `prices`"
        limit = ""
        if each.dollars is not None:
            price = f"about ${each.dollars:,.2f}"
        if each.budget is not None:
            ends = "pauses" if (each.dollars or 0) > each.budget else "would pause"
            limit = f"; the run {ends} before it pays ${each.budget:,.2f}"
        asked = f"{each.stage}: {each.judge} asks {each.model} {each.questions:,} questions"
        lines.append(f"{asked}, {price}{limit}")
    for label, stage in run.stages:
        envs = stage.env if isinstance(stage, (RL, Rank, Revise, Evaluate)) else None
        for env in envs or ():
            spec = gymnasium.registry.get(env.id)
            if spec is not None and spec.entry_point == USERS:
                user = (spec.kwargs | env.kwargs).get("user")
                model = user.get("model") if isinstance(user, Mapping) else user
                lines.append(
                    f"{label}: {model} plays the users of {env.id}, which is not estimated"
                )
    return lines


def _of_evaluate(label: str, stage: Evaluate, run: Run, sample: int) -> Iterable[Estimate]:
    """Yields what the judge of pairs and that of `best_of` will take. The policy plays all, and
    not greedily: it would say the same as itself."""
    run.stage = label
    most = max(stage.best_of.n) if stage.best_of else 1
    asked = [
        (found, times)
        for spec, times in (
            (stage.judge, len(stage.players) - 1),  # pairs of a start; each is asked in both orders
            (stage.best_of and stage.best_of.judge, most / 2),  # two conversations were played
        )
        for found in _sources([spec] if spec else [], run)
    ]
    for env in stage.env if asked else ():
        played = _played(run, stage, env, sample, 2)
        pairs = [
            (a, b) for a, b in itertools.pairwise(played) if a.group == b.group
        ]  # of each start two were played
        for (name, judge, _), times in asked:
            if judge.kind == "group":
                prompts = [p for pair in pairs for p in _of_pair(judge, pair)]
            else:
                requests = [Request("episode", e.id, label, episodes=(e,)) for e in played]
                prompts = _prompts(judge, requests)
            share = stage.episodes / max(sample, 1) * times
            yield _estimate(label, name, judge, prompts, share)


def _of_pair(judge: Any, pair: Sequence[Episode]) -> list[Any]:
    """Returns what a judge of pairs is asked in both orders; one that asks in both by itself is
    asked the same again, which is paid once."""
    key = pair[0].group
    first, second = (
        _prompts(judge, [Request("group", key, "", ask={"order": i}, episodes=tuple(shown))])
        for i, shown in enumerate((pair, pair[::-1]))
    )
    known = {(p.system, p.user) for p in first}
    return first + [p for p in second if (p.system, p.user) not in known]


def _sources(specs: Any, run: Run) -> Iterable[tuple[str, Any, Source]]:
    for source in Sources.make([specs], run.plugins, 1.0).of_env[0]:
        for name, part in with_members(source.given, source.name):
            if isinstance(part, Asking):
                yield name, part, source


def _let_up(source: Source, name: str) -> float:
    """Returns the share of a source's questions that a part of it is asked at most: of an
    escalation, the second is asked within a limit."""
    if not isinstance(source.given, Escalation):
        return 1.0
    first = next(iter(source.given.members))
    part = name.removeprefix(f"{source.name}.").partition(".")[0]
    return 1.0 if part == first else source.given.limit


def _played(run: Run, stage: Any, env: Any, sample: int, size: int, **limits: Any) -> list[Episode]:
    """Plays some starts; returns the conversations that have replies. Without a sample they are
    one of each slot, as short as a conversation can be."""
    from ...protocols import Sampling

    if not sample:
        return [
            Episode(str(slot), Start(env.id, 0), (Turn(Message("user", "Hello"), f"{slot}", 0.0),),
                    "terminated", run=run.id, stage=run.stage, slot=slot)
            for slot in range(size)  # equal replies are not compared
        ]  # fmt: skip

    temperature = stage.temperature or 1.0 if isinstance(stage, Evaluate) else stage.temperature
    player = PolicyPlayer(run.policy, Sampling(temperature, stage.max_new_tokens))
    chosen = [
        (start, slot)
        for start in starts(env.id, 4242, sample, env.options, env.kwargs)
        for slot in range(size)
    ]
    played = rollout(player, chosen, Where("estimate", run.stage, 0, 0), **limits)
    return [e for e in played if e.ending != "failed" and e.turns]


def _prompts(judge: Any, requests: Iterable[Request]) -> list[Any]:
    return [call.write("0" * 16) for request in requests for call in judge.calls(request)]


def _critics(judge: Any, played: Sequence[Episode]) -> list[Any]:
    """Returns what a critic is asked, once per reply and round."""
    prompts = []
    for e in played:
        for k, turn in enumerate(e.turns):
            texts = [
                m for t in e.turns[:k] for m in (t.observation, Message("assistant", t.action))
            ] + [turn.observation]
            drawn = judge.constitution.principles[0]
            prompts += [judge._call(texts, turn.action, drawn).write("0" * 16)] * judge.rounds
    return prompts


def _estimate(
    stage: str, name: str, judge: Asking, prompts: Sequence[Any], share: float
) -> Estimate:
    """Adds up prompts, each of which stands for `share` of them."""
    sizes = [len((p.system + p.user + json.dumps(dict(p.schema))).encode()) for p in prompts]
    answers = [min(ANSWER, p.max_tokens) for p in prompts]
    expected = Usage(fresh=int(sum(sizes) / 4 * share), output=int(sum(answers) * share))
    most = Usage(
        fresh=int(sum(sizes) / 2 * share), output=int(sum(p.max_tokens for p in prompts) * share)
    )
    price = judge._price
    dollars, at_most = (
        None if price is None else cost(usage, price, judge.batch) for usage in (expected, most)
    )
    return Estimate(
        stage,
        name,
        judge._model.name,
        round(len(prompts) * share),
        expected.fresh + expected.output,
        dollars,
        at_most,
        judge.budget,
    )


def _requests(judge: ModelJudge, source: Source, episodes: Sequence[Episode]) -> list[Request]:
    groups: dict[str, list[Episode]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(e)
    asked: list[Question] = []
    for key, members in groups.items():
        asked += source.given.plan(key, members)
    return [
        Request(judge.kind, q.target, "estimate", ask=q.ask, episodes=q.episodes)
        for q in asked
        if judge.kind == "episode" or len(q.episodes) > 1
    ]
