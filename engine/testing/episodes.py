"""Conversations and batches to test with: of one turn and of several, short, empty, cut, odd."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..policy.batching import make_batch
from ..records.batch import Batch
from ..records.episode import Episode, Message, Start, Turn
from ..records.rewards import Rewards

VOCABULARY = 256  # of the ids in these conversations


def conversation(
    *turns: tuple[str | Message, str],
    id: str = "episode",
    seed: int = 1,
    rewards: Sequence[float] = (),
    tokens: Sequence[int] | None = None,
    observed: int = 3,
    env: str = "testing/Talk-v0",
    **fields: Any,
) -> Episode:
    """Returns the episode of these turns.

    Args:
        turns: an observation, and the reply to it.
        id: of the episode.
        seed: of the start; episodes of one seed are a group.
        rewards: one per turn; default: 0.
        tokens: how many the policy sampled per turn; default: as many as the reply has words and
            one that ends it. None of them is the text's: credit and optimizers read ids.
        observed: tokens of each observation.
        env: the environment's id.
        fields: others of `Episode`.
    """
    counts = tokens or [len(reply.split()) + 1 for _, reply in turns]
    paid = [*rewards, *[0.0] * (len(turns) - len(rewards))]
    rng = random.Random(f"{id} {seed}")

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    made = tuple(
        Turn(
            seen if isinstance(seen, Message) else Message("user", seen), reply, float(reward),
            drawn(observed), drawn(count), tuple(-rng.random() - 0.1 for _ in range(count)),
        )
        for (seen, reply), reward, count in zip(turns, paid, counts, strict=True)
    )  # fmt: skip
    own = {"run": "testing", "stage": "rl", "update": 1, "ending": "terminated", **fields}
    return Episode(id, Start(env, seed), made, **own)


def conversations() -> list[Episode]:
    """Returns conversations as a run may play them, the odd ones among them, in groups of two."""
    call = Message("tool", '{"price": 3}')
    return [
        conversation(("Hello, I need help.", "What is your order number, please?"),
                     ("It is 7.", "Thank you, it is on its way."), id="two", rewards=(0, 1)),
        conversation(("Hello, I need help.", "No."), id="curt", rewards=(0,)),
        conversation(("What is 2 + 2?", "4"), id="one", seed=2, rewards=(1,),
                     system="Answer with a number."),
        conversation(("What is 2 + 2?", ""), id="empty", seed=2, rewards=(0,)),
        conversation(("Hi", "<tool_call>\n{\"name\": \"price\", \"arguments\": {}}\n</tool_call>"),
                     (call, "It costs 3."), ("Thanks!", "You are welcome."), id="tools", seed=3,
                     rewards=(0, 0, 0.5)),
        conversation(("Hi", "naïve \N{PILE OF POO} \u202e \x00 <|im_end|>"), id="odd", seed=3,
                     rewards=(-1,)),
        conversation(("Tell me a story.", "Once upon a time " * 200), id="long", seed=4,
                     rewards=(0.25,), ending="truncated", reason="max_turns"),
        conversation(*((f"Well? {k}", f"Reply {k}.") for k in range(12)), id="many", seed=4,
                     rewards=(0.1,) * 12, final=Message("user", "Goodbye.")),
    ]  # fmt: skip


def batch(
    episodes: Iterable[Episode] | None = None, *, outcomes: Sequence[float] | None = None
) -> Batch:
    """Returns a batch of conversations, with all that a credit method may ask for: a critic's
    values, raters' opinions of turns, values of branches.

    Args:
        episodes: default: groups of other sizes, lengths and outcomes.
        outcomes: of each, which come at its last turn; default: what its turns were paid.
    """
    import torch

    found = list(episodes if episodes is not None else sampled())
    rewards = []
    for i, episode in enumerate(found):
        paid = [turn.reward for turn in episode.turns]
        if outcomes is not None:
            paid = [*[0.0] * (len(paid) - 1), outcomes[i]]
        scores = tuple(
            None if k % 3 == 1 else (_digest(episode.id) + k) % 5 / 4 for k in range(len(paid))
        )
        rewards.append(Rewards(sum(paid), tuple(paid), scores))
    made = make_batch(found, rewards)
    tokens, turns = range(made.mask.shape[1]), range(made.turn_mask.shape[1])
    digests = [_digest(episode.id) for episode in found]
    made.values = torch.tensor([[(d + a) % 7 / 7 for a in tokens] for d in digests]) * made.mask
    made.bootstrap = torch.tensor([0.25 + d % 3 for d in digests]) * made.truncated
    made.branch_values = torch.tensor([[(d + k) % 4 / 4 for k in turns] for d in digests])
    return made


def sampled() -> list[Episode]:
    """Returns conversations that a policy sampled, in groups of other sizes, lengths and
    outcomes."""
    rng = random.Random(0)
    found = []
    for group in range(3):
        for member in range(2 + group):
            count = rng.randint(1, 4)
            found.append(
                conversation(
                    *(("Well?", "word " * rng.randint(1, 3)) for _ in range(count)),
                    id=f"{group}.{member}", seed=group + 10,
                    rewards=[rng.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(count)],
                    ending=rng.choice(["terminated", "truncated"]),
                )
            )  # fmt: skip
    return found


def _digest(text: str) -> int:
    return sum(ord(c) * (i + 3) for i, c in enumerate(text))
