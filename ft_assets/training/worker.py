"""The training process: `python -m ft_assets.training.worker`, launched through Dagster Pipes."""

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ft_assets.data.assembly import split_rows
from ft_assets.training.recipes import Settings
from ft_assets.worker import Progress, serve
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.tracking import TrackedRun


def train_job(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train the adapter that `job` describes, publish it to the lake and close its MLflow run."""
    progress("loading torch, transformers and the base model", force=True)
    with ThreadPoolExecutor(1) as pool:  # the tracker's imports are slow too: overlap the two
        opening = pool.submit(TrackedRun, job["mlflow"], job["task"], job["run_name"], job["tags"])
        import torch

        from ft_assets.training.trainer import Rows, Step, train

        tracked = opening.result()
    torch.set_num_threads(os.cpu_count() or 1)
    lake = Lake(job["lake"])
    settings = Settings.model_validate(job["settings"])
    numbers = {label: number for number, label in enumerate(job["labels"])}
    training, validation = (
        Rows(frame["text"].tolist(), [numbers[label] for label in frame["label"]])
        for frame in (split_rows(lake, job[split]) for split in ("train_split", "validation_split"))
    )
    tracked.params({**_flat(settings.model_dump()), "rows": len(training.texts), "template": job["template"]})

    def on_step(step: Step) -> None:
        tracked.metrics({"loss": step.loss, "learning_rate": step.learning_rate, "tokens": step.tokens}, step.step)
        left = step.seconds / step.step * (step.steps - step.step)
        progress(f"step {step.step}/{step.steps}, epoch {step.epoch}, loss {step.loss:.3f}, about {left:.0f} s left")

    def on_epoch(epoch: int, measured: dict[str, float]) -> None:
        tracked.metrics({f"validation_{name}": value for name, value in measured.items()}, epoch)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        progress(f"epoch {epoch} on {len(validation.texts)} validation rows: {figures}", force=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        try:
            history = train(
                training,
                validation,
                job["labels"],
                resolve(settings.base.model),
                settings,
                folder,
                describe={key: job[key] for key in ("task", "template", "origins", "preparation")},
                device=Environment.read().device,
                on_step=on_step,
                on_epoch=on_epoch,
            )
            artefact = lake.publish("adapter", folder, job["made_from"])
        except BaseException:
            tracked.finish("FAILED")
            raise
        tracked.finish("FINISHED", folder, {"adapter": artefact.digest})
    return {
        "adapter": artefact.digest,
        "mlflow_run": tracked.run_id,
        "mlflow_experiment": tracked.experiment_id,
        "history": asdict(history),
    }


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


if __name__ == "__main__":
    serve(train_job)
