"""API keys of the prediction service: how they are made, stored and compared.

A key is `ft_ID_SECRET`. The ledger holds the id, a salt and SHA-256 of salt and secret: the secret has 256 random
bits, so no slow hash is needed against guessing, and a stolen table opens nothing.
"""

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from ft_resources import ledger_schema as schema
from ft_resources.errors import SpecError
from ft_resources.ledger_store import LedgerStore, now

Role = Literal["reader", "owner", "admin"]
ROLES: tuple[Role, ...] = ("reader", "owner", "admin")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(rb"ft_(?P<id>[0-9a-f]{12})_(?P<secret>[A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class ApiKey:
    """A key as the ledger knows it, without the secret."""

    id: str
    name: str
    role: Role
    tasks: frozenset[str] | None
    """None: all tasks."""
    rate: float | None
    """Requests per minute."""
    salt: bytes
    hash: bytes
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of_row(cls, row: Any) -> "ApiKey":
        """From a row of the ledger's `api_keys`."""
        values = dict(row)
        tasks = values.pop("tasks")
        return cls(tasks=None if tasks is None else frozenset(tasks), **values)

    def row(self) -> dict[str, Any]:
        """The columns of the ledger's `api_keys`."""
        return {**vars(self), "tasks": None if self.tasks is None else sorted(self.tasks)}

    def valid(self, at: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)

    def fits(self, shown: bytes) -> bool:
        """Whether `shown` is this key; takes the same time wherever they differ."""
        match = _KEY.fullmatch(shown)
        return match is not None and hmac.compare_digest(_hash(self.salt, match["secret"]), self.hash)


def make(
    name: str,
    role: str,
    *,
    tasks: list[str] | None = None,
    rate: float | None = None,
    expires_at: datetime | None = None,
    created_by: str,
) -> tuple[ApiKey, str]:
    """A new key and the text to hand out, which is kept nowhere.

    Raises:
        SpecError: The name, role, rate or tasks won't do.
    """
    if NAME.fullmatch(name) is None:
        raise SpecError(
            f"'{name[:80]}' is no name for a key", mend="Use up to 64 of a-z, 0-9, '.', '_' and '-', a letter first."
        )
    if role not in ROLES:
        raise SpecError(f"there is no role '{role}'", mend=f"Roles: {', '.join(ROLES)}.")
    if role == "admin" and tasks is not None:
        raise SpecError("an admin may use every task", mend="Leave the tasks out, or make an owner.")
    if rate is not None and not 0 < rate < float("inf"):
        raise SpecError(f"{rate:g} requests per minute is no limit", mend="Give a number above 0.")
    if tasks is not None and not tasks:
        raise SpecError("a key for no task opens nothing", mend="Name its tasks.")
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise SpecError("the key would have expired already", mend="Give a time in the future.")
    secret, salt, key_id = secrets.token_urlsafe(32), secrets.token_bytes(16), secrets.token_hex(6)
    key = ApiKey(
        id=key_id,
        name=name,
        role=role,
        tasks=None if tasks is None else frozenset(tasks),
        rate=rate,
        salt=salt,
        hash=_hash(salt, secret.encode()),
        created_by=created_by,
        created_at=datetime.now(UTC),
        expires_at=expires_at,
        revoked_at=None,
    )
    return key, f"ft_{key_id}_{secret}"


def made_by(name: str, key_id: str) -> str:
    """`created_by` of keys that are made with another key. No name holds a slash."""
    return f"{name}/{key_id}" if key_id else name


def key_id(shown: bytes) -> str | None:
    """The id in a key; None when it is not one."""
    match = _KEY.fullmatch(shown)
    return None if match is None else match["id"].decode()


def has_prefix(shown: bytes) -> bool:
    """Whether `shown` claims to be a key of this platform."""
    return shown.startswith(b"ft_")


def _hash(salt: bytes, secret: bytes) -> bytes:
    return hashlib.sha256(salt + secret).digest()


class KeyRecords(LedgerStore):
    """The keys in the ledger."""

    def add_key(self, key: ApiKey) -> None:
        """Store a key.

        Raises:
            SpecError: A valid key has its name.
        """
        table = schema.api_keys
        with self._write() as connection:
            self._serialise(connection)
            rows = connection.execute(sa.select(table).where(table.c.name == key.name)).mappings()
            if any(ApiKey.of_row(row).valid(key.created_at) for row in rows):
                raise SpecError(f"there is a key '{key.name}'", mend="Revoke it first, or choose another name.")
            connection.execute(table.insert().values(**key.row()))
            detail = {"role": key.role, "tasks": sorted(key.tasks) if key.tasks is not None else None, "id": key.id}
            self._audit(connection, key.created_by, "create_key", "", key.name, detail)

    def api_keys(self) -> list[ApiKey]:
        """Every key, revoked ones too, oldest first."""
        table = schema.api_keys
        return [ApiKey.of_row(row) for row in self._rows(sa.select(table).order_by(table.c.created_at, table.c.id))]

    def revoke_key(self, name: str, actor: str) -> list[str]:
        """From now on the key opens nothing, nor do the keys made with it; services know within a second.

        Returns:
            Names of the keys made with it, directly or not, that are revoked too.

        Raises:
            SpecError: No unrevoked key has this name.
        """
        table = schema.api_keys
        with self._write() as connection:
            self._serialise(connection)
            rows = connection.execute(sa.select(table).where(table.c.revoked_at.is_(None))).mappings()
            open_keys = [ApiKey.of_row(row) for row in rows]
            revoked = [key for key in open_keys if key.name == name]
            if not revoked:
                raise SpecError(f"there is no key '{name[:80]}' to revoke", mend="See ft key list.")
            for maker in revoked:  # which grows meanwhile
                made = made_by(maker.name, maker.id)
                revoked += [key for key in open_keys if key.created_by == made]
            change = table.update().where(table.c.id.in_([key.id for key in revoked])).values(revoked_at=now())
            connection.execute(change)
            others = sorted({key.name for key in revoked} - {name})
            self._audit(connection, actor, "revoke_key", "", name, {"made_with_it": others} if others else {})
        return others
