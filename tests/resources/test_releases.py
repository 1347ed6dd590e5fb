"""Releases, routes and approvals in the ledger, on SQLite and on a real PostgreSQL server."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from ft_resources.errors import GateRefusal
from ft_resources.ledger import Ledger
from tests.resources.recording import TASK, release


def test_a_release_its_route_and_its_audit_event_come_together(ledger: Ledger) -> None:
    made = release(ledger, "a" * 64)
    assert ledger.releases(TASK) == [made]
    assert ledger.live_release(TASK) == made
    assert made["decision"]["gates"] == [{"name": "calibrated", "ece": 0.03}]
    route = ledger.route(TASK)
    assert route is not None
    assert route["release_id"] == made["id"]
    share = {"adapter": "a" * 64, "model_version": "1", "release_id": made["id"], "base": "package:base/model"}
    share |= {"share": 1.0, "precision": "auto"}
    assert route["plan"] == {"shares": [share], "shadow": [], "review_below": 0.0}
    assert ledger.routes() == {TASK: route}
    (event,) = ledger.audit_events()
    assert (event["action"], event["actor"], event["subject"]) == ("release", "ada", made["id"])


def test_nothing_of_a_release_stays_when_its_audit_event_fails(ledger: Ledger, sql: sa.Engine) -> None:
    refusal = (
        "BEGIN SELECT RAISE(ABORT, 'append-only'); END"
        if sql.dialect.name == "sqlite"
        else "FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()"
    )
    with sql.begin() as connection:
        connection.exec_driver_sql(f"CREATE TRIGGER no_insert BEFORE INSERT ON audit {refusal}")
    with pytest.raises(sa.exc.DatabaseError, match="append-only"):
        release(ledger, "a" * 64)
    assert ledger.releases(TASK) == []
    assert ledger.route_revision() == 0
    assert ledger.audit_events() == []


def test_a_decision_against_what_is_no_longer_live_is_refused(ledger: Ledger) -> None:
    first = release(ledger, "a" * 64)
    with pytest.raises(GateRefusal, match=f"{first['id']} became live"):
        release(ledger, "b" * 64)
    second = release(ledger, "b" * 64, first["id"])
    with pytest.raises(GateRefusal, match=f"{second['id']} became live"):
        release(ledger, "c" * 64, first["id"])
    assert [one["adapter"][0] for one in ledger.releases(TASK)] == ["a", "b"]
    assert len(ledger.audit_events()) == 2
    release(ledger, "c" * 64, task="another")
    assert ledger.live_release(TASK) == second


def test_of_decisions_at_the_same_time_one_becomes_live(database: str) -> None:
    ledgers = [Ledger(database) for _ in range(4)]
    start = threading.Barrier(len(ledgers))

    def decide(ledger: Ledger) -> bool:
        start.wait()
        try:
            release(ledger, "a" * 64)
        except GateRefusal:
            return False
        return True

    with ThreadPoolExecutor(len(ledgers)) as pool:
        won = list(pool.map(decide, ledgers))
    assert sum(won) == 1
    assert len(ledgers[0].releases(TASK)) == ledgers[0].route_revision() == len(ledgers[0].audit_events()) == 1
    for ledger in ledgers:
        ledger.close()


def test_history_and_what_was_live_when(ledger: Ledger) -> None:
    before = datetime.now(UTC)
    made: list[dict[str, Any]] = []
    for adapter, kind in (("a", "release"), ("b", "approval"), ("a", "rollback")):
        live = made[-1]["id"] if made else None
        made.append(release(ledger, adapter * 64, live, kind=kind))
    assert ledger.releases(TASK) == made
    assert [one["kind"] for one in ledger.releases(TASK)] == ["release", "approval", "rollback"]
    assert ledger.live_release(TASK) == made[-1]
    assert ledger.live_at(TASK, before - timedelta(seconds=1)) is None
    for one in made:
        at = ledger.live_at(TASK, one["created_at"].astimezone(timezone(timedelta(hours=9))))
        assert at is not None
        assert at["release_id"] == one["id"]
    assert before <= made[0]["created_at"] < made[1]["created_at"] < made[2]["created_at"]


def test_revision_grows_with_every_route_of_any_task(ledger: Ledger) -> None:
    revisions = [ledger.route_revision()]
    for task in ("one", "two"):
        release(ledger, "a" * 64, task=task)
        revisions.append(ledger.route_revision())
    assert revisions == sorted(set(revisions))
    assert set(ledger.routes()) == {"one", "two"}


def test_an_approval_holds_for_its_adapter_and_report_only(ledger: Ledger) -> None:
    ledger.approve(task=TASK, adapter="a" * 64, report="r" * 64, actor="ada", because="reviewed by hand")
    found = ledger.approval(task=TASK, adapter="a" * 64, report="r" * 64)
    assert found is not None
    assert found["because"] == "reviewed by hand"
    assert ledger.approval(task=TASK, adapter="b" * 64, report="r" * 64) is None
    assert ledger.approval(task=TASK, adapter="a" * 64, report="s" * 64) is None
    assert ledger.approval(task="another", adapter="a" * 64, report="r" * 64) is None
    assert [event["action"] for event in ledger.audit_events(TASK)] == ["approve"]
    assert ledger.audit_events("another") == []


def test_the_bound_of_review_stays_until_a_release_sets_another(ledger: Ledger) -> None:
    first = release(ledger, "a" * 64, review_below=0.7)
    second = release(ledger, "b" * 64, first["id"])
    assert ledger.route(TASK)["plan"]["review_below"] == 0.7  # type: ignore[index]
    third = release(ledger, "c" * 64, second["id"], review_below=0.0)
    assert ledger.route(TASK)["plan"]["review_below"] == 0.0  # type: ignore[index]
    assert ledger.set_review_below(TASK, 0.4, actor="ada") is True
    assert ledger.set_review_below(TASK, 0.4, actor="ada") is False
    route = ledger.route(TASK)
    assert route is not None
    assert (route["plan"]["review_below"], route["release_id"]) == (0.4, third["id"])
    assert route["plan"]["shares"][0]["adapter"] == "c" * 64
    assert ledger.audit_events(TASK)[-1]["action"] == "route"
    with pytest.raises(GateRefusal):
        ledger.set_review_below("another", 0.4, actor="ada")
