"""The pages of a lead: who rates, what they agree on, gold, export."""

import json

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, Response

from .. import lead, raters
from ..errors import Refused
from .service import go
from .session import Current, Id, Lead, SendingLead, Text

router = APIRouter()


@router.get("/lead", response_class=HTMLResponse)
def lead_page(request: Request, service: Current, session: Lead) -> Response:
    """Shows the overview of a run."""
    return service.page(
        request, "lead", view=lead.overview(service.ledger, service.run, service.judge), link=None
    )


@router.post("/lead/raters", response_class=HTMLResponse)
def invite(
    request: Request, service: Current, session: SendingLead, name: Text, role: Text = ""
) -> Response:
    """Invites a person, and shows their one-time link."""
    if not service.url and request.url.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise Refused(
            422,
            "This service was not told its address, so it can make no link: give make_app its"
            " `url`.",
        )
    try:
        secret = raters.invite(service.ledger, service.run, name, role or None)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    link = f"{(service.url or str(request.base_url)).rstrip('/')}/enter?link={secret}"
    return service.page(
        request,
        "lead",
        view=lead.overview(service.ledger, service.run, service.judge),
        link=link,
        invited=" ".join(name.split())[:200],
    )


@router.post("/lead/raters/{id}", response_class=HTMLResponse)
def set_state(
    request: Request, service: Current, session: SendingLead, id: Id, state: Text
) -> Response:
    """Lets a rater go on, practise or stop."""
    try:
        raters.set_state(service.ledger, service.run, id, state)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    return go("/lead")


@router.post("/lead/studies", response_class=HTMLResponse)
def pause(
    request: Request,
    service: Current,
    session: SendingLead,
    source: Text,
    paused: bool = Form(False),
) -> Response:
    """Pauses a study, or resumes it."""
    lead.pause(service.ledger, service.run, source, paused)
    return go("/lead")


@router.get("/lead/items/{id}", response_class=HTMLResponse)
def item(request: Request, service: Current, session: Lead, id: Id) -> Response:
    """Shows an item with all answers on it."""
    found = lead.item(service.ledger, service.run, id)
    if found is None:
        raise Refused(404, "There is no such item in this run.")
    return service.page(request, "item", **lead.item_page(service.ledger, found, service.shows))


@router.post("/lead/items/{id}/gold", response_class=HTMLResponse)
def make_gold(request: Request, service: Current, session: SendingLead, id: Id) -> Response:
    """Makes what raters agreed on a gold item for those who have not seen it."""
    try:
        lead.make_gold(service.ledger, service.run, id)
    except ValueError as error:
        raise Refused(422, str(error)) from error
    return go(f"/lead/items/{id}")


@router.get("/lead/export")
def export(session: Lead, service: Current) -> Response:
    """Returns every answer, one JSON object per line."""
    lines = "".join(
        json.dumps(row, ensure_ascii=True) + "\n"
        for row in lead.export(service.ledger, service.run)
    )
    headers = {"content-disposition": 'attachment; filename="answers.jsonl"'}
    return Response(lines, media_type="application/x-ndjson", headers=headers)
