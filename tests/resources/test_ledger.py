"""One set of tests, run on SQLite and on a real PostgreSQL server."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sqlalchemy as sa

from ft_assets.data.rows import ROW_COLUMNS, frame, row_id
from ft_resources import api_keys
from ft_resources import ledger_schema as schema
from ft_resources.errors import ArtefactError, GateRefusal, RequestError, SpecError
from ft_resources.ledger import Ledger

TASK = "mail-triage"
NOON = datetime(2002, 8, 1, 12, tzinfo=UTC)


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


def release(ledger: Ledger, adapter: str, expected_live: str | None = None, **other: Any) -> dict[str, Any]:
    decision = {
        "task": TASK,
        "kind": "release",
        "adapter": adapter,
        "base": "package:base/model",
        "report": "r" * 64,
        "model_version": "1",
        "bento": "ft-mail-triage:abc",
        "actor": "ada",
        "because": "all gates passed",
        "decision": {"passed": True, "gates": [{"name": "calibrated", "ece": 0.03}]},
        **other,
    }
    return ledger.record_release(expected_live=expected_live, **decision)


def answer(ledger: Ledger, name: str, event_time: datetime = NOON, **other: Any) -> None:
    ledger.log_predictions(
        [
            {
                "id": name,
                "task": TASK,
                "release_id": "rel-1",
                "adapter": "a" * 64,
                "model_version": "1",
                "input": f"the text of {name} – naïve",
                "label": "ham",
                "confidence": 0.75,
                "probabilities": {"ham": 0.75, "spam": 0.25},
                "embedding": b"\x00\x3c\xff",
                "caller": None,
                "trace_id": "t" * 32,
                "latency_ms": 3.5,
                "event_time": event_time,
                "answered_at": event_time + timedelta(seconds=1),
                **other,
            }
        ]
    )


def say(ledger: Ledger, name: str, label: str | None, rating: int | None = None, author: str = "ada") -> bool:
    return ledger.add_feedback(prediction_id=name, label=label, rating=rating, author=author)


# -- releases and routes ------------------------------------------------------------------------------------------


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


# -- predictions and feedback -------------------------------------------------------------------------------------


def test_a_prediction_is_read_back_as_it_was_logged(ledger: Ledger) -> None:
    answer(ledger, "p1", datetime(2002, 8, 1, 14, 30, 0, 123456, timezone(timedelta(hours=2))))
    found = ledger.prediction("p1")
    assert found["input"] == "the text of p1 – naïve"
    assert found["probabilities"] == {"ham": 0.75, "spam": 0.25}
    assert bytes(found["embedding"]) == b"\x00\x3c\xff"
    assert found["event_time"] == datetime(2002, 8, 1, 12, 30, 0, 123456, UTC)
    assert found["event_time"].utcoffset() == timedelta(0)
    with pytest.raises(RequestError) as caught:
        ledger.prediction("p2")
    assert (caught.value.error_code, caught.value.status) == ("unknown_prediction", 404)


def test_a_batch_is_logged_whole_or_not_at_all(ledger: Ledger) -> None:
    answer(ledger, "p1")
    row = ledger.prediction("p1")
    with pytest.raises(sa.exc.IntegrityError):
        ledger.log_predictions([{**row, "id": "p2"}, row])
    assert len(ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))) == 1
    ledger.log_predictions([])


def test_predictions_of_a_time_with_feedback_joined(ledger: Ledger) -> None:
    for hour, name in enumerate(("late", "early", "next")):
        answer(ledger, name, NOON + timedelta(hours=(5, 0, 12)[hour]))
    answer(ledger, "other", task="another")
    say(ledger, "late", "spam")
    say(ledger, "late", None, rating=-1)
    say(ledger, "next", "spam")
    rows = ledger.predictions_between(TASK, NOON, NOON + timedelta(hours=12))
    assert rows["id"].tolist() == ["early", "late"]
    assert rows["true_label"].tolist() == [None, "spam"]
    assert rows["rating"].tolist() == [None, -1]
    assert list(rows.columns) == [
        *(column.name for column in schema.predictions.c),
        "true_label",
        "rating",
        "true_text",
    ]
    nothing = ledger.predictions_between(TASK, NOON - timedelta(days=9), NOON - timedelta(days=8))
    assert nothing.empty
    for one in (rows, nothing):
        assert str(one["event_time"].dtype) == str(one["answered_at"].dtype) == "datetime64[us, UTC]"


def test_days_with_traffic_grow_as_labels_arrive(ledger: Ledger) -> None:
    answer(ledger, "p1", datetime(2002, 8, 1, 23, 59, 59, 999999, UTC))
    answer(ledger, "p2", datetime(2002, 8, 2, 0, 0, 0, 0, UTC))
    answer(ledger, "p3", datetime(2002, 8, 2, 1, 30, tzinfo=timezone(timedelta(hours=2))))
    answer(ledger, "p4", task="another")
    assert ledger.traffic_days(TASK) == {"2002-08-01": 2, "2002-08-02": 1}
    say(ledger, "p2", "spam")
    say(ledger, "p4", "spam")
    assert ledger.traffic_days(TASK) == {"2002-08-01": 2, "2002-08-02": 2}


def test_feedback_said_twice_is_stored_once_and_a_change_of_mind_counts(ledger: Ledger) -> None:
    answer(ledger, "p1")
    assert say(ledger, "p1", "spam") is True
    assert say(ledger, "p1", "spam") is False
    assert say(ledger, "p1", "ham") is True
    assert say(ledger, "p1", "spam") is True
    assert say(ledger, "p1", "spam", author="bob") is True
    assert say(ledger, "p1", None, rating=1) is True
    assert say(ledger, "p1", None, rating=1) is False
    rows = ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))
    assert rows["true_label"].tolist() == ["spam"]
    with pytest.raises(RequestError):
        say(ledger, "unknown", "spam")


def test_corrected_texts_are_raw_rows_too(ledger: Ledger) -> None:
    answer(ledger, "p1", label="", probabilities={}, output="Paris is nice.", finish_reason="length")
    assert ledger.prediction("p1")["output"] == "Paris is nice."
    long = "No, " + "much " * 200 + "better."
    assert ledger.add_feedback(prediction_id="p1", label=None, rating=-1, text=long, author="ada") is True
    assert ledger.add_feedback(prediction_id="p1", label=None, rating=-1, text=long, author="ada") is False
    assert ledger.feedback_rows(TASK)["label"].tolist() == [long]
    assert ledger.predictions_between(TASK, NOON, NOON + timedelta(days=1))["true_text"].tolist() == [long]


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


def test_the_same_feedback_sent_many_times_at_once_is_stored_once(ledger: Ledger) -> None:
    answer(ledger, "p1")
    start = threading.Barrier(4)

    def send(_: int) -> bool:
        start.wait()
        return say(ledger, "p1", "spam")

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(send, range(4))) == 1


def test_labels_that_came_back_are_raw_rows(ledger: Ledger) -> None:
    answer(ledger, "p2", NOON + timedelta(hours=1))
    answer(ledger, "p1", NOON)
    answer(ledger, "p3")
    answer(ledger, "p4", task="another")
    say(ledger, "p2", "spam")
    say(ledger, "p1", "spam")
    say(ledger, "p1", "ham", author="bob")
    say(ledger, "p3", None, rating=1)
    say(ledger, "p4", "spam")
    rows = ledger.feedback_rows(TASK)
    assert list(rows.columns) == ROW_COLUMNS
    assert rows["source"].tolist() == ["feedback:p1", "feedback:p2"]
    assert rows["label"].tolist() == ["ham", "spam"]
    assert rows["label_version"].tolist() == [3, 2]
    assert rows["annotator"].tolist() == ["bob", "ada"]
    assert rows["origin"].tolist() == ["feedback", "feedback"]
    assert rows["event_time"].tolist() == [pd.Timestamp(NOON), pd.Timestamp(NOON + timedelta(hours=1))]
    assert rows["row_id"].tolist() == [row_id(text) for text in rows["text"]]
    agreed = frame(["a text"], ["ham"], ["a.jsonl#1"], [NOON.isoformat()], "files").dtypes
    assert rows.dtypes.to_dict() == agreed.to_dict()


# -- audit --------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_without_its_secret_and_has_its_name_alone(ledger: Ledger) -> None:
    until = datetime.now(UTC) + timedelta(days=1)
    key, shown = api_keys.make("shop", "reader", tasks=["b", "a"], rate=2.5, expires_at=until, created_by="ada")
    ledger.add_key(key)
    everything, _ = api_keys.make("all", "owner", created_by="ada")
    ledger.add_key(everything)
    assert ledger.api_keys() == [key, everything]
    assert key.fits(shown.encode()) and not everything.fits(shown.encode())
    with ThreadPoolExecutor(4) as pool:
        same = [api_keys.make("same", "reader", created_by="ada")[0] for _ in range(4)]
        failures = [one.exception() for one in [pool.submit(ledger.add_key, key) for key in same]]
    assert sum(isinstance(failure, SpecError) for failure in failures) == 3
    ledger.revoke_key("shop", "ada")
    ledger.add_key(api_keys.make("shop", "reader", created_by="ada")[0])
    assert [one.revoked_at is None for one in ledger.api_keys() if one.name == "shop"] == [False, True]
    assert [event["subject"] for event in ledger.audit_events()] == ["shop", "all", "same", "shop", "shop"]


def test_keys_that_were_made_with_a_key_end_with_it(ledger: Ledger) -> None:
    def add(name: str, role: str, by: str) -> api_keys.ApiKey:
        key, _ = api_keys.make(name, role, created_by=by)
        ledger.add_key(key)
        return key

    boss = add("boss", "admin", "ada")
    owner = add("owner", "owner", api_keys.made_by("boss", boss.id))
    add("reader", "reader", api_keys.made_by("owner", owner.id))
    add("by-hand", "reader", "boss")  # a person of that name, at the command line
    assert ledger.revoke_key("reader", "ada") == []
    add("reader", "reader", api_keys.made_by("owner", owner.id))
    assert ledger.revoke_key("boss", "ada") == ["owner", "reader"]
    assert [key.name for key in ledger.api_keys() if key.revoked_at is None] == ["by-hand"]
    assert json.loads(ledger.audit_events()[-1]["detail"]) == {"made_with_it": ["owner", "reader"]}


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


# -- schema and concurrency ---------------------------------------------------------------------------------------


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
