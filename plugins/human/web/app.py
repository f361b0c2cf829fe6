"""The rating service: pages for raters and for their lead (`turnwise rate RUN`).

Every page works without scripts; scripts add the keyboard, drafts and a progress line that moves.
A request that changes something must have a session, the session's token in the form, and come from
this service's own pages. Refused requests are noted for the lead.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ....protocols import LedgerError
from ....running import Ledger, Plugins, keep
from ....tools import did_you_mean
from .. import lead
from ..errors import DeskError, NotYours, Refused
from ..tables import metadata
from . import leading, rating
from .service import HERE, Service, log, place_of
from .session import Current, service_of

# Bytes a request may have, and their kind.
BODY, FORM = 1_000_000, b"application/x-www-form-urlencoded"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


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
    keep(ledger, metadata)
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
    app.state.service = Service(ledger, run, url, secure, shows, judge)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.include_router(rating.router)
    app.include_router(leading.router)
    app.add_api_route("/healthz", healthy)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Guard, secure=secure)
    return app


def healthy(service: Current) -> dict[str, str]:
    """Answers where the records can be read."""
    with service.ledger.reading() as db:
        db.exec_driver_sql("SELECT 1")
    return {"status": "ok"}


# What goes wrong.


def _problem(request: Request, status: int, message: str) -> Response:
    if status == 401 and request.method == "GET" and "hx-request" not in request.headers:
        return service_of(request).page(
            request,
            "enter",
            401,
            link="",
            problem=message if service_of(request).cookie in request.cookies else "",
        )
    return service_of(request).page(request, "problem", status, code=status, message=message)


def _refused(request: Request, error: Refused) -> Response:
    return _problem(request, error.status, str(error))


def _not_yours(request: Request, error: NotYours) -> Response:
    service_of(request).refuse(request.state.session, request, "another rater's task, or none")
    return _problem(request, 404, str(error))


def _not_possible(request: Request, error: DeskError) -> Response:
    return _problem(request, 409, str(error))


def _invalid(request: Request, error: RequestValidationError) -> Response:
    if any(mistake["loc"][0] == "path" for mistake in error.errors()):
        return _problem(request, 404, "There is no such page.")
    return _problem(
        request, 422, "This request does not hold what it should. Go back and try again."
    )


def _http(request: Request, error: HTTPException) -> Response:
    return _problem(
        request,
        error.status_code,
        "There is no such page." if error.status_code == 404 else str(error.detail),
    )


def _busy(request: Request, error: LedgerError) -> Response:
    log.error("%s", error)
    return _problem(
        request,
        503,
        "The service cannot reach its records just now. Nothing you sent was lost: go back and"
        " send it again.",
    )


HANDLERS: Mapping[type[Exception], Any] = {
    Refused: _refused,
    NotYours: _not_yours,
    DeskError: _not_possible,
    RequestValidationError: _invalid,
    HTTPException: _http,
    LedgerError: _busy,
}


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
        """Passes a request on, or refuses one that is too large or no form."""
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
