"""Watching a run from the terminal: its state from Dagster where that is at hand, its training from MLflow.

MLflow alone is enough, so that a run can be watched from any machine that reaches the tracker.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ft_assets.submitting import RUN_ID
from ft_resources.errors import FtError
from ft_resources.tracking import DAGSTER_RUN, client, curve, training, trainings

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console, RenderableType

POLL_SECONDS = 1.0
MOST_SEARCHED = 5000
BARS = "▁▂▃▄▅▆▇█"
ENDED = {"FINISHED": True, "FAILED": False, "KILLED": False}
"""MLflow's states of a run that is over -> whether it ended well."""


class UnknownRun(FtError):
    """No run is called so, or more than one."""

    code = "unknown_run"


@dataclass(frozen=True)
class State:
    """A run at one moment; None and empty where nothing is known yet."""

    name: str
    state: str
    """Dagster's status (`STARTED`, `SUCCESS`, ...), or MLflow's (`RUNNING`, `FINISHED`, ...) without it."""
    succeeded: bool | None
    """None while it runs."""
    stage: str = ""
    """Assets that are being made."""
    training: str | None = None
    """MLflow run id of the newest training."""
    step: int | None = None
    steps: int | None = None
    epochs: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Newest value of each metric."""
    losses: Sequence[float] = ()
    """Training loss of every step so far."""
    run_id: str = ""
    """Of the Dagster run; empty for a training that had none."""
    task: str = ""
    failure: str = ""
    """Why a run ended that never began."""
    resumed_as: str = ""
    """Of a run that gave way to another one: the run that goes on."""

    @classmethod
    def of(cls, run: "dg.DagsterRun", **more: Any) -> "State":
        """What Dagster knows of a run, and `more`."""
        from ft_assets.preemption import RESUMED_AS

        partition = run.tags.get("dagster/partition", run.job_name)
        task = run.tags.get("dagster/partition/task", partition)  # of a day of a task
        succeeded = run.is_success if run.is_finished else None
        name, resumed_as = f"{partition} {run.run_id[:8]}", run.tags.get(RESUMED_AS, "")
        return cls(name, _status(run), succeeded, run_id=run.run_id, task=task, resumed_as=resumed_as, **more)

    @property
    def epoch(self) -> int | None:
        """The epoch that the step is in, from 1."""
        if self.step is None or not self.steps or not self.epochs:
            return None
        return min(self.epochs, max(1, -(-self.step * self.epochs // self.steps)))


class Watched:
    """One run that is watched, found by any of its names.

    Args:
        uri: MLflow tracking URI.
        instance: The Dagster instance of this machine; it need not know the run.
        name: Dagster run id or the start of one, task name (its newest run), or MLflow run id.

    Raises:
        UnknownRun: No run is called so, or several ids start so; it lists the newest ones.
    """

    def __init__(self, uri: str, instance: "dg.DagsterInstance", name: str) -> None:
        self._uri, self._instance = uri, instance
        self._dagster: str | None = None
        self._training: str | None = None
        self.name = name
        if RUN_ID.fullmatch(name) and instance.has_run(name):
            self._dagster = name
        elif not (self._is_task(name) or self._is_training(name) or self._is_run(name)):
            raise self._unknown(f"there is no run, and no task with a run, that is called '{name}'")

    def _is_task(self, name: str) -> bool:
        import dagster as dg

        if not re.fullmatch(r"[a-z0-9.-]+", name):
            return False
        of_task = dg.RunsFilter(tags={"dagster/partition": name})
        here = self._instance.get_run_records(of_task, limit=1)
        there = trainings(self._uri, task=name, most=1)
        trained_in = there[0].data.tags.get(DAGSTER_RUN) if there else None
        # another machine's run is the newer one when its training began after the newest run that is known here
        if here and not (there and there[0].info.start_time / 1000 > here[0].create_timestamp.timestamp()):
            self._dagster = here[0].dagster_run.run_id
        elif there:
            self._dagster, self._training = trained_in, None if trained_in else there[0].info.run_id
        return bool(here or there)

    def _is_training(self, name: str) -> bool:
        found = training(self._uri, name)
        self._training = found.info.run_id if found else None
        return found is not None

    def _is_run(self, name: str) -> bool:
        if not re.fullmatch(r"[0-9a-f-]{1,36}", name):
            return False
        here = self._instance.get_run_ids(limit=MOST_SEARCHED)
        there = [run.data.tags[DAGSTER_RUN] for run in trainings(self._uri, dagster_run=name)]
        found = sorted({run_id for run_id in (*here, *there) if run_id.startswith(name)})
        if len(found) > 1:
            raise self._unknown(f"{len(found)} runs start with '{name}', such as {found[0]} and {found[1]}")
        if found:
            self._dagster = found[0]
        return bool(found)

    def _unknown(self, what: str) -> UnknownRun:
        newest = [
            f"{run.run_id[:8]} ({run.tags.get('dagster/partition', run.job_name)}, {run.status.value.lower()})"
            for run in self._instance.get_runs(limit=5)
        ]
        if not newest:
            newest = [
                f"{run.data.tags.get(DAGSTER_RUN, run.info.run_id)[:8]} "
                f"({run.data.tags.get('task', run.info.run_name)}, {run.info.status.lower()})"
                for run in trainings(self._uri, most=5)
            ]
        known = f"The newest: {', '.join(newest)}." if newest else "There are none yet: start one with ft run TASK."
        return UnknownRun(what, where="RUN", mend=known)

    def read(self) -> State:
        """The run as it is now."""
        run = self._newest_training()
        told = {"training": run.info.run_id, **self._progress(run)} if run is not None else {}
        dagster_run = self._instance.get_run_by_id(self._dagster) if self._dagster else None
        if dagster_run is not None:
            stage = "" if dagster_run.is_finished else self._stage(dagster_run.run_id)
            return State.of(dagster_run, stage=stage, **told)
        task = run.data.tags.get("task", "") if run is not None else ""
        state = run.info.status if run is not None else "UNKNOWN"
        name = f"{task} {(self._dagster or self._training or '')[:8]}".strip()
        return State(name, state, ENDED.get(state), run_id=self._dagster or "", task=task, **told)

    def _newest_training(self) -> Any:
        if self._dagster is None:
            return client(self._uri).get_run(self._training)
        runs = trainings(self._uri, dagster_run=self._dagster)
        begun = [run for run in runs if "loss" in run.data.metrics]  # the run of a whole search has none
        running = [run for run in begun if run.info.status == "RUNNING"]
        return next(iter(running or begun or runs), None)

    def _progress(self, run: Any) -> dict[str, Any]:
        history = curve(self._uri, run.info.run_id, "loss")
        params = run.data.params
        return {
            "step": max((step for step, _ in history), default=None),
            "steps": _whole(params.get("steps")),
            "epochs": _whole(params.get("epochs", params.get("training.epochs"))),
            "metrics": dict(run.data.metrics),
            "losses": [value for _, value in history],
        }

    def _stage(self, run_id: str) -> str:
        steps = self._instance.get_run_step_stats(run_id)
        return ", ".join(step.step_key for step in steps if step.start_time and not step.end_time)

    def states(self) -> Iterator[State]:
        """The run again and again, about once a second, until it is over; reading takes a fifth of the time at most."""
        while True:
            began = time.monotonic()
            state = self.read()
            took = time.monotonic() - began
            yield state
            if state.succeeded is not None:
                return
            time.sleep(max(POLL_SECONDS, 4 * took))


def _status(run: "dg.DagsterRun") -> str:
    """Dagster's word; of a run that was stopped for another one, where it goes on."""
    from ft_assets.preemption import ENDED, RESUMED_AS, STATE

    if run.tags.get(STATE, ENDED) == ENDED or run.is_success:
        return run.status.value
    resumed = run.tags.get(RESUMED_AS)
    return f"PREEMPTED, goes on as {resumed[:8]}" if resumed else "PREEMPTED"


def watch(watched: Watched, console: "Console", *, once: bool = False) -> State:
    """Show a run until it is over: a view that stays in place in a terminal, else one line for each change.

    Args:
        once: Show the present state and return.

    Returns:
        The last state seen.
    """
    if once:
        state = watched.read()
        console.print(panel(state) if console.is_terminal else line(state), markup=False)
        return state
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            return _last(watched, lambda state: live.update(panel(state), refresh=True))
    shown = ""

    def print_change(state: State) -> None:
        nonlocal shown
        validation = {name: value for name, value in state.metrics.items() if name.startswith("validation_")}
        change = repr((state.state, state.stage, state.training, state.step, validation))
        if change != shown:
            shown = change
            console.print(line(state), markup=False)

    return _last(watched, print_change)


def _last(watched: Watched, show: Callable[[State], None]) -> State:
    for state in watched.states():
        show(state)
    return state


def line(state: State) -> str:
    """The state in one line."""
    parts = [state.name, f"{state.state}: {state.failure}" if state.failure else state.state]
    if state.stage:
        parts.append(f"making {state.stage}")
    if state.step is not None:
        parts.append(f"step {_of(state.step, state.steps)}")
    if state.epoch is not None:
        parts.append(f"epoch {_of(state.epoch, state.epochs)}")
    parts += [f"{name} {value}" for name, value in _figures(state).items()]
    return "  ".join(parts)


def panel(state: State) -> "RenderableType":
    """The state as a view for a terminal."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    style = {None: "yellow", True: "bold green", False: "bold red"}[state.succeeded]
    table = Table.grid(padding=(0, 2))
    table.add_row("state", Text(state.state, style=style))
    if state.stage:
        table.add_row("making", Text(state.stage))
    if state.step is not None:
        table.add_row("step", _of(state.step, state.steps))
        if state.steps:
            table.add_row("", ProgressBar(total=state.steps, completed=state.step, width=40))
    if state.epoch is not None:
        table.add_row("epoch", _of(state.epoch, state.epochs))
    for name, value in _figures(state).items():
        chart = f"  {sparkline(state.losses)}" if name == "loss" else ""
        table.add_row(name, Text(value + chart))
    return Panel(table, title=Text(state.name), title_align="left", width=76)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """`values` as a line of block characters, lowest to highest; more than `width` are averaged in equal parts."""
    import numpy as np

    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, len(finite)))])
    spread = means.max() - means.min()
    heights = (means - means.min()) / spread * (len(BARS) - 1) if spread else np.zeros(len(means))
    return "".join(BARS[round(float(height))] for height in heights)


def _figures(state: State) -> dict[str, str]:
    """The metrics that people look at, in their order, as text."""
    metrics = state.metrics
    running = state.succeeded is None
    formats: dict[str, tuple[str, str]] = {
        "loss": ("loss", "{:.4f}"),
        "learning_rate": ("learning rate", "{:.2e}"),
        "tokens_per_second": ("tokens/s", "{:,.0f}"),
        **({"eta_seconds": ("left", "{}")} if running else {}),
        "memory_gb": ("memory", "{:.2f} GB"),
        **({"cpu_utilisation": ("CPU", "{:.0f} %"), "gpu_utilisation": ("GPU", "{:.0f} %")} if running else {}),
        "gpu_memory_gb": ("GPU memory", "{:.2f} GB"),
    }
    figures = {}
    for metric, (name, form) in formats.items():
        if metric in metrics:
            value = metrics[metric]
            figures[name] = _duration(value) if metric == "eta_seconds" else form.format(value)
    for metric, value in sorted(metrics.items()):
        if metric.startswith("validation_"):
            figures[metric.replace("_", " ", 1)] = f"{value:.4f}"
    return figures


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _of(part: int, whole: int | None) -> str:
    return f"{part}/{whole}" if whole else str(part)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
