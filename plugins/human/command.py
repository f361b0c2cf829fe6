"""`turnwise rate RUN`: starts the rating service of a run, or makes links for its raters."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

import typer


def rate(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The run's folder.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8088,
    invite: Annotated[
        str | None, typer.Option(help="Make a one-time link for this name, and end.")
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            help="Of the invited: rater or lead; default: as it is, rater for a new person."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="How raters reach the service, for links; default http://HOST:PORT."),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(help="The ledger's URL, where the run's config does not give all of it."),
    ] = None,
    secure: Annotated[
        bool,
        typer.Option(
            help="Cookies over https only; for a service behind a proxy that speaks https."
        ),
    ] = False,
) -> None:
    """Serves the raters' web page of a run; prints a one-time link for its lead, who invites the
    others."""
    from ...protocols import ConfigError

    _check_packages()
    import uvicorn

    from ...running import keep, open_ledger
    from . import raters
    from .tables import metadata
    from .web.app import make_app
    from .web.serve import ANSWERED, Patient

    opened, run = open_ledger(folder, ledger)
    keep(opened, metadata)
    base = (url or f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}").rstrip(
        "/"
    )
    try:
        if invite is not None:
            print(f"{base}/enter?link={raters.invite(opened, run, invite, role)}")
            return
        app = make_app(opened, run, context.obj, url=base, secure=secure)
        print(_lead_link(opened, run, folder, base), flush=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_port(host, port)
    print(f"The rating service is at {base}. Ctrl-C ends it; nothing is lost.", flush=True)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        http=Patient,
        limit_concurrency=ANSWERED,
    )


def _check_packages() -> None:
    """Raises `ConfigError` where what serves web pages is not installed."""
    from ...protocols import ConfigError
    from ...tools import install

    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the rating service needs more packages: {install('people')} ({error})"
        ) from error


def _lead_link(ledger: Any, run: str, folder: Path, base: str) -> str:
    """Returns the line that tells how the lead of a run comes in; makes one where there is none."""
    from . import raters

    people = raters.everybody(ledger, run)
    leads = [p.name for p in people if p.role == "lead"]
    if leads:
        return f"A new link for the lead:  turnwise rate {folder} --invite {leads[0]!r}"
    name = "lead" if all(p.name != "lead" for p in people) else "the lead"
    secret = raters.invite(ledger, run, name, "lead")
    return f"The lead's link, good once:  {base}/enter?link={secret}"


def _check_port(host: str, port: int) -> None:
    """Raises `ConfigError` where the service cannot listen."""
    from ...protocols import ConfigError

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"the service cannot listen on {host}:{port}: {error.strerror}. Choose another one"
                " with --port"
            ) from error
