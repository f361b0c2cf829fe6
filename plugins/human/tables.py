"""The tables that the rating service adds to the ledger's database: studies, items, leases, raters,
sessions, events.

Episodes, requests and answers are the ledger's. These tables hold which rater has which question,
the answers that are not yet handed over, and the raters' accounts.
"""

from __future__ import annotations

import sqlalchemy as sa

from ...running import Words

metadata = sa.MetaData()

STUDIES = sa.Table(  # what raters are asked, as the run's config says; one per source
    "people_studies",
    metadata,
    sa.Column("run", sa.String, primary_key=True),
    sa.Column("source", Words, primary_key=True),
    sa.Column("settings", sa.String, nullable=False),  # JSON: the options of `People`
    sa.Column("instructions", sa.String, nullable=False),  # JSON: a text in Markdown
    sa.Column("paused", sa.Boolean, nullable=False, default=False),
)
ITEMS = sa.Table(  # one question, for any number of raters
    "people_items",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("source", Words, nullable=False),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("group", sa.String, nullable=False, index=True),
    sa.Column("start", sa.String, nullable=False, index=True),
    sa.Column("shown", sa.String, nullable=False),  # JSON: episode ids
    # JSON: the task and what belongs to it, as it was when this was asked.
    sa.Column("ask", sa.String, nullable=False),
    sa.Column("value", sa.Float, nullable=False, default=0.0),  # what an answer would teach
    sa.Column(
        "luck", sa.Float, nullable=False
    ),  # uniform in [0, 1): whether it belongs to the random share, and its place there
    sa.Column("gold", sa.String),  # JSON: the known answer; null: not known
    sa.Column("time", sa.Float, nullable=False),
)
LEASES = sa.Table(  # an item in a rater's hands, or their answer to it
    "people_leases",
    metadata,
    sa.Column("id", sa.String, primary_key=True),  # unguessable: it stands in the address
    sa.Column("item", sa.String, nullable=False, index=True),
    sa.Column("rater", sa.String, nullable=False, index=True),
    # The slot it fills; null: gold, or all slots were taken.
    sa.Column("request", sa.String, index=True),
    sa.Column("status", sa.String, nullable=False),  # open, answered, skipped
    sa.Column("order", sa.String, nullable=False),  # JSON: episode ids as displayed
    sa.Column("chosen", sa.String, nullable=False),  # value, random, gold
    sa.Column("draft", sa.String, nullable=False, default="{}"),  # JSON: the form as it stands
    sa.Column("answer", sa.String),  # JSON: the rater's answer
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    # The attempt that the ledger has.
    sa.Column("delivered", sa.Integer, nullable=False, default=0),
    sa.Column("seconds", sa.Float),
    sa.Column("right", sa.Boolean),  # of gold, the first answer
    # The rater passed it on to others.
    sa.Column("passed", sa.Boolean, nullable=False, default=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("answered", sa.Float),
    sa.UniqueConstraint("item", "rater"),
)
RATERS = sa.Table(
    "people_raters",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),  # JSON text: any name, kept as given
    sa.Column("role", sa.String, nullable=False),  # rater, lead
    sa.Column("state", sa.String, nullable=False),  # active, gated, practice, blocked, paused
    sa.Column("strata", sa.String, nullable=False, default="{}"),  # JSON: what they declared
    sa.Column("token", sa.String, unique=True),  # hash of the link's secret; null once used
    sa.Column("token_expires", sa.Float),
    # Gold answered before this no longer counts.
    sa.Column("gate", sa.Float, nullable=False, default=0.0),
    sa.Column("chances", sa.Integer, nullable=False, default=0),
    sa.Column("time", sa.Float, nullable=False),
    sa.UniqueConstraint("run", "name"),
)
SESSIONS = sa.Table(
    "people_sessions",
    metadata,
    sa.Column("id", sa.String, primary_key=True),  # hash of the cookie's secret
    sa.Column("rater", sa.String, nullable=False, index=True),
    sa.Column("csrf", sa.String, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
)
EVENTS = sa.Table(  # flags, refusals, gates: shown to the lead, never acted on by themselves
    "people_events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("rater", sa.String, nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("lease", sa.String),
    sa.Column("detail", Words, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)
