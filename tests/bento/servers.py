"""Real `bentoml serve` processes for tests, and clients that ask without a pause."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90


@dataclass
class Server:
    """A running service; its own process group, port, home and BentoML home."""

    home: Path
    process: "subprocess.Popen[bytes]"
    client: httpx.Client

    def ask(self, path: str = "/predict", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError((self.home / "serve.log").read_text(errors="replace")[-4000:])

    def signal(self, number: int) -> None:
        """To the server and to its worker, which is a session of its own that no process group reaches."""
        family = psutil.Process(self.process.pid).children(recursive=True) if number == signal.SIGKILL else []
        os.killpg(self.process.pid, number)
        for process in family:
            process.kill()


def start(home: Path, **settings: str) -> Server:
    """A service over the lake and ledger of `home`, ready; `settings` are environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FT_")}
    variables |= {
        "FT_HOME": str(home),
        "FT_API_KEYS": "key-of-the-test",
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FT_DRAIN_SECONDS": "0.2",
        **settings,
    }
    with (home / "serve.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("bentoml")), "serve", "bento.service:AdapterService"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=ROOT,
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(home, process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30))
    server.wait_ready()
    return server


def end(server: Server) -> None:
    server.client.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            server.signal(number)
            server.process.wait(timeout=20)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        except subprocess.TimeoutExpired:
            continue


@dataclass
class Load:
    """Threads that ask without a pause until stopped."""

    server: Server
    answers: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[Any] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self._work, args=(number,)) for number in range(3)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def _work(self, number: int) -> None:
        with httpx.Client(base_url=self.server.client.base_url, timeout=30) as client:
            while not self.stopping.is_set():
                body = {"task": "t1", "inputs": [f"text {number} {len(self.answers)}"], "user": f"user {number}"}
                try:
                    response = client.post("/predict", json=body)
                except httpx.TransportError as error:
                    self.refusals.append(error)
                    return
                if response.status_code == 200:
                    self.answers.append(response.json())
                else:
                    self.refusals.append(response.text)

    def until(self, condition: Callable[[], bool], seconds: float) -> float:
        """Seconds until the condition held."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"not within {seconds} s"
            time.sleep(0.005)
        return time.monotonic() - began
