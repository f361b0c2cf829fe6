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


def program(name: str) -> str | None:
    """Returns where a program of PostgreSQL is, which Debian keeps beside the path."""
    found = shutil.which(name) or next(
        iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None
    )
    return str(Path(found).resolve()) if found else None


@contextmanager
def cluster() -> Iterator[str]:
    """Starts a cluster on loopback and yields its URL without a database; it is gone afterwards."""
    initdb, postgres = program("initdb"), program("postgres")
    assert initdb, "PostgreSQL is not installed"
    assert postgres
    user: str | None = None
    if os.getuid() == 0:  # it refuses to run as root
        user = "postgres" if any(p.pw_name == "postgres" for p in pwd.getpwall()) else "nobody"
    with tempfile.TemporaryDirectory(prefix="turnwise-pg-") as folder:
        if user:
            shutil.chown(folder, user)
        data = f"{folder}/data"
        as_user = {"user": user} if user else {}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
        subprocess.run(
            [initdb, "-D", data, "-U", "turnwise", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            **as_user,
            **quiet,
        )
        rules = Path(data) / "pg_hba.conf"  # the first that fits counts: this user has a password
        rules.write_text("host all ada 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [postgres, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder], **as_user,
            **quiet
        )  # fmt: skip
        try:
            wait_until_open(port)
            yield f"postgresql://turnwise@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is connected
            server.wait()


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
