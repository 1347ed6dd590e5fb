"""Building Bentos and running them as real processes: `bentoml build`, `bentoml serve`, probes over HTTP."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ft_resources import images
from ft_resources.base_models import BaseModel
from ft_resources.environments import REPOSITORY, Environment
from ft_resources.errors import ServiceError
from ft_resources.files import file_hashes
from ft_resources.lake import digest_of

SERVICE = "bento.service:AdapterService"
CODE = ("bento", "ft_resources")
REQUIREMENTS = REPOSITORY / "bento" / "requirements.txt"
START_SECONDS = 120


@dataclass(frozen=True)
class ServerProcess:
    """A `bentoml serve` process that answers."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def ask(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60) -> Any:
        """GET, or POST of a JSON body; the JSON answer.

        Raises:
            ServiceError: No answer, or an error status; the message carries what the service said.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:500]
            raise ServiceError(
                f"the service answered {error.code}: {said}", where=self.url + path, mend=f"See {self.log}."
            ) from error
        except (OSError, ValueError) as error:
            raise ServiceError(
                f"the service did not answer: {error}", where=self.url + path, mend=f"See {self.log}."
            ) from error

    def stop(self) -> None:
        """SIGTERM, so that what is in flight is answered; whatever still runs after 20 seconds is killed."""
        family = _family(self.process.pid)  # BentoML's worker is a session of its own: no process group reaches it
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class BentoStore:
    """The Bentos of one platform home."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.home = environment.home / "bentoml"

    def code_digest(self) -> str:
        """Digest of the service's source, so that other code makes another Bento."""
        files = sorted(path for name in CODE for path in (REPOSITORY / name).rglob("*") if path.is_file())
        source = [path for path in files if "__pycache__" not in path.parts]
        return digest_of({str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8") for path in source})

    def packages_digest(self) -> str:
        """Digest of the packages that the image installs, so that other versions make another Bento."""
        return digest_of(images.pinned(images.packages(REQUIREMENTS)))

    def has(self, tag: str) -> bool:
        return (self.folder(tag) / "bento.yaml").is_file()

    def folder(self, tag: str) -> Path:
        """Where a built Bento lies: the build context of its image, Dockerfile in `env/docker`."""
        return self.home / "bentos" / tag.replace(":", "/")

    def image_bytes(self, tag: str) -> dict[str, int]:
        """What the image of a Bento holds beside its base image: `bento` (code and models) and `packages`, in bytes."""
        found = images.packages(REQUIREMENTS)
        return {"bento": images.folder_bytes(self.folder(tag)), "packages": images.installed_bytes(found)}

    def build(self, task: str, adapter: Path, base: BaseModel, release: Mapping[str, Any]) -> str:
        """Build the Bento that serves one adapter offline.

        Args:
            release: What is baked in as `release.json`: task, model_version, adapter digest, base reference; the
                hashes of the adapter's files are added.

        Returns:
            The Bento's tag, NAME:VERSION.

        Raises:
            ServiceError: `bentoml build` failed; the message carries its last lines.
        """
        bento = "ft-" + task.replace(".", "-")
        with tempfile.TemporaryDirectory(prefix="ft-bento-") as scratch:
            folder = Path(scratch)
            for package in CODE:
                shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(adapter, folder / "models" / "adapter")
            shutil.copytree(base.path, folder / "models" / "base", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
            baked = {**release, "files": file_hashes(folder / "models" / "adapter")}
            (folder / "release.json").write_text(json.dumps(baked, indent=1, sort_keys=True))
            (folder / "requirements.txt").write_text(images.pinned(images.packages(REQUIREMENTS)))
            (folder / "bentofile.yaml").write_text(
                json.dumps(
                    {
                        "service": SERVICE,
                        "name": bento,
                        "labels": {"task": task, "adapter": str(release["adapter"])[:12]},
                        "include": ["bento/**", "ft_resources/**", "models/**", "release.json"],
                        "python": {"requirements_txt": "requirements.txt", "lock_packages": False},
                        "envs": [{"name": name, "value": value} for name, value in images.VARIABLES.items()],
                    }
                )
            )
            built = subprocess.run(
                [_bentoml(), "build", "--output", "tag", str(folder)],
                cwd=folder,
                env=self._variables(self.home),
                capture_output=True,
                text=True,
                check=False,
            )
        tags = [
            line.removeprefix("__tag__:").strip() for line in built.stdout.splitlines() if line.startswith("__tag__:")
        ]
        if built.returncode or not tags:
            tail = "\n".join((built.stderr + built.stdout).splitlines()[-12:])
            raise ServiceError(
                f"bentoml build failed:\n{tail}",
                where=f"task {task}",
                mend="Often the disk is full.",
            )
        return tags[0]

    @contextmanager
    def serving(self, target: str, *, home: Path, port: int | None = None) -> Iterator[ServerProcess]:
        """A `bentoml serve TARGET` process that is ready, stopped on leaving.

        Args:
            target: A Bento's tag, or an import path such as `bento.service:AdapterService`.
            home: `FT_HOME` of the process: the platform's own, or an empty folder for a Bento on its own.

        Raises:
            ServiceError: It ended, or was not ready within two minutes; the message carries its last lines.
        """
        server = self.start(target, home=home, port=port)
        try:
            yield server
        finally:
            server.stop()

    def start(self, target: str, *, home: Path, port: int | None = None) -> ServerProcess:
        """Like `serving`, but the caller stops the process."""
        server = self.launch(target, home=home, port=port or free_port())
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if server.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(server.url + "/readyz", timeout=5):
                    return server
            except OSError:
                time.sleep(0.2)
        tail = last_lines(server.log)
        server.stop()
        raise ServiceError(
            f"'bentoml serve {target}' did not become ready:\n{tail}",
            where=str(server.log),
            mend="Often the port is taken or FT_LEDGER cannot be reached.",
        )

    def launch(self, target: str, *, home: Path, port: int) -> ServerProcess:
        """Like `start`, without waiting until it is ready."""
        home.mkdir(parents=True, exist_ok=True)
        log = home / f"serve-{port}.log"
        # BentoML keeps Prometheus files per BENTOML_HOME and two servers wipe each other's: give each its own,
        # with the built Bentos linked in
        private = home / f"bentoml-{port}"
        private.mkdir(exist_ok=True)
        if not (private / "bentos").exists() and (self.home / "bentos").exists():
            (private / "bentos").symlink_to(self.home / "bentos")
        variables = self._variables(private)
        if home != self.environment.home:
            variables |= Environment.read({}, home=home).variables() | {"BENTOML_HOME": str(private)}
        variables.setdefault("FT_DRAIN_SECONDS", "0.1")  # no load balancer looks at a server of the platform itself
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [_bentoml(), "serve", target, "--host", "127.0.0.1", "--port", str(port)],
                cwd=REPOSITORY if ":" in target and "." in target.split(":", maxsplit=1)[0] else home,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ServerProcess(f"http://127.0.0.1:{port}", process, log)

    def _variables(self, home: Path) -> dict[str, str]:
        home.mkdir(parents=True, exist_ok=True)
        return {**os.environ, **self.environment.variables(), "BENTOML_HOME": str(home)}


def last_lines(log: str | Path, most: int = 15) -> str:
    """The end of a log."""
    return "\n".join(Path(log).read_text(errors="replace").splitlines()[-most:])


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Refuse a port that something listens on already.

    Raises:
        ServiceError: It is taken, or may not be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} cannot be used: {error.strerror}", where=host, mend="Choose another one with --port."
            ) from None


def _bentoml() -> str:
    """The `bentoml` program of this Python environment."""
    return str(Path(sys.executable).with_name("bentoml"))
