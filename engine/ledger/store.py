"""What a plugin keeps in a ledger's database: tables of its own, and what it joins them with.

    metadata = sa.MetaData()
    NOTES = sa.Table("acme_notes", metadata, sa.Column("request", sa.String), ...)

    keep(ledger, metadata)
    with ledger.writing() as db:
        db.execute(NOTES.insert().values(...))
    with ledger.reading() as db:
        open_ = sa.select(NOTES).join(SLOTS, SLOTS.c.id == NOTES.c.request)
        rows = db.execute(open_.where(~SLOTS.c.answered)).mappings().all()

The ledger's own tables are not for plugins: episodes and answers are read and written by its
methods. Names of a plugin's tables begin with the plugin's name.
"""

from __future__ import annotations

import sqlalchemy as sa

from .database import Database
from .tables import FEEDBACK, MEMBERS, REQUESTS

# Every request: id, source, kind, target, item (the question, which several raters may be asked),
# group, rater_slot, required, deadline; whether it is answered, and whether its group belongs to an
# update already.
SLOTS = sa.select(
    REQUESTS.c.id,
    REQUESTS.c.source,
    REQUESTS.c.kind,
    REQUESTS.c.target,
    REQUESTS.c.item,
    REQUESTS.c.group,
    REQUESTS.c.rater_slot,
    REQUESTS.c.required,
    REQUESTS.c.deadline,
    sa.exists().where(FEEDBACK.c.request == REQUESTS.c.id).label("answered"),
    sa.exists().where(MEMBERS.c.group == REQUESTS.c.group).label("decided"),
).subquery("slots")


def keep(ledger: Database, metadata: sa.MetaData) -> None:
    """Creates a plugin's tables in the ledger's database where they are missing."""
    with ledger.writing() as db:
        metadata.create_all(db)
