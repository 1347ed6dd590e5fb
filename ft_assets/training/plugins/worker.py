"""The part of the training process that a plug-in trainer's run has of its own."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ft_assets.training.jobs import PLUGIN, without_lines
from ft_assets.training.plugins.interface import find
from ft_assets.training.plugins.running import fit, rows_of
from ft_assets.training.reporting import Log, flat, tracked_code
from ft_resources.lake import Lake
from ft_resources.tracking import TrackedRun


def train(job: Mapping[str, Any], tracked: TrackedRun, log: Log) -> dict[str, Any]:
    """Train what `job` describes, publish it and close its MLflow run; the report has what an adapter's has.

    Raises:
        PluginError: The trainer failed, or what it made is not what its interface promises.
    """
    made, lake = job["made_from"], Lake(job["lake"])
    plugin = find(made[PLUGIN]["trainer"], where=f"recipe {job['template']}")
    settings = plugin.trainer.settings.model_validate(made["settings"])
    rows = rows_of(lake, made)
    log.say(f"{len(rows.training.texts)} training rows for {plugin.reference} {plugin.trainer.version}", force=True)
    tracked.params(
        {
            **plugin.identity,
            **flat(settings.model_dump()),
            "template": job["template"],
            "rows": len(rows.training.texts),
            **tracked_code(),
        }
    )
    began = time.perf_counter()

    def told(step: int, steps: int, loss: float) -> None:
        if step == 1:
            tracked.params({"steps": steps})
        left = (time.perf_counter() - began) / max(step, 1) * (steps - step)
        tracked.metrics({"loss": loss, "eta_seconds": left}, step)
        log.say(f"step {step}/{steps}, loss {loss:.3f}, about {left:.0f} s left")

    with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
        folder = Path(scratch) / "trained"
        describe = {
            **{name: made[name] for name in ("task", "type", "preparation")},
            "template": job["template"],
            "origins": without_lines(job["origins"]),
        }
        history = fit(plugin, rows, settings, folder, describe=describe, on_step=told)
        (measured,) = history["validation"]
        tracked.metrics({f"validation_{name}": value for name, value in measured.items()}, len(history["loss"]))
        figures = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        log.say(f"{len(rows.validation.texts)} validation rows: {figures}", force=True)
        artefact = lake.publish("adapter", folder, made)
        tracked.finish("FINISHED", folder, {"adapter": artefact.digest})
    return {
        "adapter": artefact.digest,
        "history": history,
        "steps_now": len(history["loss"]),
        "device": "cpu",
        "precision": None,
        "rows": len(rows.training.texts),
    }
