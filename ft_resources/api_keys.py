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

from ft_resources.errors import SpecError

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


def key_id(shown: bytes) -> str | None:
    """The id in a key; None when it is not one."""
    match = _KEY.fullmatch(shown)
    return None if match is None else match["id"].decode()


def has_prefix(shown: bytes) -> bool:
    """Whether `shown` claims to be a key of this platform."""
    return shown.startswith(b"ft_")


def _hash(salt: bytes, secret: bytes) -> bytes:
    return hashlib.sha256(salt + secret).digest()
