"""Who asks: sessions, the token in forms, leads; as dependencies of the pages."""

import re
from typing import Annotated

from fastapi import Depends, Form, Request
from fastapi import Path as InPath
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from .. import raters
from ..errors import NoEntry, Refused
from .service import Service

LETTERS = 100_000  # characters that the fields of a form may hold
MOST = 50_000  # fields of a form: of a conversation's replies each is one
FIELDS = re.compile(
    r"rank-\d+|turn-\d+|preference|first_wrong|all_bad|verdict|reason|why|comment|csrf|(aspect|stratum)-.+",
    re.DOTALL,
)
Text = Annotated[str, Form(max_length=200_000)]
Id = Annotated[str, InPath(max_length=100, pattern=r"^[\w-]+$")]


def service_of(request: Request) -> Service:
    """Returns the service that the application of a request was made for."""
    service: Service = request.app.state.service
    return service


Current = Annotated[Service, Depends(service_of)]


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


Fields = Annotated[dict[str, str], Depends(sent)]


def who(request: Request, service: Current) -> raters.Session:
    """Returns the session of a request's cookie."""
    try:
        found = raters.session(service.ledger, service.run, request.cookies.get(service.cookie, ""))
    except NoEntry as error:
        raise Refused(401, str(error)) from error
    request.state.session = found
    return found


Someone = Annotated[raters.Session, Depends(who)]


def rightful(request: Request, service: Current, session: Someone, form: Fields) -> raters.Session:
    """Returns a session whose token is in the form, or in the header that scripts send."""
    service.own_page(request)
    if session.csrf not in (form.get("csrf"), request.headers.get("x-csrf")):
        service.refuse(session, request, "without the session's token")
        raise Refused(
            403,
            "This form is too old, or was not sent from here. Load the page again; nothing was"
            " changed.",
        )
    return session


Sender = Annotated[raters.Session, Depends(rightful)]


def leading(request: Request, service: Current, session: Someone) -> raters.Session:
    """Returns the session of a lead."""
    if session.person.role != "lead":
        service.refuse(session, request, "not a lead")
        raise Refused(403, "This page is for leads.")
    return session


def rightful_lead(request: Request, service: Current, session: Sender) -> raters.Session:
    """Returns the session of a lead whose token is in the form."""
    return leading(request, service, session)


Lead = Annotated[raters.Session, Depends(leading)]
SendingLead = Annotated[raters.Session, Depends(rightful_lead)]
