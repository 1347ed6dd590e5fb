"""One call to an address that answers: the service FT_SERVICE_URL names, else one of this home on this machine.

`FT_HOME/deployment.json` says which process that is: whoever asks next finds it, also after this process has ended.
"""

import json
import os
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
from filelock import FileLock

from ft_resources import processes
from ft_resources.environments import Environment
from ft_resources.errors import FtError, ServiceError
from ft_resources.files import write_json
from ft_resources.ledger import Ledger
from ft_resources.serving import SERVICE, START_SECONDS, BentoStore, ServerProcess, free_port, last_lines, require_free

STATE = "deployment.json"
LOCK = "deployment.lock"
HERE = "127.0.0.1"
LOOK = 0.1


class NothingLive(FtError):
    """No release of the task is in force."""

    code = "nothing_live"


class CannotStop(FtError):
    """The service is not the platform's to end."""

    code = "cannot_stop"


@dataclass(frozen=True)
class Deployment:
    """Where a task is answered."""

    url: str
    """POST `url`/predict."""
    page: str
    """Where a person tries it."""
    task: str
    model_version: str
    release: str
    ready: bool
    """Whether it answers with this release; only a service of FT_SERVICE_URL may not yet."""


@dataclass(frozen=True)
class LocalService:
    """A service of this home on this machine, as whoever started it wrote it down."""

    url: str
    pid: int
    started: float
    """Seconds since the epoch."""
    log: str
    """File of what it prints; empty when it was started with `ft serve`, which prints where it was started."""

    def process(self) -> psutil.Process | None:
        return processes.find(self.pid, self.started)


class Deployments:
    """What answers for the tasks of one platform home."""

    def __init__(self, environment: Environment, bentos: BentoStore) -> None:
        self._environment, self._bentos = environment, bentos
        self._child: ServerProcess | None = None  # held on to, so that a service that ended is let go of

    def deploy(self, ledger: Ledger, task: str) -> Deployment:
        """A service that answers for the live release of `task`; it is started when there is none.

        Raises:
            NothingLive: No release of it is in force.
            ServiceError: The service did not come up, or cannot load the adapter.
        """
        route, live = ledger.route(task), ledger.live_release(task)
        if route is None or live is None:
            raise NothingLive(
                f"task '{task}' has no live release",
                where="task",
                mend=f"Train and release it with 'ft run {task}' or POST /train; "
                f"what the gates refused, a person releases with 'ft release approve {task}'.",
            )
        url, ready = self._environment.service_url, True
        if url:
            ready = _in_force(_told(url), task, route["revision"])
        else:
            service = self._started()
            url = service.url
            _wait(service, task, route["revision"])
        return Deployment(url, page_of(url, task), task, live["model_version"], live["id"], ready)

    def stop(self) -> bool:
        """End the service that `deploy` started, for all tasks, once what it is answering is answered (20 s at most).

        Returns:
            Whether there was one.

        Raises:
            CannotStop: Somebody else started it.
        """
        if self._environment.service_url:
            raise CannotStop(
                "the service of FT_SERVICE_URL was not started here",
                where=self._environment.service_url,
                mend="End it where it runs.",
            )
        with self._turn():
            service = self._running()
            process = service and service.process()
            if service is None or process is None:
                return False
            if not service.log:
                raise CannotStop(
                    f"process {service.pid} was started with 'ft serve'",
                    where=service.url,
                    mend="End it where it was started.",
                )
            processes.end(process)
            return True

    def note(self, host: str, port: int) -> None:
        """Write down that this process becomes a service, unless there is one already."""
        with self._turn():
            if self._running() is None:
                self._write(LocalService(address(host, port), os.getpid(), psutil.Process().create_time(), log=""))

    def _started(self) -> LocalService:
        """The service of this home; started, and perhaps not ready yet, when there is none."""
        with self._turn():
            running = self._running()
            if running is not None:
                return running
            port = self._port()
            child = self._child = self._bentos.launch(SERVICE, home=self._environment.home, port=port)
            started = psutil.Process(child.process.pid).create_time()
            service = LocalService(child.url, child.process.pid, started, str(child.log))
            self._write(service)
            return service

    def _port(self) -> int:
        """The port of the service before, so that its address stays; another one when that is taken."""
        before = self._noted()
        port = urlsplit(before.url).port if before is not None and before.log else None
        if port is not None:
            with suppress(ServiceError):
                require_free(HERE, port)
                return port
        return free_port()

    def _turn(self) -> FileLock:
        """Held from looking for a service to writing one down, so that two who ask at once start one."""
        self._environment.home.mkdir(parents=True, exist_ok=True)
        return FileLock(self._environment.home / LOCK)

    def _noted(self) -> LocalService | None:
        file = self._environment.home / STATE
        return LocalService(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def _running(self) -> LocalService | None:
        noted = self._noted()
        return noted if noted is not None and noted.process() is not None else None

    def _write(self, service: LocalService) -> None:
        write_json(self._environment.home / STATE, asdict(service))


def address(host: str, port: int) -> str:
    """Where a service that listens on `host` is reached from this machine."""
    host = {"0.0.0.0": HERE, "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page_of(url: str, task: str) -> str:
    """The page where a person tries a task."""
    return f"{url}/?task={quote(task, safe='')}"


def _wait(service: LocalService, task: str, revision: int) -> None:
    """Return when `service` follows the route of `task` with this revision or a later one.

    Raises:
        ServiceError: It ended, cannot load the adapter, or was not that far within two minutes; it is ended then,
            unless it answers for other tasks.
    """
    told: dict[str, Any] = {}
    deadline = time.monotonic() + START_SECONDS
    while service.process() is not None and time.monotonic() < deadline:
        told = _told(service.url)
        if _in_force(told, task, revision):
            return
        if told.get("ready") and task in told.get("errors", {}):
            raise ServiceError(
                f"the service cannot load the live release of task '{task}': {told['errors'][task]}",
                where=service.url,
                mend="Release it again, or roll back with 'ft release rollback'.",
            )
        time.sleep(LOOK)
    process = service.process()
    if process is not None and service.log and not told.get("ready"):
        processes.end(process)
    said = last_lines(service.log) if service.log else "what it printed stands where 'ft serve' was started"
    raise ServiceError(
        f"the service does not answer for task '{task}':\n{said}",
        where=service.log or service.url,
        mend="Often FT_LEDGER or FT_LAKE cannot be reached, or memory is short.",
    )


def _told(url: str) -> dict[str, Any]:
    """What /readyz of the service at `url` says; nothing when it does not answer."""
    try:
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
                content = json.loads(answer.read())
        except urllib.error.HTTPError as refusal:
            with refusal:
                content = json.loads(refusal.read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_force(told: dict[str, Any], task: str, revision: int) -> bool:
    """Whether a service that says `told` answers with this revision of the route.

    Routes are told to callers on this machine only, and not with FT_AUTH=always: where they are not, a ready service
    has read the ledger, and follows it within a second.
    """
    return bool(told.get("ready")) and ("routes" not in told or told["routes"].get(task, -1) >= revision)
