"""Following the ledger's routes: new adapters are loaded first, then the table is swapped.

A route that cannot be served leaves the old one in force, is reported, and is tried again with growing pauses.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from bento.adapters import AdapterStore
from bento.repeating import Repeating
from bento.routing import Route, RouteEntry, RouteTable, read_plan, released_entries
from ft_resources.errors import FtError, ServiceError
from ft_resources.ledger import Ledger

logger = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0


@dataclass(frozen=True)
class Failure:
    """A route that could not be put in force."""

    revision: int
    message: str
    tries: int
    again_at: float
    """Monotonic seconds before which it is not tried again."""


class Routes:
    """The table in force, and bringing it up to date with the ledger.

    Args:
        ledger: Holds the routes.
        store: Loads the adapters a route needs.
        baked: Route to follow for a task that the ledger has none for.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        store: AdapterStore,
        baked: Route | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger, self._store, self._clock = ledger, store, clock
        self._baked = {} if baked is None else {baked.task: baked}
        self._table = RouteTable()
        self._seen: int | None = None
        self._failures: dict[str, Failure] = {}
        self._ledger_error = ""
        self._turn = threading.Lock()

    @property
    def table(self) -> RouteTable:
        """The newest snapshot: take it once per request."""
        return self._table

    @property
    def ready(self) -> bool:
        """The ledger was read, and at least one task answers unless there is none to answer."""
        return self._seen is not None and (bool(self._table.routes) or not self._table.waiting)

    @property
    def errors(self) -> dict[str, str]:
        """What stands in the way, by task; `ledger` when routes cannot be read."""
        errors = {task: failure.message for task, failure in self._failures.items()}
        return {**errors, "ledger": self._ledger_error} if self._ledger_error else errors

    def refresh(self) -> bool:
        """Look for changed routes and apply them; True when the table changed."""
        with self._turn:
            try:
                revision = self._ledger.route_revision()
                due = any(failure.again_at <= self._clock() for failure in self._failures.values())
                if revision == self._seen and not due:
                    self._ledger_error = ""
                    return False
                rows = self._ledger.routes()
                fresh = {task: row for task, row in rows.items() if self._wanted(task, int(row["revision"]))}
                released = {task: released_entries(self._ledger.releases(task)) for task in fresh}
            except SQLAlchemyError as error:
                if not self._ledger_error:
                    logger.warning("routes cannot be read, the old ones stay in force: %s", error)
                self._ledger_error = f"{type(error).__name__}: routes cannot be read"
                return False
            self._ledger_error = ""
            changed = self._apply(fresh, released, rows)
            self._seen = revision
            return changed

    def _wanted(self, task: str, revision: int) -> bool:
        failure = self._failures.get(task)
        if failure is not None and failure.revision == revision:
            return failure.again_at <= self._clock()
        route = self._table.routes.get(task)
        return route is None or route.revision != revision or failure is not None

    def _apply(
        self,
        fresh: Mapping[str, Mapping[str, Any]],
        released: Mapping[str, tuple[RouteEntry, ...]],
        rows: Mapping[str, Mapping[str, Any]],
    ) -> bool:
        routes = dict(self._table.routes)
        for task, route in self._baked.items():
            if task not in rows and task not in routes:
                self._adopt(routes, route)
        for task, row in fresh.items():
            try:
                plan = read_plan(task, row["plan"])
            except ServiceError as error:
                self._fail(task, int(row["revision"]), str(error))
            else:
                route = Route(
                    task,
                    int(row["revision"]),
                    plan.shares,
                    released[task],
                    plan.review_below,
                    row["created_at"].timestamp(),
                )
                self._adopt(routes, route)
        waiting = {task: failure.message for task, failure in self._failures.items() if task not in routes}
        table = RouteTable(routes, waiting)
        changed = table != self._table
        self._table = table
        return changed

    def _adopt(self, routes: dict[str, Route], route: Route) -> None:
        """Load what `route` needs, then let it replace the old one in `routes`."""
        try:
            for entry in route.entries:
                if entry.share > 0:
                    self._store.get(entry.adapter, entry.precision)
        except (FtError, OSError, RuntimeError) as error:  # RuntimeError: out of memory on the device
            self._fail(route.task, route.revision, str(error))
        else:
            routes[route.task] = route
            self._failures.pop(route.task, None)
            logger.info("task %s follows route %s", route.task, route.revision)

    def _fail(self, task: str, revision: int, message: str) -> None:
        before = self._failures.get(task)
        tries = before.tries + 1 if before is not None and before.revision == revision else 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1))
        self._failures[task] = Failure(revision, message, tries, self._clock() + pause)
        if tries == 1:
            logger.error("route %s of task %s cannot be followed, the old one stays: %s", revision, task, message)


class RouteWatcher(Repeating):
    """Refreshes the routes in a thread of its own.

    Args:
        routes: What to keep up to date.
        every: Seconds between two looks at the ledger.
        after: Called after each look.
    """

    def __init__(self, routes: Routes, *, every: float = 0.15, after: Callable[[], None] = lambda: None) -> None:
        self._routes, self._after = routes, after
        super().__init__("route-watcher", self._look, every)

    def _look(self) -> None:
        self._routes.refresh()
        self._after()
