"""The tables of the ledger."""

from __future__ import annotations

import sqlalchemy as sa

from .database import Words

SCHEMA = 4


METADATA = sa.MetaData()
INFO = sa.Table(
    "info",
    METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
EPISODES = sa.Table(
    "episodes",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("stage", Words, nullable=False),
    sa.Column("update", sa.Integer, nullable=False),
    sa.Column("group", sa.String, nullable=False, index=True),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("env", Words, nullable=False),
    sa.Column("ending", sa.String, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Index("ix_episodes_place", "run", "stage", "update"),
)
REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("group", sa.String, nullable=False, index=True),
    sa.Column("source", Words, nullable=False),
    sa.Column("rater_slot", sa.Integer, nullable=False),
    sa.Column("required", sa.Boolean, nullable=False),
    sa.Column("deadline", sa.Float),
    sa.Column("ask", sa.String, nullable=False),
    # What is asked, whichever rater's turn it is.
    sa.Column("item", sa.String, nullable=False, server_default="", index=True),
    sa.Column("shown", sa.String, nullable=False, server_default="[]"),
    sa.Column("time", sa.Float, nullable=False),
)
FEEDBACK = sa.Table(
    "feedback",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("target", sa.String, nullable=False, index=True),
    sa.Column("request", sa.String, index=True),
    sa.Column("source", Words, nullable=False),
    sa.Column("version", Words, nullable=False),
    sa.Column("rater", Words, nullable=False),
    sa.Column("stratum", Words, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("score", sa.Float),
    sa.Column("content", sa.String, nullable=False),
    sa.Column("supersedes", sa.String, unique=True),
    sa.Column("cost", sa.Float, nullable=False),
    sa.Column("late", sa.Boolean, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Index("ix_feedback_newest", "source", "time"),
)
MEMBERS = sa.Table(
    "members",
    METADATA,
    sa.Column("episode", sa.String, primary_key=True),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("update", sa.Integer, nullable=False),
    sa.Column("group", sa.String, nullable=False, index=True),
    sa.Column("used", sa.Boolean, nullable=False),
    sa.Column("reason", Words, nullable=False),
    sa.Column("outcome", sa.Float),
    sa.Column("feedback", sa.String, nullable=False),
    sa.Column("credit", sa.String, nullable=False, server_default="[]"),
    sa.Column("time", sa.Float, nullable=False),
    sa.Index("ix_members_place", "run", "update"),
)
