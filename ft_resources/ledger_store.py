"""The ledger's database: opened, brought up to date, read, written, and audited by a hash chain.

SQLite in WAL mode by default, PostgreSQL in production; the schema is kept by Alembic (`migrations/`). A write
transaction of SQLite takes the write lock at its start, so that writers queue instead of failing half-way.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ft_resources import ledger_schema as schema
from ft_resources.errors import ArtefactError

GENESIS = "0" * 64


def now() -> datetime:
    return datetime.now(UTC)


class LedgerStore:
    """Opens the database and brings its schema up to date; what is stored in it is told by the classes on top.

    Args:
        url: SQLAlchemy URL, such as `sqlite:////data/ledger.db` or `postgresql://user@host/name`.

    Raises:
        ArtefactError: The database cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parsed = sa.make_url(url)
            if parsed.drivername == "postgresql":  # SQLAlchemy would take psycopg 3, which is not installed
                parsed = parsed.set(drivername="postgresql+psycopg2")
            self._sqlite = parsed.get_backend_name() == "sqlite"
            if self._sqlite and parsed.database:
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            waiting = {"connect_args": {"timeout": 60}} if self._sqlite else {}
            # errors end up in logs, where neither inputs nor keys may stand
            self._engine = sa.create_engine(parsed, hide_parameters=True, **waiting)
        except (sa.exc.ArgumentError, ImportError, OSError) as error:
            raise ArtefactError(
                f"the ledger cannot be opened: {error}",
                where="FT_LEDGER",
                mend="Write sqlite:////path/to/ledger.db or postgresql://user@host/name.",
            ) from error
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _prepare_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        try:
            schema.upgrade(self._engine, url)
        except (sa.exc.DatabaseError, schema.UnknownRevisionError, OSError) as error:
            self._engine.dispose()
            raise ArtefactError(
                f"the ledger cannot be opened: {getattr(error, 'orig', None) or error}",
                where=parsed.render_as_string(hide_password=True),
                mend="Check that it is a database of this platform and that it can be written.",
            ) from error

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        with self._engine.begin() as connection:
            yield connection

    def _rows(self, query: sa.Executable) -> list[dict[str, Any]]:
        with self._read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def audit(self, actor: str, action: str, task: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Append an event to the hash chain."""
        with self._write() as connection:
            self._audit(connection, actor, action, task, subject, detail)

    def _serialise(self, connection: sa.Connection) -> None:
        """Writers of decisions take turns; SQLite's BEGIN IMMEDIATE does that already."""
        if not self._sqlite:
            connection.exec_driver_sql("LOCK TABLE audit IN EXCLUSIVE MODE")

    def _audit(
        self, connection: sa.Connection, actor: str, action: str, task: str, subject: str, detail: Mapping[str, Any]
    ) -> None:
        table = schema.audit
        self._serialise(connection)
        last = connection.execute(sa.select(table.c.hash).order_by(table.c.id.desc()).limit(1)).scalar() or GENESIS
        event = {
            "at": now().isoformat(),
            "actor": actor,
            "action": action,
            "task": task,
            "subject": subject,
            "detail": json.dumps(dict(detail), sort_keys=True),
        }
        connection.execute(table.insert().values(**event, previous_hash=last, hash=_chain(last, event)))

    def audit_events(self, task: str | None = None) -> list[dict[str, Any]]:
        """Events oldest first.

        Raises:
            ArtefactError: An event was changed, removed or inserted after the fact.
        """
        previous = GENESIS
        decided = [row["id"] for row in self._rows(sa.select(schema.releases.c.id))]  # first: events only get more
        events = self._rows(sa.select(schema.audit).order_by(schema.audit.c.id))
        for row in events:
            event = {key: row[key] for key in ("at", "actor", "action", "task", "subject", "detail")}
            if row["previous_hash"] != previous or row["hash"] != _chain(previous, event):
                raise ArtefactError(
                    f"audit event {row['id']} does not continue the chain",
                    where=sa.make_url(self.url).render_as_string(hide_password=True),
                    mend="Events were tampered with; compare with a backup.",
                )
            previous = row["hash"]
        # the newest events could go without breaking the chain
        silent = sorted(set(decided) - {row["subject"] for row in events})
        if silent:
            raise ArtefactError(
                f"release {silent[0]} has no audit event",
                where=sa.make_url(self.url).render_as_string(hide_password=True),
                mend="Events were tampered with; compare with a backup.",
            )
        return [row for row in events if task is None or row["task"] == task]


def _chain(previous: str, event: Mapping[str, str]) -> str:
    return hashlib.sha256((previous + json.dumps(dict(event), sort_keys=True)).encode()).hexdigest()


def _begin_sqlite(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":  # reads never wait for a writer
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the begin event opens transactions, not the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=60000")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()
