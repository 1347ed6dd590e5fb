"""The platform's stores as Dagster resources, opened from the environment of the process that needs them."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from ft_resources.compute import Compute
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.serving import BentoStore
from ft_resources.tracking import ModelRegistry


@dg.resource(description="Content-addressed artefact store (FT_LAKE).")
def lake(_: dg.InitResourceContext) -> Lake:
    return Lake(Environment.read().lake)


@dg.resource(description="Decisions and events (FT_LEDGER).")
def ledger(_: dg.InitResourceContext) -> Iterator[Ledger]:
    opened = Ledger(Environment.read().ledger)
    try:
        yield opened
    finally:
        opened.close()


@dg.resource(description="MLflow tracking and model registry (MLFLOW_TRACKING_URI).")
def registry(_: dg.InitResourceContext) -> ModelRegistry:
    return ModelRegistry(Environment.read().mlflow)


@dg.resource(description="Built Bentos and the processes that serve them (FT_HOME/bentoml).")
def bentos(_: dg.InitResourceContext) -> BentoStore:
    return BentoStore(Environment.read())


@dg.resource(description="Where this process finds its stores and task files.")
def environment(_: dg.InitResourceContext) -> Environment:
    return Environment.read()


def platform_resources() -> dict[str, Any]:
    """Resource keys as the assets name them."""
    settings = Environment.read()
    return {
        "environment": environment,
        "lake": lake,
        "ledger": ledger,
        "registry": registry,
        "bentos": bentos,
        "compute": Compute(  # type: ignore[call-arg]
            kind=settings.compute,  # type: ignore[arg-type]
            image=settings.image,
            namespace=settings.namespace,
            gpus=settings.gpus,
        ),
    }
