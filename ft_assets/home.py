"""Where one platform keeps everything: its environment, tasks, stores and Dagster instance."""

import shutil
from functools import cached_property
from typing import TYPE_CHECKING

from ft_assets.tasks import TaskFolders
from ft_resources.environments import REPOSITORY, Environment
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.serving import BentoStore
from ft_resources.tracking import ModelRegistry

if TYPE_CHECKING:
    import dagster as dg


class Home:
    """One platform home, created when it is not there; a store is opened when it is first asked for.

    Args:
        environment: Where everything is.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        environment.export()
        environment.dagster_home.mkdir(parents=True, exist_ok=True)
        configuration = environment.dagster_home / "dagster.yaml"
        if not configuration.exists():
            shutil.copyfile(REPOSITORY / "deployments" / "local" / "dagster.yaml", configuration)

    @property
    def tasks(self) -> TaskFolders:
        return TaskFolders(self.environment.task_folders)

    @cached_property
    def lake(self) -> Lake:
        return Lake(self.environment.lake)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.environment.ledger)

    @cached_property
    def registry(self) -> ModelRegistry:
        return ModelRegistry(self.environment.mlflow)

    @cached_property
    def bentos(self) -> BentoStore:
        return BentoStore(self.environment)

    @cached_property
    def instance(self) -> "dg.DagsterInstance":
        """The Dagster instance that the UI and the daemon share."""
        import dagster as dg
        from filelock import FileLock

        with FileLock(self.environment.dagster_home / "creation.lock"):  # dagster creates its tables without one
            instance = dg.DagsterInstance.from_config(str(self.environment.dagster_home))
            instance.get_run_ids(limit=1)
        return instance
