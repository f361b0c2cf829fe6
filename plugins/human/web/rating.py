"""The pages of raters: coming in, tasks, their own progress."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from .. import lead, raters
from ..errors import DeskError, FormError, NoEntry, Refused, Used
from .pages import task_page
from .render import instructions
from .service import DONE, Service, go
from .session import Current, Fields, Id, Sender, Someone, Text

router = APIRouter()


@router.get("/enter", response_class=HTMLResponse)
def enter_page(
    request: Request, service: Current, link: Annotated[str, Query(max_length=200)] = ""
) -> Response:
    """Shows the page that a one-time link opens."""
    return service.page(request, "enter", link=link)


@router.post("/enter", response_class=HTMLResponse)
def enter(request: Request, service: Current, link: Text = "") -> Response:
    """Opens a new session with a link, which is used up; looking at it (as previews do) uses
    nothing."""
    service.own_page(request)
    try:
        cookie = raters.enter(service.ledger, service.run, link.strip().rsplit("link=", 1)[-1])
    except NoEntry as error:
        service.refuse(None, request, "a link that opens nothing")
        return service.page(request, "enter", 403, link="", problem=str(error))
    answer = go("/instructions")
    answer.set_cookie(
        service.cookie,
        cookie,
        max_age=int(raters.SESSION),
        httponly=True,
        samesite="lax",
        secure=service.secure,
        path="/",
    )
    return answer


@router.post("/leave", response_class=HTMLResponse)
def leave(request: Request, service: Current, session: Sender) -> Response:
    """Ends the session."""
    raters.leave(service.ledger, request.cookies.get(service.cookie, ""))
    answer = go("/enter")
    answer.delete_cookie(service.cookie, path="/")
    return answer


# Rating.


@router.get("/", response_class=HTMLResponse)
def home(
    request: Request,
    service: Current,
    session: Someone,
    done: Annotated[str, Query(max_length=20)] = "",
) -> Response:
    """Leads to the next task; says so where there is none."""
    service.collect()
    if any(name not in session.person.strata for name in service.strata()):
        return go("/me")
    try:
        id = service.desk.next(service.run, session.person.id)
    except DeskError as error:
        return service.page(request, "idle", why=str(error), gated=session.person.state == "gated")
    if id is None:
        return service.page(request, "idle", why="", gated=False)
    return go(f"/task/{id}" + (f"?done={done}" if done in DONE else ""))


@router.get("/more")
def more(session: Someone, service: Current) -> Response:
    """Tells a page that waits whether there is something to do; it takes nothing."""
    return Response(
        status_code=200 if service.desk.has_next(service.run, session.person.id) else 204
    )


def onward(service: Service, session: raters.Session, done: str, last: str) -> RedirectResponse:
    """Leads to the next task, where there is one."""
    service.collect()
    try:
        id = service.desk.next(service.run, session.person.id)
    except DeskError:
        id = None
    return go(
        f"/task/{id}?done={done}&last={last}" if id is not None else f"/?done={done}&last={last}"
    )


@router.get("/task/{id}", response_class=HTMLResponse)
def show(
    request: Request, service: Current, session: Someone, id: Id, check: bool = False
) -> Response:
    """Shows a task."""
    task = service.desk.task(id, session.person.id)
    return service.page(
        request,
        "task",
        **task_page(
            task, service.shows.get(task.study["render"], service.shows["markdown"]), check
        ),
    )


@router.post("/task/{id}", response_class=HTMLResponse)
def answer(request: Request, service: Current, session: Sender, id: Id, form: Fields) -> Response:
    """Takes an answer and leads on; a form that is not complete is shown again."""
    try:
        return onward(service, session, service.desk.answer(id, session.person.id, form), id)
    except FormError:
        service.desk.draft(id, session.person.id, form)
        return go(f"/task/{id}?check=1")


@router.post("/task/{id}/draft")
def draft(request: Request, service: Current, session: Sender, id: Id, form: Fields) -> Response:
    """Keeps a form that is not sent yet."""
    service.desk.draft(id, session.person.id, form)
    return Response(status_code=204)


@router.post("/task/{id}/skip", response_class=HTMLResponse)
def skip(request: Request, service: Current, session: Sender, id: Id, form: Fields) -> Response:
    """Passes a task on to another rater."""
    service.desk.skip(id, session.person.id, form.get("why", ""))
    return onward(service, session, "skipped", id)


@router.post("/task/{id}/undo", response_class=HTMLResponse)
def undo(request: Request, service: Current, session: Sender, id: Id) -> Response:
    """Takes the last answer back, while it has not been handed over."""
    try:
        back = service.desk.undo(id, session.person.id)
    except Used:  # gold is never used: both are told the same
        back = False
    return go(f"/task/{id}?done={'undone' if back else 'handed-over'}")


@router.post("/practice", response_class=HTMLResponse)
def practice(request: Request, service: Current, session: Sender) -> Response:
    """Lets a rater who failed gold practise."""
    raters.try_again(service.ledger, session.person.id)
    return go("/")


@router.get("/progress", response_class=HTMLResponse)
def progress(request: Request, service: Current, session: Someone) -> Response:
    """Shows how much a rater has done, and what all agree on."""
    return service.page(
        request,
        "progress",
        p=service.desk.progress(service.run, session.person.id),
        **service.everybody(),
    )


@router.get("/instructions", response_class=HTMLResponse)
def instructions_page(request: Request, service: Current, session: Someone) -> Response:
    """Shows what raters are asked to do."""
    texts = [
        (study.settings["question"], instructions(study.instructions))
        for study in lead.studies(service.ledger, service.run)
    ]
    return service.page(
        request, "instructions", gold=lead.has_gold(service.ledger, service.run), texts=texts
    )


@router.get("/me", response_class=HTMLResponse)
def me(request: Request, service: Current, session: Someone) -> Response:
    """Asks raters what they are told apart by."""
    return service.page(request, "me", asked=service.strata())


@router.post("/me", response_class=HTMLResponse)
def declare(request: Request, service: Current, session: Sender, form: Fields) -> Response:
    """Takes what a rater declared."""
    asked = service.strata()
    chosen = {name: form.get(f"stratum-{name}", "") for name in asked}
    if any(value not in asked[name] and value != "" for name, value in chosen.items()):
        raise Refused(422, "Choose one of the answers that are offered.")
    raters.declare(service.ledger, session.person.id, chosen)
    return go("/")
