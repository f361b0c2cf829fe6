"""Keeps what simulated users may cost, and what they have cost, over all runs: in the database of
their cache, since no run pays for a user alone, and a budget in an environment's kwargs would be
part of every start."""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from ...protocols import Paused
from ...running import Database, keep
from ..asking.store import CALLS, Account

_budgets = sa.MetaData()
BUDGETS = sa.Table(
    "user_budgets",
    _budgets,
    sa.Column("source", sa.String, primary_key=True),
    sa.Column("dollars", sa.Float, nullable=False),
)


def set_budget(database: Database, model: str, dollars: float | None) -> None:
    """Allows the users that a model plays so many dollars in all, those that were spent included;
    None: as many as they cost."""
    keep(database, _budgets)
    with database.writing() as db:
        db.execute(BUDGETS.delete().where(BUDGETS.c.source == model))
        if dollars is None:
            return
        db.execute(BUDGETS.insert().values(source=model, dollars=dollars))


def budgets(database: Database) -> dict[str, float]:
    """Returns the budgets by model."""
    keep(database, _budgets)
    with database.reading() as db:
        return {row.source: row.dollars for row in db.execute(sa.select(BUDGETS))}


class UsersAccount(Account):
    """The account of the users that a model plays.

    Spending and budget are read before each request, so that several processes share them; what
    another one has under way is not known.
    """

    def __init__(self, database: Database, model: str, clock: Callable[[], float]) -> None:
        super().__init__(database, "", model, None, clock)
        self._database, self._model = database, model
        budgets(database)  # makes the table

    def reserve(self, amount: float, already_sent: bool = False) -> bool:
        """Reserves money; returns False where it must wait until what is under way is settled.

        Raises:
            Paused: there is nothing to wait for, the budget is spent.
        """
        paid = sa.select(sa.func.coalesce(sa.func.sum(CALLS.c.cost), 0.0))
        own = sa.select(BUDGETS.c.dollars).where(BUDGETS.c.source == self._model)
        with self._database.reading() as db:
            budget = db.scalar(own)
            self.spent = float(db.scalar(paid.where(CALLS.c.source == self._model)) or 0.0)
        if budget is not None and amount > 0 and self.spent + self.reserved + amount > budget:
            if self.reserved > 0:
                return False
            raise Paused(
                f"the users that {self._model} plays have spent {self.spent:.4f} of their budget of"
                f" {budget:g} dollars, and the next request may cost {amount:.4f}: give them more"
                f" by `turnwise simulator budget DOLLARS --user {self._model}`, and go on"
            )
        self.reserved += amount
        return True
