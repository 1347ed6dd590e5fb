"""The only place that reads environment variables: where this process finds its home, lake, ledger and tracker."""

import getpass
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ft_resources.errors import SpecError

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "deployments" / "recipes"
MOST_ADAPTERS = 64


def source_digest(*names: str) -> str:
    """Digest of source files of this repository, and of all Python files below its folders; 12 hex digits."""
    total = hashlib.sha256()
    for name in names:
        path = REPOSITORY / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(f"{file.relative_to(REPOSITORY)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Environment:
    """Where everything is. Each field names the variable that sets it and its default."""

    home: Path
    """`FT_HOME`, default `.ft` in the working directory: all state of one machine."""
    lake: str
    """`FT_LAKE`, default `FT_HOME/lake`: folder or fsspec URL of the artefact store."""
    ledger: str
    """`FT_LEDGER`, default SQLite in `FT_HOME/ledger.db`: SQLAlchemy URL."""
    mlflow: str
    """`MLFLOW_TRACKING_URI`, default SQLite in `FT_HOME/mlflow`."""
    dagster_home: Path
    """`DAGSTER_HOME`, default `FT_HOME/dagster`."""
    task_folders: tuple[Path, ...]
    """`FT_TASKS`, path-separated, default `deployments/tasks` and `FT_HOME/tasks`."""
    packages: Path
    """`FT_PACKAGE_CACHE`, default `FT_HOME/packages`: data packages fetched by their client."""
    compute: str
    """`FT_COMPUTE`, `local` (default) or `kubernetes`."""
    image: str
    """`FT_IMAGE`: the image of training pods (kubernetes only)."""
    gpus: int
    """`FT_GPUS`, default 0: GPUs of a training pod (kubernetes only)."""
    namespace: str
    """`FT_NAMESPACE`, default `default` (kubernetes only)."""
    device: str
    """`FT_DEVICE`: `cuda`, `mps` or `cpu`; empty picks the best one there is."""
    processes: int
    """`FT_PROCESSES`, default 1: processes that train one adapter together; each computes its share of a batch."""
    memory_gb: float | None
    """`FT_MEMORY_GB`: memory a training may use; default what there is."""
    prices: Path
    """`FT_PRICES`, default `deployments/prices.yaml`: what an hour of each device costs."""
    max_adapters: int
    """`FT_MAX_ADAPTERS`, default 64: adapters a service keeps in memory."""
    api_keys: tuple[str, ...]
    """`FT_API_KEYS`, comma-separated: keys that callers from other machines must show."""
    actor: str
    """`FT_ACTOR`, default the login name: who the audit names."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None, *, home: str | Path | None = None) -> "Environment":
        """The environment as `variables` (default: of this process) describe it; `home` overrides `FT_HOME`.

        Relative paths start at the working directory, here and not where a child process happens to stand.

        Raises:
            SpecError: A variable that is a number or a choice holds something else.
        """
        get = (os.environ if variables is None else variables).get
        root = Path(home or get("FT_HOME") or ".ft").expanduser().resolve()
        folders = get("FT_TASKS")
        return cls(
            home=root,
            lake=_absolute_url(get("FT_LAKE") or str(root / "lake")),
            ledger=get("FT_LEDGER") or f"sqlite:///{root / 'ledger.db'}",
            mlflow=get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}",
            dagster_home=_absolute(get("DAGSTER_HOME") or root / "dagster"),
            task_folders=tuple(_absolute(part) for part in folders.split(os.pathsep) if part)
            if folders
            else (REPOSITORY / "deployments" / "tasks", root / "tasks"),
            packages=_absolute(get("FT_PACKAGE_CACHE") or root / "packages"),
            compute=_choice("FT_COMPUTE", get("FT_COMPUTE") or "local", ("local", "kubernetes")),
            image=get("FT_IMAGE") or "",
            gpus=int(get("FT_GPUS") or 0),
            namespace=get("FT_NAMESPACE") or "default",
            device=get("FT_DEVICE") or "",
            processes=_positive("FT_PROCESSES", get("FT_PROCESSES") or "1"),
            memory_gb=_amount("FT_MEMORY_GB", get("FT_MEMORY_GB")),
            prices=_absolute(get("FT_PRICES") or REPOSITORY / "deployments" / "prices.yaml"),
            max_adapters=_positive("FT_MAX_ADAPTERS", get("FT_MAX_ADAPTERS") or str(MOST_ADAPTERS)),
            api_keys=tuple(key.strip() for key in (get("FT_API_KEYS") or "").split(",") if key.strip()),
            actor=get("FT_ACTOR") or _login(),
        )

    def variables(self) -> dict[str, str]:
        """The variables that give a child process this environment, offline and without telemetry.

        API keys are left out: only the service needs them, and it has them from whoever starts it.
        """
        chosen = {
            "FT_IMAGE": self.image,
            "FT_NAMESPACE": self.namespace,
            "FT_DEVICE": self.device,
            "FT_PROCESSES": str(self.processes) if self.processes > 1 else "",
            "FT_MEMORY_GB": "" if self.memory_gb is None else str(self.memory_gb),
            "FT_MAX_ADAPTERS": str(self.max_adapters),
        }
        return {
            "FT_HOME": str(self.home),
            "FT_LAKE": self.lake,
            "FT_LEDGER": self.ledger,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "DAGSTER_HOME": str(self.dagster_home),
            "FT_TASKS": os.pathsep.join(map(str, self.task_folders)),
            "FT_PACKAGE_CACHE": str(self.packages),
            "FT_COMPUTE": self.compute,
            "FT_PRICES": str(self.prices),
            "FT_ACTOR": self.actor,
            "BENTOML_HOME": str(self.home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TQDM_DISABLE": "1",
            **{name: value for name, value in chosen.items() if value not in ("", str(MOST_ADAPTERS))},
        }

    def export(self) -> None:
        """Give this process, and the processes it starts, this environment."""
        os.environ.update(self.variables())


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _absolute_url(url: str) -> str:
    return url if "://" in url or "::" in url else str(_absolute(url))


def _positive(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise SpecError(f"{name} is '{value}'", where="environment", mend="Set it to a whole number of 1 or more.")
    return int(value)


def _amount(name: str, value: str | None) -> float | None:
    if not value:
        return None
    try:
        amount = float(value)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise SpecError(f"{name} is '{value}'", where="environment", mend="Set it to a number above 0, or unset it.")
    return amount


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return f"uid {os.getuid()}"


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise SpecError(f"{name} is '{value}'", where="environment", mend=f"Set it to {' or '.join(choices)}.")
    return value
