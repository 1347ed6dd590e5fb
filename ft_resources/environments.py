"""The only place that reads environment variables: where this process finds its home, lake, ledger and tracker."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = REPOSITORY / "deployments" / "recipes"


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
    namespace: str
    """`FT_NAMESPACE`, default `default` (kubernetes only)."""
    device: str
    """`FT_DEVICE`: `cuda`, `mps` or `cpu`; empty picks the best one there is."""
    max_adapters: int
    """`FT_MAX_ADAPTERS`, default 64: adapters a service keeps in memory."""
    api_keys: tuple[str, ...]
    """`FT_API_KEYS`, comma-separated: keys that callers from other machines must show."""
    actor: str
    """`FT_ACTOR`, default the login name: who the audit names."""

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None, *, home: str | Path | None = None) -> "Environment":
        """The environment as `variables` (default: of this process) describe it; `home` overrides `FT_HOME`."""
        get = (os.environ if variables is None else variables).get
        root = Path(home or get("FT_HOME") or ".ft").expanduser().resolve()
        folders = get("FT_TASKS")
        return cls(
            home=root,
            lake=get("FT_LAKE") or str(root / "lake"),
            ledger=get("FT_LEDGER") or f"sqlite:///{root / 'ledger.db'}",
            mlflow=get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}",
            dagster_home=Path(get("DAGSTER_HOME") or root / "dagster"),
            task_folders=tuple(Path(part) for part in folders.split(os.pathsep))
            if folders
            else (REPOSITORY / "deployments" / "tasks", root / "tasks"),
            packages=Path(get("FT_PACKAGE_CACHE") or root / "packages"),
            compute=get("FT_COMPUTE") or "local",
            image=get("FT_IMAGE") or "",
            namespace=get("FT_NAMESPACE") or "default",
            device=get("FT_DEVICE") or "",
            max_adapters=int(get("FT_MAX_ADAPTERS") or 64),
            api_keys=tuple(key.strip() for key in (get("FT_API_KEYS") or "").split(",") if key.strip()),
            actor=get("FT_ACTOR") or get("USER") or get("LOGNAME") or "unknown",
        )

    def variables(self) -> dict[str, str]:
        """The variables that give a child process this environment, offline and without telemetry."""
        return {
            "FT_HOME": str(self.home),
            "FT_LAKE": self.lake,
            "FT_LEDGER": self.ledger,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "DAGSTER_HOME": str(self.dagster_home),
            "FT_TASKS": os.pathsep.join(map(str, self.task_folders)),
            "FT_PACKAGE_CACHE": str(self.packages),
            "FT_COMPUTE": self.compute,
            "FT_ACTOR": self.actor,
            "BENTOML_HOME": str(self.home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DAGSTER_DISABLE_TELEMETRY": "yes",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # OpenMP threads that spin while they wait starve everything else on a small machine
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def export(self) -> None:
        """Give this process, and the processes it starts, this environment."""
        os.environ.update(self.variables())
