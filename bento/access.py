"""Endpoints that give tokens for keys and keep keys: an owner those of its own tasks, an admin all."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError

from bento.auth import Caller, Doorkeeper, permit
from bento.protocol import ErrorResponse
from bento.tokens import SECONDS
from ft_resources import api_keys
from ft_resources.api_keys import ApiKey, Role
from ft_resources.errors import RequestError, SpecError

if TYPE_CHECKING:
    from ft_resources.ledger import Ledger

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "No valid key.",
        403: "The key is not for this.",
        422: "A field is not what the protocol asks for.",
        429: "Too many requests.",
        503: "Not ready, or the ledger cannot be written.",
    }.items()
}
SECURITY = {"bearer": {"type": "http", "scheme": "bearer", "description": "A key, or a token of POST /auth/token."}}
TaskName = Annotated[str, pydantic.Field(min_length=1, max_length=128)]
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class Access:
    """What these endpoints work with; `app.state.access`."""

    doors: Doorkeeper
    ledger: "Ledger"
    rate: float | None = None
    """FT_RATE_LIMIT: requests per minute of a key that names no rate."""


class TokenResponse(pydantic.BaseModel):
    """A token (RFC 6749, section 5.1)."""

    access_token: str = pydantic.Field(description="Send it as `Authorization: Bearer TOKEN`.")
    token_type: Literal["Bearer"] = "Bearer"
    expires_in: int = pydantic.Field(description="Seconds.")


class KeyRequest(pydantic.BaseModel):
    """A key to make."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, pydantic.Field(pattern=NAME)]
    role: Role = "reader"
    tasks: Annotated[list[TaskName], pydantic.Field(min_length=1)] | None = pydantic.Field(
        None, description="Tasks it is for; none given: all."
    )
    rate: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = pydantic.Field(
        None, description="Requests per minute."
    )
    expires_at: pydantic.AwareDatetime | None = None


class KeyInfo(pydantic.BaseModel):
    """A key without its secret."""

    id: str
    name: str
    role: Role
    tasks: list[str] | None
    rate: float | None
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, key: ApiKey) -> "KeyInfo":
        return cls(**{**vars(key), "tasks": None if key.tasks is None else sorted(key.tasks)})


class NewKey(pydantic.BaseModel):
    """A key, shown this once."""

    key: str
    info: KeyInfo


class Keys(pydantic.BaseModel):
    """Every key the caller may see."""

    data: list[KeyInfo]


def add_access(app: FastAPI) -> None:
    """Add the endpoints to `app`, and to its OpenAPI document how callers say who they are."""
    app.state.access = None
    describe = app.openapi

    def with_security() -> dict[str, Any]:
        schema = describe()
        schema.setdefault("components", {})["securitySchemes"] = SECURITY
        schema["security"] = [*({name: []} for name in SECURITY), {}]  # callers on the service's machine need none
        return schema

    app.openapi = with_security  # type: ignore[method-assign]
    for path, method, handler, answer in (
        ("/auth/token", "POST", give_token, TokenResponse),
        ("/auth/keys", "GET", list_keys, Keys),
        ("/auth/keys", "POST", make_key, NewKey),
        ("/auth/keys/{name}", "DELETE", revoke_key, KeyInfo),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=answer, responses=ERRORS, tags=["access"])


async def give_token(request: Request) -> JSONResponse:
    """Exchange the key in the Authorization header for a token of the same rights, good for 30 minutes."""
    access = _access(request)
    caller = access.doors.key_of(dict(request.scope["headers"]))
    if access.doors.tokens is None:
        raise RequestError("invalid_request", "this service gives no tokens", status=404, mend="Use the key.")
    content = TokenResponse(access_token=access.doors.tokens.issue(caller), expires_in=SECONDS).model_dump()
    return JSONResponse(content, headers={"cache-control": "no-store"})


async def list_keys(request: Request) -> Keys:
    """Keys; an owner sees those for its own tasks only."""
    permit(request, role="owner", any_task=True)
    caller: Caller = request.state.caller
    keys = await asyncio.to_thread(_stored, _access(request).ledger)
    return Keys(data=[KeyInfo.of(key) for key in keys if _may_keep(caller, key.role, key.tasks)])


async def make_key(body: KeyRequest, request: Request) -> NewKey:
    """Make a key; an owner makes readers of its own tasks. None has a higher rate or lasts longer than its maker.

    It takes a key: who got hold of a token, which ends in half an hour, cannot make something that lasts.
    """
    permit(request, role="owner", any_task=True)
    access, caller = _access(request), request.state.caller
    if not caller.local:
        caller = access.doors.key_of(dict(request.scope["headers"]))
    tasks = None if body.tasks is None else frozenset(body.tasks)
    if not _may_keep(caller, body.role, tasks):
        raise RequestError(
            "forbidden",
            "an owner makes keys with the role reader for its own tasks",
            status=403,
            mend="Name your tasks, or ask an admin.",
        )
    rate, expires_at = _limited(body, caller, access.rate)
    try:
        key, shown = api_keys.make(
            body.name,
            body.role,
            tasks=body.tasks,
            rate=rate,
            expires_at=expires_at,
            created_by=api_keys.made_by(caller.name, caller.key_id),
        )
        await asyncio.to_thread(access.ledger.add_key, key)
    except SpecError as error:
        raise RequestError("invalid_request", error.what, status=422, mend=error.mend) from None
    except SQLAlchemyError as error:
        raise _unavailable() from error
    return NewKey(key=shown, info=KeyInfo.of(key))


async def revoke_key(name: str, request: Request) -> KeyInfo:
    """Revoke a key and those made with it: within a second or two they open nothing any more, nor do their tokens."""
    permit(request, role="owner", any_task=True)
    caller: Caller = request.state.caller
    ledger = _access(request).ledger
    keys = await asyncio.to_thread(_stored, ledger)
    named = [one for one in keys if one.name == name and one.revoked_at is None]  # all but the newest have expired
    if not named or not all(_may_keep(caller, one.role, one.tasks) for one in named):
        raise RequestError("invalid_request", "there is no such key of yours", status=404, mend="See GET /auth/keys.")
    try:
        await asyncio.to_thread(ledger.revoke_key, name, caller.name)
    except SpecError as error:  # revoked meanwhile
        raise RequestError("invalid_request", error.what, status=404, mend=error.mend) from None
    except SQLAlchemyError as error:
        raise _unavailable() from error
    return KeyInfo.of(named[-1]).model_copy(update={"revoked_at": datetime.now(UTC)})


def _may_keep(caller: Caller, role: Role, tasks: frozenset[str] | None) -> bool:
    """Whether `caller` may see, make and revoke such a key."""
    if caller.role == "admin":
        return True
    return role == "reader" and (caller.tasks is None or (tasks is not None and tasks <= caller.tasks))


def _limited(body: KeyRequest, caller: Caller, default: float | None) -> tuple[float | None, datetime | None]:
    """Rate and end of the key that `caller` makes: what it asks for, at most its own, which it gets by default.

    Args:
        default: Rate of a caller whose key names none.

    Raises:
        RequestError: `forbidden`.
    """
    own = caller.rate if caller.rate is not None or caller.role == "admin" else default
    if own is not None and body.rate is not None and body.rate > own:
        raise RequestError(
            "forbidden",
            f"field 'rate': your own key has {own:g} requests per minute",
            status=403,
            mend="Ask for no more than that, or ask an admin.",
            field="rate",
        )
    if caller.expires_at is not None and body.expires_at is not None and body.expires_at > caller.expires_at:
        raise RequestError(
            "forbidden",
            f"field 'expires_at': your own key ends at {caller.expires_at.isoformat()}",
            status=403,
            mend="Ask for an end before that, or ask an admin.",
            field="expires_at",
        )
    return body.rate or caller.rate, body.expires_at or caller.expires_at


def _stored(ledger: "Ledger") -> list[ApiKey]:
    try:
        return ledger.api_keys()
    except SQLAlchemyError as error:
        raise _unavailable() from error


def _access(request: Request) -> Access:
    access = request.app.state.access
    if not isinstance(access, Access):
        raise RequestError("not_ready", "the service is starting", status=503, mend="Try again in a few seconds.")
    return access


def _unavailable() -> RequestError:
    return RequestError("log_unavailable", "the ledger cannot be reached", status=503, mend="Try again later.")
