"""`turnwise serve POLICY`: serves a policy to programs; `turnwise forget LEDGER ID`: deletes
conversations."""

from __future__ import annotations

import signal
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ...running import Ledger, PolicyPlayer
    from .server import Server
    from .serving import Serving

LOCKED = 1.0  # seconds that replies may wait for another writer of the ledger


def serve(
    policy: Annotated[str, typer.Argument(help="Its folder, hub name or short name.")],
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Record conversations there: a file or a database URL. Default: nowhere."
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="YAML: name: KEY, or name: {key: KEY, expires: 2027-01-31, per_minute: 60}."
            " Default: one key, drawn and printed."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets others in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    model: Annotated[
        list[str] | None, typer.Option(help="A name that it answers to; default: policy.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="An option of requests to pass over: temperature.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Conversations that are open at a time.")] = 64,
    idle: Annotated[
        float, typer.Option(min=0.0, help="Seconds after which a conversation ends.")
    ] = 600.0,
    redact: Annotated[
        str | None,
        typer.Option(help="MODULE:FUNCTION that takes out of a text what must not be recorded."),
    ] = None,
) -> None:
    """Serves a policy as Chat Completions, Responses and Messages, and takes feedback on its
    conversations."""
    from ...protocols import ConfigError
    from ...tools import install, named

    if ledger is not None and temperature <= 0:
        raise ConfigError("what is recorded may train, and needs a temperature above 0")
    try:
        from .clients import Client
        from .server import Server
        from .serving import Serving
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs more packages: {install('agents')} ({error})") from error
    try:
        clean = None if redact is None else named(redact)
        known = _keys(keys)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    player, opened = _player(policy, temperature, max_new_tokens, rows), _ledger(ledger)
    serving = Serving(player, model or ["policy"], opened, ignore or (), clean, idle)
    try:
        server = Server({"/feedback": Client.feedback, "/forget": Client.forget}, host, port)
    except OSError as error:
        raise ConfigError(
            f"nothing can listen on {host}:{port}: {error.strerror}. Choose another --port"
        ) from error
    for name, (key, expires, per_minute) in known.items():
        server.open(key, Client(name, serving, expires, per_minute))
    where = "recorded nowhere" if opened is None else f"recorded in {opened.url}"
    print(f"{policy} is at {server.url}/v1; conversations are {where}.")
    if keys is None:
        print(f"The key: {next(iter(known.values()))[0]}")
    print("Ctrl-C ends it; what is open is recorded.", flush=True)
    _run(serving, server)


def _run(serving: Serving, server: Server) -> None:
    """Replies until a signal comes."""

    def stop(*_: Any) -> None:
        serving.stop()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_DFL)  # a second one ends it at once

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop)
    serving.run()
    server.stop()
    if serving.recorder.ledger is not None:
        serving.recorder.ledger.close()


def _player(policy: str, temperature: float, max_new_tokens: int, rows: int) -> PolicyPlayer:
    """Loads a policy to sample by these settings.

    Raises:
        ConfigError: replies are as long as its context.
    """
    from ...learning import InProcess, Policy
    from ...protocols import ConfigError, Sampling
    from ...running import PolicyPlayer

    loaded = Policy.from_pretrained(policy)
    if max_new_tokens >= loaded.context_length:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room in a context of"
            f" {loaded.context_length} tokens"
        )
    backend = InProcess(loaded, rows=rows)
    return PolicyPlayer(loaded, Sampling(temperature, max_new_tokens), backend)


def _ledger(url: str | None) -> Ledger | None:
    """Opens the ledger where conversations are recorded, if they are. What it cannot take is kept
    and tried again: replies do not wait for a lock."""
    from ...running import Ledger

    return None if url is None else Ledger(url, lock_timeout=LOCKED)


def _keys(path: Path | None) -> dict[str, tuple[str, float | None, int]]:
    """Reads keys: by name the key, when it expires, and how often it may ask in a minute.

    Raises:
        ValueError: the file holds something else.
    """
    import secrets
    from datetime import date, datetime, time

    import yaml

    if path is None:
        return {"client": (secrets.token_urlsafe(24), None, 0)}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the keys in {path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:  # whose own words would quote a key
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(
            f"the keys in {path} cannot be read: {error.problem}, line {line}"
        ) from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must have a key for each name: `name: KEY`")
    keys: dict[str, tuple[str, float | None, int]] = {}
    for number, (name, given) in enumerate(found.items(), 1):
        entry: dict[str, Any] = dict(given) if isinstance(given, dict) else {"key": given}
        key, until, often = (entry.pop(k, None) for k in ("key", "expires", "per_minute"))
        sound = isinstance(key, str) and len(key) >= 16 and key.isascii() and key == key.strip()
        count = often is None or (isinstance(often, int) and often is not True and often > 0)
        if entry or not sound or not count or not isinstance(until, (date, type(None))):
            raise ValueError(
                f"{path}: entry {number} must be a name with a `key` of at least 16 ASCII"
                " characters, and perhaps `expires`, a day or a time, and `per_minute`, a number"
                " from 1 on"
            )
        if until is not None and not isinstance(until, datetime):
            until = datetime.combine(until, time.max)
        if until is not None and until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        keys[str(name)] = (key, until.timestamp() if until else None, often or 0)
    if len({key for key, *_ in keys.values()}) < len(keys):
        raise ValueError(f"{path}: two names have one key")
    return keys


def forget(
    ledger: Annotated[str, typer.Argument(help="The ledger: a file or a database URL.")],
    conversations: Annotated[list[str], typer.Argument(help="Their ids, or those of responses.")],
) -> None:
    """Deletes conversations from a ledger for good, with all feedback on them."""
    from ...protocols import ConfigError
    from ...running import Ledger
    from .recording import conversation_of, later

    conversations = [conversation_of(name) for name in conversations]
    opened = Ledger(ledger, create=False)
    there = opened.episodes(conversations)
    if missing := [id_ for id_ in conversations if id_ not in there]:
        raise ConfigError(f"{opened.url} has no conversation {', '.join(missing)}")
    more = later(opened, conversations)
    trained = opened.forget([*conversations, *more])
    opened.close()
    for id_ in (*conversations, *more):
        went_on = ", which went on with one of these," if id_ in more else ""
        place = trained.get(id_)
        note = f"; run {place[0]} had trained on it in update {place[1]}" if place else ""
        print(f"{id_}{went_on} is deleted{note}")
