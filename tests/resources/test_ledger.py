"""Opening a ledger and its schema, and who waits for whom, on SQLite and on a real PostgreSQL server."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ft_resources import ledger_schema as schema
from ft_resources.errors import ArtefactError
from ft_resources.ledger import Ledger
from tests.resources.recording import NOON, TASK, release


def test_an_empty_ledger(ledger: Ledger) -> None:
    assert ledger.releases(TASK) == []
    assert ledger.route(TASK) is None
    assert ledger.routes() == {}
    assert ledger.route_revision() == 0
    assert ledger.live_release(TASK) is None
    assert ledger.audit_events() == []
    assert ledger.traffic_days(TASK) == {}
    assert ledger.predictions_between(TASK, NOON, NOON).empty
    assert ledger.feedback_rows(TASK).empty


def test_models_and_migrations_agree(ledger: Ledger, sql: sa.Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with sql.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() is not None


def test_opening_again_keeps_what_is_there(database: str) -> None:
    first = Ledger(database)
    made = release(first, "a" * 64)
    first.close()
    again = Ledger(database)
    assert again.live_release(TASK) == made
    again.close()


OPENING = """
import sys
import alembic.command
from ft_resources.ledger import Ledger
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(sys.argv[1])
ledger.audit("ada", "open", "t", sys.argv[2], {})
print("open", flush=True)
sys.stdin.readline()
"""


def test_processes_that_start_together_migrate_once_and_none_waits_for_another_to_end(database: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENING, database, str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(3)
    ]
    # one that hangs fails the test here instead of for ever
    watch = threading.Timer(30, lambda: [process.kill() for process in processes])
    watch.start()
    pipes = [(process.stdin, process.stdout) for process in processes if process.stdin and process.stdout]
    said = [out.readline() for _, out in pipes]
    for into, _ in pipes:
        into.write("go\n")
        into.flush()
    said += [out.readline() for _, out in pipes]
    watch.cancel()
    errors = [process.communicate("end\n", timeout=30)[1] for process in processes]
    assert said == ["ready\n"] * len(pipes) + ["open\n"] * len(pipes), errors
    ledger = Ledger(database)
    assert {event["subject"] for event in ledger.audit_events()} == {"0", "1", "2"}
    ledger.close()


def test_readers_do_not_wait_for_a_writer(ledger: Ledger, sql: sa.Engine) -> None:
    release(ledger, "a" * 64)
    with sql.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE" if sql.dialect.name == "sqlite" else "BEGIN")
        writer.exec_driver_sql("UPDATE routes SET actor = 'eve'")
        reads: list[Callable[[], Any]] = [ledger.route_revision, ledger.routes, ledger.audit_events]
        with ThreadPoolExecutor(1) as pool:
            for read in reads:
                assert pool.submit(read).result(timeout=10)


def test_a_schema_of_a_newer_version_is_refused(database: str, sql: sa.Engine) -> None:
    Ledger(database).close()
    with sql.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ArtefactError, match="its schema 9999 is newer"):
        Ledger(database)


def test_a_url_needs_no_driver(database: str) -> None:
    ledger = Ledger(database.replace("+psycopg2", ""))
    assert ledger.live_release("t1") is None
    ledger.close()


def test_what_is_no_ledger_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database\n" * 100, encoding="utf-8")
    for url in (
        f"sqlite:///{tmp_path}/notes.txt",
        f"sqlite:///{tmp_path}/notes.txt/ledger.db",
        "postgresql+psycopg2://ft:secret@127.0.0.1:1/none",
        "nonsense",
        "nosuch://db",
    ):
        with pytest.raises(ArtefactError, match="the ledger cannot be opened") as caught:
            Ledger(url)
        assert caught.value.mend
        assert "secret" not in str(caught.value)
