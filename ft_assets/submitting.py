"""Runs that go on in a process of their own: `FT_HOME/submitted/RUN/` holds what was asked for and what it printed.

The run's id is known before its process has created the Dagster run, so that it can be asked after at once.
"""

import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from ft_resources.environments import REPOSITORY, Environment

REQUEST = "request.json"
LOG = "log.txt"
CLOCK_ERROR = 2.0
"""Seconds by which the start of a process may seem to move when the clock is set."""


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
    def is_here(self) -> bool:
        """Whether its process is, or was, one of this machine."""
        return self.host == platform.node()

    @property
    def alive(self) -> bool:
        """Whether its process works on it; of another machine's nobody can tell, so it may."""
        if not self.is_here:
            return True
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started) < CLOCK_ERROR
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

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

    def start(self, task: str, only: Sequence[str], because: str) -> Submission:
        """Start `ft run` for `task` in a process that outlives this one."""
        run_id = str(uuid.uuid4())
        folder = self._folder / run_id
        folder.mkdir(parents=True)
        words = ["run", task, *(f"--only={asset}" for asset in only), "--because", because, "--run-id", run_id]
        with (folder / LOG).open("wb") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "ft_assets.cli", *words, "--home", str(self._environment.home)],
                cwd=REPOSITORY,
                env={**os.environ, **self._environment.variables()},
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
        aside = folder / f".{REQUEST}"
        aside.write_text(json.dumps({**asdict(submission), "log": LOG}), encoding="utf-8")
        aside.rename(folder / REQUEST)
        return submission

    def find(self, start: str) -> Submission | None:
        """The one run whose id starts so; None when there is none, or more."""
        found = [one for one in self.all() if one.run_id.startswith(start)] if start else []
        return found[0] if len(found) == 1 else None

    def all(self) -> Iterator[Submission]:
        """Every submission, newest first."""
        files = sorted(self._folder.glob(f"*/{REQUEST}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files:
            told = json.loads(file.read_text(encoding="utf-8"))
            yield Submission(**{**told, "log": file.parent / told["log"]})
