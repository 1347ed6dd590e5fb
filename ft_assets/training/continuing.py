"""Incremental retraining: which adapter a training starts from, and whether it can.

It is the live one. If that learned exactly these rows already, it is what that one started from: no row is learned
twice over a chain of trainings, and the same rows make the same adapter again.
"""

from collections.abc import Mapping
from typing import Any

from ft_assets.tasks import Task
from ft_assets.training.jobs import SPLITS
from ft_assets.training.recipes import Merged, Resolved, Settings
from ft_resources.errors import SpecError
from ft_resources.lake import Lake, short
from ft_resources.ledger import Ledger

SHAPE = (
    "base.pooling",
    "lora.alpha",
    "lora.rank",
    "lora.target_modules",
    "lora.top_layers",
    "lora.use_dora",
    "lora.use_rslora",
)
"""Settings without which the weights of an adapter mean something else, by path."""


def check_incremental(task: Task, merged: Merged) -> None:
    """Check that a task that asks for incremental retraining can have it, whatever is live.

    Raises:
        SpecError: There is no adapter in what it trains, or its search would change the adapter's shape.
    """
    if task.spec.retraining == "full":
        return
    method = merged.settings.method if isinstance(merged, Resolved) else "of a plug-in trainer"
    if method != "lora":
        raise SpecError(
            f"incremental retraining continues an adapter, and method {method} makes none",
            where=task.file.where(("retraining",)),
            mend="Set method to lora, or retraining to full.",
        )
    paths = task.spec.search.dimensions()
    reshaping = [path for path in paths if path in (*SHAPE, "method", "base.model")]
    if reshaping or task.spec.search.learning_curve:
        what = f"chooses {', '.join(reshaping)}" if reshaping else "draws a learning curve"
        raise SpecError(
            f"the search {what}, and an adapter that is continued keeps its shape and has learned all rows",
            where=task.file.where(("search",)),
            mend="Leave that out of the search, or set retraining to full.",
        )


def parent_of(task: Task, made: Mapping[str, Any], lake: Lake, ledger: Ledger) -> str | None:
    """Digest of the adapter that a training of `task` starts from; None: fresh weights.

    Args:
        made: What the new adapter is made from, as `jobs.made_from` tells.

    Raises:
        SpecError: That adapter differs in what its weights depend on; it names all of it.
    """
    live = ledger.live_release(task.name) if task.spec.retraining == "incremental" else None
    if live is None:
        return None
    parent = lake.open(live["adapter"])
    if all(parent.made_from[split] == made[split] for split in SPLITS):
        if "parent" not in parent.made_from:
            return None
        parent = lake.open(parent.made_from["parent"])
    differing = [
        f"{name} is {_text(now)}, was {_text(then)}"
        for name, (now, then) in _compared(made, parent.made_from).items()
        if now != then
    ]
    if differing:
        raise SpecError(
            f"training cannot start from adapter {short(parent.digest)}: {'; '.join(differing)}",
            where=task.file.where(("retraining",)),
            mend="Set retraining to full, or make these as they were.",
        )
    return parent.digest


def _compared(made: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    def values(of: Mapping[str, Any]) -> dict[str, Any]:
        settings = Settings.model_validate(of["settings"]).model_dump(mode="json")  # older ones know fewer
        shape = {path: settings[path.split(".")[0]][path.split(".")[1]] for path in SHAPE}
        return {
            "type": of.get("type", "text-classification"),
            "labels": of["labels"],
            "method": settings["method"],
            "base": of["base"],
            **shape,
        }

    then = values(before)
    return {name: (now, then[name]) for name, now in values(made).items()}


def _text(value: Any) -> str:
    return short(value) if isinstance(value, str) and len(value) == 64 else repr(value)
