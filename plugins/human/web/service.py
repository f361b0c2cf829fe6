"""What all pages of the rating service share: the run's desk, templates, caches, and what refuses a
request."""

import contextlib
import ipaddress
import logging
import math
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.templating import Jinja2Templates

from ....running import Ledger
from .. import lead, raters
from ..agreement import agreed
from ..desk import Desk
from ..errors import Refused
from .pages import filters

HERE = Path(__file__).parent
PORTS = {"http": 80, "https": 443}
NOTED, HOUR = 20, 3600.0  # notes of what was refused to a person, in so many seconds
# Seconds between looks at what is due, and between counts of the raters' progress.
COLLECT, COUNT = 5.0, 20.0
DONE = {
    "new": "Saved.",
    "again": "That was saved already.",
    "corrected": "Your correction is saved.",
    "extra": "Saved as an extra opinion: others had finished this one.",
    "late": "Saved, though this one is not waited for any more.",
    "handed-over": (
        "Your last answer has been handed over already. Change it below and send the correction."
    ),
    "skipped": "Passed on to another rater.",
    "undone": "Your last answer is taken back. Change it and send it again.",
}
log = logging.getLogger("turnwise.rate")


class Service:
    """The rating service of one run.

    Args:
        ledger, run: the run's ledger, and its id.
        url: how raters reach the service; empty: from this machine only.
        secure: cookies travel over https only.
        shows: renderers by name.
        judge: the aggregator that knows raters.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: str,
        url: str,
        secure: bool,
        shows: Mapping[str, Any],
        judge: Any,
    ) -> None:
        self.ledger, self.run, self.url, self.secure = ledger, run, url, secure
        self.shows, self.judge = shows, judge
        self.desk, self.cookie = Desk(ledger), cookie_name(run)
        self.strata = Sometimes(lambda: lead.strata(ledger, run), COLLECT)
        self.everybody = Sometimes(
            lambda: {"answers": self.desk.answer_count(run), "agreed": agreed(ledger, run)}, COUNT
        )
        # Also when no run is there to do it.
        self.collect = Sometimes(lambda: self.desk.collect(run), COLLECT)
        # When refusals of the last hour were noted, by person; "" are strangers.
        self._noted: dict[str, list[float]] = {}
        self._pages = Jinja2Templates(HERE / "templates")
        self._pages.env.filters |= dict(filters())
        self._pages.env.trim_blocks = self._pages.env.lstrip_blocks = True

    def refuse(self, session: raters.Session | None, request: Request, why: str) -> None:
        """Notes an attempt that was refused; of a person twenty an hour, of all strangers one a
        minute, so that the log and the records cannot be flooded, nor other requests held up. What
        they sent is written so that it can neither end a line nor steer a terminal."""
        person, now = session.person.id if session else "", time.monotonic()
        before = [
            when for when in self._noted.get(person, ()) if when > now - (HOUR if session else 60.0)
        ]
        if len(before) >= (NOTED if session else 1):
            return
        self._noted[person] = [*before, now]
        what = f"{request.method} {ascii(request.url.path[:200])[1:-1]}: {ascii(why)[1:-1]}"
        log.warning("refused to %s: %s", person or "a stranger", what)
        with self.ledger.writing() as db:
            raters.note(db, self.run, person, "refused", what, self.ledger.clock())

    def own_page(self, request: Request) -> None:
        """Refuses a form that was sent from elsewhere; browsers tell where it was sent from."""
        origin = request.headers.get("origin")
        own = (
            self.url or f"{origin.partition('://')[0]}://{request.headers.get('host', '')}"
            if origin
            else ""
        )
        if origin is not None and (place_of(origin) is None or place_of(origin) != place_of(own)):
            self.refuse(None, request, f"sent from {origin[:100]}")
            raise Refused(
                403,
                "This was not sent from the pages of this service."
                + (f" Open it as {self.url}" if self.url else ""),
            )

    def page(self, request: Request, name: str, status: int = 200, **more: Any) -> HTMLResponse:
        """Returns a page, made of a template and what all pages show."""
        session = request.scope.get("state", {}).get("session")
        done, last = request.query_params.get("done", ""), request.query_params.get("last", "")
        back = (
            last if done in ("new", "corrected") and re.fullmatch(r"[\w-]{1,100}", last) else None
        )
        known = {
            "session": session,
            "me": session.person if session else None,
            "done": DONE.get(done),
            "last": back,
        }
        return self._pages.TemplateResponse(
            request, f"{name}.html", {**known, **more}, status_code=status
        )


def go(where: str) -> RedirectResponse:
    """Leads on after a form was taken."""
    return RedirectResponse(where, status_code=303)


class Sometimes:
    """A value that is computed again after a while; one thread at a time does so, the others take
    the last value."""

    def __init__(self, work: Callable[[], Any], seconds: float) -> None:
        self.work, self.seconds = work, seconds
        self.until, self.value, self.lock = -math.inf, None, threading.Lock()

    def __call__(self) -> Any:
        """Returns the value, computed again when it is due."""
        if time.monotonic() >= self.until and self.lock.acquire(blocking=self.until == -math.inf):
            try:
                if time.monotonic() >= self.until:
                    self.value = self.work()
                    self.until = time.monotonic() + self.seconds
            finally:
                self.lock.release()
        return self.value


def place_of(url: str) -> tuple[str, str, int] | None:
    """Returns scheme, host and port of an address, however it is spelled: in capitals, with the
    default port, in letters beyond ASCII or their encoding. None: it is no address of a page."""
    try:
        parts = urlsplit(url)
        host = ".".join(_letters(label) for label in (parts.hostname or "").rstrip(".").split("."))
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    with contextlib.suppress(ValueError):  # a name
        host = ipaddress.ip_address(host).compressed
    return (
        (parts.scheme, "localhost" if host in ("127.0.0.1", "::1") else host, port)
        if host
        else None
    )


def _letters(label: str) -> str:
    """Decodes a part of a host's name: browsers send `xn--` and ASCII for other letters."""
    if label.startswith("xn--"):
        return label[4:].encode("ascii").decode("punycode")
    return unicodedata.normalize("NFKC", label)


def cookie_name(run: str) -> str:
    """Returns the name of a run's cookie: services of several runs on one host must not sign each
    other's raters out."""
    return f"turnwise_{run[:12]}"
