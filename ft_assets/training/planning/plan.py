"""What a training will take before it runs: tokens, memory, time and money, for LoRA and full fine-tuning alike."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ft_assets.tasks import Task
from ft_assets.training.jobs import SPLITS
from ft_assets.training.planning.cost_model import CONFIDENCE, Calibration, Interval, calibrate
from ft_assets.training.planning.prices import CPU, hourly_price
from ft_assets.training.planning.workloads import (
    RECORDED_ROWS,
    Measured,
    Rows,
    Workload,
    keep,
    measure,
    recorded_runs,
    rows_of,
    run_entry,
    sample_of_splits,
    task_made,
)
from ft_assets.training.recipes import Resolved, Settings, of_transformers, resolve
from ft_resources.environments import Environment
from ft_resources.errors import SpecError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.usage import usable_cores

TRUNCATED_SHARE = 0.05
"""From this share of cut rows on, the plan advises more tokens."""
METHODS = ("lora", "full")


@dataclass(frozen=True)
class MethodPlan:
    """One way of training. Times in seconds, sizes in 1e6 bytes (MB)."""

    method: str
    chosen: bool
    """Whether the task asks for it."""
    trained_parameters: int
    total_parameters: int
    trained_share: float
    result_mb: float
    """Of the weights that are written."""
    memory_mb: Interval
    fits: bool
    """Whether the expected peak is within the memory there is."""
    seconds: Interval
    core_hours: Interval
    gpu_hours: Interval
    cost: Interval | None
    """In the plan's currency; None without a price for the device."""


@dataclass(frozen=True)
class Plan:
    """What a training of a task will take."""

    task: str
    base: str
    device: str
    precision: str
    rows_from: str
    """Where the rows were taken from."""
    rows: int
    validation_rows: int
    counted_rows: int
    tokens_per_epoch: int
    epochs: int
    tokens: int
    """Over all epochs, without padding."""
    steps: int
    max_tokens: int
    truncated_share: float
    longest: int
    dropped: int
    memory_mb: float
    """There is."""
    methods: list[MethodPlan]
    calibration: str
    currency: str
    advice: list[str]

    @property
    def chosen(self) -> MethodPlan:
        """The task's own method."""
        return next(one for one in self.methods if one.chosen)

    def json(self) -> str:
        """Everything above, intervals as `{expected, low, high}`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def plan(lake: Lake, ledger: Ledger, environment: Environment, task: Task, resolved: Resolved | None = None) -> Plan:
    """Plan the training of `task` on this machine; takes some ten seconds, nearly all of it a worker's imports.

    Args:
        resolved: Settings to plan for; default: those of the task file.

    Raises:
        SpecError: The recipe, an override or the base model is wrong; or the recipe is a plug-in trainer's.
        SourceError: There is no split yet and a source cannot be read.
        TrainingError: A label has no rows, no answer fits, or the settings do not fit the base model.
    """
    settings = (resolved or of_transformers(resolve(task))).settings
    rows = rows_of(lake, ledger, environment, task)
    recorded = recorded_runs(lake, ledger, environment, settings)
    methods = [settings.method, *(method for method in METHODS if method != settings.method)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        runs = [
            run_entry(folder, task_made(task), settings.model_copy(update={"method": method}), rows, timed=at == 0)
            for at, method in enumerate(methods)
        ]
        for one in recorded:
            if one.workload is None:
                made = one.made_from
                sample = sample_of_splits(lake, {split: made[split] for split in SPLITS}, RECORDED_ROWS)
                runs.append(run_entry(folder, made, Settings.model_validate(made["settings"]), sample, timed=False))
        measured = measure(runs, environment, folder)
    fresh = iter(measured.workloads[len(methods) :])
    observations = []
    for one in recorded:
        workload = one.workload or keep(one.cache, next(fresh))
        if workload.precision == measured.workloads[0].precision:
            observations.append(one.observation(workload, measured))
    calibration = calibrate(observations, measured.start_seconds)
    return _plan(task, settings, environment, rows, methods, measured, calibration, _qualities(ledger, task))


def _qualities(ledger: Ledger, task: Task) -> dict[str, float]:
    """Best validation figure of each method so far: accuracy, or of answers the negated loss."""
    runs = ledger.training_runs(task.name, status="FINISHED")
    score = runs["accuracy"] if task.spec.type == "text-classification" else -runs["loss"]
    best = score.dropna().groupby(runs["method"]).max()
    return {str(method): float(value) for method, value in best.items()}


# -- the plan -----------------------------------------------------------------------------------------------------


def _plan(
    task: Task,
    settings: Settings,
    environment: Environment,
    rows: Rows,
    methods: Sequence[str],
    measured: Measured,
    calibration: Calibration,
    qualities: Mapping[str, float],
) -> Plan:
    own = measured.workloads[0]
    gpu = measured.device == "cuda"
    remarks: list[str] = []
    price, currency = None, ""
    try:
        found = hourly_price(measured.device_name if gpu else CPU, environment.prices)
        price, currency = found.amount, found.currency
    except SpecError as error:
        remarks.append(f"No cost: {error}")
    planned = []
    for method, workload in zip(methods, measured.workloads, strict=False):
        seconds = calibration.seconds(measured.rates.seconds(workload.work(workload.tokens(settings.training.epochs))))
        memory = calibration.memory(workload.memory(measured.baseline_bytes))
        cores = seconds.times(usable_cores() / 3600)
        gpus = seconds.times(float(gpu) / 3600)
        written = workload.trained_parameters if method == "lora" else workload.total_parameters
        planned.append(
            MethodPlan(
                method,
                method == settings.method,
                workload.trained_parameters,
                workload.total_parameters,
                workload.trained_parameters / workload.total_parameters,
                written * 4 / 1e6,
                memory.times(1e-6),
                memory.expected <= measured.memory,
                seconds,
                cores,
                gpus,
                None if price is None else (gpus if gpu else cores).times(price),
            )
        )
    planned.sort(key=lambda one: METHODS.index(one.method))
    if environment.compute == "kubernetes":
        remarks.append("Training runs in a pod; these figures are for the machine that planned.")
    return Plan(
        task=task.name,
        base=settings.base.model,
        device=measured.device_name,
        precision=own.precision,
        rows_from=rows.origin,
        rows=own.rows,
        validation_rows=own.validation_rows,
        counted_rows=own.counted_rows,
        tokens_per_epoch=own.tokens_per_epoch,
        epochs=settings.training.epochs,
        tokens=own.tokens(settings.training.epochs),
        steps=own.steps,
        max_tokens=settings.base.max_tokens,
        truncated_share=own.truncated_share,
        longest=own.longest,
        dropped=own.dropped,
        memory_mb=measured.memory / 1e6,
        methods=planned,
        calibration=_calibrated_on(calibration, measured),
        currency=currency,
        advice=[*_advice(task, settings, own, planned, qualities), *remarks],
    )


def _calibrated_on(calibration: Calibration, measured: Measured) -> str:
    if not calibration.runs:
        return f"Not calibrated yet: computed from a few steps measured on {measured.device_name} just now."
    runs = f"{calibration.runs} recorded run{'s' * (calibration.runs > 1)}"
    return f"Calibrated on {runs} on {measured.device}; intervals hold {CONFIDENCE:.0%}."


def _advice(
    task: Task, settings: Settings, own: Workload, planned: Sequence[MethodPlan], qualities: Mapping[str, float]
) -> Iterator[str]:
    lora, full = planned
    figure = "accuracy" if task.spec.type == "text-classification" else "loss"
    if len(qualities) > 1:
        better = max(qualities, key=lambda method: qualities[method])
        shown = ", ".join(f"{method} {abs(value):.3f}" for method, value in sorted(qualities.items()))
        yield f"Use {better}: best validation {figure} so far is {shown}."
    elif not full.fits:
        yield "Use lora: full fine-tuning is expected to need more memory than there is."
    else:
        yield (
            f"Use lora unless its quality falls short: full fine-tuning takes {_ratio(full.seconds, lora.seconds)} the "
            f"time and {_ratio(full.memory_mb, lora.memory_mb)} the memory; no run of both has been recorded yet."
        )
    if own.truncated_share > TRUNCATED_SHARE:
        yield (
            f"{own.truncated_share:.0%} of the rows are cut at base.max_tokens {settings.base.max_tokens}: raise it; "
            f"the longest row has {own.longest} tokens."
        )
    if own.dropped:
        yield f"{own.dropped:,} rows are dropped, for their question alone fills base.max_tokens: raise it."
    if not next(one for one in planned if one.chosen).fits:
        yield (
            "The memory there is will hardly do: lower training.micro_batch_tokens or base.max_tokens, or set "
            "training.gradient_checkpointing."
        )
    if task.spec.search.trials > 1:
        yield f"The figures are for one training; the search adds up to {task.spec.search.trials} trials."


def _ratio(one: Interval, other: Interval) -> str:
    return f"{one.expected / other.expected:.1f} times"


# -- for people ---------------------------------------------------------------------------------------------------


def render(plan: Plan) -> RenderableType:
    """The plan as a table with both methods side by side, and lines below it."""
    table = Table(title=f"Plan: {plan.task}", title_justify="left")
    table.add_column("")
    for one in plan.methods:
        table.add_column(f"{one.method} (this task)" if one.chosen else one.method, justify="right")
    price = f"cost ({plan.currency})"
    for name, cells in (
        ("trained parameters", [f"{one.trained_parameters:,} ({one.trained_share:.2%})" for one in plan.methods]),
        ("result on disk", [f"{one.result_mb:,.1f} MB" for one in plan.methods]),
        ("peak memory", [_memory(one) for one in plan.methods]),
        ("time", [_between(one.seconds, _duration) for one in plan.methods]),
        ("core hours", [_between(one.core_hours, _amount) for one in plan.methods]),
        ("GPU hours", [_between(one.gpu_hours, _amount) for one in plan.methods]),
        (price, [_between(one.cost, _amount) if one.cost else "no price" for one in plan.methods]),
    ):
        if name != "GPU hours" or plan.chosen.gpu_hours.expected:
            table.add_row(name, *cells)
    sampled = f" (by a sample of {plan.counted_rows:,})" if plan.counted_rows < plan.rows + plan.dropped else ""
    lines = [
        f"{plan.rows:,} training and {plan.validation_rows:,} validation rows from {plan.rows_from}{sampled}",
        f"{plan.tokens_per_epoch:,} tokens an epoch, {plan.tokens:,} in all; {plan.epochs} epochs, {plan.steps:,} "
        f"steps; {plan.truncated_share:.1%} of rows cut to {plan.max_tokens} tokens, the longest has {plan.longest:,}; "
        f"{plan.dropped:,} dropped",
        f"{plan.base} on {plan.device} in {plan.precision}, {plan.memory_mb / 1e3:,.1f} GB of memory",
        plan.calibration,
    ]
    return Group(table, *map(Text, lines), *(Text(f"-> {line}", style="bold") for line in plan.advice))


def _between(interval: Interval, show: Any) -> str:
    return f"{show(interval.expected)} ({show(interval.low)} to {show(interval.high)})"


def _memory(one: MethodPlan) -> str:
    shown = _between(one.memory_mb, lambda value: f"{value / 1e3:.2f} GB")
    return shown if one.fits else f"{shown}, too much"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _amount(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"
