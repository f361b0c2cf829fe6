"""`check_credit`: gives a credit method batches that differ in nothing it may depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from ..protocols import CreditAssigner
from ..records.batch import Batch, Credit
from ..records.episode import Episode
from .episodes import batch, conversation, sampled
from .faults import faults_of, short

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 1e-4


def check_credit(
    make: Callable[[], CreditAssigner], *, adds_up_to: Callable[[Batch], Tensor] | None = None
) -> None:
    """Assigns credit on canned batches, and lists what is wrong: numbers that are not finite, or at
    padding; credit that depends on the order of conversations, on a longer neighbour that pads the
    rest, on how long observations are, or on other groups; credit that differs from one time to the
    next, or after its state was saved and loaded; a batch that it changes; credit that does not add
    up.

    Args:
        make: makes the method, as a config would.
        adds_up_to: what the credit of a conversation's turns adds up to, [E], where it is to
            conserve something: `lambda batch: batch.outcome`, or the outcome less its group's mean.

    Raises:
        Unsound: with all faults.
    """
    import torch

    played = sampled()
    with faults_of(make()) as faults:
        check = _Check(make, played, faults)
        base = check.assign(batch(played), "a batch")
        if base is None:
            return
        check.same(
            check.assign(batch(played), "the same batch"), played, "from one time to the next"
        )
        check.same(check.assign(batch(played[::-1]), "a batch in another order"), played[::-1],
                   "on the order of the conversations")  # fmt: skip
        other = [conversation(("Well?", "word"), id="other", seed=98), *played]
        apart = check.same(check.assign(batch(other), "a batch with another start"), other,
                           "on the conversations of other starts")  # fmt: skip
        long = conversation(*(("Well?", "word " * 6) for _ in range(7)), id="long", seed=99)
        wide = [long, *played]
        if apart:  # which it has as well
            check.same(check.assign(batch(wide), "a batch with a longer conversation"), wide,
                       "on padding")  # fmt: skip
        longer = [_with_observations(e, 9) for e in played]
        check.same(check.assign(batch(longer), "conversations with longer observations"), longer,
                   "on how many tokens the observations have: only what the policy chose may"
                   " count")  # fmt: skip
        check.restored()
        if adds_up_to is not None:
            made = batch(played)
            wanted, found = adds_up_to(made), base.turn_credit.sum(1)
            if not torch.allclose(found, wanted.to(found), atol=CLOSE):
                worst = int((found - wanted).abs().argmax())
                faults.append(
                    f"its turns do not add up: those of {played[worst].id!r} make"
                    f" {found[worst]:.4f} together, and are to make {wanted[worst]:.4f}"
                )


class _Check:
    """A check in progress, and the credit that each conversation should have."""

    def __init__(
        self, make: Callable[[], CreditAssigner], played: list[Episode], faults: list[str]
    ) -> None:
        self.make, self.played, self.faults = make, played, faults
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    def assign(self, made: Batch, what: str, method: CreditAssigner | None = None) -> Credit | None:
        """Returns the credit of a batch, and notes what is wrong with it by itself."""
        import torch

        before = copy.deepcopy(made)
        try:
            found = (method or self.make()).assign(made)
        except Exception as error:
            self.faults.append(f"it raises {type(error).__name__} on {what}: {error}")
            return None
        if changed := _changed(before, made):
            self.faults.append(f"it changes the batch that it is given: {', '.join(changed)}")
        if not isinstance(found, Credit):
            self.faults.append(f"it returns {short(found)} and not Credit")
            return None
        numbers = {"advantages": (found.advantages, made.mask),
                   "turn_credit": (found.turn_credit, made.turn_mask)}  # fmt: skip
        if found.value_targets is not None:
            numbers["value_targets"] = found.value_targets, made.mask
        for name, (values, mask) in numbers.items():
            if values.shape != mask.shape:
                self.faults.append(
                    f"its {name} have the shape {tuple(values.shape)}, and are to have"
                    f" {tuple(mask.shape)}"
                )
                return None
            if not torch.isfinite(values).all():
                self.faults.append(f"its {name} are not all finite")
                return None
            if values[~mask].any() and name != "value_targets":
                self.faults.append(f"its {name} are not 0 at padding")
        silent = [
            (e.id, k)
            for i, e in enumerate(made.episodes)
            for k in range(len(e.turns))
            if abs(float(found.turn_credit[i, k])) > CLOSE
            and not found.advantages[i][made.turn[i] == k].any()
        ]
        if silent:
            name, turn = silent[0]
            self.faults.append(
                f"it credits turn {turn} of {name!r}, and the advantages of its tokens, which are"
                " what trains, are 0"
            )
        if not self.known:
            self.known = self._by_id(found, made)
        return found

    def _by_id(self, found: Credit, made: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            e.id: (found.advantages[i][made.mask[i]], found.turn_credit[i][made.turn_mask[i]])
            for i, e in enumerate(made.episodes)
        }

    def same(self, found: Credit | None, played: list[Episode], why: str) -> bool:
        """Notes credit that differs from what the conversations had before; returns whether it is
        the same."""
        import torch

        if found is None:
            return False
        own = self._by_id(found, batch(played))
        for name, pair in self.known.items():
            if not all(
                torch.allclose(a, b, atol=CLOSE) for a, b in zip(pair, own[name], strict=True)
            ):
                verb = "it differs" if why.startswith("from") else "it depends"
                self.faults.append(f"its credit for {name!r} is not stable: {verb} {why}")
                return False
        return True

    def restored(self) -> None:
        """Lets it learn, saves its state, and compares a new one that loads it."""
        import torch

        made, method = batch(self.played), self.make()
        if self.assign(made, "a batch", method) is None:
            return
        before = copy.deepcopy(made)
        try:
            method.fit(made)
        except Exception as error:
            self.faults.append(f"fit raises {type(error).__name__}: {error}")
            return
        if changed := _changed(before, made):
            self.faults.append(f"fit changes the batch that it is given: {', '.join(changed)}")
        after = self.assign(batch(self.played), "a batch after it has learned", method)
        again = self.make()
        if state := method.state_dict():
            again.load_state_dict(copy.deepcopy(state))
        found = self.assign(batch(self.played), "a batch after its state was loaded", again)
        if after and found and not torch.equal(after.advantages, found.advantages):
            self.faults.append(
                "after its state was saved and loaded it assigns other credit: a run that goes on"
                " would not be the run it was"
            )


def _with_observations(episode: Episode, tokens: int) -> Episode:
    from dataclasses import replace

    turns = tuple(replace(turn, prompt_ids=tuple(range(10, 10 + tokens))) for turn in episode.turns)
    return replace(episode, turns=turns)


def _changed(before: Batch, after: Batch) -> list[str]:
    """Returns the names of what a batch holds that is no longer what it was; `extras` are there to
    be written to."""
    import torch

    names = [f.name for f in fields(Batch)]
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    played = [[e.to_dict() for e in each.episodes] for each in (before, after)]
    return (["episodes"] if played[0] != played[1] else []) + [
        name for name, old, new in pairs
        if isinstance(old, torch.Tensor)
        and not (isinstance(new, torch.Tensor) and torch.equal(old.nan_to_num(), new.nan_to_num()))
    ]  # fmt: skip
