"""The rating service: pages for raters and for their lead (`turnwise rate RUN`).

Every page works without scripts; scripts add the keyboard, drafts and a progress line that moves. Whoever sends something must have a
session, the session's token in the form, and come from this service's own pages. What is refused is noted for the lead.
"""

import json
import logging
from collections.abc import Mapping
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

from ...engine.ledger import Ledger, LedgerError
from ...engine.plugins import Plugins
from . import lead, raters
from .desk import Desk, DeskError, NotYours
from .pages import filters, task_page
from .render import instructions
from .tasks import FormError

HERE = Path(__file__).parent
COOKIE = "turnwise_session"
BODY = 1_000_000  # bytes a request may have
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
log = logging.getLogger("turnwise.rate")
Text = Annotated[str, Form(max_length=200_000)]
Id = Annotated[str, InPath(max_length=100)]
DONE = {
    "new": "Saved.", "again": "That was saved already.", "corrected": "Your correction is saved.",
    "extra": "Saved as an extra opinion: others had finished this one.", "skipped": "Passed on to somebody else.",
    "undone": "Your last answer is taken back. Change it and send it again.",
}  # fmt: skip


class Refused(Exception):
    """A request that must not be done: forged, or by somebody who may not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def sent(request: Request) -> dict[str, str]:
    """The fields of a form whose names depend on the task. Files and repeated fields are no part of any form here."""
    form: FormData = await request.form()
    return {k: v for k, v in form.items() if isinstance(v, str)}


def make_app(ledger: Ledger, run: str, plugins: Plugins | None = None, secure: bool = False) -> FastAPI:
    """The service for one run.

    Args:
        ledger: the run's.
        run: its id.
        plugins: where renderers and the aggregator that knows raters are looked up; default: those installed.
        secure: cookies travel over https only.
    """
    plugins = plugins if plugins is not None else Plugins()
    shows: Mapping[str, Any] = {name: plugins.create("renderer", name) for name in plugins.names("renderer")}
    judge = plugins.create("aggregator", "rater-bradley-terry")
    app = FastAPI(title="Turnwise rating service", docs_url=None, redoc_url=None, openapi_url=None)
    desk = Desk(ledger)
    pages = Jinja2Templates(HERE / "templates")
    pages.env.filters |= dict(filters())
    pages.env.trim_blocks = pages.env.lstrip_blocks = True
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    # Who asks.

    def who(request: Request) -> raters.Session:
        try:
            found = raters.session(ledger, request.cookies.get(COOKIE, ""))
        except raters.NoEntry as error:
            raise Refused(401, str(error)) from error
        request.state.session = found
        return found

    def rightful(request: Request, session: Annotated[raters.Session, Depends(who)], csrf: Text = "") -> raters.Session:
        """A session that means what it sends: its token is in the form, or in the header that scripts send."""
        own_page(request)
        if session.csrf not in (csrf, request.headers.get("x-csrf")):
            refuse(session, request, "without the session's token")
            raise Refused(403, "This form is too old, or was not sent from here. Load the page again; nothing was changed.")
        return session

    def leading(request: Request, session: Annotated[raters.Session, Depends(who)]) -> raters.Session:
        if session.person.role != "lead":
            refuse(session, request, "not a lead")
            raise Refused(403, "This page is for leads.")
        return session

    def rightful_lead(request: Request, session: Annotated[raters.Session, Depends(rightful)]) -> raters.Session:
        return leading(request, session)

    def refuse(session: raters.Session | None, request: Request, why: str) -> None:
        """Notes an attempt that was refused."""
        person = session.person.id if session else ""
        log.warning("refused %s %s of %s: %s", request.method, request.url.path[:200], person or "somebody", why)
        with ledger.writing() as db:
            raters.note(db, person, "refused", f"{request.method} {request.url.path[:200]}: {why}", ledger.clock())

    def own_page(request: Request) -> None:
        """Browsers say where a form was sent from."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host", ""):
            refuse(None, request, f"sent from {origin[:100]}")
            raise Refused(403, "This was not sent from the pages of this service.")

    Someone = Annotated[raters.Session, Depends(who)]
    Sender = Annotated[raters.Session, Depends(rightful)]
    Lead = Annotated[raters.Session, Depends(leading)]
    SendingLead = Annotated[raters.Session, Depends(rightful_lead)]

    def page(request: Request, name: str, status: int = 200, **more: Any) -> HTMLResponse:
        session = getattr(request.state, "session", None)
        known = {
            "session": session,
            "me": session.person if session else None,
            "done": DONE.get(request.query_params.get("done", "")),
        }
        return pages.TemplateResponse(request, f"{name}.html", {**known, **more}, status_code=status)

    def go(where: str) -> RedirectResponse:
        return RedirectResponse(where, status_code=303)

    # Coming and going.

    @app.get("/enter", response_class=HTMLResponse)
    def enter_page(request: Request, link: Annotated[str, Query(max_length=200)] = "") -> Response:
        return page(request, "enter", link=link)

    @app.post("/enter", response_class=HTMLResponse)
    def enter(request: Request, link: Text = "") -> Response:
        """A link opens a new session and is used up; looking at it (as previews do) uses nothing."""
        own_page(request)
        try:
            cookie = raters.enter(ledger, link.strip().rsplit("link=", 1)[-1])
        except raters.NoEntry as error:
            refuse(None, request, "a link that opens nothing")
            return page(request, "enter", 403, link="", problem=str(error))
        answer = go("/instructions")
        answer.set_cookie(COOKIE, cookie, max_age=int(raters.SESSION), httponly=True, samesite="lax", secure=secure, path="/")
        return answer

    @app.post("/leave", response_class=HTMLResponse)
    def leave(request: Request, session: Sender) -> Response:
        raters.leave(ledger, request.cookies.get(COOKIE, ""))
        answer = go("/enter")
        answer.delete_cookie(COOKIE, path="/")
        return answer

    # Rating.

    @app.get("/", response_class=HTMLResponse)
    def home(request: Request, session: Someone, done: Annotated[str, Query(max_length=20)] = "") -> Response:
        asked = lead.strata(ledger, run)
        if any(name not in session.person.strata for name in asked):
            return go("/me")
        try:
            id = desk.next(run, session.person.id)
        except DeskError as error:
            return page(request, "idle", why=str(error), gated=session.person.state == "gated")
        if id is None:
            return page(request, "idle", why="", gated=False)
        return go(f"/task/{id}" + (f"?done={done}" if done in DONE else ""))

    def onward(session: raters.Session, done: str) -> RedirectResponse:
        """To the next task, where there is one."""
        try:
            id = desk.next(run, session.person.id)
        except DeskError:
            id = None
        return go(f"/task/{id}?done={done}" if id is not None else f"/?done={done}")

    @app.get("/task/{id}", response_class=HTMLResponse)
    def show(request: Request, session: Someone, id: Id, check: bool = False) -> Response:
        task = mine(request, session, id)
        return page(request, "task", **task_page(task, shows.get(task.study["render"], shows["markdown"]), check))

    @app.post("/task/{id}", response_class=HTMLResponse)
    def answer(request: Request, session: Sender, id: Id, form: Annotated[dict[str, str], Depends(sent)]) -> Response:
        mine(request, session, id)
        try:
            return onward(session, desk.answer(id, session.person.id, form))
        except FormError:
            desk.draft(id, session.person.id, form)
            return go(f"/task/{id}?check=1")

    @app.post("/task/{id}/draft")
    def draft(request: Request, session: Sender, id: Id, form: Annotated[dict[str, str], Depends(sent)]) -> Response:
        mine(request, session, id)
        desk.draft(id, session.person.id, form)
        return Response(status_code=204)

    @app.post("/task/{id}/skip", response_class=HTMLResponse)
    def skip(request: Request, session: Sender, id: Id, reason: Text = "") -> Response:
        mine(request, session, id)
        desk.skip(id, session.person.id, reason)
        return onward(session, "skipped")

    @app.post("/undo", response_class=HTMLResponse)
    def undo(request: Request, session: Sender) -> Response:
        return go(f"/task/{desk.undo(run, session.person.id).id}?done=undone")

    @app.post("/practice", response_class=HTMLResponse)
    def practice(request: Request, session: Sender) -> Response:
        raters.try_again(ledger, session.person.id)
        return go("/")

    @app.get("/progress", response_class=HTMLResponse)
    def progress(request: Request, session: Someone) -> Response:
        return page(request, "progress", p=desk.progress(run, session.person.id), agreement=lead.agreement_now(ledger, run))

    @app.get("/instructions", response_class=HTMLResponse)
    def instructions_page(request: Request, session: Someone) -> Response:
        texts: dict[str, list[str]] = {}  # several studies may share one
        for study in lead.studies(ledger, run):
            texts.setdefault(study.instructions, []).append(study.settings["question"])
        return page(request, "instructions", texts=[(instructions(text), asked) for text, asked in texts.items()])

    @app.get("/me", response_class=HTMLResponse)
    def me(request: Request, session: Someone) -> Response:
        return page(request, "me", asked=lead.strata(ledger, run))

    @app.post("/me", response_class=HTMLResponse)
    def declare(request: Request, session: Sender, form: Annotated[dict[str, str], Depends(sent)]) -> Response:
        asked = lead.strata(ledger, run)
        said = {name: form.get(f"stratum-{name}", "") for name in asked}
        if any(value not in asked[name] and value != "" for name, value in said.items()):
            raise Refused(422, "Choose one of the answers that are offered.")
        raters.declare(ledger, session.person.id, said)
        return go("/")

    def mine(request: Request, session: raters.Session, id: str) -> Any:
        try:
            return desk.task(id, session.person.id)
        except NotYours as error:
            refuse(session, request, "a task of somebody else's, or none")
            raise Refused(404, str(error)) from error

    # The lead.

    @app.get("/lead", response_class=HTMLResponse)
    def lead_page(request: Request, session: Lead) -> Response:
        return page(request, "lead", view=lead.overview(ledger, run, judge), link=None)

    @app.post("/lead/raters", response_class=HTMLResponse)
    def invite(request: Request, session: SendingLead, name: Text, role: Text = "rater") -> Response:
        try:
            secret = raters.invite(ledger, name, role)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        link = f"{request.base_url}enter?link={secret}"
        return page(request, "lead", view=lead.overview(ledger, run, judge), link=link, invited=" ".join(name.split())[:200])

    @app.post("/lead/raters/{id}", response_class=HTMLResponse)
    def set_state(request: Request, session: SendingLead, id: Id, state: Text) -> Response:
        try:
            raters.set_state(ledger, id, state)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        return go("/lead")

    @app.post("/lead/studies", response_class=HTMLResponse)
    def pause(request: Request, session: SendingLead, source: Text, paused: bool = Form(False)) -> Response:
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
        """What raters agreed on becomes a gold item for those who have not seen it."""
        try:
            lead.make_gold(ledger, run, id)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        return go(f"/lead/items/{id}")

    @app.get("/lead/export")
    def export(session: Lead) -> Response:
        """Every answer, one JSON object per line."""
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in lead.export(ledger, run))
        headers = {"content-disposition": 'attachment; filename="answers.jsonl"'}
        return Response(lines, media_type="application/x-ndjson", headers=headers)

    @app.get("/healthz")
    def healthy() -> dict[str, str]:
        with ledger.reading() as db:
            db.exec_driver_sql("SELECT 1")
        return {"status": "ok"}

    # What goes wrong.

    def said(request: Request, status: int, message: str) -> Response:
        if status == 401 and request.method == "GET" and "hx-request" not in request.headers:
            return page(request, "enter", 401, link="", problem=message if COOKIE in request.cookies else "")
        return page(request, "problem", status, code=status, message=message)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> Response:
        return said(request, error.status, str(error))

    @app.exception_handler(DeskError)
    def not_possible(request: Request, error: DeskError) -> Response:
        return said(request, 409, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return said(request, 422, "This request does not hold what it should. Go back and try again.")

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return said(request, error.status_code, "There is no such page." if error.status_code == 404 else str(error.detail))

    @app.exception_handler(LedgerError)
    def busy(request: Request, error: LedgerError) -> Response:
        log.error("%s", error)
        return said(
            request, 503, "The service cannot reach its records just now. Nothing you sent was lost: go back and send it again."
        )

    app.add_middleware(Guard, secure=secure)
    return app


class Guard:
    """Headers that keep pages inert, and a limit to what is read of a request."""

    def __init__(self, app: Any, secure: bool) -> None:
        self.app = app
        self.headers = [
            (b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin"),
        ] + ([(b"strict-transport-security", b"max-age=31536000")] if secure else [])  # fmt: skip

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        fixed = self.headers + ([] if scope["path"].startswith("/static/") else [(b"cache-control", b"no-store")])
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

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY:
            await JSONResponse({"detail": "That is more than this service reads."}, 413)(scope, receive, answer)
            return
        await self.app(scope, limited, answer)
