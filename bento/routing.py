"""Which adapter answers which request: an immutable table, published as one reference."""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

from ft_resources.base_models import BaseModel, resolve
from ft_resources.errors import RequestError, ServiceError

CHAMPION = "champion"
MIN_DIGEST = 8
Precision = Literal["auto", "int8", "bf16", "fp32"]


class RouteEntry(pydantic.BaseModel):
    """One adapter of a task and the share of traffic it answers."""

    model_config = pydantic.ConfigDict(frozen=True)

    adapter: str = pydantic.Field(min_length=1)
    model_version: str = pydantic.Field(min_length=1)
    release_id: str = pydantic.Field(min_length=1)
    share: float = pydantic.Field(ge=0, allow_inf_nan=False)
    precision: Precision = "auto"
    """What it was evaluated in; `auto`: bf16 where the machine has it, else fp32."""


class RoutePlan(pydantic.BaseModel):
    """The `plan` column of a route: the live shares, champion first."""

    shares: tuple[RouteEntry, ...] = pydantic.Field(min_length=1)
    review_below: float = pydantic.Field(0.0, ge=0, le=1)
    """Labels less confident than this are for a person to review."""

    @pydantic.field_validator("shares")
    @classmethod
    def _some_traffic(cls, value: tuple[RouteEntry, ...]) -> tuple[RouteEntry, ...]:
        if not sum(entry.share for entry in value) > 0:
            raise ValueError("at least one share must be above 0")
        return value


@dataclass(frozen=True)
class Route:
    """What is live for one task.

    `released` holds every adapter that was ever released for it, oldest first, whatever its share is now.
    """

    task: str
    revision: int
    entries: tuple[RouteEntry, ...]
    released: tuple[RouteEntry, ...] = ()
    review_below: float = 0.0
    since: float = 0.0
    """When it was put in force, in seconds since 1970; 0 where that is not known."""

    def live(self, key: str) -> RouteEntry:
        """The entry whose part of [0, total of shares) the hash of `key` falls into: equal keys, equal entry.

        Entries keep their order from plan to plan, so a growing last share only takes over callers, and gives none
        back.
        """
        digest = hashlib.sha256(f"{self.task}\0{key}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64 * sum(entry.share for entry in self.entries)
        for entry in self.entries:
            if point < entry.share:
                return entry
            point -= entry.share
        return next(entry for entry in reversed(self.entries) if entry.share > 0)

    def version(self, wanted: str) -> RouteEntry:
        """The released adapter of this model version, or of this prefix of a digest.

        Raises:
            RequestError: `unknown_version`.
        """
        known = (*self.released, *self.entries)
        for entry in reversed(known):
            if entry.model_version == wanted:
                return entry
        if len(wanted) >= MIN_DIGEST:
            found = {entry.adapter: entry for entry in known if entry.adapter.startswith(wanted.lower())}
            if len(found) == 1:
                return next(iter(found.values()))
        names = ", ".join(dict.fromkeys(entry.model_version for entry in known))
        raise RequestError(
            "unknown_version",
            f"task '{self.task}' has no released model version '{wanted[:64]}'",
            status=404,
            mend=f"Versions: {names}. Leave model_version out to follow the route.",
        )


@dataclass(frozen=True)
class RouteTable:
    """The routes of all tasks at one moment.

    `waiting` names the tasks that have a route of which no adapter could be loaded yet, each with the reason.
    """

    routes: Mapping[str, Route] = field(default_factory=dict)
    waiting: Mapping[str, str] = field(default_factory=dict)

    def route(self, task: str, told: Collection[str] | None = None) -> Route:
        """The route of a task.

        Args:
            told: The tasks that a refusal may name; None: all.

        Raises:
            RequestError: `unknown_task`, naming the nearest one; `not_ready` while its adapter cannot be loaded.
        """
        route = self.routes.get(task)
        if route is not None:
            return route
        if task in self.waiting:
            raise RequestError(
                "not_ready",
                f"task '{task}' is not loaded yet",
                status=503,
                mend="Try again; /readyz says what is amiss.",
            )
        tasks = sorted(one for one in self.routes if told is None or one in told)
        near = difflib.get_close_matches(task, tasks, n=1, cutoff=0.5)
        known = ", ".join(tasks[:20]) + (", ..." if len(tasks) > 20 else "") or "none"
        raise RequestError(
            "unknown_task",
            f"there is no released task '{task[:128]}'",
            status=404,
            mend=(f"Did you mean '{near[0]}'? " if near else "") + f"Released tasks: {known}.",
        )

    def choose(self, task: str, user: str | None, prediction_id: str, model_version: str | None = None) -> RouteEntry:
        """The adapter that answers: the version asked for, else by the live shares, sticky for a user.

        Raises:
            RequestError: `unknown_task`, `unknown_version`, `not_ready`.
        """
        route = self.route(task)
        if model_version is None or model_version == CHAMPION:
            return route.live(user or prediction_id)
        return route.version(model_version)


@dataclass(frozen=True)
class BakedRelease:
    """A release that lies beside the service, so that a Bento answers alone."""

    route: Route
    base: BaseModel
    folder: Path
    files: Mapping[str, str]
    """SHA-256 of each file in `folder`."""

    @property
    def adapter(self) -> str:
        return self.route.entries[0].adapter


class _ReleaseFile(pydantic.BaseModel):
    task: str
    release_id: str
    model_version: str
    adapter: str
    files: dict[str, str] = pydantic.Field(min_length=1)
    review_below: float = pydantic.Field(0.0, ge=0, le=1)
    precision: Precision = "auto"


def read_baked(root: Path) -> BakedRelease | None:
    """The release that `root/release.json` describes, with `models/adapter` and `models/base`; None without one.

    Raises:
        ServiceError: The file is not what it must be.
        SpecError: The base model's folder is not whole.
    """
    path = root / "release.json"
    if not path.is_file():
        return None
    try:
        release = _ReleaseFile.model_validate(json.loads(path.read_bytes()))
    except (ValueError, pydantic.ValidationError) as error:
        raise ServiceError(
            f"release.json is not a release: {error}", where=str(path), mend="Build the Bento again."
        ) from None
    entry = RouteEntry(
        adapter=release.adapter,
        model_version=release.model_version,
        release_id=release.release_id,
        share=1.0,
        precision=release.precision,
    )
    return BakedRelease(
        Route(release.task, 0, (entry,), (entry,), release.review_below),
        resolve(str(root / "models" / "base")),
        root / "models" / "adapter",
        release.files,
    )


def read_plan(task: str, plan: Mapping[str, Any]) -> RoutePlan:
    """A stored plan.

    Raises:
        ServiceError: The plan cannot be followed.
    """
    try:
        return RoutePlan.model_validate(plan)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field_ = ".".join(str(part) for part in first["loc"])
        raise ServiceError(
            f"the route of task '{task}' cannot be followed: {field_}: {first['msg']}", mend="Release it again."
        ) from None


def released_entries(releases: Sequence[Mapping[str, Any]]) -> tuple[RouteEntry, ...]:
    """Every release of a task as an entry without traffic, oldest first."""
    return tuple(
        RouteEntry(
            adapter=row["adapter"],
            model_version=row["model_version"],
            release_id=row["id"],
            share=0.0,
            precision=row.get("decision", {}).get("precision", "auto"),
        )
        for row in releases
    )
