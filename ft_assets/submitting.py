"""Runs that go on in a process of their own: `FT_HOME/submitted/RUN/` holds what was asked for and what it printed.

The run's id is known before its process has created the Dagster run, so that it can be asked after at once.
"""

import json
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock

from ft_resources import processes
from ft_resources.environments import CREDENTIALS, REPOSITORY, Environment
from ft_resources.errors import FtError
from ft_resources.files import write_json

if TYPE_CHECKING:
    import dagster as dg

REQUEST = "request.json"
CANCELLATION = "cancellation.json"
LOG = "log.txt"
RUN_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class CannotCancel(FtError):
    """The run is over, or its process is not this machine's to end."""

    code = "cannot_cancel"


@dataclass(frozen=True)
class Submission:
    """A run that was asked for."""

    run_id: str
    task: str
    because: str
    submitted: str
    """ISO 8601, UTC."""
    host: str
    pid: int
    process_started: float
    """Seconds since the epoch: by it a process is told from a later one of the same number."""
    log: Path

    @property
    def canceled_by(self) -> str:
        """Who asked for its end; empty when nobody did."""
        file = self.log.parent / CANCELLATION
        return str(json.loads(file.read_text(encoding="utf-8"))["actor"]) if file.exists() else ""

    @property
    def is_here(self) -> bool:
        """Whether its process is, or was, one of this machine."""
        return self.host == platform.node()

    @property
    def alive(self) -> bool:
        """Whether its process works on it; of another machine's nobody can tell, so it may."""
        return not self.is_here or self._process() is not None

    def _process(self) -> psutil.Process | None:
        """Its process on this machine; None when it has ended."""
        return processes.find(self.pid, self.process_started)

    def process_here(self) -> psutil.Process:
        """The process to end.

        Raises:
            CannotCancel: It has ended, or is another machine's.
        """
        process = self._process() if self.is_here else None
        if process is None:
            raise CannotCancel(
                f"run {self.run_id} is over" if self.is_here else f"run {self.run_id} is a process of {self.host}",
                where=f"task {self.task}",
                mend="There is nothing to cancel." if self.is_here else "Cancel it there.",
            )
        return process

    def cancel(self, actor: str) -> None:
        """Ask its process to end, which takes seconds, and keep who asked.

        Raises:
            CannotCancel: It has ended, or is another machine's.
        """
        process = self.process_here()
        write_json(self.log.parent / CANCELLATION, {"actor": actor, "at": datetime.now(UTC).isoformat()})
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            process.terminate()

    def last_words(self) -> str:
        """The last line that its process printed, without a full stop."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing, as if killed")
        return last.removesuffix(".")


class Submissions:
    """The submitted runs of one platform home."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._folder = environment.home / "submitted"
        self._children: list[subprocess.Popen[bytes]] = []

    def turn(self) -> FileLock:
        """Held from looking whether a task is busy to `start`, so that two who ask at once do not both find it idle."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self._folder / "turn.lock")

    def start(self, task: str, only: Sequence[str], because: str, actor: str) -> Submission:
        """Start `ft run` for `task` in a process that outlives this one.

        Args:
            actor: Who asked for it.
        """
        self._children = [child for child in self._children if child.poll() is None]  # an ended one is let go of
        run_id = str(uuid.uuid4())
        folder = self._folder / run_id
        folder.mkdir(parents=True)
        words = ["run", task, *(f"--only={asset}" for asset in only), f"--because={because}", f"--run-id={run_id}"]
        inherited = {name: value for name, value in os.environ.items() if name not in CREDENTIALS}
        with (folder / LOG).open("wb") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "ft_assets.cli", *words, "--home", str(self._environment.home)],
                cwd=REPOSITORY,
                env={**inherited, **self._environment.variables(), "FT_ACTOR": actor},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self._children.append(child)
        submission = Submission(
            run_id,
            task,
            because,
            datetime.now(UTC).isoformat(),
            platform.node(),
            child.pid,
            psutil.Process(child.pid).create_time(),
            folder / LOG,
        )
        write_json(folder / REQUEST, {**asdict(submission), "log": LOG})
        return submission

    def find(self, start: str) -> Submission | None:
        """The one run whose id starts so; None when there is none, or more."""
        if RUN_ID.fullmatch(start):
            file = self._folder / start / REQUEST
            return _read(file) if file.exists() else None
        found = [one for one in self.all() if one.run_id.startswith(start)] if start else []
        return found[0] if len(found) == 1 else None

    def end(self, instance: "dg.DagsterInstance", run: "dg.DagsterRun", actor: str) -> None:
        """Ask a run that was submitted, or that Dagster's queue starts, to end, which takes seconds.

        Raises:
            CannotCancel: As of `Submission.cancel`; the run stays as it is.
        """
        submission = self.find(run.run_id)
        if submission is not None:
            submission.process_here()  # looked at first: a run is not called canceling that nobody ends
            instance.report_run_canceling(run, f"Canceled by {actor}.")
            submission.cancel(actor)
        elif run.status.value == "QUEUED":
            instance.report_run_canceled(run, f"Canceled by {actor}.")
        else:
            instance.run_launcher.terminate(run.run_id)

    def all(self) -> Iterator[Submission]:
        """Every submission, newest first."""
        files = sorted(self._folder.glob(f"*/{REQUEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        yield from map(_read, files)


def _read(file: Path) -> Submission:
    told = json.loads(file.read_text(encoding="utf-8"))
    return Submission(**{**told, "log": file.parent / told["log"]})
