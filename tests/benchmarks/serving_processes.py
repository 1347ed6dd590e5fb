"""Servers as real processes on a core of their own, and what they cost."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from setting import REPOSITORY

HERE = Path(__file__).resolve().parent
START_SECONDS = 120

_USABLE = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = _USABLE[-1], _USABLE[0]
"""The same one where this process may use only one."""


@dataclass
class Server:
    """A server that answers, with every process it started."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"
    family: Sequence[psutil.Process]

    def cpu(self) -> float:
        """CPU seconds of all its processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family)

    def memory(self) -> int:
        """Resident bytes of the largest of its processes: the one with the model."""
        return max(process.memory_info().rss for process in self.family)


@contextmanager
def server(
    name: str, command: Sequence[str], *, home: Path, variables: Mapping[str, str], cwd: Path = HERE
) -> Iterator[Server]:
    """`command` with its `{port}` filled in, on the servers' core, with one thread; killed on leaving.

    Raises:
        SystemExit: It did not become ready; the message carries the end of its log.
    """
    from ft_resources.serving import free_port

    port, core = free_port(), SERVER_CORE
    home.mkdir(parents=True, exist_ok=True)
    log = home / f"{name}.log"
    environment = {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": "1",
        "BENTOML_HOME": str(home / f"bentoml-{port}"),
        "BENTOML_DO_NOT_TRACK": "true",
        "PYTHONPATH": f"{HERE}{os.pathsep}{REPOSITORY}",
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *(part.replace("{port}", str(port)) for part in command)],
            cwd=cwd,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    family = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{name} did not become ready:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        family += family[0].children(recursive=True)
        yield Server(name, port, process, family)
    finally:
        family += [child for child in _children(process.pid) if child not in family]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for one in alive:
            one.kill()
        process.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def program(name: str) -> str:
    """A console program of this Python environment."""
    return str(Path(sys.executable).with_name(name))


class Engines:
    """`serving_engines.py` in a process on the servers' core; ends with the block it is used in."""

    def __init__(self, world: Mapping[str, object], peers: str) -> None:
        self._process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), sys.executable, str(HERE / "serving_engines.py")],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{HERE}{os.pathsep}{REPOSITORY}",
                "WORLD": json.dumps(world),
                "PEERS": peers,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, way: str, texts: Sequence[str], adapters: int, seconds: float) -> float:
        """See `serving_engines.Engines.run`."""
        assert self._process.stdin is not None
        question = {"way": way, "texts": texts, "adapters": adapters, "seconds": seconds}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the process of the engines ended")
        return line
