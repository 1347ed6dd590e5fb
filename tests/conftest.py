"""What every test shares: no network beyond the package client, no telemetry, and the real mails."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.setdefault("FT_PACKAGE_CACHE", str(REPOSITORY / ".cache" / "packages"))
os.environ |= {
    "BENTOML_DO_NOT_TRACK": "True",
    "DAGSTER_DISABLE_TELEMETRY": "yes",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}

ENVIRONMENT = dict(os.environ)

import pandas as pd
import pytest

from ft_assets.data.sources import read_sources
from ft_assets.tasks import Task
from ft_resources.tracking import client

FIRST = ("graph/test_gate_bypass.py", "graph/test_texts.py")
"""Long modules that do not wait for each other; of the rest, those of the graph take the longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that the processes of a test run end at about the same time."""

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return name not in FIRST, not name.startswith("graph/")

    items.sort(key=turn)


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """An opened platform says in the environment where it is, to what it starts; not to the modules that follow."""
    yield
    for name in os.environ.keys() - ENVIRONMENT.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same in each of its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def package_cache() -> Path:
    """Where fetched packages are kept between runs."""
    return Path(os.environ["FT_PACKAGE_CACHE"])


@pytest.fixture(scope="session")
def tracker_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Puts an empty MLflow store into a platform home and returns its URI: making its tables, once, takes seconds."""
    made = tmp_path_factory.mktemp("tracker") / "mlflow.db"

    def put(home: Path) -> str:
        if not made.exists():
            client(f"sqlite:///{made}").search_experiments()
        place = home / "mlflow" / "mlflow.db"
        place.parent.mkdir(parents=True)
        shutil.copyfile(made, place)
        return f"sqlite:///{place}"

    return put


@pytest.fixture(scope="session")
def real_mails(package_cache: Path) -> pd.DataFrame:
    """All 6,046 mails of the demo's package as raw rows."""
    task = Task(REPOSITORY / "deployments" / "tasks" / "mail-triage.yaml")
    package = task.spec.sources[0].model_copy(update={"since": None, "until": None})
    spec = task.spec.model_copy(update={"sources": [package]})
    return read_sources(spec, REPOSITORY, package_cache, pd.DataFrame)
