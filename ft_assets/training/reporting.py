"""What people and the tracker are told of a training while it runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_assets.training.engine.batching import steps_per_epoch
from ft_assets.training.recipes import Settings
from ft_assets.worker import Progress
from ft_resources.environments import Environment
from ft_resources.provenance import code
from ft_resources.tracking import TrackedRun

if TYPE_CHECKING:
    from ft_assets.training.engine.runs import Data
    from ft_assets.training.engine.trainer import Step


class Log:
    """Lines for people: to the Dagster run's log as they come, and kept for the results folder."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.lines: list[str] = []

    def say(self, line: str, *, force: bool = False) -> None:
        self.lines.append(line)
        self._progress(line, force=force)

    def warn(self, line: str) -> None:
        self.say(f"warning: {line}", force=True)


class Reporter:
    """Streams the steps and epochs of one run; a process that does not lead has no tracker."""

    def __init__(
        self, tracked: TrackedRun | None, log: Log, job: Mapping[str, Any], settings: Settings, data: "Data"
    ) -> None:
        self._tracked, self._log, self._validation = tracked, log, len(data.validation.examples)
        training = data.training
        lost = f"{training.cut} cut to {settings.base.max_tokens} tokens, {training.dropped} dropped"
        log.say(f"{len(training.examples)} training rows, {lost}; the longest has {training.longest}", force=True)
        if tracked:
            steps = steps_per_epoch(len(training.examples), settings.training.batch_size)
            tracked.params(
                {
                    **flat(settings.model_dump()),
                    "template": job["template"],
                    "rows": len(training.examples),
                    "rows_cut": training.cut,
                    "steps": steps * settings.training.epochs,
                    "epochs": settings.training.epochs,
                    **tracked_code(),
                }
            )

    def step(self, step: "Step") -> None:
        if self._tracked:
            self._tracked.metrics(
                {
                    "loss": step.loss,
                    "learning_rate": step.learning_rate,
                    "epoch": step.epoch,
                    "tokens": step.tokens,
                    "tokens_per_second": step.tokens_per_second,
                    "eta_seconds": step.eta_seconds,
                },
                step.step,
            )
        self._log.say(
            f"step {step.step}/{step.steps}, epoch {step.epoch}, loss {step.loss:.3f}, "
            f"{step.tokens_per_second:,.0f} tokens/s, about {step.eta_seconds:.0f} s left"
        )

    def epoch(self, epoch: int, measured: Mapping[str, float]) -> None:
        if self._tracked:
            self._tracked.metrics({f"validation_{name}": value for name, value in measured.items()}, epoch)
        figures = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        self._log.say(f"epoch {epoch} on {self._validation} validation rows: {figures}", force=True)


def tracked_code() -> dict[str, Any]:
    """The platform's commit as parameters of an MLflow run."""
    commit = code()
    return {"code_commit": commit["commit"], "code_dirty": commit["dirty"]}


def expected_device(environment: Environment) -> str:
    """The device a training will use, told before torch is imported: as asked, else a GPU if its driver is there."""
    return environment.device or ("cuda" if Path("/proc/driver/nvidia").exists() else "cpu")


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as dotted paths and values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
