"""Brings the tables of an older ledger up to date."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .tables import INFO, METADATA, SCHEMA


def migrate(db: Connection, schema: int) -> dict[str, str]:
    """Updates the tables of an older ledger to the present schema; returns its `info` after
    that."""
    if schema < 2:
        db.exec_driver_sql("ALTER TABLE members ADD COLUMN credit VARCHAR NOT NULL DEFAULT '[]'")
    if schema < 3:
        db.exec_driver_sql("ALTER TABLE requests ADD COLUMN item VARCHAR NOT NULL DEFAULT ''")
        db.exec_driver_sql("ALTER TABLE requests ADD COLUMN shown VARCHAR NOT NULL DEFAULT '[]'")
    METADATA.create_all(db)  # tables that are new
    for table in METADATA.tables.values():  # schema 4 added indexes
        for index in table.indexes:
            index.create(db, checkfirst=True)
    now = dict(db.execute(sa.select(INFO.c.key, INFO.c.value)).tuples().all()) | {
        "schema": str(SCHEMA)
    }
    now.setdefault("id", uuid.uuid4().hex)
    db.execute(INFO.delete())
    db.execute(INFO.insert(), [{"key": key, "value": value} for key, value in now.items()])
    return now
