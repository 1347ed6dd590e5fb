"""A real `ft api` process over a home with recorded trainings, keys of every role, two tasks and a run that ended."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from ft_assets.submitting import LOG, REQUEST, Submission
from ft_resources import api_keys
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.serving import free_port
from tests.resources.test_training_runs import NOON, run

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"x-forwarded-for": "10.1.2.3"}
"""Behind a proxy nobody is from this machine."""
ENDED = "4d2fe0ea-9a3c-4f0e-a3c6-000000000001"
"""Id of a run of `news` whose process was killed."""
TASK = """\
name: {name}
type: text-classification
labels: [cold, warm]
recipe: encoder-lora@1
sources:
  - {{kind: files, url: {name}.jsonl}}
cleaning: {{min_chars: 1, near_duplicates: 1.0}}
"""


@dataclass
class Api:
    """A running API; `client` is a caller on this machine."""

    home: Path
    process: "subprocess.Popen[bytes]"
    client: httpx.Client

    @property
    def log(self) -> str:
        return (self.home / "api.log").read_text(errors="replace")


def start(home: Path, **settings: str) -> Api:
    """An API over `home`, ready; `settings` are environment variables."""
    port = free_port()
    others = ("MLFLOW_TRACKING_URI", "DAGSTER_HOME")
    variables = {k: v for k, v in os.environ.items() if k not in others and not k.startswith("FT_")}
    variables |= {"FT_HOME": str(home), "FT_TASKS": str(home / "tasks"), "FT_DRAIN_SECONDS": "0.1", **settings}
    with (home / "api.log").open("ab") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ft")), "api", "--port", str(port)],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    api = Api(home, process, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if api.client.get("/readyz").status_code == 200:
                return api
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(api.log)


def end(api: Api) -> None:
    api.client.close()
    api.process.send_signal(signal.SIGTERM)
    api.process.wait(timeout=20)


def write_task(home: Path, name: str, rows: int) -> None:
    """A task with `rows` rows; 50 are the fewest it takes."""
    said = [
        {"text": f"{name} {number} is {number % 2}", "label": ("cold", "warm")[number % 2]} for number in range(rows)
    ]
    (home / "tasks").mkdir(parents=True, exist_ok=True)
    (home / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    (home / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("api")
    write_task(home, "weather", 60)
    write_task(home, "drizzle", 10)
    folder = home / "submitted" / ENDED
    folder.mkdir(parents=True)
    asked = Submission(ENDED, "news", "a test", NOON.isoformat(), platform.node(), 0, 0.0, Path("log.txt"))
    (folder / REQUEST).write_text(json.dumps(asdict(asked) | {"log": LOG}))
    (folder / LOG).write_text("")
    return home


@pytest.fixture(scope="session")
def adapter(home: Path) -> str:
    """Digest of an adapter on the lake."""
    (home / "made").mkdir()
    (home / "made" / "adapter.json").write_text("{}")
    return Lake(home / "lake").publish("adapter", home / "made", {"task": "mail"}).digest


@pytest.fixture(scope="session")
def ledger(home: Path, adapter: str) -> Iterator[Ledger]:
    """Three trainings of `mail` and one of `news`."""
    opened = Ledger(f"sqlite:///{home / 'ledger.db'}")
    opened.record_training(run("best", accuracy=0.97, adapter=adapter, loss=float("nan")))
    opened.record_training(run("poor", accuracy=0.6, wall_seconds=900.0, base="folder/other", adapter=None))
    unknown = dict.fromkeys(["rows", "wall_seconds", "accuracy", "macro_f1", "loss", "adapter"])
    early = NOON - timedelta(days=2)
    opened.record_training(run("bad", status="FAILED", error="out_of_memory", started=early, **unknown))
    opened.record_training(run("elsewhere", task="news", adapter=None, started=NOON - timedelta(days=9)))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def shown(ledger: Ledger) -> dict[str, str]:
    """What each kind of caller shows."""

    def add(name: str, role: str = "reader", tasks: list[str] | None = None, seconds: float | None = None) -> str:
        expires = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        key, secret = api_keys.make(name, role, tasks=tasks, expires_at=expires, created_by="test")
        ledger.add_key(key)
        return secret

    keys = {
        "nobody": "",
        "stranger": "ft_0123456789ab_" + "x" * 43,
        "reader of mail": add("reader-mail", tasks=["mail", "weather"]),
        "reader": add("reader"),
        "owner of mail": add("owner-mail", "owner", ["mail", "weather"]),
        "owner": add("owner", "owner"),
        "admin": add("admin", "admin"),
        "environment": "key-of-the-test",
        "revoked": add("revoked", "admin"),
        "expired": add("expired", "admin", seconds=0.01),
    }
    ledger.revoke_key("revoked", "test")
    return keys


@pytest.fixture(scope="session")
def api(home: Path, shown: dict[str, str]) -> Iterator[Api]:
    api = start(home, FT_API_KEYS="key-of-the-test", FT_ACTOR="ada")
    yield api
    end(api)


def bearer(key: str) -> dict[str, str]:
    return OUTSIDE | ({"authorization": f"Bearer {key}"} if key else {})
