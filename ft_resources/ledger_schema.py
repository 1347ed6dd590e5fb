"""Tables of the ledger, and bringing a database to the newest schema with Alembic."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa


class UtcTime(sa.TypeDecorator[datetime]):
    """Aware datetimes in, aware UTC datetimes out, on databases with and without time zones."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


metadata = sa.MetaData()
_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")

releases = sa.Table(
    "releases",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("task", sa.String(128), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("adapter", sa.String(64), nullable=False),
    sa.Column("report", sa.String(64)),
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("bento", sa.String(128)),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("because", sa.Text, nullable=False),
    sa.Column("decision", sa.JSON, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)
routes = sa.Table(
    "routes",
    metadata,
    sa.Column("revision", _Id, primary_key=True, autoincrement=True),
    sa.Column("task", sa.String(128), nullable=False, index=True),
    sa.Column("release_id", sa.String(64), sa.ForeignKey("releases.id"), nullable=False),
    sa.Column("plan", sa.JSON, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)
approvals = sa.Table(
    "approvals",
    metadata,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("task", sa.String(128), nullable=False),
    sa.Column("adapter", sa.String(64), nullable=False),
    sa.Column("report", sa.String(64), nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("because", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("task", sa.String(128), nullable=False),
    sa.Column("release_id", sa.String(64), nullable=False),
    sa.Column("adapter", sa.String(64), nullable=False),
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("input", sa.Text, nullable=False),
    sa.Column("label", sa.String(256), nullable=False),  # "" where the answer is a text
    sa.Column("confidence", sa.Float, nullable=False),
    sa.Column("probabilities", sa.JSON, nullable=False),
    sa.Column("embedding", sa.LargeBinary, nullable=False),  # float16 [hidden], the pooled state behind a label
    sa.Column("caller", sa.String(128)),
    sa.Column("trace_id", sa.String(32), nullable=False),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("event_time", UtcTime, nullable=False),
    sa.Column("answered_at", UtcTime, nullable=False),
    sa.Column("decision", sa.String(8)),  # of a label: accept or review
    sa.Column("output", sa.Text),  # what was generated, and why it ended: stop, length or cancelled
    sa.Column("finish_reason", sa.String(16)),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("completion_tokens", sa.Integer),
    sa.Index("predictions_by_task_and_time", "task", "event_time"),
)
feedback = sa.Table(
    "feedback",
    metadata,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("prediction_id", sa.String(32), sa.ForeignKey("predictions.id"), nullable=False, index=True),
    sa.Column("task", sa.String(128), nullable=False, index=True),
    sa.Column("label", sa.String(256)),
    sa.Column("rating", sa.Integer),
    sa.Column("text", sa.Text),  # what should have been generated
    sa.Column("author", sa.String(128), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", _Id, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("task", sa.String(128), nullable=False),
    sa.Column("subject", sa.String(128), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("previous_hash", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)
training_runs = sa.Table(
    "training_runs",
    metadata,
    sa.Column("run_id", sa.String(64), primary_key=True),
    sa.Column("dagster_run_id", sa.String(64), nullable=False, index=True),
    sa.Column("task", sa.String(128), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("adapter", sa.String(64)),
    sa.Column("trained_from", sa.String(64), nullable=False),
    sa.Column("training_rows_digest", sa.String(64), nullable=False),
    sa.Column("validation_rows_digest", sa.String(64), nullable=False),
    sa.Column("base", sa.String(512), nullable=False),
    sa.Column("base_digest", sa.String(64), nullable=False),
    sa.Column("template", sa.String(128), nullable=False),
    sa.Column("method", sa.String(32), nullable=False),
    sa.Column("device", sa.String(64)),
    sa.Column("precision", sa.String(16)),
    sa.Column("rows", sa.BigInteger),
    sa.Column("tokens", sa.BigInteger),
    sa.Column("steps", sa.BigInteger),
    sa.Column("wall_seconds", sa.Float),
    sa.Column("cpu_seconds", sa.Float),
    sa.Column("gpu_seconds", sa.Float),
    sa.Column("peak_memory_bytes", sa.BigInteger),
    sa.Column("peak_gpu_memory_bytes", sa.BigInteger),
    sa.Column("energy_wh", sa.Float),
    sa.Column("energy_source", sa.String(32)),
    sa.Column("cost", sa.Float),
    sa.Column("accuracy", sa.Float),
    sa.Column("macro_f1", sa.Float),
    sa.Column("loss", sa.Float),
    sa.Column("started", UtcTime, nullable=False),
    sa.Column("ended", UtcTime, nullable=False),
    sa.Column("error", sa.String(64)),
    sa.Index("training_runs_by_task_and_time", "task", "started"),
)
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, index=True),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("tasks", sa.JSON(none_as_null=True)),
    sa.Column("rate", sa.Float),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sa.Column("created_by", sa.String(128), nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("expires_at", UtcTime),
    sa.Column("revoked_at", UtcTime),
)


class UnknownRevisionError(Exception):
    """The database was brought to a schema that this version of the platform does not know."""


def upgrade(engine: sa.Engine, url: str) -> None:
    """Run the migrations that `engine`'s database lacks; processes that start together take turns.

    Raises:
        UnknownRevisionError: A newer version of the platform migrated the database.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    newest, present = scripts.get_current_head(), _revision(engine)
    if present == newest:
        return
    if present is not None and present not in {script.revision for script in scripts.walk_revisions()}:
        raise UnknownRevisionError(f"its schema {present} is newer than {newest}, the newest one known here")
    with _turn(engine, url), engine.connect() as connection:
        if _revision(engine) == newest:
            return
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(engine: sa.Engine) -> str | None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def _turn(engine: sa.Engine, url: str) -> Any:
    database = sa.make_url(url).database
    if engine.dialect.name == "sqlite" and database:
        from filelock import FileLock

        return FileLock(f"{database}.migration-lock")
    return _advisory_lock(engine)


def _advisory_lock(engine: sa.Engine) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def lock() -> Any:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                # held by the transaction, which ends with this block: a pooled connection must not keep it
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(20021001)")
            yield

    return lock()
