"""A database that several processes share: SQLite or PostgreSQL, one writer at a time.

SQLite runs in WAL mode; PostgreSQL (`postgresql://user:password@host/database`) is for a team. Both
let one writer in at a time, from the first statement of its transaction on (`BEGIN IMMEDIATE`, an
advisory lock): what is written depends on what was looked up before, and nothing may come between
the two. Threads of one process queue before that.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import DatabaseError
from ..util.secrets import redact, url_in_use
from ..util.suggest import install

ONE_WRITER = 0x7475726E  # the advisory lock's key: "turn"
RESTART = 60.0  # seconds that a server which was reached before is waited for


class Words(sa.TypeDecorator[str]):
    """A text column to select by: what databases cannot hold in a text (NUL, lone surrogates) is
    replaced. The whole text is in `content`."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Replaces NUL by U+FFFD and lone surrogates by question marks; None stays."""
        return (
            value
            if value is None
            else value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
        )


P = ParamSpec("P")
R = TypeVar("R")


def again(method: Callable[P, R]) -> Callable[P, R]:
    """Makes a method of a database one that is called once more where the connection breaks off in
    it: whether its transaction is there is not known then, and it must not write anything twice."""

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except DatabaseError as error:
            if not error.broke_off:
                raise
        return method(*args, **kwargs)

    return called


class Database:
    """A database, opened or created.

    Args:
        url: `sqlite:///path`, `postgresql://user:password@host/database` (any SQLAlchemy URL of
            these two), or the path of an SQLite file.
        lock_timeout: seconds to wait for another writer.
        create: whether a file that is missing is made.

    Raises:
        DatabaseError: the URL or its driver cannot be used, or there is no such file; of a
            subclass, its own error.
    """

    what: ClassVar[str] = "database"
    error: ClassVar[type[DatabaseError]] = DatabaseError

    def __init__(self, url: str | Path, lock_timeout: float = 30.0, *, create: bool = True) -> None:
        where = str(url) if "://" in str(url) else f"sqlite:///{url}"
        url_in_use(where)
        self.url = redact(where)
        if not re.match(r"(sqlite|postgres(ql)?)(\+\w+)?:", where):
            raise self.error(
                f"the {self.what} {self.url} must be SQLite or PostgreSQL: sqlite:///file, or"
                " postgresql://user@host/database"
            )
        try:
            address = sa.make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", where))
            if (
                address.get_backend_name() == "sqlite"
                and address.database
                and not address.database.startswith((":", "file:"))
            ):
                # Connections are opened later, when the working directory may be another one.
                address = address.set(database=str(Path(address.database).absolute()))
            self._engine = sa.create_engine(
                address,
                pool_logging_name=__name__,
                pool_pre_ping=address.get_backend_name() != "sqlite",
            )
            logging.getLogger(
                f"sqlalchemy.pool.impl.{type(self._engine.pool).__name__}.{__name__}"
            ).setLevel(
                logging.CRITICAL
                # it would print the traceback of a connection that breaks off, in addition to the
                # error that is raised
            )
        except ModuleNotFoundError as error:
            raise self.error(
                f"the {self.what} {self.url} needs a driver: {install('postgres')} ({error})"
            ) from error
        except (sa.exc.ArgumentError, ValueError) as error:
            raise self.error(
                f"the {self.what}'s URL {self.url} cannot be used: {redact(str(error))}"
            ) from error
        self._lock_timeout = lock_timeout
        self._reached, self._waiting = False, False
        # Threads of one process queue here: databases let waiters poll, which is slow and unfair.
        self._turn = threading.Lock()
        self._sqlite = self._engine.dialect.name == "sqlite"
        if self._sqlite:
            file = self._engine.url.database
            if not create and not (file and Path(file).is_file()):
                raise self.error(f"the {self.what} {self.url} is gone: there is no such file")
            self._tame_sqlite(lock_timeout)

    def _tame_sqlite(self, lock_timeout: float) -> None:
        @sa.event.listens_for(self._engine, "connect")
        def connected(dbapi: Any, record: Any) -> None:
            dbapi.isolation_level = None  # we say BEGIN ourselves
            cursor = dbapi.cursor()
            cursor.execute(f"PRAGMA busy_timeout={int(lock_timeout * 1000)}")
            cursor.execute("PRAGMA journal_mode=WAL")
            # What was acknowledged survives a power loss too.
            cursor.execute("PRAGMA synchronous=FULL")
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten
            cursor.close()

        @sa.event.listens_for(self._engine, "begin")
        def begun(db: Connection) -> None:
            writing = db.get_execution_options().get("writing", False)
            db.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Opens a transaction that writes: no other one begins before it ends.

        Raises:
            DatabaseError: another writer holds the lock for too long, or the database cannot be
                used.
        """
        while not self._turn.acquire(timeout=self._lock_timeout):
            if self._waiting:  # who has it waits for the server
                continue
            raise self.error(
                f"the {self.what} {self.url} is locked by another thread that has not let go of it"
            )
        try:
            with (
                self._named(),
                self._connected().execution_options(writing=True) as db,
                db.begin(),
            ):
                if not self._sqlite:
                    wait = int(self._lock_timeout * 1000)
                    db.exec_driver_sql(
                        f"SELECT set_config('lock_timeout', '{wait}', true),"
                        f" pg_advisory_xact_lock({ONE_WRITER})"
                    )
                yield db
        finally:
            self._turn.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Opens a transaction that only reads."""
        with self._named(), self._connected() as db, db.begin():
            yield db

    def _connected(self) -> Connection:
        """Connects. A server that was reached before may be restarting, and is waited for; one that
        never was is an error at once."""
        until, pause = time.monotonic() + RESTART, 0.1
        try:
            while True:
                try:
                    db = self._engine.connect()
                    self._reached = True
                    return db
                except sa.exc.OperationalError as error:
                    down = not self._sqlite and self._reached and _lost(error)
                    if not down or time.monotonic() > until:
                        raise
                if not self._waiting:
                    self._waiting = True
                    logging.getLogger(__name__).warning(
                        "the %s %s cannot be reached: waiting up to %.0f s for it",
                        self.what, self.url, RESTART,
                    )  # fmt: skip
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
        finally:
            self._waiting = False

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turns the database's errors into messages that say what to do."""
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        # `settle` asks the driver itself
        except (sa.exc.DBAPIError, self._engine.dialect.loaded_dbapi.Error) as error:
            cause = (error.orig or error) if isinstance(error, sa.exc.DBAPIError) else error
            words = " ".join(redact(str(cause)).split())
            if not self._sqlite and _lost(error):
                lost = self.error(
                    f"the {self.what} {self.url} cannot be used, it cannot be reached: {words}."
                    " What was acknowledged stands; when it can be reached again, a run goes on"
                    " with `turnwise run --resume`."
                )
                lost.broke_off = True
                raise lost from error
            if "locked" in words or "busy" in words or "lock timeout" in words:
                raise self.error(
                    f"the {self.what} {self.url} is locked by another process that has not let go"
                    " of it. Is another run or a rating service using this folder? Stop it, or"
                    " wait and try again."
                ) from error
            raise self.error(f"the {self.what} {self.url} cannot be used: {words}") from error

    def wipe(self) -> None:
        """Empties SQLite's journal, which holds what was deleted, too; where a reader needs it,
        that is done later."""
        self._checkpoint("TRUNCATE")

    def settle(self) -> None:
        """Moves what stands in SQLite's journal (`-wal`) into the file itself, as far as no reader
        needs the state before, so that the file alone is whole. It never waits; PostgreSQL needs
        nothing."""
        self._checkpoint("PASSIVE")

    def _checkpoint(self, how: str) -> None:
        if self._sqlite:
            with self._named(), self._connected() as db:
                db.connection.driver_connection.execute(f"PRAGMA wal_checkpoint({how})")  # type: ignore[union-attr]

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


# What a server answers to one that it turns away, and how it says that it will be there again.
_REFUSED, _BACK = ("FATAL:", "password"), ("starting up", "shutting down", "in recovery")


def _lost(error: Exception) -> bool:
    """Returns whether a server was not reached, or the connection to it broke off: an error as one
    connects has no statement. libpq gives no code of what the server answers, only its words."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    words = str(error.orig)
    refused = any(word in words for word in _REFUSED) and not any(word in words for word in _BACK)
    return error.connection_invalidated or (error.statement is None and not refused)
