"""The rating service: pages for raters and for their lead (`turnwise rate RUN`).

Every page works without scripts; scripts add the keyboard, drafts and a progress line that moves.
A request that changes something must have a session, the session's token in the form, and come from
this service's own pages. Refused requests are noted for the lead.
"""

import contextlib
import ipaddress
import json
import logging
import math
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Form, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from ....protocols import LedgerError
from ....running import Ledger, Plugins
from ....tools import did_you_mean
from .. import lead, raters
from ..agreement import agreed
from ..desk import Desk
from ..errors import DeskError, FormError, NoEntry, NotYours, Refused, Used
from ..tables import prepare
from .pages import filters, task_page
from .render import instructions

HERE = Path(__file__).parent
LETTERS = 100_000  # characters that the fields of a form may hold
PORTS = {"http": 80, "https": 443}
# Bytes a request may have, and their kind.
BODY, FORM = 1_000_000, b"application/x-www-form-urlencoded"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
log = logging.getLogger("turnwise.rate")
Text = Annotated[str, Form(max_length=200_000)]
Id = Annotated[str, InPath(max_length=100, pattern=r"^[\w-]+$")]
FIELDS = re.compile(
    r"rank-\d+|turn-\d+|preference|first_wrong|all_bad|verdict|reason|why|comment|csrf|(aspect|stratum)-.+",
    re.DOTALL,
)
MOST = 50_000  # fields of a form: of a conversation's replies each is one
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


async def sent(request: Request) -> dict[str, str]:
    """Returns the fields of a form whose names depend on the task; others are left out, and so is
    what no text can hold."""
    form: FormData = await request.form(max_fields=MOST)
    whole = {
        k: str(v).encode("utf-8", "replace").decode().replace("\0", "\ufffd")
        for k, v in form.items()
        if FIELDS.fullmatch(k)
    }
    if sum(map(len, whole.values())) > LETTERS:
        raise HTTPException(413, "That is more than this service reads.")
    return whole


class Sometimes:
    """A value that is computed again after a while; one thread at a time does so, the others take
    the last value."""

    def __init__(self, work: Callable[[], Any], seconds: float) -> None:
        self.work, self.seconds = work, seconds
        self.until, self.value, self.lock = -math.inf, None, threading.Lock()

    def __call__(self) -> Any:
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


def make_app(
    ledger: Ledger, run: str, plugins: Plugins | None = None, url: str = "", secure: bool = False
) -> FastAPI:
    """Makes the service for one run.

    Args:
        ledger: the run's.
        run: its id.
        plugins: where renderers and the aggregator that knows raters are looked up; default: those
            installed.
        url: how raters reach the service: where links lead, and forms may come from. Without it
            links are made for this machine only, since a request can claim any other address.
        secure: cookies travel over https only.
    """
    if url and place_of(url) is None:
        raise ValueError(
            "url must be the address that raters open, such as https://rate.example.org, got"
            f" {url!r}"
        )
    prepare(ledger)
    plugins = plugins if plugins is not None else Plugins()
    shows: Mapping[str, Any] = {
        name: plugins.create("renderer", name) for name in plugins.names("renderer")
    }
    judge = plugins.create("aggregator", "rater-bradley-terry")
    app = FastAPI(title="Turnwise rating service", docs_url=None, redoc_url=None, openapi_url=None)
    for study in lead.studies(ledger, run):
        if (name := study.settings["render"]) not in shows:
            raise ValueError(
                f"source {study.source!r} wants the renderer {name!r}, which no plugin"
                f" registered.{did_you_mean(name, shows)}"
            )
    desk, cookie_ = Desk(ledger), cookie_name(run)
    strata = Sometimes(lambda: lead.strata(ledger, run), COLLECT)
    everybody = Sometimes(
        lambda: {"answers": desk.answer_count(run), "agreed": agreed(ledger, run)}, COUNT
    )
    collect = Sometimes(lambda: desk.collect(run), COLLECT)  # also when no run is there to do it
    # When refusals of the last hour were noted, by person; "" are strangers.
    noted: dict[str, list[float]] = {}
    pages = Jinja2Templates(HERE / "templates")
    pages.env.filters |= dict(filters())
    pages.env.trim_blocks = pages.env.lstrip_blocks = True
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    # Who asks.

    def who(request: Request) -> raters.Session:
        try:
            found = raters.session(ledger, run, request.cookies.get(cookie_, ""))
        except NoEntry as error:
            raise Refused(401, str(error)) from error
        request.state.session = found
        return found

    def rightful(
        request: Request,
        session: Annotated[raters.Session, Depends(who)],
        form: Annotated[dict[str, str], Depends(sent)],
    ) -> raters.Session:
        """Returns a session whose token is in the form, or in the header that scripts send."""
        own_page(request)
        if session.csrf not in (form.get("csrf"), request.headers.get("x-csrf")):
            refuse(session, request, "without the session's token")
            raise Refused(
                403,
                "This form is too old, or was not sent from here. Load the page again; nothing was"
                " changed.",
            )
        return session

    def leading(
        request: Request, session: Annotated[raters.Session, Depends(who)]
    ) -> raters.Session:
        if session.person.role != "lead":
            refuse(session, request, "not a lead")
            raise Refused(403, "This page is for leads.")
        return session

    def rightful_lead(
        request: Request, session: Annotated[raters.Session, Depends(rightful)]
    ) -> raters.Session:
        return leading(request, session)

    def refuse(session: raters.Session | None, request: Request, why: str) -> None:
        """Notes an attempt that was refused; of a person twenty an hour, of all strangers one a
        minute, so that the log and the records cannot be flooded, nor other requests held up. What
        they sent is written so that it can neither end a line nor steer a terminal."""
        person, now = session.person.id if session else "", time.monotonic()
        before = [
            when for when in noted.get(person, ()) if when > now - (HOUR if session else 60.0)
        ]
        if len(before) >= (NOTED if session else 1):
            return
        noted[person] = [*before, now]
        what = f"{request.method} {ascii(request.url.path[:200])[1:-1]}: {ascii(why)[1:-1]}"
        log.warning("refused to %s: %s", person or "a stranger", what)
        with ledger.writing() as db:
            raters.note(db, run, person, "refused", what, ledger.clock())

    def own_page(request: Request) -> None:
        """Refuses a form that was sent from elsewhere; browsers tell where it was sent from."""
        origin = request.headers.get("origin")
        own = (
            url or f"{origin.partition('://')[0]}://{request.headers.get('host', '')}"
            if origin
            else ""
        )
        if origin is not None and (place_of(origin) is None or place_of(origin) != place_of(own)):
            refuse(None, request, f"sent from {origin[:100]}")
            raise Refused(
                403,
                "This was not sent from the pages of this service."
                + (f" Open it as {url}" if url else ""),
            )

    Someone = Annotated[raters.Session, Depends(who)]
    Sender = Annotated[raters.Session, Depends(rightful)]
    Lead = Annotated[raters.Session, Depends(leading)]
    SendingLead = Annotated[raters.Session, Depends(rightful_lead)]

    def page(request: Request, name: str, status: int = 200, **more: Any) -> HTMLResponse:
        session = getattr(request.state, "session", None)
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
        return pages.TemplateResponse(
            request, f"{name}.html", {**known, **more}, status_code=status
        )

    def go(where: str) -> RedirectResponse:
        return RedirectResponse(where, status_code=303)

    # Coming and going.

    @app.get("/enter", response_class=HTMLResponse)
    def enter_page(request: Request, link: Annotated[str, Query(max_length=200)] = "") -> Response:
        return page(request, "enter", link=link)

    @app.post("/enter", response_class=HTMLResponse)
    def enter(request: Request, link: Text = "") -> Response:
        """Opens a new session with a link, which is used up; looking at it (as previews do) uses
        nothing."""
        own_page(request)
        try:
            cookie = raters.enter(ledger, run, link.strip().rsplit("link=", 1)[-1])
        except NoEntry as error:
            refuse(None, request, "a link that opens nothing")
            return page(request, "enter", 403, link="", problem=str(error))
        answer = go("/instructions")
        answer.set_cookie(
            cookie_,
            cookie,
            max_age=int(raters.SESSION),
            httponly=True,
            samesite="lax",
            secure=secure,
            path="/",
        )
        return answer

    @app.post("/leave", response_class=HTMLResponse)
    def leave(request: Request, session: Sender) -> Response:
        raters.leave(ledger, request.cookies.get(cookie_, ""))
        answer = go("/enter")
        answer.delete_cookie(cookie_, path="/")
        return answer

    # Rating.

    @app.get("/", response_class=HTMLResponse)
    def home(
        request: Request, session: Someone, done: Annotated[str, Query(max_length=20)] = ""
    ) -> Response:
        collect()
        if any(name not in session.person.strata for name in strata()):
            return go("/me")
        try:
            id = desk.next(run, session.person.id)
        except DeskError as error:
            return page(request, "idle", why=str(error), gated=session.person.state == "gated")
        if id is None:
            return page(request, "idle", why="", gated=False)
        return go(f"/task/{id}" + (f"?done={done}" if done in DONE else ""))

    @app.get("/more")
    def more(session: Someone) -> Response:
        """Tells a page that waits whether there is something to do; it takes nothing."""
        return Response(status_code=200 if desk.has_next(run, session.person.id) else 204)

    def onward(session: raters.Session, done: str, last: str) -> RedirectResponse:
        """Leads to the next task, where there is one."""
        collect()
        try:
            id = desk.next(run, session.person.id)
        except DeskError:
            id = None
        return go(
            f"/task/{id}?done={done}&last={last}"
            if id is not None
            else f"/?done={done}&last={last}"
        )

    @app.get("/task/{id}", response_class=HTMLResponse)
    def show(request: Request, session: Someone, id: Id, check: bool = False) -> Response:
        task = desk.task(id, session.person.id)
        return page(
            request,
            "task",
            **task_page(task, shows.get(task.study["render"], shows["markdown"]), check),
        )

    @app.post("/task/{id}", response_class=HTMLResponse)
    def answer(
        request: Request, session: Sender, id: Id, form: Annotated[dict[str, str], Depends(sent)]
    ) -> Response:
        try:
            return onward(session, desk.answer(id, session.person.id, form), id)
        except FormError:
            desk.draft(id, session.person.id, form)
            return go(f"/task/{id}?check=1")

    @app.post("/task/{id}/draft")
    def draft(
        request: Request, session: Sender, id: Id, form: Annotated[dict[str, str], Depends(sent)]
    ) -> Response:
        desk.draft(id, session.person.id, form)
        return Response(status_code=204)

    @app.post("/task/{id}/skip", response_class=HTMLResponse)
    def skip(
        request: Request, session: Sender, id: Id, form: Annotated[dict[str, str], Depends(sent)]
    ) -> Response:
        desk.skip(id, session.person.id, form.get("why", ""))
        return onward(session, "skipped", id)

    @app.post("/task/{id}/undo", response_class=HTMLResponse)
    def undo(request: Request, session: Sender, id: Id) -> Response:
        try:
            back = desk.undo(id, session.person.id)
        except Used:  # gold is never used: both are told the same
            back = False
        return go(f"/task/{id}?done={'undone' if back else 'handed-over'}")

    @app.post("/practice", response_class=HTMLResponse)
    def practice(request: Request, session: Sender) -> Response:
        raters.try_again(ledger, session.person.id)
        return go("/")

    @app.get("/progress", response_class=HTMLResponse)
    def progress(request: Request, session: Someone) -> Response:
        return page(request, "progress", p=desk.progress(run, session.person.id), **everybody())

    @app.get("/instructions", response_class=HTMLResponse)
    def instructions_page(request: Request, session: Someone) -> Response:
        texts = [
            (study.settings["question"], instructions(study.instructions))
            for study in lead.studies(ledger, run)
        ]
        return page(request, "instructions", gold=lead.has_gold(ledger, run), texts=texts)

    @app.get("/me", response_class=HTMLResponse)
    def me(request: Request, session: Someone) -> Response:
        return page(request, "me", asked=strata())

    @app.post("/me", response_class=HTMLResponse)
    def declare(
        request: Request, session: Sender, form: Annotated[dict[str, str], Depends(sent)]
    ) -> Response:
        asked = strata()
        chosen = {name: form.get(f"stratum-{name}", "") for name in asked}
        if any(value not in asked[name] and value != "" for name, value in chosen.items()):
            raise Refused(422, "Choose one of the answers that are offered.")
        raters.declare(ledger, session.person.id, chosen)
        return go("/")

    # The lead.

    @app.get("/lead", response_class=HTMLResponse)
    def lead_page(request: Request, session: Lead) -> Response:
        return page(request, "lead", view=lead.overview(ledger, run, judge), link=None)

    @app.post("/lead/raters", response_class=HTMLResponse)
    def invite(request: Request, session: SendingLead, name: Text, role: Text = "") -> Response:
        if not url and request.url.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise Refused(
                422,
                "This service was not told its address, so it can make no link: give make_app its"
                " `url`.",
            )
        try:
            secret = raters.invite(ledger, run, name, role or None)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        link = f"{(url or str(request.base_url)).rstrip('/')}/enter?link={secret}"
        return page(
            request,
            "lead",
            view=lead.overview(ledger, run, judge),
            link=link,
            invited=" ".join(name.split())[:200],
        )

    @app.post("/lead/raters/{id}", response_class=HTMLResponse)
    def set_state(request: Request, session: SendingLead, id: Id, state: Text) -> Response:
        try:
            raters.set_state(ledger, run, id, state)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        return go("/lead")

    @app.post("/lead/studies", response_class=HTMLResponse)
    def pause(
        request: Request, session: SendingLead, source: Text, paused: bool = Form(False)
    ) -> Response:
        lead.pause(ledger, run, source, paused)
        return go("/lead")

    @app.get("/lead/items/{id}", response_class=HTMLResponse)
    def item(request: Request, session: Lead, id: Id) -> Response:
        found = lead.item(ledger, run, id)
        if found is None:
            raise Refused(404, "There is no such item in this run.")
        return page(request, "item", **lead.item_page(ledger, found, shows))

    @app.post("/lead/items/{id}/gold", response_class=HTMLResponse)
    def make_gold(request: Request, session: SendingLead, id: Id) -> Response:
        """Makes what raters agreed on a gold item for those who have not seen it."""
        try:
            lead.make_gold(ledger, run, id)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        return go(f"/lead/items/{id}")

    @app.get("/lead/export")
    def export(session: Lead) -> Response:
        """Returns every answer, one JSON object per line."""
        lines = "".join(
            json.dumps(row, ensure_ascii=True) + "\n" for row in lead.export(ledger, run)
        )
        headers = {"content-disposition": 'attachment; filename="answers.jsonl"'}
        return Response(lines, media_type="application/x-ndjson", headers=headers)

    @app.get("/healthz")
    def healthy() -> dict[str, str]:
        with ledger.reading() as db:
            db.exec_driver_sql("SELECT 1")
        return {"status": "ok"}

    # What goes wrong.

    def problem(request: Request, status: int, message: str) -> Response:
        if status == 401 and request.method == "GET" and "hx-request" not in request.headers:
            return page(
                request,
                "enter",
                401,
                link="",
                problem=message if cookie_ in request.cookies else "",
            )
        return page(request, "problem", status, code=status, message=message)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> Response:
        return problem(request, error.status, str(error))

    @app.exception_handler(NotYours)
    def not_yours(request: Request, error: NotYours) -> Response:
        refuse(request.state.session, request, "another rater's task, or none")
        return problem(request, 404, str(error))

    @app.exception_handler(DeskError)
    def not_possible(request: Request, error: DeskError) -> Response:
        return problem(request, 409, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        if any(mistake["loc"][0] == "path" for mistake in error.errors()):
            return problem(request, 404, "There is no such page.")
        return problem(
            request, 422, "This request does not hold what it should. Go back and try again."
        )

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return problem(
            request,
            error.status_code,
            "There is no such page." if error.status_code == 404 else str(error.detail),
        )

    @app.exception_handler(LedgerError)
    def busy(request: Request, error: LedgerError) -> Response:
        log.error("%s", error)
        return problem(
            request,
            503,
            "The service cannot reach its records just now. Nothing you sent was lost: go back and"
            " send it again.",
        )

    app.add_middleware(Guard, secure=secure)
    return app


class Guard:
    """A middleware that sets headers which keep pages inert, and limits what is read of a
    request."""

    def __init__(self, app: Any, secure: bool) -> None:
        self.app = app
        self.headers = [
            (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"strict-origin"), (b"cross-origin-opener-policy", b"same-origin"),
        ] + ([(b"strict-transport-security", b"max-age=31536000")] if secure else [])  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        fixed = self.headers + (
            [] if scope["path"].startswith("/static/") else [(b"cache-control", b"no-store")]
        )
        read = 0

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *fixed]
            await send(message)

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > BODY:
                raise HTTPException(413, "That is more than this service reads.")
            return message

        headers = dict(scope["headers"])
        if scope["method"] == "POST" and not headers.get(b"content-type", FORM).lower().startswith(
            FORM
        ):
            await JSONResponse({"detail": "This service reads plain forms."}, 415)(
                scope, receive, answer
            )
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY:
            await JSONResponse({"detail": "That is more than this service reads."}, 413)(
                scope, receive, answer
            )
            return
        await self.app(scope, limited, answer)
