"""`turnwise judges RUN`, and the same in the report: what the judges of a run did, what it cost,
and how far they can be trusted.

Everything is computed from the ledger: answers, requests that were sent, canaries. People are the
sources whose answers name a rater, unless they are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import sqlalchemy as sa

from ...judging import bias_report, calibrate
from ...protocols import Answer, Comparison, Feedback, ReportSection, overall
from ...running import Ledger
from ...tools import did_you_mean
from ..asking.store import CALLS, CANARIES
from ..trust.canaries import Quarantine


def audit(
    ledger: Ledger, run: str, people: Sequence[str] = (), own: Sequence[str] = ()
) -> list[ReportSection]:
    """Returns the report's sections on a run's judges; none where it had no judges.

    Args:
        ledger: of the run.
        run: the run's id.
        people: names of the sources that are people; default: those whose answers name a rater.
        own: names of the judges that are of the policy's model family. Whether they prefer the
            policy's replies is measured against conversations that others played (scripts,
            imports), by people's answers on them.

    Raises:
        LookupError: no such source.
    """
    answers = ledger.feedback(run=run, late=True)
    by_source: dict[str, list[Answer]] = {}
    for answer in answers:
        by_source.setdefault(answer.stamp.source, []).append(answer)
    for name in (*people, *own):
        if name not in by_source:
            raise LookupError(
                f"no source {name!r} has answered in this run.{did_you_mean(name, by_source)}"
            )
    # A source may be both: an escalation answers by a judge here, by people there.
    human = [a for a in answers if (a.stamp.source in people if people else bool(a.stamp.rater))]
    voices = {id(a) for a in human}
    judges = {name: [a for a in own_ if id(a) not in voices] for name, own_ in by_source.items()}
    judges = {name: own_ for name, own_ in judges.items() if own_}
    asked_models = _has(ledger, CALLS)
    sections = [_answers(by_source)] if by_source else []
    sections += [_money(ledger, run), _canaries(ledger, run)] if asked_models else []
    episodes = list(ledger.episodes(sorted(_episodes(answers))).values()) if judges else []
    family = {
        e.id: "the policy's family" if any(t.action_ids is not None for t in e.turns) else "others"
        for e in episodes
    }
    found = bias_report(
        _all(judges), episodes, reference=_worth(human) or None, authors=family if own else None,
        families=dict.fromkeys(own, "the policy's family") if own else None,
    )  # fmt: skip
    lines = [f"{b.rater} ({b.version}): {b.sentence}" for b in found]
    if lines:
        sections.append(ReportSection("Biases of judges", lines))
    if human:
        lines = [
            line for one in judges.values() for line in calibrate(one, human, episodes).lines()
        ]
        both = sorted(set(judges) & {a.stamp.source for a in human})
        if both:
            lines.append(
                f"People were asked by {', '.join(both)} about what a judge was unsure of: that is"
                " no fair sample of what it judged."
            )
        sections.append(ReportSection("Judges against people", lines))
    return [s for s in sections if s.lines or s.rows]


def _all(judges: dict[str, list[Answer]]) -> list[Answer]:
    return [a for own in judges.values() for a in own]


def _answers(by_source: dict[str, list[Answer]]) -> ReportSection:
    rows = []
    for name, own in sorted(by_source.items()):
        counts = Counter(a.status for a in own)
        why = Counter(a.reason.split(":")[0] for a in own if a.status != "scored" and a.reason)
        known = sum(a.details.get("took", {}).get("cached", 0) > 0 for a in own)
        flips = [bool(a.details["flipped"]) for a in own if "flipped" in a.details]
        rows.append(
            [
                name, ", ".join(sorted({a.stamp.version for a in own if a.stamp.version}))[:200],
                str(len(own)), str(counts["scored"]),
                str(counts["abstained"]), f"{counts['failed']} ({counts['failed'] / len(own):.1%})",
                "; ".join(f"{reason} ({count})" for reason, count in why.most_common(3)),
                str(known),
                f"{sum(flips) / len(flips):.1%} of {len(flips)}" if flips else "",
                f"{sum(a.stamp.cost for a in own):.4f}",
            ]
        )  # fmt: skip
    columns = [
        "source",
        "version",
        "answers",
        "scored",
        "abstained",
        "failed",
        "why not",
        "known before",
        "flipped with the order",
        "cost",
    ]
    return ReportSection("Answers by source", [], columns, rows)


def _money(ledger: Ledger, run: str) -> ReportSection:
    c = CALLS.c
    sums = [sa.func.sum(column) for column in (c.fresh, c.read, c.written, c.output, c.cost)]
    failed = sa.func.sum(
        sa.case(
            (c.status.in_(["busy", "server", "timeout", "connection", "request", "account"]), 1),
            else_=0,
        )
    )
    unsure = sa.func.sum(sa.case((c.certain, 0.0), else_=c.cost))
    query = (
        sa.select(c.source, c.model, sa.func.count(), failed, *sums, unsure)
        .where(c.run == run)
        .group_by(c.source, c.model)
    )
    with ledger.reading() as db:
        found = list(db.execute(query.order_by(c.source, c.model)))
    rows = [
        [
            source,
            model,
            f"{count:,}",
            f"{bad:,} ({bad / count:.1%})",
            *(f"{int(n):,}" for n in tokens),
            f"{cost:.4f}",
            f"{unclear:.4f}",
        ]
        for source, model, count, bad, *tokens, cost, unclear in found
    ]
    columns = ["source", "model", "requests", "without an answer", "tokens", "read from cache",
        "written to cache", "answered", "dollars",
               "of it not certain"]  # fmt: skip
    lines = (
        [
            "Not certain: an answer may have been made that did not arrive; the most it can have"
            " cost is counted."
        ]
        if rows
        else []
    )
    return ReportSection("What was asked of models", lines, columns, rows)


def _canaries(ledger: Ledger, run: str) -> ReportSection:
    c = CANARIES.c
    counts = [
        sa.func.sum(sa.case((test, 1), else_=0))
        for test in (c.fell.is_(True), c.fell.is_(False), c.fell.is_(None))
    ]
    query = (
        sa.select(c.source, c.kind, *counts)
        .where(c.run == run)
        .group_by(c.source, c.kind)
        .order_by(c.source, c.kind)
    )
    with ledger.reading() as db:
        rows = [[source, kind, *map(str, numbers)] for source, kind, *numbers in db.execute(query)]
    with ledger.reading() as db:
        tried = sa.select(c.source, c.version, c.kind, c.fell).where(
            c.run == run, c.fell.is_not(None)
        )
        seen = list(db.execute(tried.order_by(c.time, c.id)))
    watched: dict[tuple[str, str], Quarantine] = {}
    for source, version, kind, fell in seen:
        watched.setdefault((source, version), Quarantine()).saw(kind, bool(fell))
    lines = [
        f"QUARANTINED: {source} ({version}) {quarantine.reason}. It is not to be trusted with a"
        " policy."
        for (source, version), quarantine in sorted(watched.items())
        if quarantine.quarantined
    ]
    columns = ["source", "kind", "fell for", "saw through", "no verdict"]
    return ReportSection("Canaries: conversations known to be bad", lines, columns, rows)


def _has(ledger: Ledger, table: sa.Table) -> bool:
    with ledger.reading() as db:
        return sa.inspect(db).has_table(table.name)


def _episodes(answers: Sequence[Answer]) -> set[str]:
    scored = {a.episode for a in answers if isinstance(a, Feedback)}
    return scored | {
        e for a in answers if isinstance(a, Comparison) for tier in a.ranking for e in tier
    }


def _worth(human: Sequence[Answer]) -> dict[str, float]:
    """Returns the mean of people's scores for each episode."""
    scores: dict[str, list[float]] = {}
    for answer in human:
        if (
            isinstance(answer, Feedback)
            and answer.status == "scored"
            and (score := overall(answer)) is not None
        ):
            scores.setdefault(answer.episode, []).append(score)
    return {episode: sum(own) / len(own) for episode, own in scores.items()}
