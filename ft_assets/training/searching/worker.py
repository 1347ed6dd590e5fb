"""The search process: `python -m ft_assets.training.searching.worker`, launched through Dagster Pipes.

All trials run in it one after another: rows are tokenised once for each base model and length. What a training gave
is kept on the lake as soon as it ends, so a worker that takes over from a dead one replays it instead.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bento.devices import pick_device
from ft_assets.tasks import SearchSpec
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.runs import (
    Data,
    described,
    fit,
    memory_of,
    publish_trace,
    task_rows,
    tokenise,
    use_cores,
)
from ft_assets.training.engine.trainer import Pruned, Trained
from ft_assets.training.jobs import key_of
from ft_assets.training.planning.prices import CPU, hourly_price
from ft_assets.training.recipes import Resolved, Settings, with_values
from ft_assets.training.reporting import Log, Reporter, expected_device
from ft_assets.training.searching.learning_curve import Run, answer, share_of, variants
from ft_assets.training.searching.trials import Attempt, Budget, Objective, State, Watch, report, run_trials
from ft_assets.worker import Progress, serve
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.errors import OutOfMemory, SpecError, TrainingError
from ft_resources.lake import Artefact, Lake, digest_of
from ft_resources.tracking import DAGSTER_RUN, TRAINED_FROM, TrackedRun, trainings
from ft_resources.usage import Meter, usable_cores

RECORD = "search_trial"
"""Artefact of a training that a search did: figures and seconds of its epochs, and outputs if it came to its end."""
OUTPUTS = "outputs.npy"
SEARCH = "search"
"""Tag of the MLflow run above the trials: digest of what the search is made from."""
PARENT = "mlflow.parentRunId"


def search_job(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Run the search that `job` describes; returns `trials.json` with what it used.

    Raises:
        TrainingError: There are no validation rows, or no trial finished.
    """
    log, environment = Log(progress), Environment.read()
    spec, made = SearchSpec.model_validate(job["search"]), job["made_from"]
    objective, budget = Objective.of(made["type"]), _budget(spec, environment)
    recipe = Resolved(job["template"], made["template"], Settings.model_validate(made["settings"]), job["origins"])
    use_cores(World())
    with Meter(device=expected_device(environment), warn=log.warn) as meter:
        parent = _parent(job, spec, meter.now)
        try:
            workshop = Workshop(job, environment, log, budget, parent, meter.now)
            found = run_trials(spec, recipe, objective, workshop.train, budget, lambda line: log.say(line, force=True))
            best = with_values(recipe, found.best, "search")
            curve = _learning_curve(workshop, best, objective, budget) if spec.learning_curve else None
        except BaseException:
            parent.finish("FAILED")
            raise
        scores = {trial["trial"]: trial["score"] for trial in found.trials if trial["state"] == "finished"}
        for number, score in scores.items():
            parent.metrics({objective.name: score}, number)
        parent.metrics({"seconds": budget.seconds, "cost": budget.cost}, len(found.trials))
        parent.finish("FINISHED", tags={"best_trial": str(found.best_trial)})
        return {
            **report(found, objective, budget, curve),
            "mlflow_run": parent.run_id,
            "usage": asdict(meter.total()),
        }


def _budget(spec: SearchSpec, environment: Environment) -> Budget:
    device = pick_device(environment.device)
    held = 1 if device.type == "cuda" else usable_cores()
    try:
        price = hourly_price(torch.cuda.get_device_name(device) if device.type == "cuda" else CPU, environment.prices)
    except SpecError:
        if spec.max_cost is not None:
            raise
        return Budget(spec.max_minutes * 60, None, 0.0, "")  # without a price there is no cost to tell
    return Budget(spec.max_minutes * 60, spec.max_cost, held * price.amount, price.currency)


def _parent(job: Mapping[str, Any], spec: SearchSpec, live: Callable[[], Mapping[str, float]]) -> TrackedRun:
    """The MLflow run above the trials; that of a worker that died is gone on with."""
    made = job["made_from"]
    key = digest_of({"made_from": made, "search": job["search"]})
    known = [run for run in trainings(job["mlflow"], task=made["task"]) if run.data.tags.get(SEARCH) == key]
    tags = {name: value for name, value in job["tags"].items() if name != TRAINED_FROM} | {SEARCH: key}
    earlier = known[0].info.run_id if known else ""
    tracked = TrackedRun(job["mlflow"], made["task"], job["run_name"], tags, live=live, resume=earlier)
    if not earlier:
        limits = {"trials": spec.trials, "max_minutes": spec.max_minutes, "max_cost": spec.max_cost}
        tracked.params({**limits, "pruning": spec.pruning, **{f"space.{k}": v for k, v in spec.dimensions().items()}})
    return tracked


@dataclass(frozen=True)
class Record:
    """What is kept of a training."""

    epochs: list[dict[str, Any]]
    seconds: float
    complete: bool
    """False: it was ended after the last of these epochs."""
    kept_epoch: int = 0
    """Of one that is complete, counted from 1."""
    error: str = ""
    """Of one that failed."""
    course: dict[str, Any] = field(default_factory=dict)
    """As of the attempt."""


class Workshop:
    """Trains settings of one task one after another in this process, and replays what was trained before.

    Args:
        budget: Charged with what is not part of one training, such as tokenising.
        live: Metrics of the moment for the tracker.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        environment: Environment,
        log: Log,
        budget: Budget,
        parent: TrackedRun,
        live: Callable[[], Mapping[str, float]],
    ) -> None:
        self._job, self._environment, self._log, self._live = job, environment, log, live
        self._budget, self._parent = budget, parent
        self._lake, self._made = Lake(job["lake"]), job["made_from"]
        self._data: dict[tuple[str, int], Data] = {}
        self._kept: tuple[str, dict[int, torch.Tensor]] = "", {}
        with budget.charging():
            self._rows = task_rows(self._lake, self._made)
        if self._rows.validation.empty:
            raise TrainingError(
                "there are no validation rows to compare trials on",
                where="validation_split",
                mend="Raise split.validation, or search nothing.",
            )

    def data(self, settings: Settings) -> Data:
        """The tokenised rows for `settings`."""
        base, longest = resolve(settings.base.model), settings.base.max_tokens
        if (base.digest, longest) not in self._data:
            with self._budget.charging():
                self._data[base.digest, longest] = tokenise(self._rows, base, longest)
        return self._data[base.digest, longest]

    def train(self, name: str, resolved: Resolved, watch: Watch, share: float = 1.0, publish: bool = True) -> Attempt:
        """Train `resolved`, or replay it if that was done before.

        Args:
            share: Of the training rows.
            publish: Keep the adapter.
        """
        made = self._made_from(resolved.settings, share)
        adapter = self._lake.find("adapter", made) if publish else None
        attempt = self._replayed(made, adapter, watch, publish)
        return attempt or self._trained(name, resolved, made, watch, share, publish)

    def known(self, resolved: Resolved, share: float) -> tuple[float, np.ndarray] | None:
        """What a search trained to its end: seconds, and float32 [validation rows, outputs] of the best epoch."""
        stored = self._lake.find(RECORD, self._made_from(resolved.settings, share))
        if stored is None or OUTPUTS not in stored.files:
            return None
        return stored.json("record.json")["seconds"], np.load(stored.path(OUTPUTS), allow_pickle=False)

    def rows(self, settings: Settings, share: float) -> int:
        """Training rows in a share of them."""
        return len(self._part(self.data(settings), settings, share).training.examples)

    def targets(self, settings: Settings) -> list[int]:
        """Per validation row its class, or the number of its answer's tokens."""
        examples = self.data(settings).validation.examples
        return [one.target if self._rows.labels else len(one.ids) - one.target for one in examples]

    def _made_from(self, settings: Settings, share: float) -> dict[str, Any]:
        own = {"settings": settings.model_dump(mode="json"), "base": resolve(settings.base.model).digest}
        return {**self._made, **own, **({"share": share} if share < 1 else {})}

    def _lower(self, made: Mapping[str, Any], share: float) -> dict[int, torch.Tensor]:
        """What frozen layers gave in the last training, if it is the same for this one; one at a time is kept."""
        settings = made["settings"]
        same = [settings["lora"]["top_layers"], settings["training"]["precision"], settings["speed"]]
        key = digest_of([made["base"], settings["base"]["max_tokens"], share, *same])
        if self._kept[0] != key:
            self._kept = key, {}
        return self._kept[1]

    def _part(self, data: Data, settings: Settings, share: float) -> Data:
        if share == 1:
            return data
        examples = data.training.examples
        classes = [one.target if self._rows.labels else 0 for one in examples]
        kept = [examples[place] for place in share_of(classes, share, settings.training.seed)]
        return replace(data, training=replace(data.training, examples=kept))

    def _replayed(
        self, made: Mapping[str, Any], adapter: Artefact | None, watch: Watch, publish: bool
    ) -> Attempt | None:
        """The same course of a training that was done before; None where it says too little."""
        stored = self._lake.find(RECORD, made)
        if stored is not None:
            record = Record(**stored.json("record.json"))
        elif adapter is not None:  # trained outside of a search: nobody knows how long it took
            history = adapter.json("training.json")
            epochs = [{"measured": measured, "seconds": 0.0} for measured in history["validation"]]
            record = Record(epochs, 0.0, True, history["best_epoch"])
        else:
            return None
        last, key = made["settings"]["training"]["epochs"], key_of(made)
        for number, epoch in enumerate(record.epochs, start=1):
            ended = watch(number, epoch["measured"], epoch["seconds"]) if number < last else None
            if ended:
                done = record.epochs[:number]
                return Attempt(
                    ended[0], done, epoch["seconds"], reused=True, why=ended[1], trained_from=key, course=record.course
                )
        if record.error:
            return Attempt(
                "failed",
                record.epochs,
                record.seconds,
                reused=True,
                why=record.error,
                trained_from=key,
                course=record.course,
            )
        if not record.complete or (publish and adapter is None):
            return None
        digest = adapter.digest if adapter else None
        return Attempt(
            "finished",
            record.epochs,
            record.seconds,
            digest,
            reused=True,
            kept_epoch=record.kept_epoch,
            trained_from=key,
            course=record.course,
        )

    def _trained(
        self, name: str, resolved: Resolved, made: Mapping[str, Any], watch: Watch, share: float, publish: bool
    ) -> Attempt:
        settings = resolved.settings
        part = self._part(self.data(settings), settings, share)
        key = key_of(made)
        parent = self._lake.open(made["parent"]) if "parent" in made else None
        tags = {**self._job["tags"], TRAINED_FROM: key, PARENT: self._parent.run_id, "search_trial": name}
        if not publish:  # of this key is only who trained an adapter that is kept
            del tags[TRAINED_FROM]
        tracked = TrackedRun(self._job["mlflow"], made["task"], f"{made['task']} {name}", tags, live=self._live)
        course = {
            "run_id": tracked.run_id,
            "dagster_run_id": self._job["tags"][DAGSTER_RUN],
            "base_digest": made["base"],
            "started": datetime.now(UTC).isoformat(),
        }
        attempt = Attempt("finished", [], 0.0, trained_from=key, course=course)
        began = time.monotonic()
        reporter = Reporter(tracked, self._log, self._job, settings, part)

        def on_epoch(epoch: int, measured: dict[str, float]) -> None:
            reporter.epoch(epoch, measured)
            attempt.epochs.append({"measured": measured, "seconds": time.monotonic() - began})
            ended = watch(epoch, measured, attempt.epochs[-1]["seconds"]) if epoch < settings.training.epochs else None
            if ended:
                attempt.state, attempt.why = ended
                raise Pruned(attempt.why)

        trained: Trained | None = None
        lasting = True
        with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
            folder = Path(scratch) / "adapter"
            try:
                with suppress(Pruned):
                    trained = fit(
                        self._rows,
                        part,
                        resolve(settings.base.model),
                        settings,
                        folder,
                        describe=described(made, resolved.template, resolved.origins, self._environment),
                        device=self._environment.device,
                        memory=memory_of(self._environment),
                        kept=self._lower(made, share),
                        parent=parent.folder if parent else None,
                        on_step=reporter.step,
                        on_epoch=on_epoch,
                    )
                if trained:
                    attempt.kept_epoch = trained.history.best_epoch
                if trained and publish:
                    attempt.adapter = self._lake.publish("adapter", folder, made).digest
                    publish_trace(self._lake, attempt.adapter, trained)
            except TrainingError as error:  # these values do not train: others may
                attempt.state = "failed"
                attempt.why = str(error)
                lasting = not isinstance(error, OutOfMemory)  # another machine may have more
            except BaseException:
                tracked.finish("FAILED")
                raise
            attempt.seconds = time.monotonic() - began
            course["ended"] = datetime.now(UTC).isoformat()
            if lasting:
                self._keep(made, attempt, trained)
            _close(tracked, attempt, folder if attempt.adapter else None)
        return attempt

    def _keep(self, made: Mapping[str, Any], attempt: Attempt, trained: Trained | None) -> None:
        error = attempt.why if attempt.state == "failed" else ""
        record = Record(attempt.epochs, attempt.seconds, trained is not None, attempt.kept_epoch, error, attempt.course)
        with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
            (Path(scratch) / "record.json").write_text(json.dumps(asdict(record)))
            if trained is not None:
                np.save(Path(scratch) / OUTPUTS, trained.outputs)
            self._lake.publish(RECORD, Path(scratch), made)


def _close(tracked: TrackedRun, attempt: Attempt, folder: Path | None) -> None:
    status = {"finished": "FINISHED", "failed": "FAILED"}.get(attempt.state, "KILLED")
    tags: dict[str, str] = {"trial_state": attempt.state}
    if attempt.adapter:
        tags["adapter"] = attempt.adapter
    if attempt.why:
        tags["ended"] = attempt.why[:500]
    tracked.finish(status, folder, tags)


def _learning_curve(workshop: Workshop, best: Resolved, objective: Objective, budget: Budget) -> dict[str, Any]:
    """The trainings of the learning curve that the budget still allows, and what they tell."""

    def watch(epoch: int, measured: Mapping[str, float], seconds: float) -> tuple[State, str] | None:
        over = budget.over(seconds)
        return ("stopped", over) if over else None

    runs: list[Run] = []
    missing: list[str] = []
    for variant in variants(best):
        known = workshop.known(variant.resolved, variant.share)
        if known is None or variant.name != "all":  # the best trial is paid for
            if over := budget.over():
                missing.append(over)
                break
            name = f"learning curve, {variant.name} {variant.share:g}"
            attempt = workshop.train(name, variant.resolved, watch, variant.share, publish=False)
            budget.seconds += attempt.seconds
            known = workshop.known(variant.resolved, variant.share) if attempt.state == "finished" else None
            if known is None:
                missing.append(f"{name}: {attempt.why}")
                continue
        runs.append(Run(variant.name, workshop.rows(variant.resolved.settings, variant.share), *known))
    return answer(runs, workshop.targets(best.settings), objective, best.settings, "; ".join(missing))


if __name__ == "__main__":
    serve(search_job)
