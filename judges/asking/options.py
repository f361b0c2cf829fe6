"""The options of every judge that asks a model."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...protocols import Context
from ...running import Plugins
from ...tools import background, derive_id
from ..models.model import BatchModel, make_model
from .batches import BatchCaller
from .calls import Caller
from .prices import price_of
from .store import Account, Cache

# What stands in a version under its own name, or not at all.
NAMED = frozenset(("model", "plugins"))


@dataclass(kw_only=True)
class Asking(ABC):
    """Base of everything that asks a model: its options, and how it is set up to ask.

    Attributes:
        model: "provider:name", a mapping with provider, model and the provider's options, or an
            object with `ask(prompt)`.
        max_tokens: of an answer; one that is cut off is asked for once more with twice as many.
        cache: URL or file of the verdicts' cache; default: judges.sqlite next to the run's folder.
            False: none.
        budget: dollars that this judge may spend in a run; the run is paused before it would spend
            more.
        prices: dollars per million tokens, {"provider:name": [input, output] or [input, cached,
            written, output]}.
        concurrency: requests under way at once.
        timeout: seconds for one request.
        patience: seconds that one verdict is waited for while the model does not answer.
        batch: send the questions of a round as one batch, at half the price and within a day.

    Raises:
        ValueError, PluginError: an option that cannot work.
    """

    way: ClassVar[str] = ""
    # What says nothing of the verdict.
    may_change: ClassVar[frozenset[str]] = frozenset(
        ("cache", "budget", "prices", "concurrency", "timeout", "patience", "batch")
    )
    MANY: ClassVar[frozenset[str]] = frozenset(("samples", "pairs", "orders", "weights", "rounds"))

    model: Any
    max_tokens: int = 1024
    cache: str | Literal[False] | None = None
    budget: float | None = None
    prices: Mapping[str, Sequence[float]] = field(default_factory=dict)
    concurrency: int = 8
    timeout: float = 120.0
    patience: float = 900.0
    batch: bool = False
    plugins: Plugins | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 16), ("concurrency", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("timeout", "patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self._model = make_model(self.model, self.plugins)
        self._price = price_of(
            self._model.name, self.prices, str(self._model.settings.get("url") or "")
        )
        if self.budget is not None and not (
            isinstance(self.budget, (int, float)) and self.budget > 0
        ):
            raise ValueError(f"budget must be positive, got {self.budget}")
        if self.budget is not None and self._price is None:
            raise ValueError(
                f"the price of {self._model.name} is unknown, so a budget cannot be held: give"
                f" `prices: {{{self._model.name!r}: [input, output]}}`, in dollars per million"
                " tokens"
            )
        guessed = (
            self._price is not None and not any(self._price) and self._model.name not in self.prices
        )
        if self.budget is not None and guessed and self._model.settings.get("url"):
            warnings.warn(
                f"{self._model.name} at a server of your own costs 0 by assumption, so its budget"
                " never ends: if the server passes questions on to a paid model, give `prices:"
                f" {{{self._model.name!r}: [input, output]}}`",
                stacklevel=2,
            )
        if self.batch and not isinstance(self._model, BatchModel):
            raise ValueError(f"{self._model.name} has no batches: leave `batch` out")
        self._context: Context | None = None
        self._caller: Any = None
        self._opened = False

    @property
    @abstractmethod
    def instructions(self) -> str:
        """The instructions every call begins with: part of the version."""

    @property
    def label(self) -> str:
        """The rubric's version, or whatever tells this task from another."""
        return self.way

    @property
    def version(self) -> str:
        """Model, task, and a hash of all that can change a verdict."""
        return f"{self._model.name}/{self.label}/{self._hash(self.may_change | NAMED)}"

    @property
    def _basis(self) -> str:
        """The version as far as one verdict depends on it: without how many verdicts are asked for
        and how they are combined."""
        return f"{self._model.name}/{self.label}/{self._hash(self.may_change | NAMED | self.MANY)}"

    def _hash(self, without: frozenset[str]) -> str:
        own = {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in without
        }
        return derive_id(self.way, self.instructions, own, dict(self._model.settings))

    def open(self, context: Context) -> None:
        """Sets up asking: one budget and one circuit, for all environments of the stage."""
        self.close()
        self._context = context
        self._caller, self._opened = self._new_caller(context), True

    def _new_caller(self, context: Context) -> Caller:
        cache = None
        if self.cache is not False:
            cache = Cache(
                self.cache if self.cache is not None else context.folder.parent / "judges.sqlite"
            )
        account = Account(context.ledger, context.run, context.name, self.budget, context.clock)
        limits: dict[str, Any] = {
            "concurrency": self.concurrency,
            "timeout": self.timeout,
            "patience": self.patience,
        }
        asked = (self._model, self._basis, cache, account, self._price)
        if self.batch:
            names = {"ledger": context.ledger, "run": context.run, "source": context.name}
            return BatchCaller(*asked, clock=context.clock, **limits, **names)
        return Caller(*asked, clock=context.clock, **limits)

    def close(self) -> None:
        """Waits for what is under way, since it is paid for, and asks nothing more."""
        if not self._opened:
            return
        self._opened = False
        background(self._caller.drain()).result()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
