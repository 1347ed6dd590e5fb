"""Running a plug-in trainer: train, look at what it wrote, measure it on validation rows as any training is."""

import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ft_assets.data.assembly import require_labels, split_rows
from ft_assets.specs import Strict
from ft_assets.training.plugins.interface import Plugin, Progress, Rows, Split
from ft_assets.training.plugins.pickles import require_none
from ft_resources.errors import FtError, PluginError
from ft_resources.lake import Lake

Result = TypeVar("Result")
MODEL = "model"
"""Folder of what the trainer wrote, beside adapter.json and training.json."""
SUM = 1e-3
"""By how much the probabilities of a row may miss 1."""


def rows_of(lake: Lake, made_from: Mapping[str, Any]) -> Rows:
    """The rows that something is, or was, made from.

    Raises:
        TrainingError: A label has no training row.
    """
    training, validation = (split_rows(lake, made_from[split]) for split in ("train_split", "validation_split"))
    labels = made_from["labels"]
    require_labels(training, labels)
    return Rows(labels, _split(training, labels), _split(validation, labels))


def _split(frame: pd.DataFrame, labels: Sequence[str]) -> Split:
    places = {label: place for place, label in enumerate(labels)}
    return Split(frame["text"].tolist(), [places[label] for label in frame["label"]])


def fit(
    plugin: Plugin,
    rows: Rows,
    settings: Strict,
    folder: Path,
    *,
    describe: Mapping[str, Any],
    on_step: Progress = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Train and write the artefact to `folder`.

    Args:
        describe: Further entries of `adapter.json`.

    Returns:
        `training.json`: the loss of every step that the trainer told of, or the final one of one that told of none,
        and the figures of the validation rows.

    Raises:
        PluginError: The trainer failed, wrote nothing, wrote a pickle, or gives no probabilities.
    """
    model, losses = folder / MODEL, list[float]()
    model.mkdir(parents=True)

    def told(step: int, steps: int, loss: float) -> None:
        losses.append(float(loss))
        on_step(step, steps, float(loss))

    _guarded(plugin, "training", lambda: plugin.trainer.train(rows, settings, model, told))
    if not any(path.is_file() for path in model.rglob("*")):
        raise PluginError(f"trainer {plugin.reference} wrote no file", where="train", mend="Write to `folder`.")
    require_none(model, plugin.reference)
    answering = Model(plugin, model, rows.labels)
    history = {
        "loss": losses or [_loss(answering.probabilities(rows.training.texts), rows.training.targets)],
        "validation": [_measured(answering, rows)],
        "best_epoch": 1,
    }
    about = {
        "format": 1,
        "method": plugin.name,
        **plugin.identity,
        "labels": list(rows.labels),
        "settings": settings.model_dump(mode="json"),
        "exactness": "bit-exact",
        **describe,
    }
    (folder / "adapter.json").write_text(json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False))
    (folder / "training.json").write_text(json.dumps(history, indent=1, sort_keys=True))
    return history


class Model:
    """What a plug-in trained, loaded.

    Args:
        folder: That the trainer wrote.

    Raises:
        PluginError: It cannot be loaded.
    """

    def __init__(self, plugin: Plugin, folder: Path, labels: Sequence[str]) -> None:
        self._plugin, self._labels = plugin, labels
        self._predict = _guarded(plugin, "loading", lambda: plugin.trainer.load(folder))

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities [texts, labels].

        Raises:
            PluginError: The model fails, or does not give a distribution over the labels for each text.
        """
        shape = len(texts), len(self._labels)
        if not texts:
            return np.zeros(shape)
        given = _guarded(self._plugin, "answering", lambda: np.asarray(self._predict(texts), dtype=np.float64))
        wrong = ""
        if given.shape != shape:
            wrong = f"gave an array of shape {given.shape} where {shape} was due"
        elif not np.isfinite(given).all() or given.min() < 0 or abs(given.sum(axis=1) - 1).max() > SUM:
            wrong = "gave numbers that are no probabilities: each row has to be 0 or more and sum to 1"
        if wrong:
            raise PluginError(f"trainer {self._plugin.reference} {wrong}", where="load", mend="Mend the trainer.")
        return given


def _measured(model: Model, rows: Rows) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    texts, targets = rows.validation.texts, rows.validation.targets
    if not texts:
        return {"loss": 0.0}
    given = model.probabilities(texts)
    predicted = given.argmax(axis=1)
    macro = f1_score(targets, predicted, labels=range(len(rows.labels)), average="macro", zero_division=0)
    return {
        "loss": _loss(given, targets),
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(macro),
    }


def _loss(probabilities: NDArray[np.float64], targets: Sequence[int]) -> float:
    """Mean cross-entropy, in nats."""
    given = probabilities[np.arange(len(targets)), np.asarray(targets)]
    return float(-np.log(np.maximum(given, np.finfo(np.float32).tiny)).mean())


def _guarded(plugin: Plugin, what: str, call: Callable[[], Result]) -> Result:
    """What `call` gives; an error that is not typed becomes one that names the trainer and its line."""
    try:
        return call()
    except FtError:
        raise
    except Exception as error:  # somebody else's code
        raise PluginError(
            f"trainer {plugin.reference} failed in {what}: {type(error).__name__}: {error}",
            where=_line(plugin, error),
            mend="Mend the trainer, the settings or the rows, and run again.",
        ) from error


def _line(plugin: Plugin, error: Exception) -> str:
    """File and line of the trainer's module in which the error came up."""
    source = inspect.getfile(type(plugin.trainer))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    return f"{source}:{lines[-1]}" if lines else source
