"""The chain of audit events, on SQLite and on a real PostgreSQL server."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from ft_resources.errors import ArtefactError
from ft_resources.ledger import Ledger
from tests.resources.recording import TASK, release


@pytest.fixture
def audited(ledger: Ledger) -> Ledger:
    """Four events: two releases with what people did before them."""
    ledger.audit("ada", "export", TASK, "p1", {"rows": 3})
    first = release(ledger, "a" * 64)
    ledger.approve(task=TASK, adapter="b" * 64, report="r" * 64, actor="ada", because="reviewed")
    release(ledger, "b" * 64, first["id"])
    return ledger


def test_events_are_chained(audited: Ledger) -> None:
    events = audited.audit_events()
    assert [event["action"] for event in events] == ["export", "release", "approve", "release"]
    assert events[0]["previous_hash"] == "0" * 64
    assert [event["previous_hash"] for event in events[1:]] == [event["hash"] for event in events[:-1]]


def test_writers_at_the_same_time_make_one_chain(database: str) -> None:
    ledgers = [Ledger(database) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: ledgers[n % 3].audit("ada", "export", TASK, f"p{n}", {"n": n}), range(30)))
    events = ledgers[0].audit_events()
    assert {event["subject"] for event in events} == {f"p{n}" for n in range(30)}
    for ledger in ledgers:
        ledger.close()


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'eve'", "DELETE FROM audit WHERE id = 1"])
def test_the_database_refuses_changes_of_the_audit(audited: Ledger, sql: sa.Engine, statement: str) -> None:
    with pytest.raises(sa.exc.DatabaseError, match="append-only"), sql.begin() as connection:
        connection.exec_driver_sql(statement)
    assert len(audited.audit_events()) == 4


def test_the_database_refuses_to_truncate_the_audit(audited: Ledger, sql: sa.Engine) -> None:
    # SQLite has no TRUNCATE: a DELETE of everything is the same there
    statement = "DELETE FROM audit" if sql.dialect.name == "sqlite" else "TRUNCATE audit"
    with pytest.raises(sa.exc.DatabaseError, match="append-only"), sql.begin() as connection:
        connection.exec_driver_sql(statement)
    assert len(audited.audit_events()) == 4


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET actor = 'eve' WHERE id = 2",
        "UPDATE audit SET detail = '{}' WHERE id = 1",
        "UPDATE audit SET at = '2002-08-01T00:00:00+00:00' WHERE id = 3",
        "DELETE FROM audit WHERE id = 1",
        "DELETE FROM audit WHERE id = 3",
        "DELETE FROM audit WHERE id = 4",
        "DELETE FROM audit",
        "INSERT INTO audit (at, actor, action, task, subject, detail, previous_hash, hash)"
        " SELECT at, actor, action, task, subject, detail, previous_hash, hash FROM audit WHERE id = 2",
    ],
)
def test_tampering_behind_the_triggers_is_detected(audited: Ledger, sql: sa.Engine, statement: str) -> None:
    with sql.begin() as connection:
        if sql.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER audit_no_update")
            connection.exec_driver_sql("DROP TRIGGER audit_no_delete")
        else:
            connection.exec_driver_sql("ALTER TABLE audit DISABLE TRIGGER USER")
        connection.exec_driver_sql(statement)
    with pytest.raises(ArtefactError, match=r"does not continue the chain|has no audit event") as caught:
        audited.audit_events()
    assert "tampered" in caught.value.mend
