"""What a plug-in trainer is: the interface it has, and how the one that a recipe names is found.

A recipe whose `trainer` is `package.module:Class` is trained by that class instead of the platform's own trainer. The
class is constructed without arguments, in the code location too, to read its settings: import what is heavy inside
`train` and `load`.
"""

import difflib
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ft_assets.specs import Strict
from ft_resources.errors import SpecError

Progress = Callable[[int, int, float], None]
"""Told of a step that ended: its number from 1, how many there will be at most, and its training loss."""
Predict = Callable[[Sequence[str]], NDArray[np.floating[Any]]]
"""Texts -> probabilities [texts, labels] that sum to 1 in each row; columns in the order of `Rows.labels`."""


@dataclass(frozen=True)
class Split:
    """Texts and their labels, in row id order."""

    texts: Sequence[str]
    targets: Sequence[int]
    """Place of each text's label in `Rows.labels`."""


@dataclass(frozen=True)
class Rows:
    """What a trainer learns from: clean rows, without personal data, no row or near-copy in both splits."""

    labels: Sequence[str]
    """The task's labels; each has a training row."""
    training: Split
    validation: Split
    """For what a trainer has to choose, such as when to stop; the platform measures on it afterwards."""


class Trainer(Protocol):
    """A trainer of text classifiers. Equal rows and settings have to give equal bytes: seed what is drawn.

    The first three are plain attributes of a class mostly.
    """

    @property
    def version(self) -> str:
        """Part of the digest of what is trained: another one when the code makes other bytes of the same rows. The
        module that holds the class is part of the digest anyway."""

    @property
    def packages(self) -> Sequence[str]:
        """Distributions, such as xgboost-cpu, whose versions decide the bytes: part of the digest as well."""

    @property
    def settings(self) -> type[Strict]:
        """What a recipe's `settings` and a task's `overrides` may hold, a description on each field."""

    def train(self, rows: Rows, settings: Any, folder: Path, progress: Progress) -> None:
        """Train, and write all that `load` needs to `folder`, which is empty. No pickle.

        Args:
            settings: An instance of `self.settings`.
        """

    def load(self, folder: Path) -> Predict:
        """What was trained, ready to answer, from the files that `train` wrote."""


METHODS = {"train": ("rows", "settings", "folder", "progress"), "load": ("folder",)}
MEND = "ft_assets/training/plugins/interface.py describes what a trainer has; boosted_trees.py beside it is one."


@dataclass(frozen=True)
class Plugin:
    """A trainer that was found and has the interface."""

    reference: str
    """`package.module:Class`, as the recipe names it."""
    trainer: Trainer

    @property
    def name(self) -> str:
        """The class."""
        return self.reference.partition(":")[2]

    @cached_property
    def identity(self) -> dict[str, str]:
        """What of the trainer decides the bytes."""
        source = Path(inspect.getfile(type(self.trainer))).read_bytes()
        return {
            "trainer": self.reference,
            "version": self.trainer.version,
            "source": hashlib.sha256(source).hexdigest()[:12],
        }

    def packages(self) -> dict[str, str]:
        """Versions of the distributions it computes with.

        Raises:
            SpecError: One is not installed.
        """
        found = {}
        for name in self.trainer.packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                raise SpecError(
                    f"trainer {self.reference} needs the package {name}, which is not installed",
                    where="environment",
                    mend=f"pip install {name}",
                ) from None
        return found


def find(reference: str, *, where: str) -> Plugin:
    """The trainer that `package.module:Class` names.

    Args:
        where: File and line that name it.

    Raises:
        SpecError: There is no such module or class, with the nearest name there is; it cannot be imported or
            constructed; or it lacks a part of the interface.
    """
    module, _, name = reference.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise SpecError(f"'{reference}' names no trainer", where=where, mend="Write package.module:Class.")
    try:
        there = _module(reference, module, where)
        found = getattr(there, name, None)
        trainer = found() if inspect.isclass(found) else None
    except SpecError:
        raise
    except Exception as error:  # somebody else's code: whatever it raises, the recipe cannot be used
        raise SpecError(
            f"trainer '{reference}' cannot be loaded: {type(error).__name__}: {error}", where=where, mend=MEND
        ) from error
    if trainer is None:
        classes = [each for each, _ in inspect.getmembers(there, inspect.isclass)]
        raise _unknown(f"module '{module}' has no class '{name}'", name, classes, where)
    if wrong := _wrong(trainer):
        raise SpecError(f"'{reference}' is no trainer: {'; '.join(wrong)}", where=where, mend=MEND)
    return Plugin(reference, cast(Trainer, trainer))


def _module(reference: str, module: str, where: str) -> ModuleType:
    """The module, imported; a part of its path that is not there is an error with the nearest name beside it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{module}.".startswith(f"{missing}."):
            raise  # something that it imports
        above, _, part = missing.rpartition(".")
        inside = getattr(importlib.import_module(above), "__path__", []) if above else None
        what = f"trainer '{reference}': there is no module '{part}'" + (f" in '{above}'" if above else "")
        raise _unknown(what, part, [one.name for one in pkgutil.iter_modules(inside)], where) from None


def _unknown(what: str, name: str, there: Sequence[str], where: str) -> SpecError:
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return SpecError(what, where=where, mend=f"{hint}Install it, or put its folder on PYTHONPATH.")


def _wrong(trainer: object) -> list[str]:
    """What `trainer` lacks of the interface."""
    wrong = []
    told, packages, settings = (getattr(trainer, name, None) for name in ("version", "packages", "settings"))
    if not isinstance(told, str) or not told:
        wrong.append("it has no `version`, a text")
    if not isinstance(packages, list | tuple) or not all(isinstance(one, str) for one in packages):
        wrong.append("it has no `packages`, a list of distributions")
    if not inspect.isclass(settings) or not issubclass(settings, Strict):
        wrong.append("it has no `settings`, a class below ft_assets.specs.Strict")
    for name, parameters in METHODS.items():
        method, call = getattr(trainer, name, None), f"{name}({', '.join(parameters)})"
        if not callable(method):
            wrong.append(f"it has no method {call}")
            continue
        try:
            inspect.signature(method).bind(*parameters)
        except TypeError:
            wrong.append(f"its method {name} cannot be called as {call}")
    return wrong
