"""Who asks, and what they may do: callers, roles and tasks.

Three ways to be known, in this order: a key of the ledger or of FT_API_KEYS, a token (`bento.tokens`), or standing on
this machine. Whoever shows a key or token of this platform is held to it, also on this machine.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from ft_resources.api_keys import ROLES, ApiKey, Role, has_prefix
from ft_resources.errors import RequestError

if TYPE_CHECKING:
    from bento.keys import KeyRing
    from bento.tokens import Tokens

FORWARDING = (b"x-forwarded-", b"x-envoy-", b"x-real-ip", b"forwarded", b"via")
"""Beginnings of headers that a proxy adds. They are never believed; a request with one is not from this machine."""
THIS_MACHINE = ("127.0.0.1", "::1")
MOST_CREDENTIAL = 8192


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str
    role: Role
    tasks: frozenset[str] | None = None
    """Tasks this caller may use; None: all."""
    rate: float | None = None
    """Requests per minute; None: what FT_RATE_LIMIT says."""
    key_id: str = ""
    """The key behind it, also of a token; empty for callers of this machine and of another issuer."""
    expires_at: datetime | None = None
    """When the key ends; None: never, or not known, as of a token."""
    local: bool = False
    """Let in because it stands on this machine."""

    def may_use(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks


class Connection(Protocol):
    """What `permit` needs of a request."""

    @property
    def state(self) -> Any: ...


LOCAL = Caller("local", "admin", local=True)


def permit(request: Connection, task: str | None = None, role: Role = "reader", *, any_task: bool = False) -> None:
    """Refuse a caller who may not do this.

    Args:
        request: `request.state.caller` is set by `bento.front`.
        task: The task it is about; None when it concerns all tasks, which needs a caller who may use all.
        role: The least role it takes: `reader` asks, `owner` also keeps the keys of its tasks, `admin` everything.
        any_task: It concerns whichever tasks the caller has.

    Raises:
        RequestError: `forbidden` (403).
    """
    check(request.state.caller, task, role, any_task=any_task)


def check(caller: Caller, task: str | None, role: Role, *, any_task: bool = False) -> None:
    """`permit` for a caller that is known already."""
    if ROLES.index(caller.role) < ROLES.index(role):
        raise RequestError(
            "forbidden", f"this takes the role {role}", status=403, mend=f"Use a key with the role {role}."
        )
    if caller.tasks is not None and not any_task and (task is None or task not in caller.tasks):
        what = "all tasks" if task is None else f"task '{task[:128]}'"
        raise RequestError(
            "forbidden",
            f"this key is not for {what}",
            status=403,
            mend=f"Its tasks: {', '.join(sorted(caller.tasks)) or 'none'}.",
        )


def permit_path(caller: Caller, path: str) -> None:
    """Refuse paths that BentoML answers itself, or that tell of all tasks: /metrics takes an owner of all tasks.

    Raises:
        RequestError: `forbidden` (403).
    """
    if path.rstrip("/") == "/metrics":
        check(caller, None, "owner")


class Doorkeeper:
    """Tells who asks, from the address and the headers of a request.

    Args:
        static_keys: FT_API_KEYS: admin keys that no ledger holds.
        mode: `auto`: this machine is let in; `always`: it needs a key too.
        tokens: Checks tokens.

    Attributes:
        ring: The keys of the ledger; None until the service has read them.
    """

    def __init__(
        self, static_keys: Sequence[str], mode: Literal["auto", "always"] = "auto", tokens: "Tokens | None" = None
    ) -> None:
        self._static = tuple(key.encode() for key in static_keys)
        self._static_ids = [f"static-{hashlib.sha256(key).hexdigest()[:12]}" for key in self._static]
        self._always, self.tokens = mode == "always", tokens
        self.ring: KeyRing | None = None

    def identify(self, client: str | None, headers: Mapping[bytes, bytes]) -> Caller:
        """The caller.

        Args:
            client: Address of the peer; None where it is not known.
            headers: Names in lower case.

        Raises:
            RequestError: `unauthorized`; `not_ready` while the keys are not read yet.
        """
        shown = _bearer(headers)
        caller = self._by_credential(shown) if shown else None
        if caller is not None:
            return caller
        if self.trusts(client, headers) and not _ours(shown):
            return LOCAL
        raise RequestError(
            "unauthorized",
            "the key is not valid" if shown else "callers need a key",
            status=401,
            mend="Send 'Authorization: Bearer KEY'; an admin makes keys with 'ft key create'.",
        )

    def visitor(self, client: str | None, headers: Mapping[bytes, bytes]) -> Caller:
        """Whoever asks for what is nobody's: a key is not looked at, and opens nothing here."""
        return LOCAL if self.trusts(client, headers) else Caller(f"visitor {client}", "reader", frozenset())

    def trusts(self, client: str | None, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request is let in without a key, because it comes from this machine."""
        return not self._always and is_local(client, headers)

    def key_of(self, headers: Mapping[bytes, bytes]) -> Caller:
        """The caller by the key it shows; a token won't do.

        Raises:
            RequestError: `unauthorized`; `not_ready`.
        """
        caller = self._by_key(_bearer(headers))
        if caller is None:
            raise RequestError(
                "unauthorized",
                "this takes a key, a token won't do",
                status=401,
                mend="Send 'Authorization: Bearer KEY'.",
            )
        return caller

    def _by_credential(self, shown: bytes) -> Caller | None:
        caller = self._by_key(shown)
        if caller is None and self.tokens is not None and shown.count(b".") == 2:
            caller = self.tokens.caller(shown)
            if caller.key_id and not self._valid(caller.key_id):
                raise RequestError("unauthorized", "the key of this token was revoked", status=401, mend="Ask for one.")
        return caller

    def _by_key(self, shown: bytes) -> Caller | None:
        # every key is compared, so that the time taken does not tell which one nearly matched
        matches = [hmac.compare_digest(shown, known) for known in self._static]
        if any(matches):
            number = matches.index(True)
            return Caller(f"FT_API_KEYS[{number}]", "admin", key_id=self._static_ids[number])
        if not has_prefix(shown):
            return None
        found = self._keys().find(shown)
        return None if found is None else caller_of(found)

    def _valid(self, key_id: str) -> bool:
        if key_id.startswith("static-"):
            return key_id in self._static_ids
        return self._keys().by_id(key_id) is not None

    def _keys(self) -> "KeyRing":
        if self.ring is None or not self.ring.loaded:
            raise RequestError("not_ready", "the service is starting", status=503, mend="Try again in a few seconds.")
        return self.ring


def caller_of(key: ApiKey) -> Caller:
    """Whom a key stands for."""
    return Caller(key.name, key.role, key.tasks, key.rate, key.id, key.expires_at)


def is_local(client: str | None, headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request comes from this machine, through no proxy, and not from a page of another site.

    The `Host` must be a name of this machine: a page whose own name was made to point here (DNS rebinding) sends that.
    A proxy on this machine that adds no header cannot be told from a caller; behind one, FT_AUTH must be `always`.
    """
    if client is None or not _is_this_machine(client) or any(name.startswith(FORWARDING) for name in headers):
        return False
    origin = headers.get(b"origin")
    if origin is not None and not _is_loopback(_host(origin.decode("latin-1"))):
        return False
    return _is_loopback(_host("//" + headers.get(b"host", b"").decode("latin-1")))


def _is_this_machine(client: str) -> bool:
    return client.removeprefix("::ffff:") in THIS_MACHINE  # how a socket for both families writes IPv4 addresses


@lru_cache(1024)  # the few names of a service come again with every request
def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@lru_cache(1024)
def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _bearer(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
    shown = shown.strip()
    return shown if scheme.lower() == b"bearer" and len(shown) <= MOST_CREDENTIAL else b""


def _ours(shown: bytes) -> bool:
    """Whether it looks like a key or a token of this platform, rather than what a client library sends by default."""
    return has_prefix(shown)
