"""What an MLflow tracker keeps: a database (SQLite or PostgreSQL) and a folder of artefacts, of any fsspec URL.

PostgreSQL is dumped and restored by its own programs, pg_dump and pg_restore, SQLite through its online backup API;
both while the tracker is in use, as of one moment.
"""

import hashlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import sqlalchemy as sa

from ft_resources.errors import BackupError
from ft_resources.folders import Folder, read_errors
from ft_resources.masking import mask_text

PROXIED = "mlflow-artifacts"
"""Scheme of an artefact location that the tracking server resolves: a path below its artefact destination."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
"""Columns of MLflow's database that hold artefact locations."""

Tables = dict[str, dict[str, Any]]


class TrackingStore:
    """One tracker's database and artefacts.

    Args:
        database: SQLAlchemy URL, as `mlflow server --backend-store-uri` has it.
        artifacts: Folder or fsspec URL, as `mlflow server --artifacts-destination` has it; empty: the folder
            `artifacts` beside a SQLite database.

    Raises:
        BackupError: That is no such database, or nobody can tell where the artefacts are.
    """

    def __init__(self, database: str, artifacts: str = "") -> None:
        self._url = _parsed(database)
        self.kind = self._url.get_backend_name()
        self.database = self._url.render_as_string(hide_password=False)
        self.name = self._url.render_as_string()
        if not artifacts and self.kind != "sqlite":
            raise BackupError(
                "where the artefacts of this tracker are is not known",
                where=self.name,
                mend="Give --artifacts or MLFLOW_ARTIFACTS_DESTINATION, as the tracking server has it.",
            )
        self.artifacts = open_folder(artifacts or str(self._file.parent / "artifacts"))

    @property
    def _file(self) -> Path:
        return Path(self._url.database or "")

    # -- copies -------------------------------------------------------------------------------------------------

    def dump(self, file: Path) -> Tables:
        """Write a copy of the database to `file`, as of one moment.

        Returns:
            For each table the number of its rows and a digest of them.

        Raises:
            BackupError: The database cannot be read or is not MLflow's; pg_dump is missing or failed.
        """
        with self._reached():
            if self.kind == "sqlite":
                if not self._file.is_file():
                    raise BackupError("there is no such database", where=self.name, mend="Check the path.")
                with closing(sqlite3.connect(self._file)) as source, closing(sqlite3.connect(file)) as sink:
                    source.backup(sink)
                return self._checked(TrackingStore(f"sqlite:///{file}").tables())
            with self._connected("REPEATABLE READ") as connection:
                snapshot = connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one()
                tables = self._checked(_tables(connection))
                self._program("pg_dump", "--format=custom", f"--snapshot={snapshot}", f"--file={file}")
                return tables

    def load(self, file: Path, expected: Tables) -> None:
        """Fill this empty store's database from a dump and compare every row with what was dumped.

        Raises:
            BackupError: It could not be filled, or holds something else than was dumped.
        """
        with self._reached():
            if self.kind == "sqlite":
                self._file.parent.mkdir(parents=True, exist_ok=True)
                aside = self._file.with_name(f".{self._file.name}.{uuid.uuid4().hex}")
                shutil.copyfile(file, aside)
                aside.replace(self._file)
            else:
                self._program("pg_restore", "--single-transaction", "--exit-on-error", str(file))
            found = self.tables()
        wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        if wrong:
            raise BackupError(
                f"after the restore these tables do not hold the rows of the backup: {', '.join(wrong)}",
                where=self.name,
                mend="Empty the database, look for what else writes to it, and restore again.",
            )

    def tables(self) -> Tables:
        """Number and digest of the rows of every table; the digest does not depend on their order."""
        with self._reached(), self._connected() as connection:
            return _tables(connection)

    def require_empty(self, *, artifacts: bool) -> None:
        """Refuse a store that holds anything.

        Args:
            artifacts: Whether its folder of artefacts has to be empty too.

        Raises:
            BackupError: It is not empty.
        """
        tables = self.tables() if self.kind != "sqlite" or self._file.exists() else {}
        if tables:
            rows = sum(table["rows"] for table in tables.values())
            raise BackupError(
                f"the database is not empty: {len(tables)} tables, {rows:,} rows",
                where=self.name,
                mend="Restore into a new, empty database; nothing was changed.",
            )
        with usable(self.artifacts):
            filled = artifacts and self.artifacts.names()
        if filled:
            raise BackupError(
                "the folder of artefacts is not empty",
                where=self.artifacts.url,
                mend="Restore into an empty folder or prefix; nothing was changed.",
            )

    # -- locations ----------------------------------------------------------------------------------------------

    def path_of(self, location: str) -> str | None:
        """Path below the artefact folder of a location in the database; None where it points elsewhere."""
        if urlparse(location).scheme == PROXIED:
            return urlparse(location).path.strip("/")
        for form in _forms(self.artifacts.uri):
            if f"{location}/".startswith(f"{form}/"):
                return location[len(form) :].strip("/")
        return None

    def runs_elsewhere(self) -> int:
        """How many runs have their artefacts outside the folder of artefacts."""
        with self._reached(), self._connected() as connection:
            locations = connection.exec_driver_sql("SELECT artifact_uri FROM runs").scalars()
            return sum(self.path_of(location or "") is None for location in locations)

    def relocate(self, former: str) -> None:
        """Let locations below the artefact folder `former` (its URI) point below this store's.

        Raises:
            BackupError: A location became longer than MLflow's columns hold.
        """
        new = self.artifacts.uri
        with self._reached(), self._engine().begin() as connection:
            existing = set(sa.inspect(connection).get_table_names())
            for table, column in LOCATIONS:
                if table not in existing:
                    continue
                target = sa.table(table, sa.column(column, sa.String))
                place = target.c[column]
                for form in _forms(former):
                    below = sa.func.substr(place, 1, len(form) + 1) == f"{form}/"
                    moved = sa.literal(new).concat(sa.func.substr(place, len(form) + 1))
                    connection.execute(sa.update(target).where(below | (place == form)).values({column: moved}))

    # -- scratch ------------------------------------------------------------------------------------------------

    @contextmanager
    def scratch(self) -> Iterator["TrackingStore"]:
        """An empty store that is removed at the end: a temporary folder, and a database on the same server.

        Raises:
            BackupError: The server does not let this user create a database.
        """
        with tempfile.TemporaryDirectory(prefix="ft-drill-") as folder:
            if self.kind == "sqlite":
                yield TrackingStore(f"sqlite:///{folder}/mlflow.db")
                return
            name = f"ft_drill_{uuid.uuid4().hex}"
            self._execute(f"CREATE DATABASE {name} TEMPLATE template0")
            try:
                url = self._url.set(database=name).render_as_string(hide_password=False)
                yield TrackingStore(url, f"{folder}/artifacts")
            finally:
                self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    # -- the database -------------------------------------------------------------------------------------------

    def _engine(self, isolation: str | None = None) -> sa.Engine:
        options = {"isolation_level": isolation} if isolation else {}
        return sa.create_engine(self._url, poolclass=sa.NullPool, hide_parameters=True, **options)

    @contextmanager
    def _connected(self, isolation: str | None = None) -> Iterator[sa.Connection]:
        with self._engine(isolation).connect() as connection:
            yield connection

    def _execute(self, statement: str) -> None:
        mend = "Let its user create databases (ALTER ROLE ... CREATEDB): a drill needs one."
        with self._reached(mend), self._connected("AUTOCOMMIT") as connection:
            connection.exec_driver_sql(statement)

    @contextmanager
    def _reached(self, mend: str = "Check that it runs, and the host, name and user in its URL.") -> Iterator[None]:
        try:
            yield
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            said = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise BackupError(f"the database cannot be used: {mask_text(said)}", where=self.name, mend=mend) from error

    def _checked(self, tables: Tables) -> Tables:
        if not {"experiments", "runs"} <= tables.keys():
            raise BackupError(
                "this is not a database of MLflow: it has no runs",
                where=self.name,
                mend="Give the database that the tracking server has as --backend-store-uri.",
            )
        return tables

    def _program(self, name: str, *options: str) -> None:
        """Run one of PostgreSQL's programs on the database; the password is not on its command line."""
        program = shutil.which(name)
        if program is None:
            raise BackupError(
                f"{name} is not installed",
                where="PATH",
                mend="Install PostgreSQL's client programs, as new as the server.",
            )
        url = self._url
        place = sa.URL.create("postgresql", url.username, None, url.host, url.port, url.database, url.query)
        secret = {"PGPASSWORD": str(url.password)} if url.password else {}
        done = subprocess.run(
            [
                program,
                "--no-owner",
                "--no-privileges",
                "--no-password",
                f"--dbname={place.render_as_string()}",
                *options,
            ],
            env={**os.environ, **secret},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = mask_text(done.stderr.strip().partition("\n")[0])
            raise BackupError(
                f"{name} failed: {said}", where=self.name, mend="It says why; it must not be older than the server."
            )


def open_folder(url: str) -> Folder:
    """The folder at `url`.

    Raises:
        BackupError: Nothing here speaks its protocol.
    """
    try:
        return Folder(url)
    except (ImportError, OSError, ValueError) as error:
        raise BackupError(
            f"the URL cannot be used: {error}", where=mask_text(url), mend="Check its protocol; s3:// needs s3fs."
        ) from error


@contextmanager
def usable(folder: Folder) -> Iterator[None]:
    """What fsspec and its clients raise on the use of `folder` becomes a `BackupError`."""
    try:
        yield
    except read_errors() as error:
        raise BackupError(
            f"files cannot be read or written: {error}",
            where=folder.url,
            mend="Check the address, the credentials, and the space there is.",
        ) from error


def _parsed(database: str) -> sa.URL:
    try:
        url = sa.make_url(database)
        known = url.get_backend_name() in ("sqlite", "postgresql") and bool(url.database)
    except (sa.exc.ArgumentError, ValueError):
        known = False
    if not known:
        raise BackupError(
            "this is not the database of an MLflow tracker; one that is reached over HTTP gives no copy of it away",
            where=mask_text(database),
            mend="Give --database or MLFLOW_BACKEND_STORE_URI, as the tracking server has it: "
            "sqlite:////path/to/mlflow.db or postgresql+psycopg2://user@host/name.",
        )
    # SQLAlchemy takes psycopg 3 where no driver is named, which is not what is installed here
    return url if url.get_backend_name() == "sqlite" else url.set(drivername="postgresql+psycopg2")


def _tables(connection: sa.Connection) -> Tables:
    found: Tables = {}
    for name in sorted(sa.inspect(connection).get_table_names()):
        rows, total = 0, 0
        every = sa.select(sa.text("*")).select_from(sa.table(name))
        for row in connection.execute(every, execution_options={"yield_per": 1000}):
            plain = tuple(bytes(value) if isinstance(value, memoryview) else value for value in row)
            total += int.from_bytes(hashlib.sha256(repr(plain).encode()).digest())
            rows += 1
        found[name] = {"rows": rows, "sha256": f"{total % (1 << 256):064x}"}
    return found


def _forms(uri: str) -> tuple[str, ...]:
    """The ways in which MLflow may have written this folder down."""
    path = unquote(urlparse(uri).path)
    return tuple(dict.fromkeys((uri, f"file://{path}", path))) if uri.startswith("file:") else (uri,)
