"""The checks for plugin authors: our own parts pass them, and each fault that they claim to find is
planted once and found."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium
import pytest
import torch
import turnwise
from turnwise import testing
from turnwise.learning import Batch, Credit, group_advantage
from turnwise.protocols import NoReward, NoRoom, Rewards

# What comes with Turnwise.

JUDGES: dict[str, dict[str, Any]] = {
    "length": {"max_words": 5}, "repetition": {}, "turns": {"max_turns": 3}, "questions": {},
    "tool-calls": {}, "exact": {"reference": "4"}, "regex": {"pattern": "a"},
    "forbidden": {"words": ["No"]}, "economy": {}, "language": {"languages": ["en"]},
    "rules": {"of": ["length"]}, "not": {"of": "length"},
}  # fmt: skip


@pytest.mark.parametrize("name", JUDGES)
def test_our_judges_are_sound(name: str, plugins: turnwise.Plugins) -> None:
    testing.check_judge(plugins.create("judge", name, **JUDGES[name]))


@pytest.mark.parametrize(
    "name", ["outcome", "turn-returns", "gae", "gigpo", "branch", "counterfactual", "judged",
             "redistribute"],
)  # fmt: skip
def test_our_credit_methods_are_sound(name: str, plugins: turnwise.Plugins) -> None:
    assert name in plugins.names("credit method")
    testing.check_credit(lambda: plugins.create("credit method", name))


def less_the_others(batch: Batch) -> torch.Tensor:
    return group_advantage(batch.outcome, batch.group, "loo")


def test_what_is_conserved_can_be_stated(plugins: turnwise.Plugins) -> None:
    made = {name: lambda name=name: plugins.create("credit method", name)
            for name in ("redistribute", "outcome")}  # fmt: skip
    testing.check_credit(made["redistribute"], adds_up_to=less_the_others)
    with pytest.raises(testing.Unsound, match="its turns do not add up"):
        testing.check_credit(made["outcome"], adds_up_to=less_the_others)


@pytest.mark.parametrize("name", ["grpo", "ppo", "rejection", "dpo", "kto"])
def test_our_optimizers_are_sound(name: str, plugins: turnwise.Plugins) -> None:
    testing.check_optimizer(lambda: plugins.create("optimizer", name, lr=1e-3))


def test_our_combiner_is_sound(plugins: turnwise.Plugins) -> None:
    weights = {"testing": 1.0, "environment": 1.0}
    testing.check_combiner(lambda: plugins.create("combiner", "weighted", weights=weights))
    two = {"one": 1.0, "two": 0.5}
    testing.check_combiner(
        lambda: plugins.create("combiner", "weighted", weights=two), sources=tuple(two)
    )
    for name in ("mean", "majority", "dawid-skene"):
        make = lambda name=name: plugins.create(  # noqa: E731
            "combiner", "aggregate", weights=weights, aggregator=plugins.create("aggregator", name)
        )
        testing.check_combiner(make)


def test_an_environment_of_ours_is_sound_and_plays_what_is_written_down() -> None:
    testing.check_environment("turnwise/Maze-v0", episodes=3)
    played = testing.play("turnwise/SupportDesk-v0", "What is the order number?", "Done.", seed=3)
    assert [t.action for t in played.turns] == ["What is the order number?", "Done."]
    again = testing.play("turnwise/SupportDesk-v0", "What is the order number?", "Done.", seed=3)
    assert [t.observation for t in again.turns] == [t.observation for t in played.turns]


def test_a_fresh_process_knows_our_environments() -> None:
    code = """
    from turnwise import testing
    print(len(testing.play("turnwise/SupportDesk-v0", "Hello").turns))
    try:
        testing.check_environment("turnwise/SuportDesk-v0")
    except LookupError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("1\n"), done.stderr[-2000:]
    assert "Did you mean 'turnwise/SupportDesk-v0'" in done.stdout


class Number(gymnasium.Env[str, str]):
    """Says a number, and says it again; its expert does not care."""

    observation_space = action_space = turnwise.Text(1000)
    players: ClassVar[Any] = {"expert": lambda env, rng: lambda messages: "no"}
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.keeper().number = int(self.np_random.integers(10**6))
        self.left = 2
        return f"remember {self.keeper().number}", {}

    def step(self, action: str) -> Any:
        self.left -= 1
        right = str(self.keeper().number) in action
        return f"it is {self.keeper().number}", 0.0, not self.left, False, {"success": right}

    def keeper(self) -> Any:
        return self


class SharedNumber(Number):
    def keeper(self) -> Any:
        return SharedNumber


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (SharedNumber, "another transcript next to another episode"),
        (Number, "its expert never succeeds"),
    ],
)
def test_state_that_episodes_share_is_found(made: Any, fault: str) -> None:
    """What Gymnasium's checker and one episode after the other do not show; more kinds stand in
    tests/test_environment.py."""
    gymnasium.register("planted/Number-v0", made, disable_env_checker=True)
    try:
        with pytest.raises(testing.Unsound, match=fault) as found:
            testing.check_environment("planted/Number-v0", episodes=4)
    finally:
        gymnasium.registry.pop("planted/Number-v0")
    assert ("next to another" in str(found.value)) == (made is SharedNumber)


class OneSeat(Number):
    """A server that lets one in at a time, and says so as it is asked for another."""

    taken: ClassVar[list[Any]] = []
    players: ClassVar[Any] = {}

    def __init__(self) -> None:
        if OneSeat.taken:
            raise NoRoom("full")
        OneSeat.taken.append(self)

    def close(self) -> None:
        OneSeat.taken.clear()


def test_one_that_lives_alone_is_no_fault() -> None:
    gymnasium.register("planted/OneSeat-v0", OneSeat, disable_env_checker=True)
    try:
        testing.check_environment("planted/OneSeat-v0", episodes=4)
    finally:
        gymnasium.registry.pop("planted/OneSeat-v0")


# Judges with a fault.


class Fine(turnwise.Judge):
    """Scores the number of turns."""

    api_key = ""

    def score(self, episodes: Sequence[turnwise.Episode]) -> Any:
        return [turnwise.Feedback(e.id, score=float(len(e.turns))) for e in episodes]


class Short(Fine):
    def score(self, episodes: Any) -> Any:
        return super().score(episodes)[1:]


class Backwards(Fine):
    def score(self, episodes: Any) -> Any:
        return super().score(episodes)[::-1]


class Others(Fine):
    def score(self, episodes: Any) -> Any:
        return [turnwise.Feedback("another", score=1.0) for _ in episodes]


class Numbers(Fine):
    def score(self, episodes: Any) -> Any:
        return [1.0 for _ in episodes]


class NoList(Fine):
    def score(self, episodes: Any) -> Any:
        return 1.0


class Chance(Fine):
    calls = 0

    def score(self, episodes: Any) -> Any:
        self.calls += 1
        return [turnwise.Feedback(e.id, score=float(self.calls)) for e in episodes]


class Relative(Fine):
    def score(self, episodes: Any) -> Any:
        mean = sum(len(e.turns) for e in episodes) / max(1, len(episodes))
        return [turnwise.Feedback(e.id, score=len(e.turns) - mean) for e in episodes]


class TooManyTurns(Fine):
    def score(self, episodes: Any) -> Any:
        return [turnwise.Feedback(e.id, turn_scores=(1.0,) * (len(e.turns) + 1)) for e in episodes]


class Writes(Fine):
    def score(self, episodes: Any) -> Any:
        for e in episodes:
            e.info["seen"] = True
        return super().score(episodes)


class Raises(Fine):
    def score(self, episodes: Any) -> Any:
        return [turnwise.Feedback(e.id, score=1 / len(e.turns[-1].action)) for e in episodes]


class Blocks(Fine):
    async def score(self, episodes: Any) -> Any:
        time.sleep(0.3)
        return Fine().score(episodes)


class Tells(Fine):
    def __init__(self) -> None:
        self.api_key = "sk-very-secret"

    def __repr__(self) -> str:
        return f"Tells({self.api_key})"


class TellsInAMapping(Fine):
    def __init__(self) -> None:
        self.headers = {"authorization": "Bearer tok-very-secret"}

    def __repr__(self) -> str:
        return f"TellsInAMapping({self.headers})"


class TellsInItsVersion(Fine):
    def __init__(self) -> None:
        self.api_key = "sk-very-secret"
        self.version = f"1/{self.api_key}"


class TellsInItsAnswers(Fine):
    def __init__(self) -> None:
        self.api_key = "sk-very-secret"

    def score(self, episodes: Any) -> Any:
        return [turnwise.Feedback(e.id, 1.0, comment=f"by {self.api_key}") for e in episodes]


class DrawnOncePerId(Fine):
    def __init__(self) -> None:
        self.known: dict[str, float] = {}

    def score(self, episodes: Any) -> Any:
        for e in episodes:
            self.known.setdefault(e.id, float(len(self.known)))
        return [turnwise.Feedback(e.id, self.known[e.id]) for e in episodes]


class Eager(Fine):
    def score(self, episodes: Any) -> Any:
        return [turnwise.Feedback("none", score=0.0) for _ in (*episodes, 0)]


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        (Short(), "it gives 0 answers"),
        (Backwards(), "not in the order in which it was asked"),
        (Others(), "about conversations that it was not asked about"),
        (Numbers(), "is no Feedback"),
        (NoList(), "not with a list of Feedback"),
        (Chance(), "asked twice about 'two'"),
        (Relative(), "depends on which others it is asked about"),
        (TooManyTurns(), "it scores 3 turns of 'two', which has 2"),
        (Writes(), "it changes the episodes"),
        (Raises(), "it raises ZeroDivisionError: .* when asked about the conversation 'empty'"),
        (Blocks(), "blocks its loop for"),
        (Tells(), "its repr shows the secret in the attribute 'api_key'"),
        (Eager(), "asked about no conversation it answers"),
        (TellsInAMapping(), r"its repr shows the secret in the attribute 'headers.authorization'"),
        (TellsInItsVersion(), "its version shows the secret"),
        (TellsInItsAnswers(), "its answer shows the secret"),
        (DrawnOncePerId(), "asked about 'curt' under another id"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Fine) else "",
)
def test_a_judge_with_a_fault_is_found(judge: Any, fault: str) -> None:
    with pytest.raises(testing.Unsound, match=fault):
        few = testing.conversations()[:2] if isinstance(judge, Blocks) else None
        testing.check_judge(judge, seconds=0.2, episodes=few)


def test_a_sound_judge_passes_a_random_one_if_that_is_meant() -> None:
    class Async(Fine):
        async def score(self, episodes: Any) -> Any:
            await asyncio.sleep(0.3)
            return Fine().score(episodes)

    testing.check_judge(Fine())
    testing.check_judge(Async(), seconds=0.2, episodes=testing.conversations()[:2])
    testing.check_judge(Chance(), random=True)
    testing.check_judge(lambda episode: float(len(episode.turns)))

    class Limited(Fine):
        """Holds what belongs to one loop, as an asynchronous client does."""

        keyword = "please"  # no secret

        def __init__(self) -> None:
            self.slots, self.tokenizer = None, "gpt2"
            self.key, self.api_key = "helpful", "env:OPENAI_API_KEY"

        def __repr__(self) -> str:
            return f"Limited({self.tokenizer}, {self.key}, {self.api_key})"

        async def score(self, episodes: Any) -> Any:
            self.slots = self.slots or asyncio.Semaphore(1)
            await self.slots.acquire()
            asyncio.get_running_loop().call_soon(self.slots.release)
            async with self.slots:
                return Fine().score(episodes)

    testing.check_judge(Limited())


def test_a_model_in_float32_that_pads_is_sound() -> None:
    """What stands next to a conversation changes the last bits of its score."""

    class Padded(Fine):
        def score(self, episodes: Any) -> Any:
            found = [turnwise.Feedback(e.id, float(len(e.turns)) * 0.1) for e in episodes]
            return [dataclasses.replace(f, score=f.score + 1e-7 * len(found)) for f in found]

    testing.check_judge(Padded())


def test_what_is_no_judge_is_named() -> None:
    for given in ("length", 3):
        with pytest.raises(TypeError, match="takes a judge or a function of an episode, got"):
            testing.check_judge(given)


async def blocking(episode: turnwise.Episode) -> float:
    time.sleep(0.3)
    return 1.0


def test_a_judges_class_is_no_judge() -> None:
    with pytest.raises(TypeError, match=r"give Fine\(\), not the class"):
        testing.check_judge(Fine)


def test_functions_are_looked_at_as_judges_are() -> None:
    with pytest.raises(testing.Unsound, match="blocks its loop"):
        testing.check_judge(blocking, seconds=0.2, episodes=testing.conversations()[:2])
    with pytest.raises(testing.Unsound, match="a failure is never a score"):
        testing.check_judge(lambda e: 1.0, failing=lambda e: 1.0)


def test_a_failure_that_is_scored_is_found() -> None:
    class Broken(Fine):
        def score(self, episodes: Any) -> Any:
            return [turnwise.Feedback(e.id, score=0.0) for e in episodes]  # whatever went wrong

    class Honest(Fine):
        def score(self, episodes: Any) -> Any:
            return [turnwise.Feedback.failed(e.id, "no answer") for e in episodes]

    class LetsThrough(Fine):
        def score(self, episodes: Any) -> Any:
            raise TimeoutError("no answer")

    with pytest.raises(testing.Unsound, match="a failure is never a score"):
        testing.check_judge(Fine(), failing=Broken())
    testing.check_judge(Fine(), failing=Honest())
    testing.check_judge(Fine(), failing=LetsThrough())


class Ranks(turnwise.GroupJudge):
    """Ranks by the number of turns."""

    calls = 0

    def rank(self, group: Any) -> Any:
        first, *rest = sorted(group, key=lambda e: (len(e.turns), e.id))
        return turnwise.Comparison(group[0].group, ((first.id,), tuple(e.id for e in rest)))


class RanksAnother(Ranks):
    def rank(self, group: Any) -> Any:
        return dataclasses.replace(super().rank(group), group="elsewhere")


class RanksStrangers(Ranks):
    def rank(self, group: Any) -> Any:
        return turnwise.Comparison(group[0].group, (("nobody",), (group[0].id,)))


class RanksByChance(Ranks):
    def rank(self, group: Any) -> Any:
        self.calls += 1
        found = super().rank(group)
        return found if self.calls % 2 else dataclasses.replace(found, ranking=found.ranking[::-1])


class RanksAsShown(Ranks):
    def rank(self, group: Any) -> Any:
        return turnwise.Comparison(group[0].group, tuple((e.id,) for e in group))


class RanksNothing(Ranks):
    def rank(self, group: Any) -> Any:
        return [e.id for e in group]


@pytest.mark.parametrize(
    ("judge", "fault"),
    [
        (RanksAnother(), "filed under another group"),
        (RanksStrangers(), "it ranks 'nobody', which it was not asked about"),
        (RanksByChance(), "asked twice about the same group it ranks otherwise"),
        (RanksNothing(), "not with a Comparison"),
        (RanksAsShown(), "in the reverse order it ranks otherwise"),
    ],
)
def test_a_judge_that_compares_with_a_fault_is_found(judge: Any, fault: str) -> None:
    testing.check_judge(Ranks())
    with pytest.raises(testing.Unsound, match=fault):
        testing.check_judge(judge)


# Sources with a fault.


class Mailbox(turnwise.FeedbackSource):
    """Asks people; an answer is repeated until it is acknowledged."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.answers: dict[str, Any] = {}
        self.token = "tok-s3cret"

    def request(self, requests: Any) -> None:
        self.asked |= {r.id: r for r in requests}

    def receive(self) -> Any:
        return list(self.answers.values())

    def acknowledge(self, ids: Any) -> None:
        for id_ in ids:
            self.answers.pop(id_, None)

    def put(self, request: Any) -> None:
        if request.id in self.asked:
            self.answers[f"mail-{request.id}"] = turnwise.Feedback(
                request.target, 1.0, id=f"mail-{request.id}",
                stamp=turnwise.Stamp(request=request.id),
            )  # fmt: skip


class AsksTwice(Mailbox):
    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, int] = {}

    def request(self, requests: Any) -> None:
        super().request(requests)
        for r in requests:
            self.times[r.id] = self.times.get(r.id, 0) + 1

    def put(self, request: Any) -> None:
        super().put(request)
        id_, answer = list(self.answers.items())[-1]
        for k in range(1, self.times[request.id]):
            self.answers[f"{id_}-{k}"] = dataclasses.replace(answer, id=f"{id_}-{k}")


class NewIds(Mailbox):
    count = 0

    def receive(self) -> Any:
        found = []
        for answer in super().receive():
            self.count += 1
            found.append(dataclasses.replace(answer, id=f"{answer.id}-{self.count}"))
        return found


class ChangesItsMind(Mailbox):
    count = 0.0

    def receive(self) -> Any:
        self.count += 1
        return [dataclasses.replace(a, score=self.count) for a in super().receive()]


class NeverForgets(Mailbox):
    def acknowledge(self, ids: Any) -> None:
        pass


class Nameless(Mailbox):
    def receive(self) -> Any:
        return [dataclasses.replace(a, stamp=turnwise.Stamp()) for a in super().receive()]


class OffTopic(Mailbox):
    def receive(self) -> Any:
        return [dataclasses.replace(a, episode="another") for a in super().receive()]


class Waits(Mailbox):
    def request(self, requests: Any) -> None:
        super().request(requests)
        time.sleep(0.3)


class WaitsForAnswers(Mailbox):
    def receive(self) -> Any:
        time.sleep(0.3)
        return super().receive()


class Deaf(Mailbox):
    def put(self, request: Any) -> None:
        pass


class Picky(Mailbox):
    def acknowledge(self, ids: Any) -> None:
        for id_ in ids:
            self.answers.pop(id_)


class ClosesOnce(Mailbox):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class Scribbles(Mailbox):
    def request(self, requests: Any) -> None:
        super().request(requests)
        for r in requests:
            for e in r.episodes:
                e.info["asked"] = True


class ShowsToken(Mailbox):
    def __repr__(self) -> str:
        return f"ShowsToken({self.token})"


class CountsTurnsWrong(Mailbox):
    def receive(self) -> Any:
        return [dataclasses.replace(a, turn_scores=(1.0,) * 9) for a in super().receive()]


class OnlyInTheLedger(Mailbox):
    """Writes its answers into the ledger, and never again after a restart."""

    answers_in_ledger = True
    made = 0

    def __init__(self) -> None:
        super().__init__()
        OnlyInTheLedger.made += 1
        self.first = OnlyInTheLedger.made % 2 == 1

    def open(self, context: Any) -> None:
        self.ledger = context.ledger

    def receive(self) -> Any:
        return []

    def put(self, request: Any) -> None:
        if self.first:
            super().put(request)
            self.ledger.add_feedback(list(self.answers.values()))


class LosesItsMemory(Mailbox):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        LosesItsMemory.made += 1
        self.first = LosesItsMemory.made % 2 == 1

    def request(self, requests: Any) -> None:
        if self.first:  # "they were asked before the restart"
            super().request(requests)


class LaterOnesAreNonsense(Mailbox):
    def put(self, request: Any) -> None:
        super().put(request)
        if request.id != next(iter(self.asked)):
            answer = self.answers[f"mail-{request.id}"]
            self.answers[answer.id] = dataclasses.replace(answer, episode="nonsense")


class AnswersTheFirst(Mailbox):
    def put(self, request: Any) -> None:
        if request.id == next(iter(self.asked)):
            super().put(request)


class AcknowledgesAll(Mailbox):
    def acknowledge(self, ids: Any) -> None:
        self.answers.clear()


class Counts(Mailbox):
    """Its count begins again with the process."""

    count = 0

    def put(self, request: Any) -> None:
        super().put(request)
        answer = self.answers.pop(f"mail-{request.id}")
        self.count += 1
        self.answers[f"mail-{self.count}"] = dataclasses.replace(answer, id=f"mail-{self.count}")


class RanksOthers(Mailbox):
    kind = "group"

    def put(self, request: Any) -> None:
        ranked = turnwise.Comparison(
            request.target, (("stranger",), (request.episodes[0].id,)), id=f"c-{request.id}",
            stamp=turnwise.Stamp(request=request.id),
        )  # fmt: skip
        self.answers[ranked.id] = ranked


class RepeatsTheOld(Mailbox):
    """After a restart it has nothing but what was acknowledged long ago."""

    old: ClassVar[dict[str, Any]] = {}
    made = 0

    def __init__(self) -> None:
        super().__init__()
        RepeatsTheOld.made += 1
        self.restarted = RepeatsTheOld.made % 2 == 0

    def put(self, request: Any) -> None:
        if self.restarted:
            self.answers |= RepeatsTheOld.old
        else:
            super().put(request)
            RepeatsTheOld.old |= self.answers


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (LaterOnesAreNonsense, "it answers about 'nonsense'"),
        (AnswersTheFirst, "no answer to one of the requests arrived"),
        (AcknowledgesAll, "no answer to one of the requests arrived"),
        (Counts, "the id 'mail-1' is given to another answer after a restart"),
        (RanksOthers, "it ranks 'stranger', which it was not asked about"),
        (RepeatsTheOld, "what was asked before a restart is not answered after it"),
        (AsksTwice, "one request that was asked twice has two answers"),
        (NewIds, "one answer arrives several times"),
        (ChangesItsMind, "another content under the same id"),
        (NeverForgets, "comes again after it was acknowledged"),
        (Nameless, "names no request that was made"),
        (OffTopic, "it answers about 'another'"),
        (Waits, "request takes 0"),
        (WaitsForAnswers, "receive takes 0"),
        (Deaf, "no answer to one of the requests arrived within"),
        (Picky, "acknowledge of an unknown id raises KeyError"),
        (ClosesOnce, "close, a second time, raises RuntimeError"),
        (Scribbles, "it changes the episodes"),
        (ShowsToken, "its repr shows the secret in the attribute 'token'"),
        (CountsTurnsWrong, "it scores another number of turns"),
        (OnlyInTheLedger, "what was asked before a restart is not answered after it"),
        (LosesItsMemory, "what was asked before a restart is not answered after it"),
    ],
)
def test_a_source_with_a_fault_is_found(make: Callable[[], Any], fault: str) -> None:
    with pytest.raises(testing.Unsound, match=fault):
        testing.check_feedback_source(
            make, lambda source, request: source.put(request), seconds=0.2, patience=0.3
        )


def test_a_sound_source_passes() -> None:
    class Connects(Mailbox):
        def open(self, context: Any) -> None:
            time.sleep(0.4)

    testing.check_feedback_source(Mailbox, lambda source, request: source.put(request))
    testing.check_feedback_source(
        Connects, lambda source, request: source.put(request), seconds=0.2
    )


# Credit methods with a fault.


class Even(turnwise.CreditAssigner):
    """Gives every turn the outcome less its group's mean."""

    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, group_advantage(batch.outcome, batch.group, "mean"))

    def credit(self, batch: Batch, advantage: torch.Tensor) -> Credit:
        wide = advantage.unsqueeze(1)
        return Credit(wide * batch.mask, None, wide * batch.turn_mask)


class WholeBatch(Even):
    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, batch.outcome - batch.outcome.mean())


class ByWidth(Even):
    def assign(self, batch: Batch) -> Credit:
        advantage = group_advantage(batch.outcome, batch.group, "mean")
        return self.credit(batch, advantage / batch.mask.shape[1])


class ByPlace(Even):
    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, batch.outcome * torch.arange(len(batch.outcome)))


class AtPadding(Even):
    def assign(self, batch: Batch) -> Credit:
        wide = batch.outcome.unsqueeze(1)
        return Credit(wide.expand(batch.mask.shape), None, wide * batch.turn_mask)


class NotFinite(Even):
    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, batch.outcome / 0.0)


class ReadsObservations(Even):
    def assign(self, batch: Batch) -> Credit:
        longest = [len(e.turns[0].prompt_ids) for e in batch.episodes]
        return self.credit(batch, batch.outcome / torch.tensor(longest))


class Drawn(Even):
    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, batch.outcome + torch.randn(len(batch.outcome)))


class Overwrites(Even):
    def assign(self, batch: Batch) -> Credit:
        batch.outcome -= batch.outcome.mean()
        return self.credit(batch, batch.outcome * 0)


class WrongShape(Even):
    def assign(self, batch: Batch) -> Credit:
        return Credit(batch.outcome, None, batch.turn_mask * 0.0)


class Breaks(Even):
    def assign(self, batch: Batch) -> Credit:
        raise ValueError("no idea")


class Forgets(Even):
    """Learns, and saves another number than it learned."""

    def __init__(self) -> None:
        self.mean = 0.0

    def assign(self, batch: Batch) -> Credit:
        return self.credit(batch, batch.outcome - self.mean)

    def fit(self, batch: Batch) -> None:
        self.mean = float(batch.outcome.mean())

    def state_dict(self) -> Any:
        return {"mean": 0.0}

    def load_state_dict(self, state: Any) -> None:
        self.mean = state["mean"]


class ForgetsAll(Forgets):
    """Learns, and has no state to save."""

    def state_dict(self) -> Any:
        return {}


class Mute(Even):
    def credit(self, batch: Batch, advantage: torch.Tensor) -> Credit:
        return dataclasses.replace(
            super().credit(batch, advantage), advantages=torch.zeros(batch.mask.shape)
        )


class OddTargets(Even):
    def assign(self, batch: Batch) -> Credit:
        found = super().assign(batch)
        return dataclasses.replace(found, value_targets=found.advantages * float("nan"))


class WritesIntoEpisodes(Even):
    def assign(self, batch: Batch) -> Credit:
        batch.episodes[0].info["credit"] = 1.0  # type: ignore[index]
        return super().assign(batch)


class FitsOver(Even):
    def fit(self, batch: Batch) -> Any:
        batch.outcome.zero_()
        return {}


class CannotFit(Even):
    def fit(self, batch: Batch) -> Any:
        raise RuntimeError("no data")


class ReturnsNothing(Even):
    def assign(self, batch: Batch) -> Any:
        return None


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (WholeBatch, "depends on the conversations of other starts"),
        (ByWidth, "depends on padding"),
        (ByPlace, "depends on the order of the conversations"),
        (AtPadding, "its advantages are not 0 at padding"),
        (NotFinite, "its advantages are not all finite"),
        (ReadsObservations, "depends on how many tokens the observations have"),
        (Drawn, "differs from one time to the next"),
        (Overwrites, "it changes the batch that it is given: outcome"),
        (WrongShape, "its advantages have the shape"),
        (Breaks, "it raises ValueError"),
        (Mute, "the advantages of its tokens, which are what trains, are 0"),
        (OddTargets, "its value_targets are not all finite"),
        (WritesIntoEpisodes, "it changes the batch that it is given: episodes"),
        (FitsOver, "fit changes the batch that it is given: outcome"),
        (CannotFit, "fit raises RuntimeError"),
        (ReturnsNothing, "it returns None and not Credit"),
        (Forgets, "after its state was saved and loaded it assigns other credit"),
        (ForgetsAll, "after its state was saved and loaded it assigns other credit"),
    ],
)
def test_a_credit_method_with_a_fault_is_found(make: Callable[[], Any], fault: str) -> None:
    testing.check_credit(Even)
    with pytest.raises(testing.Unsound, match=fault):
        testing.check_credit(make)


# Optimizers with a fault.


class Plain(turnwise.Optimizer):
    """REINFORCE by SGD with momentum, one step per update, without any of the engine's helpers."""

    consumes = frozenset({"advantages"})
    sign = -1.0

    def setup(self, policy: Any) -> None:
        self.adam = torch.optim.SGD(policy.parameters(), lr=0.1, momentum=0.9)

    def loss(self, policy: Any, batch: Batch) -> torch.Tensor:
        """The sum over action tokens of their advantages times log-probs."""
        total = torch.zeros(())
        for micro in policy.micro_batches(batch.rows, 4096):
            out = policy.score(micro, batch.temperature, policy.network)
            given = batch.credit.advantages[micro.episode, micro.action]
            total = total + self.sign * (given * out.logprobs).sum() / batch.mask.sum()
        return total

    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        loss = self.loss(policy, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not torch.isfinite(norm):
            self.adam.zero_grad()
            raise turnwise.NonFiniteError("the gradient is not finite")
        self.adam.step()
        self.adam.zero_grad()
        return {"loss": float(loss), "grad_norm": float(norm)}

    def state_dict(self) -> Any:
        return {
            str(i): self.adam.state[p]["momentum_buffer"].clone()
            for i, p in enumerate(self.adam.param_groups[0]["params"])
        }

    def load_state_dict(self, state: Any) -> None:
        for i, p in enumerate(self.adam.param_groups[0]["params"]):
            self.adam.state[p]["momentum_buffer"] = state[str(i)].clone()


class Uphill(Plain):
    sign = 1.0


class CountsPadding(Plain):
    def loss(self, policy: Any, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * batch.mask.sum() / batch.mask.numel()


class CountsPaddingByAdam(CountsPadding):
    """Adam's first step hides it."""

    def setup(self, policy: Any) -> None:
        self.adam = torch.optim.Adam(policy.parameters(), lr=1e-3)

    def state_dict(self) -> Any:
        return {"adam": self.adam.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.adam.load_state_dict(state["adam"])


class Momentumless(Plain):
    def state_dict(self) -> Any:
        return {}


class StepsOnNaN(Plain):
    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        self.loss(policy, batch).backward()
        self.adam.step()
        self.adam.zero_grad()
        return {}


class NoisyLoss(Plain):
    def loss(self, policy: Any, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * (1 + torch.rand(()))


class OddMetric(Plain):
    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        return {**super().update(policy, batch), "kl": float("nan")}


class Idle(Plain):
    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        return {}

    def state_dict(self) -> Any:
        return {}


class WrongError(Plain):
    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        if not torch.isfinite(batch.credit.advantages).all():
            raise ValueError("nan")
        return super().update(policy, batch)


class Crashes(Plain):
    def update(self, policy: Any, batch: Batch) -> dict[str, Any]:
        raise KeyError("values")


class Unlearns(Plain):
    """Imitates what it is shown, with the wrong sign."""

    consumes = frozenset({"demonstrations"})

    def loss(self, policy: Any, batch: Batch) -> torch.Tensor:
        kept = batch.credit
        batch.credit = Credit(-1.0 * batch.mask, None, kept.turn_credit)
        found = super().loss(policy, batch)
        batch.credit = kept
        return found


class CountsTurnsOfPadding(Plain):
    def loss(self, policy: Any, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * batch.turn_mask.sum() / batch.turn_mask.numel()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (CountsTurnsOfPadding, "its update depends on padding"),
        (Uphill, "less likely than what was not: look at the sign"),
        (CountsPadding, "its update depends on padding"),
        (CountsPaddingByAdam, "its update depends on padding"),
        (Momentumless, "after its state was saved and loaded is another one"),
        (StepsOnNaN, "takes a step on advantages that are NaN"),
        (NoisyLoss, "its update differs from one time to the next"),
        (OddMetric, "its metric 'kl' is nan"),
        (Idle, "its update leaves the policy as it was"),
        (WrongError, "raises ValueError and not NonFiniteError"),
        (Crashes, "it raises KeyError on a batch"),
        (Unlearns, "makes the conversations that it imitates less likely"),
    ],
)
def test_an_optimizer_with_a_fault_is_found(make: Callable[[], Any], fault: str) -> None:
    with pytest.raises(testing.Unsound, match=fault):
        testing.check_optimizer(make)


def test_a_plain_optimizer_passes() -> None:
    testing.check_optimizer(Plain)


def test_an_environment_with_a_fault_is_found() -> None:
    class Remembers(gymnasium.Env):
        observation_space = action_space = turnwise.Text(1000)
        played = 0

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            Remembers.played += 1
            return f"Conversation {Remembers.played}", {}

        def step(self, action: str) -> Any:
            return "Goodbye.", 1.0, True, False, {}

    gymnasium.register("testing/Remembers-v0", Remembers)
    with pytest.raises(testing.Unsound, match="environment 'testing/Remembers-v0' is unsound"):
        testing.check_environment("testing/Remembers-v0", episodes=2)


# Combiners with a fault.


class Sums2(turnwise.Combiner):
    """Adds up all scores of a conversation."""

    def combine(self, group: Any, feedback: Any) -> Any:
        found = []
        for e in group:
            scores = [f.score for f in feedback if f.target == e.id and f.status == "scored"]
            total = float(sum(scores))
            found.append(
                Rewards(total, (*[0.0] * (len(e.turns) - 1), total))
                if scores
                else NoReward("no score")
            )
        return found


class FailureIsZero(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        return [
            Rewards(0.0, (0.0,) * len(e.turns)) if isinstance(r, NoReward) else r
            for e, r in zip(group, super().combine(group, feedback), strict=True)
        ]


class AbstentionIsZero(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        silent = [f.target for f in feedback if f.status == "abstained"]
        return [
            Rewards(0.0, (0.0,) * len(e.turns)) if e.id in silent else r
            for e, r in zip(group, super().combine(group, feedback), strict=True)
        ]


class LeavesOut(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        return super().combine(group, feedback)[:1]


class FirstIsBest(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        return [
            Rewards(float(i), (*[0.0] * (len(e.turns) - 1), float(i))) for i, e in enumerate(group)
        ]


class LastWins(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        best = feedback[-1].target
        return [
            Rewards(float(e.id == best), (*[0.0] * (len(e.turns) - 1), float(e.id == best)))
            for e in group
        ]


class Pops(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        found = super().combine(group, feedback)
        feedback.pop()
        return found


class NoRewards(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        return [1.0 for _ in group]


class OneTurn(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        return [Rewards(0.0, (0.0,)) for _ in group]


class Fails(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        raise ValueError("no idea")


@pytest.mark.parametrize(
    ("combiner", "fault"),
    [
        (FailureIsZero, "where every source has failed"),
        (AbstentionIsZero, "where every source has abstained"),
        (LeavesOut, "it gives 1 rewards for 2 conversations"),
        (FirstIsBest, "depend on the order of the conversations"),
        (LastWins, "depend on the order in which feedback came"),
        (Pops, "it changes the episodes or the feedback"),
        (NoRewards, "which is neither Rewards nor NoReward"),
        (OneTurn, "have 1 turns, and the conversation 2"),
        (Fails, "it raises ValueError"),
    ],
)
def test_a_combiner_with_a_fault_is_found(combiner: Callable[[], Any], fault: str) -> None:
    testing.check_combiner(Sums2)
    with pytest.raises(testing.Unsound, match=fault):
        testing.check_combiner(combiner)


class Means2(Sums2):
    def combine(self, group: Any, feedback: Any) -> Any:
        count = {e.id: sum(f.target == e.id and f.status == "scored" for f in feedback)
                 for e in group}  # fmt: skip
        return [
            r if isinstance(r, NoReward)
            else Rewards(r.outcome / count[e.id], tuple(t / count[e.id] for t in r.turns))
            for e, r in zip(group, super().combine(group, feedback), strict=True)
        ]  # fmt: skip


class NeedsOne(Sums2):
    """Forgives none but the second."""

    def combine(self, group: Any, feedback: Any) -> Any:
        sound = {f.target for f in feedback if f.stamp.source == "one" and f.status == "scored"}
        made = super().combine(group, feedback)
        return [r if e.id in sound else NoReward("one failed")
                for e, r in zip(group, made, strict=True)]  # fmt: skip


def test_one_of_several_sources_that_failed_is_no_zero() -> None:
    testing.check_combiner(Means2, sources=("one", "two"))
    with pytest.raises(testing.Unsound, match="where 'one' has failed it counts as a score of 0"):
        testing.check_combiner(Sums2, sources=("one", "two"))
    with pytest.raises(testing.Unsound, match="where 'two' has failed it counts as a score of 0"):
        testing.check_combiner(NeedsOne, sources=("one", "two"))
