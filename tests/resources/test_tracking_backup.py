"""Backups of a real MLflow on SQLite and on a real PostgreSQL server: made, refused, restored, drilled."""

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from ft_assets.cli import app
from ft_resources.errors import BackupError
from ft_resources.tracking import ModelRegistry, TrackedRun, client
from ft_resources.tracking_backup import Backup, backup, find, restore
from ft_resources.tracking_drill import drill
from ft_resources.tracking_store import TrackingStore

NewStore = Callable[[str], TrackingStore]
RUNS = 2


@pytest.fixture(scope="module")
def databases(postgres: str) -> Iterator[Callable[[], str]]:
    """Makes an empty database on the server."""
    server = sa.make_url(postgres)
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    made = []

    def new() -> str:
        made.append(f"mlflow_{uuid.uuid4().hex}")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {made[-1]}")
        return server.set(database=made[-1]).render_as_string(hide_password=False)

    yield new
    with engine.connect() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def new_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NewStore:
    """Makes an empty store of a kind of database, with a name of its own."""

    def new(name: str) -> TrackingStore:
        folder = tmp_path_factory.mktemp(name)
        if request.param == "sqlite":
            return TrackingStore(f"sqlite:///{folder / 'mlflow.db'}")
        return TrackingStore(request.getfixturevalue("databases")(), str(folder / "artifacts"))

    return new


@pytest.fixture(scope="module")
def tracker(new_store: NewStore, tmp_path_factory: pytest.TempPathFactory) -> TrackingStore:
    """A tracker with two runs of steps, artefacts and registered versions, and two that run elsewhere."""
    store = new_store("tracker")
    connection = client(store.database)
    connection.create_experiment("ft/mail", artifact_location=f"{store.artifacts.uri}/mail")
    folder = tmp_path_factory.mktemp("adapter")
    for number in range(RUNS):
        run = TrackedRun(store.database, "mail", f"run {number}", {"adapter": str(number)})
        run.params({"lora.rank": 4 + number, "note": "Grüße, 'quoted' % ;"})
        for step in range(1, 6):
            run.metrics({"loss": 1 / step, "broken": float("nan")}, step)
        (folder / "adapter.bin").write_bytes(bytes(range(256)) * (number + 1))
        run.finish("FINISHED", folder)
        card = {"model_card.json": "{}"}
        source = f"{store.artifacts.uri}/mail/{run.run_id}/artifacts/adapter"
        ModelRegistry(store.database).register(
            "mail", str(number), run_id=run.run_id, source=source, card=card, tags={"report": "r"}
        )
    ModelRegistry(store.database).set_alias("mail", "champion", str(RUNS))
    for name, location in {"proxied": "mlflow-artifacts:/1", "away": "s3://other/bucket"}.items():
        connection.create_run(connection.create_experiment(name, artifact_location=location))
    return store


@pytest.fixture(scope="module")
def made(tracker: TrackingStore, tmp_path_factory: pytest.TempPathFactory) -> Backup:
    return backup(tracker, str(tmp_path_factory.mktemp("backups")))


@pytest.fixture
def copy(made: Backup, tmp_path: Path) -> Path:
    """A copy of the backup, to be damaged."""
    return shutil.copytree(made.folder.root, tmp_path / "copy")


def champion(tracker: TrackingStore) -> str:
    return str(client(tracker.database).get_model_version_by_alias("mail", "champion").run_id)


def test_a_drill_brings_a_run_back_and_leaves_nothing_behind(
    tracker: TrackingStore, made: Backup, databases: Callable[[], str], postgres: str
) -> None:
    def on_server() -> list[str]:
        engine = sa.create_engine(postgres, poolclass=sa.NullPool)
        with engine.connect() as connection:
            return sorted(connection.exec_driver_sql("SELECT datname FROM pg_database").scalars())

    before = on_server()
    assert made.runs_elsewhere == 1
    done = drill(find(made.folder.url), tracker)
    assert done.run_id == champion(tracker)
    assert done.content.params == {"lora.rank": "5", "note": "Grüße, 'quoted' % ;"}
    assert [(step, value) for step, _, value in done.content.metrics["loss"]] == [
        (step, repr(1 / step)) for step in range(1, 6)
    ]
    assert done.content.metrics["broken"][0][2] == "nan"
    assert sorted(done.content.artifacts) == ["adapter/adapter.bin", "card/model_card.json"]
    assert done.content.versions == [f"mail/{RUNS}"]
    assert done.versioned is None and done.seconds > 0 and done.age.total_seconds() > 0
    assert on_server() == before


def test_a_restored_tracker_answers_through_mlflow_with_its_own_artefacts(
    tracker: TrackingStore, made: Backup, new_store: NewStore, tmp_path: Path
) -> None:
    store = new_store("restored")
    restore(made, store)
    connection, run_id = client(store.database), champion(tracker)
    run = connection.get_run(run_id)
    assert run.info.artifact_uri.startswith(store.artifacts.uri)
    assert run.data.params["lora.rank"] == "5"
    assert [point.value for point in connection.get_metric_history(run_id, "loss")] == [1 / n for n in range(1, 6)]
    fetched = Path(connection.download_artifacts(run_id, "adapter/adapter.bin", str(tmp_path)))
    assert fetched.read_bytes() == bytes(range(256)) * 2
    version = connection.get_model_version_by_alias("mail", "champion")
    assert (str(version.version), version.run_id, version.tags["report"]) == (str(RUNS), run_id, "r")
    assert version.source == f"{store.artifacts.uri}/mail/{run_id}/artifacts/adapter"
    # it goes on where it stopped
    after = TrackedRun(store.database, "mail", "after", {})
    after.finish("FINISHED")
    assert connection.get_run(after.run_id).info.artifact_uri.startswith(store.artifacts.uri)
    with pytest.raises(BackupError, match="not empty"):
        restore(made, store)


def test_a_flipped_byte_anywhere_is_refused_before_anything_is_changed(
    copy: Path, new_store: NewStore, tmp_path: Path
) -> None:
    store = new_store("never")
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) == 2 + 2 * RUNS
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(BackupError, match=f"damaged: '{path.relative_to(copy)}'"):
            restore(find(str(copy)), store)
        path.unlink()
        with pytest.raises(BackupError, match=r"damaged|there is no backup"):
            restore(find(str(copy)), store)
        path.write_bytes(content)
    store.require_empty(artifacts=True)


def test_a_store_that_holds_anything_is_not_restored_into(
    tracker: TrackingStore, made: Backup, new_store: NewStore
) -> None:
    with pytest.raises(BackupError, match="the database is not empty"):
        restore(made, tracker)
    store = new_store("files")
    store.artifacts.write("mail/left.txt", b"")
    with pytest.raises(BackupError, match="the folder of artefacts is not empty"):
        restore(made, store)
    assert store.artifacts.names() == ["mail/left.txt"]


def test_a_restore_that_lost_a_row_is_told(made: Backup, new_store: NewStore) -> None:
    said = json.loads(made.folder.read("manifest.json"))
    said["tables"]["params"]["rows"] += 1
    with pytest.raises(BackupError, match="do not hold the rows of the backup: params"):
        restore(Backup(made.folder, said), new_store("lossy"))


def test_a_run_that_differs_from_its_original_fails_the_drill(
    tracker: TrackingStore, made: Backup, new_store: NewStore
) -> None:
    changed = new_store("changed")
    restore(made, changed)
    run_id = champion(tracker)
    client(changed.database).log_metric(run_id, "loss", 0.0, step=6)
    changed.artifacts.write(f"mail/{run_id}/artifacts/adapter/adapter.bin", b"other")
    with pytest.raises(BackupError, match="came back with other metrics, artifacts"):
        drill(made, changed)
    with pytest.raises(BackupError, match="MLflow cannot read the run"):
        drill(made, changed, run_id="0" * 32)


def test_a_backup_is_of_one_moment_while_the_tracker_is_written(
    tracker: TrackingStore, made: Backup, new_store: NewStore, tmp_path: Path
) -> None:
    busy, quiet = new_store("busy"), new_store("quiet")
    restore(made, busy)
    connection, run_id = client(busy.database), champion(tracker)
    over, written = threading.Event(), threading.Event()

    def write() -> None:
        for step in takewhile(lambda _: not over.is_set(), count()):
            connection.log_metric(run_id, "live", 0.0, step=step)
            written.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert written.wait(30)
        live = backup(busy, str(tmp_path))
    finally:
        over.set()
        writer.join()
    restore(live, quiet)
    points = [len(client(store.database).get_metric_history(run_id, "live")) for store in (quiet, busy)]
    assert 0 < points[0] < points[1]


def test_old_backups_and_broken_off_ones_go(tracker: TrackingStore, tmp_path: Path) -> None:
    broken = tmp_path / "20200101T000000000000Z"
    broken.mkdir()
    (tmp_path / "notes").mkdir()
    kept = [backup(tracker, str(tmp_path), keep=2).folder.url for _ in range(3)][1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(Path(url).name for url in kept), "notes"]
    (Path(kept[1]) / "manifest.json").unlink()
    assert find(str(tmp_path)).folder.url == kept[0]


def test_an_object_store_holds_backups(tracker: TrackingStore, made: Backup) -> None:
    """fsspec's store in memory has, as S3, no folders."""
    bucket = f"memory://bucket-{uuid.uuid4().hex}"
    far = backup(tracker, f"{bucket}/backups", keep=1)
    assert far.files.keys() == made.files.keys()
    again = find(f"{bucket}/backups")
    assert drill(again, tracker).content.artifacts
    far.folder.write(f"artifacts/{far.artifacts[0]}", b"other")
    with pytest.raises(BackupError, match="damaged"):
        again.verify()


class Bucket(MemoryFileSystem):
    """Stands for S3, which is not here: like s3fs it tells whether a bucket keeps versions."""

    protocol = "bucket"
    versioned: ClassVar[dict[str, bool]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("bucket://", "memory://")))

    def is_bucket_versioned(self, bucket: str) -> bool:
        return self.versioned[bucket]


def test_a_drill_asks_whether_the_bucket_keeps_versions(tracker: TrackingStore, tmp_path: Path) -> None:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    store = TrackingStore(tracker.database, "bucket://artefacts/mlflow")
    made = backup(store, str(tmp_path), database_only=True)
    Bucket.versioned["artefacts"] = True
    done = drill(made, store)
    assert done.versioned is True and done.content.artifacts == {} and done.content.metrics["loss"]
    Bucket.versioned["artefacts"] = False
    with pytest.raises(BackupError, match="does not keep versions"):
        drill(made, store)
    assert drill(backup(store, str(tmp_path)), store).versioned is False


def test_artefacts_may_be_left_where_they_are(tracker: TrackingStore, new_store: NewStore, tmp_path: Path) -> None:
    made = backup(tracker, str(tmp_path), database_only=True)
    assert made.artifacts == [] and made.rows > 0
    store = new_store("database-only")
    store.artifacts.write("replicated.txt", b"")
    restore(made, store)
    assert client(store.database).get_run(champion(tracker)).info.artifact_uri.startswith(store.artifacts.uri)


@pytest.mark.parametrize(
    ("database", "artifacts", "target", "said"),
    [
        ("http://mlflow:5000", "", "x", "not the database of an MLflow tracker"),
        ("mysql://ft:secret@db/mlflow", "", "x", "not the database of an MLflow tracker"),
        ("sqlite://", "", "x", "not the database of an MLflow tracker"),
        ("sqlite:///nothing.db", "", "x", "no such database"),
        ("sqlite:///text.db", "", "x", "cannot be used: file is not a database"),
        ("sqlite:///other.db", "", "x", "not a database of MLflow"),
        ("sqlite:///other.db", "", "artifacts/x", "cannot lie among the artefacts"),
        ("sqlite:///other.db", "", "smtp://x", "Protocol not known"),
        ("postgresql://ft:secret@127.0.0.1:1/mlflow", "", "x", "where the artefacts"),
        ("postgresql://ft:secret@127.0.0.1:1/mlflow", "a", "x", "Connection refused"),
    ],
)
def test_what_cannot_be_backed_up_is_said_without_stack_trace_or_password(
    database: str, artifacts: str, target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("these are a few words, no database" * 100)
    sa.create_engine("sqlite:///other.db").connect().exec_driver_sql("CREATE TABLE other (id INTEGER)")
    words = ["tracking", "backup", target, "--database", database, *(["--artifacts", artifacts] if artifacts else [])]
    done = CliRunner().invoke(app, [*words, "--home", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert said in done.output and "Traceback" not in done.output and "secret" not in done.output


def test_a_place_that_cannot_be_written_is_named(tracker: TrackingStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackupError, match="cannot be read or written"):
        backup(tracker, str(tmp_path / "file"))


def test_programs_that_are_missing_are_named(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TrackingStore(postgres, str(tmp_path / "artifacts"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupError, match="pg_restore is not installed"):
        store.load(tmp_path / "dump", {})


@pytest.mark.parametrize("new_store", ["postgresql"], indirect=True)
def test_a_password_reaches_the_programs_of_postgresql(postgres: str, made: Backup, tmp_path: Path) -> None:
    """The restore and the backup of an application's user, whose password has every character that URLs encode."""
    password, name = "p@ss:w/rd%1 '\"?#", f"mlflow_{uuid.uuid4().hex}"
    engine = sa.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        quoted = password.replace("'", "''")
        connection.exec_driver_sql(f"CREATE ROLE guarded LOGIN PASSWORD '{quoted}'".replace("%", "%%"))
        connection.exec_driver_sql(f"CREATE DATABASE {name} OWNER guarded")
    try:
        url = sa.make_url(postgres).set(database=name, username="guarded", password=password)
        store = TrackingStore(url.render_as_string(hide_password=False), str(tmp_path / "artifacts"))
        restore(made, store)
        again = backup(store, str(tmp_path / "backups"))
        assert again.rows == made.rows
        with pytest.raises(BackupError, match="permission denied to create database") as caught:
            drill(again, store)
        assert "CREATEDB" in caught.value.mend and password not in str(caught.value)
        wrong = TrackingStore(url.set(password="other").render_as_string(hide_password=False), str(tmp_path / "a"))
        with pytest.raises(BackupError, match="password authentication failed"):
            backup(wrong, str(tmp_path / "backups"))
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
            connection.exec_driver_sql("DROP ROLE guarded")


def test_the_commands_use_the_home_and_the_variables_of_the_tracking_server(
    new_store: NewStore, tracker: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", tracker.database)
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", tracker.artifacts.url)

    def ft(*words: str) -> str:
        done = CliRunner().invoke(app, ["tracking", *words, "--home", str(tmp_path / "home")])
        assert done.exit_code == 0, done.output
        return done.output

    target, store = str(tmp_path / "backups"), new_store("commanded")
    assert "artefacts" in ft("backup", target, "--keep", "1")
    assert f"run {champion(tracker)} is back with 2 params, 10 points of 2 metrics, 2 artefacts" in ft("drill", target)
    ft("restore", target, "--database", store.database, "--artifacts", store.artifacts.url)
    assert client(store.database).get_run(champion(tracker)).info.status == "FINISHED"
    assert not (tmp_path / "home").exists()
