"""`turnwise estimate PIPELINE`: what judging will take, before a run: questions, tokens, dollars.

A few starts of each stage are played by the policy as it is, the very prompts are written for these
conversations, and counted; nothing is sent. A token is taken to be four bytes of prompt, an answer
to have 250 tokens (or `max_tokens`, where that is fewer); "at most" takes two bytes and
`max_tokens`. What the policy will say when it has learned is not known: conversations that grow
cost more. Caches, canaries, repeated questions and judges of `evaluate` are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...judging import Source, Sources, with_members
from ...protocols import Episode, Message, Question, Request, starts
from ...running import RL, PolicyPlayer, Rank, Run, Where, rollout
from ..asking.options import Asking
from ..asking.prices import cost
from ..constitutional.revise import Revise
from ..llm.judge import ModelJudge
from ..models.model import Usage

ANSWER = 250  # tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one judge will take in one stage.

    Attributes:
        questions: requests to the model.
        tokens: of all prompts and answers.
        dollars, most: None where the price is unknown.
    """

    stage: str
    judge: str
    model: str
    questions: int
    tokens: int
    dollars: float | None
    most: float | None


def estimate(run: Run, sample: int = 2) -> list[Estimate]:
    """Estimates for every model that a run will ask.

    Args:
        run: the run whose stages are gone through.
        sample: starts that are played per environment of a stage.
    """
    found: list[Estimate] = []
    for label, stage in run.stages:
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
                else list(_judges(stage, each, run))
            )
            if not judges:
                continue
            played = _played(run, stage, each, sample)
            share = groups * each.weight / weights / sample
            found += [
                _one(label, name, judge, source, played, share) for name, judge, source in judges
            ]
    run.stage = ""
    return found


def _judges(stage: Any, env: Any, run: Run) -> Iterable[tuple[str, Asking, Source | None]]:
    specs = env.feedback if env.feedback is not None else stage.feedback
    for source in Sources.make([specs], run.plugins, 1.0).of_env[0]:
        for name, part in with_members(source.given, source.name):
            if isinstance(part, Asking):
                yield name, part, source


def _played(run: Run, stage: Any, env: Any, sample: int) -> list[Episode]:
    from ...protocols import Sampling

    player = PolicyPlayer(run.policy, Sampling(stage.temperature, stage.max_new_tokens))
    chosen = [
        (start, slot)
        for start in starts(env.id, 4242, sample, env.options, env.kwargs)
        for slot in range(stage.group_size)
    ]
    return rollout(
        player,
        chosen,
        Where("estimate", run.stage, 0, 0),
        max_turns=stage.max_turns,
        step_limit=stage.step_limit,
        schedule=stage.schedule,
    )


def _one(
    stage: str,
    name: str,
    judge: Asking,
    source: Source | None,
    played: Sequence[Episode],
    share: float,
) -> Estimate:
    sound = [e for e in played if e.ending != "failed" and e.turns]
    prompts = []
    if isinstance(judge, ModelJudge):
        for request in _requests(judge, source, sound):
            prompts += [call.write("0" * 16) for call in judge.calls(request)]
        share *= source.share * source.raters if source is not None else 1.0
    else:  # a critic, once per reply and round
        for e in sound:
            for k, turn in enumerate(e.turns):
                texts = [
                    m for t in e.turns[:k] for m in (t.observation, Message("assistant", t.action))
                ] + [turn.observation]
                drawn = judge.constitution.principles[0]  # type: ignore[attr-defined]
                prompts += [judge._call(texts, turn.action, drawn).write("0" * 16)] * judge.rounds  # type: ignore[attr-defined]
    sizes = [len((p.system + p.user + json.dumps(dict(p.schema))).encode()) for p in prompts]
    answers = [min(ANSWER, p.max_tokens) for p in prompts]
    expected = Usage(fresh=int(sum(sizes) / 4 * share), output=int(sum(answers) * share))
    most = Usage(
        fresh=int(sum(sizes) / 2 * share), output=int(sum(p.max_tokens for p in prompts) * share)
    )
    price = judge._price
    dollars = [
        None if price is None else cost(usage, price, judge.batch) for usage in (expected, most)
    ]
    return Estimate(
        stage,
        name,
        judge._model.name,
        round(len(prompts) * share),
        expected.fresh + expected.output,
        *dollars,
    )


def _requests(
    judge: ModelJudge, source: Source | None, episodes: Sequence[Episode]
) -> list[Request]:
    groups: dict[str, list[Episode]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(e)
    asked: list[Question] = []
    for key, members in groups.items():
        planner = source.given if source is not None else judge
        asked += planner.plan(key, members)
    return [
        Request(judge.kind, q.target, "estimate", ask=q.ask, episodes=q.episodes)
        for q in asked
        if judge.kind == "episode" or len(q.episodes) > 1
    ]
