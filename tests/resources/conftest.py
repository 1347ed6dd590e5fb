"""A real PostgreSQL server for the session, and an empty database of each kind with its ledger for a test."""

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ft_resources.ledger import Ledger

PROGRAMS = ("initdb", "pg_ctl")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of the server; a database name follows `@/`."""
    if not all(map(shutil.which, PROGRAMS)):
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    root = os.getuid() == 0
    user = "postgres" if root else None  # the server refuses to run as root
    home = Path(tempfile.mkdtemp(prefix="ft-postgres-"))
    if root:
        shutil.chown(home, "postgres", "postgres")
    data = str(home / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-p {port} -k {home} -c listen_addresses='' -c fsync=off -c full_page_writes=off -c shared_buffers=32MB"

    def run(*command: str) -> None:
        subprocess.run(command, user=user, group=user, cwd=home, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        run("initdb", "-D", data, "-U", "ft", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        access = home / "data" / "pg_hba.conf"
        # one user, whom a test may create, is let in with a password only
        access.write_text(f"local all guarded scram-sha-256\n{access.read_text()}")
        run("pg_ctl", "-D", data, "-w", "-l", str(home / "log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://ft@/postgres?host={home}&port={port}"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/home/ledger.db"
        return
    server = sa.make_url(request.getfixturevalue("postgres"))
    name = f"ledger_{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield server.set(database=name).render_as_string()
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def ledger(database: str) -> Iterator[Ledger]:
    opened = Ledger(database)
    yield opened
    opened.close()


@pytest.fixture
def sql(database: str) -> Iterator[sa.Engine]:
    """The database as someone sees it who goes around the ledger."""
    engine = sa.create_engine(database, poolclass=sa.NullPool)
    yield engine
    engine.dispose()
