"""The training process: `python -m ft_assets.training.worker`, launched through Dagster Pipes.

Several of them, which train one adapter together, are started by torchrun.
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ft_assets.training.failures import RESOURCES, failure_of, results_folder, write_results
from ft_assets.training.idle import IdleWatch, reclaimed_when_idle
from ft_assets.training.jobs import PLUGIN, made_on
from ft_assets.training.plugins.worker import train as train_plugin
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import reliefs_of
from ft_assets.training.reporting import Log, Reporter, expected_device
from ft_assets.worker import Progress, is_leader, serve
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.lake import Lake
from ft_resources.provenance import provenance
from ft_resources.tracking import TrackedRun
from ft_resources.usage import Meter


def train_job(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train the adapter that `job` describes, publish it to the lake and close its MLflow run.

    Of several processes that train together the first reports, tracks and publishes.
    """
    log = Log(progress)
    if not is_leader():
        return _train(job, None, log)
    plugged = PLUGIN in job["made_from"]
    log.say("loading the trainer" if plugged else "loading torch, transformers and the base model", force=True)
    environment, started = Environment.read(), datetime.now(UTC)
    folder = results_folder(environment, job["made_from"]["task"], job["run_name"])
    about = {"config": job["made_from"]["settings"], "origins": job["origins"]}
    with Meter(device=expected_device(environment), file=folder / RESOURCES, warn=log.warn) as meter:
        tracked: TrackedRun | None = None
        try:
            with ThreadPoolExecutor(1) as pool:  # the tracker's imports are slow too: overlap the two
                opening = pool.submit(
                    TrackedRun, job["mlflow"], job["made_from"]["task"], job["run_name"], job["tags"], live=meter.now
                )
                if not plugged:
                    import ft_assets.training.engine.runs  # noqa: F401

                tracked = opening.result()
            with reclaimed_when_idle(IdleWatch(), log.lines, lambda: meter.now().get("gpu_utilisation"), log.warn):
                report = train_plugin(job, tracked, log) if plugged else _train(job, tracked, log)
        except BaseException as error:
            if tracked:
                tracked.finish("FAILED")
            write_results(
                folder,
                **about,
                metrics={},
                log=log.lines,
                usage=meter.total(),
                provenance=made_on(job),
                failure=failure_of(error),
            )
            raise
    usage = meter.total()
    metrics = {**report["history"]["validation"][-1], "loss_last_step": report["history"]["loss"][-1]}
    write_results(folder, **about, metrics=metrics, log=log.lines, usage=usage, provenance=made_on(job))
    return {
        **report,
        "mlflow_run": tracked.run_id,
        "mlflow_experiment": tracked.experiment_id,
        "usage": asdict(usage),
        "provenance": provenance(),
        "results": str(folder),
        "started": started.isoformat(),
        "ended": datetime.now(UTC).isoformat(),
    }


def _train(job: Mapping[str, Any], tracked: TrackedRun | None, log: Log) -> dict[str, Any]:
    from ft_assets.training.engine.checkpoints import Checkpoints
    from ft_assets.training.engine.distributed import World
    from ft_assets.training.engine.runs import described, fit, memory_of, publish_trace, task_rows, tokenise, use_cores

    environment, made, lake, world = Environment.read(), job["made_from"], Lake(job["lake"]), World.join()
    use_cores(world)
    settings = Settings.model_validate(made["settings"])
    base = resolve(settings.base.model)
    parent = lake.open(made["parent"]) if "parent" in made else None
    rows = task_rows(lake, made)
    data = tokenise(rows, base, settings.base.max_tokens)
    reporter = Reporter(tracked, log, job, settings, data)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        trained = fit(
            rows,
            data,
            base,
            settings,
            folder,
            describe=described(made, job["template"], job["origins"], environment),
            device=environment.device,
            checkpoints=Checkpoints(lake, made["task"], job["key"]),
            world=world,
            memory=memory_of(environment) // world.size,
            relief=reliefs_of(made),
            parent=parent.folder if parent else None,
            on_step=reporter.step,
            on_epoch=reporter.epoch,
        )
        history = asdict(trained.history)
        if not world.leads:
            return {"history": history}
        artefact = lake.publish("adapter", folder, made)
        publish_trace(lake, artefact.digest, trained)
        if tracked:
            tracked.finish("FINISHED", folder, {"adapter": artefact.digest})
    return {
        "adapter": artefact.digest,
        "history": history,
        "steps_now": trained.steps_now,
        "device": trained.device,
        "precision": trained.precision,
        "rows": len(data.training.examples),
    }


if __name__ == "__main__":
    serve(train_job)
