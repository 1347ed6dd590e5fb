"""The process that ticks sensors and starts queued runs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft_resources.environments import REPOSITORY, Environment


@contextmanager
def daemon(environment: Environment) -> Iterator[Path]:
    """See `Platform.daemon`."""
    log = environment.home / "daemon.log"
    program = str(Path(sys.executable).with_name("dagster-daemon"))
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [program, "run", "-w", str(REPOSITORY / "workspace.yaml")],
            cwd=REPOSITORY,
            env={**os.environ, **environment.variables()},
            stdout=sink,
            stderr=sink,
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(timeout=60)
