"""Starts a throw-away PostgreSQL cluster, where its programs are installed."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def program(name: str) -> str | None:
    """Returns where a program of PostgreSQL is, which Debian keeps beside the path."""
    found = shutil.which(name) or next(
        iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None
    )
    return str(Path(found).resolve()) if found else None


class Server:
    """A cluster on loopback, in a folder that is there already; it can be stopped and started."""

    def __init__(self, folder: str) -> None:
        initdb = program("initdb")
        assert initdb, "PostgreSQL is not installed"
        user: str | None = None
        if os.getuid() == 0:  # it refuses to run as root
            user = "postgres" if any(p.pw_name == "postgres" for p in pwd.getpwall()) else "nobody"
            shutil.chown(folder, user)
        self.folder, self.data = folder, f"{folder}/data"
        self.how: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
                                    "cwd": folder, **({"user": user} if user else {})}  # fmt: skip
        subprocess.run(
            [initdb, "-D", self.data, "-U", "turnwise", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            **self.how,
        )
        rules = Path(self.data) / "pg_hba.conf"  # the first that fits counts: she has a password
        rules.write_text("host all ada 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://turnwise@127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        place = ["-p", str(self.port), "-h", "127.0.0.1", "-k", self.folder]
        self.process = subprocess.Popen(
            [str(program("postgres")), "-D", self.data, *place], **self.how
        )
        wait_until_open(self.port)

    def stop(self) -> None:
        """Stops it at once, whoever is connected."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


@contextmanager
def server() -> Iterator[Server]:
    """Starts a cluster; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="turnwise-pg-") as folder:
        made = Server(folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@contextmanager
def cluster() -> Iterator[str]:
    """Starts a cluster and yields its URL without a database; it is gone afterwards."""
    with server() as made:
        yield made.url


def wait_until_open(port: int) -> None:
    import time

    import psycopg

    for _ in range(6000):
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="turnwise", dbname="postgres").close()
            return
        except Exception:
            time.sleep(0.1)
    raise TimeoutError("PostgreSQL did not start")


def new_database(url: str, name: str) -> str:
    """Makes an empty database in the cluster. Returns its URL."""
    import sqlalchemy as sa

    engine = sa.create_engine(
        url.replace("postgresql://", "postgresql+psycopg://") + "/postgres",
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as db:
        db.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return f"{url}/{name}"
