"""`ft plan`, `reproduce`, `watch` and `experiments`: before, during and after a training."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from ft_assets.grouping import GROUPS, Group, Status
from ft_assets.terminal import MARKS, HomeOption, TaskArgument, console, make_table, open_platform, told

app = typer.Typer()


@app.command()
def plan(
    task: TaskArgument,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """What a training will take before it runs: tokens, memory, time, money; LoRA beside full fine-tuning."""
    with told():
        from ft_assets.training.planning.plan import render

        found = open_platform(home).plan(task)
        if as_json:
            typer.echo(found.json())
        else:
            console.print(render(found))


@app.command()
def reproduce(
    adapter: Annotated[str, typer.Argument(help="Digest of an adapter or its start, or a task: its newest adapter.")],
    home: HomeOption = None,
) -> None:
    """Train an adapter again and compare every tensor. Exit code 1 if it differs by more than it declares."""
    with told():
        with console.status("training again") as status:
            found = open_platform(home).reproduce(adapter, show=status.update)
        if found.tensors:
            table = make_table("tensor", "then", "now")
            for name, (then, now) in list(found.tensors.items())[:20]:
                table.add_row(name, then, now)
            console.print(table)
        for name, (then, now) in found.changed.items():
            console.print(f"{name}: {then} then, {now} now", markup=False)
        console.print(f"{MARKS['passed' if found.acceptable else 'refused']}{found.verdict}")
    if not found.acceptable:
        raise typer.Exit(1)


@app.command()
def watch(
    run: Annotated[str, typer.Argument(help="Task name (its newest run), Dagster run id or its start, MLflow run id.")],
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
    home: HomeOption = None,
) -> None:
    """Watch a run: state, step, loss, time left, memory. Ends with the run, with exit code 1 if that failed."""
    with told():
        from ft_assets.watching import watch as show

        state = show(open_platform(home).watched(run), console, once=once)
    if state.succeeded is False:
        raise typer.Exit(1)


@app.command()
def experiments(
    task: Annotated[str | None, typer.Argument(help="Task name; without one, all tasks.")] = None,
    min_accuracy: Annotated[float | None, typer.Option("--min-accuracy", help="At least, on validation rows.")] = None,
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="Took at most this long.")] = None,
    since: Annotated[datetime | None, typer.Option("--since", help="Started then or later (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option("--until", help="Started before (UTC).")] = None,
    status: Annotated[Status | None, typer.Option("--status", case_sensitive=False, help="How it ended.")] = None,
    by: Annotated[Group | None, typer.Option("--by", help="Count and sum instead of listing.")] = None,
    home: HomeOption = None,
) -> None:
    """Every training that ended: what it was made from, what it took, what it reached; the newest first."""
    with told():
        platform = open_platform(home)
        if by is not None:
            _show_statistics(platform.experiment_statistics(GROUPS[by], task), by)
            return
        found = platform.experiments(
            task,
            status=status.value if status else None,
            min_accuracy=min_accuracy,
            max_seconds=max_seconds,
            since=since and since.replace(tzinfo=UTC),
            until=until and until.replace(tzinfo=UTC),
        )
        _show_experiments(found)


def _show_experiments(found: Any) -> None:
    names = ("started", "task", "run", "ended", "base", "method", "recipe", "rows", "accuracy", "macro-F1", "loss")
    table = make_table(*names, "seconds", "tokens/s", "peak GB", "GPU GB", "Wh", "cost")
    found = found.assign(speed=found["tokens"] / found["wall_seconds"])
    for row in found.itertuples():
        table.add_row(
            f"{row.started:%Y-%m-%d %H:%M:%S}",
            row.task,
            row.run_id[:8],
            row.status.lower() + (f": {row.error}" if row.error else ""),
            row.base,
            row.method,
            row.template,
            _number(row.rows, "{:,}"),
            _number(row.accuracy, "{:.3f}"),
            _number(row.macro_f1, "{:.3f}"),
            _number(row.loss, "{:.3f}"),
            _number(row.wall_seconds, "{:.1f}"),
            _number(row.speed, "{:,.0f}"),
            _number(row.peak_memory_bytes, "{:.2f}", 1e-9),
            _number(row.peak_gpu_memory_bytes, "{:.2f}", 1e-9),
            _number(row.energy_wh, "{:.2f}"),
            _number(row.cost, "{:.4f}"),
        )
    console.print(table)


def _show_statistics(found: Any, by: "Group") -> None:
    table = make_table(by.value, "runs", "finished", "failed", "pruned", "best accuracy", "mean", "best macro-F1")
    for column in ("mean seconds", "seconds", "peak GB", "Wh", "cost", "newest"):
        table.add_column(column, overflow="fold")
    for row in found.to_dict("records"):
        table.add_row(
            str(row[GROUPS[by]])[: 12 if by is Group.dataset else None],
            *(str(row[column]) for column in ("runs", "finished", "failed", "pruned")),
            *(_number(row[column], "{:.3f}") for column in ("best_accuracy", "mean_accuracy", "best_macro_f1")),
            *(_number(row[column], "{:.1f}") for column in ("mean_seconds", "seconds")),
            _number(row["peak_memory_bytes"], "{:.2f}", 1e-9),
            _number(row["energy_wh"], "{:.2f}"),
            _number(row["cost"], "{:.4f}"),
            f"{row['newest']:%Y-%m-%d %H:%M:%S}",
        )
    console.print(table)


def _number(value: Any, form: str, scale: float = 1) -> str:
    """The number as text, a dash when it is not known."""
    import pandas as pd

    return "-" if pd.isna(value) else form.format(value * scale)
