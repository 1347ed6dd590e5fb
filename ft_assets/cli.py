"""`ft`: a thin command line over the Python asset API."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ft_resources.errors import FtError

if TYPE_CHECKING:
    from ft_resources.training_runs import Grouping

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fine-tune LoRA adapters on your own rows: from a task file to a release that answers and is watched.",
)
task_app = typer.Typer(no_args_is_help=True, help="Task files: check, add, list.")
recipe_app = typer.Typer(no_args_is_help=True, help="Recipes: list, show their forms.")
release_app = typer.Typer(no_args_is_help=True, help="What is live, what was live when, overrule, go back.")
app.add_typer(task_app, name="task")
app.add_typer(recipe_app, name="recipe")
app.add_typer(release_app, name="release")
WIDE = None if sys.stdout.isatty() else 200  # nothing is cut for a file or a pipe
console = Console(highlight=False, soft_wrap=True, width=WIDE)
complaints = Console(stderr=True, highlight=False, soft_wrap=True)

HomeOption = Annotated[Path | None, typer.Option("--home", help="Platform home; default FT_HOME, else .ft here.")]
TaskArgument = Annotated[str, typer.Argument(help="Task name, as in its file.")]
Because = Annotated[str, typer.Option("--because", help="Why; recorded with your name.")]


class Status(StrEnum):
    """How a training ended."""

    finished = "FINISHED"
    failed = "FAILED"
    pruned = "PRUNED"


class Group(StrEnum):
    """What trainings are counted by."""

    base = "base"
    dataset = "dataset"
    recipe = "recipe"
    method = "method"
    task = "task"


GROUPS: "dict[Group, Grouping]" = {
    Group.base: "base",
    Group.dataset: "training_rows_digest",
    Group.recipe: "template",
    Group.method: "method",
    Group.task: "task",
}
MARKS = {
    "made": "[green]made[/green]    ",
    "passed": "[green]pass[/green]    ",
    "refused": "[bold red]REFUSED[/bold red] ",
    "warned": "[yellow]note[/yellow]    ",
    "failed": "[bold red]FAILED[/bold red]  ",
    "note": "        ",
}


def show_line(line: Any) -> None:
    """One line of a run, as `ft run` and the demo print it."""
    from rich.markup import escape

    subject = f"{line.subject}: " if line.subject and line.kind != "note" else ""
    console.print(f"[dim]{line.seconds:6.1f}s[/dim]  {MARKS[line.kind]}{escape(subject + line.text)}")


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def _told() -> Iterator[None]:
    """Typed errors end the command with a sentence and exit code 2, without a stack trace."""
    from rich.markup import escape

    try:
        yield
    except FtError as error:
        complaints.print(f"[bold red]{type(error).__name__}[/bold red] {escape(str(error))}")
        raise typer.Exit(2) from None


def _open(home: Path | None) -> Any:
    from ft_assets.platform import Platform

    return Platform.open(home)


@task_app.command("check")
def task_check(file: Annotated[Path, typer.Argument(help="Task file.")], home: HomeOption = None) -> None:
    """Validate a task file; an error names file, line, field, what was expected and the nearest valid name."""
    with _told():
        task, resolved = _open(home).check_task(file)
        console.print(f"[green]valid[/green]: task {task.name}, {task.spec.type}, recipe {resolved.template}")
        table = _table("setting", "value", "from")
        for path, origin in resolved.origins.items():
            value: Any = resolved.settings.model_dump()
            for part in path.split("."):
                value = value[part]
            table.add_row(path, str(value), origin)
        console.print(table)


@task_app.command("add")
def task_add(file: Annotated[Path, typer.Argument(help="Task file.")], home: HomeOption = None) -> None:
    """Validate a task file and register it: `ft run` and the Dagster UI know it from then on."""
    with _told():
        task = _open(home).add_task(file)
        console.print(f"[green]added[/green] {task.name} ({task.path}). Next: ft run {task.name}")


@task_app.command("list")
def task_list(home: HomeOption = None) -> None:
    """Every task file that is found, what is live for it, and the files that do not parse."""
    with _told():
        platform = _open(home)
        tasks, errors = platform.tasks.load()
        table = _table("task", "type", "recipe", "live", "file")
        for name, task in sorted(tasks.items()):
            live = platform.ledger.live_release(name)
            table.add_row(
                name,
                task.spec.type,
                task.spec.recipe,
                f"version {live['model_version']}" if live else "-",
                str(task.path),
            )
        console.print(table)
        for error in errors:
            complaints.print(f"[red]{error}[/red]")


@recipe_app.command("list")
def recipe_list(home: HomeOption = None) -> None:
    """Every published recipe: what it trains, on which base model."""
    with _told():
        table = _table("recipe", "types", "base model", "description")
        for one in _open(home).published_recipes():
            table.add_row(f"{one.name}@{one.version}", ", ".join(one.types), one.settings.base.model, one.description)
        console.print(table)


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    basic: Annotated[bool, typer.Option("--basic/--advanced", help="Five fields, or every setting.")] = True,
    home: HomeOption = None,
) -> None:
    """The form that fills in a recipe, as JSON Schema with the recipe's values as defaults."""
    with _told():
        found = _open(home).recipe_form(recipe, "basic" if basic else "advanced")
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))


@app.command()
def run(
    task: TaskArgument,
    only: Annotated[list[str] | None, typer.Option("--only", help="Materialise just this asset; repeatable.")] = None,
    because: Because = "asked for with ft run",
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and leave it running.")] = False,
    run_id: Annotated[str | None, typer.Option("--run-id", hidden=True)] = None,
    home: HomeOption = None,
) -> None:
    """Take a task from its raw rows through training, evaluation and gates to a live release."""
    with _told():
        if detach:
            submitted = _open(home).submit(task, only=only or (), because=because)
            console.print(submitted)
            complaints.print(f"Follow it with: ft watch {submitted[:8]}. Its state: ft status {submitted[:8]}")
            return
        outcome = _open(home).materialise(task, only=only or (), because=because, show=show_line, run_id=run_id)
        _verdict(outcome, task, home)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="As of ft watch; without one, the newest runs.")] = None,
    home: HomeOption = None,
) -> None:
    """How a run stands, or the newest ones. Exit code 1 if the one that was asked for failed."""
    with _told():
        from ft_assets.watching import line

        platform = _open(home)
        states = [platform.status(run)] if run else platform.recent()
        for state in states:
            console.print(line(state), markup=False)
    if run and states[0].succeeded is False:
        raise typer.Exit(1)


@app.command()
def plan(
    task: TaskArgument,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    home: HomeOption = None,
) -> None:
    """What a training will take before it runs: tokens, memory, time, money; LoRA beside full fine-tuning."""
    with _told():
        from ft_assets.training.planning.plan import render

        found = _open(home).plan(task)
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
    with _told():
        with console.status("training again") as status:
            found = _open(home).reproduce(adapter, show=status.update)
        if found.tensors:
            table = _table("tensor", "then", "now")
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
    with _told():
        from ft_assets.watching import watch as show

        state = show(_open(home).watched(run), console, once=once)
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
    with _told():
        platform = _open(home)
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


@app.command()
def monitor(
    task: TaskArgument,
    day: Annotated[str, typer.Argument(help="ISO day of the traffic, such as 2002-08-31.")],
    home: HomeOption = None,
) -> None:
    """Compact and judge one day of a task's traffic."""
    with _told():
        _verdict(_open(home).monitor(task, day, show=show_line), task, home)


@app.command()
def report(task: TaskArgument, home: HomeOption = None) -> None:
    """The newest evaluation: metrics beside baselines and champion, the gates' verdict, the HTML page's path."""
    with _told():
        from ft_assets.evaluation.gate import decide

        platform = _open(home)
        found = platform.report(task)
        table = _table("model", *found.models["candidate"])
        for name, metrics in found.models.items():
            table.add_row(name, *(f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for i in metrics.values()))
        console.print(table)
        decision = decide(found, platform.tasks.get(task).spec.gates)
        for name, gate in decision.gates.items():
            console.print(f"{MARKS['passed' if gate.passed else 'refused']}{name}: {gate.reason}")
        console.print(decision.verdict)
        console.print(f"Page: {platform.report_page(task)}")


@app.command()
def predict(
    task: TaskArgument,
    texts: Annotated[list[str], typer.Argument(help="Texts to answer; '-' reads one a line from standard input.")],
    version: Annotated[
        str | None, typer.Option("--version", help="A released version instead of the live one.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Answer texts with the live release, in this process; logged like the service's answers."""
    with _told():
        inputs = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
        for answer in _open(home).predict(task, inputs, model_version=version):
            console.print(f"{answer.label}  {answer.confidence:.3f}  [dim]{answer.prediction_id}[/dim]")


@app.command()
def trace(
    prediction: Annotated[str, typer.Argument(help="A prediction_id, or a row id with --task.")],
    task: Annotated[str | None, typer.Option("--task", help="Trace a row of this task instead of an answer.")] = None,
    rows: Annotated[int, typer.Option("--rows", help="How many training rows to show.")] = 5,
    home: HomeOption = None,
) -> None:
    """From an answer back to the decision, the adapter and the rows it learned from; or from a row to its adapters."""
    with _told():
        platform = _open(home)
        if task is not None:
            console.print_json(json.dumps(platform.trace_row(task, prediction), default=str))
            return
        found = platform.trace(prediction)
        answer = found.prediction
        console.print(
            f"answer   {answer['label']} ({answer['confidence']:.3f}) at {answer['answered_at']:%Y-%m-%d %H:%M:%S}"
        )
        if found.release:
            one = found.release
            console.print(f"release  {one['id']}, version {one['model_version']}, by {one['actor']}: {one['because']}")
        console.print(f"recipe   {found.adapter['template']} on {found.adapter['base']['model']}")
        for name, digest in found.digests.items():
            console.print(f"{name:17}{digest}")
        console.print(f"trained on {len(found.rows)} rows, the first {min(rows, len(found.rows))} (more: --rows N):")
        table = _table("row", "label", "source")
        for row in found.rows.head(rows).itertuples():
            table.add_row(row.row_id, row.label, row.source)
        console.print(table)


@release_app.command("history")
def release_history(
    task: TaskArgument,
    at: Annotated[datetime | None, typer.Option("--at", help="Only what was live at this moment (UTC).")] = None,
    home: HomeOption = None,
) -> None:
    """Every decision for a task: what was live when, who decided, on which report."""
    with _told():
        if at is not None:
            route = _open(home).live_at(task, at.replace(tzinfo=UTC))
            console.print_json(json.dumps(route, default=str)) if route else console.print("nothing was live then")
            return
        table = _table("from", "release", "kind", "version", "adapter", "by", "because")
        for one in _open(home).history(task):
            table.add_row(
                f"{one['created_at']:%Y-%m-%d %H:%M:%S}",
                one["id"],
                one["kind"],
                one["model_version"],
                one["adapter"][:12],
                one["actor"],
                one["because"],
            )
        console.print(table)


@release_app.command("approve")
def release_approve(
    task: TaskArgument,
    because: Annotated[str, typer.Option(help="Why the gates are overruled.")],
    home: HomeOption = None,
) -> None:
    """Overrule the gates for the newest candidate. Recorded with your name and reason, and shown in the history."""
    with _told():
        release = _open(home).approve(task, because=because)
        console.print(f"[yellow]approved[/yellow]: version {release['model_version']} is live as {release['id']}")


@release_app.command("rollback")
def release_rollback(
    task: TaskArgument,
    because: Annotated[str, typer.Option(help="Why.")],
    to: Annotated[str | None, typer.Option("--to", help="A release id; default the adapter before.")] = None,
    home: HomeOption = None,
) -> None:
    """Make an earlier adapter live again: one row, in effect in under a second, nothing restarts."""
    with _told():
        release = _open(home).roll_back(task, to=to, because=because)
        console.print(f"[green]version {release['model_version']}[/green] is live again as {release['id']}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port.")] = 3000,
    host: Annotated[str, typer.Option(help="Address; callers from elsewhere need a key of FT_API_KEYS.")] = "127.0.0.1",
    home: HomeOption = None,
) -> None:
    """Serve every released task over HTTP with `bentoml serve`; releases and rollbacks need no restart."""
    from ft_resources.environments import REPOSITORY
    from ft_resources.serving import SERVICE, require_free

    _open(home)
    with _told():
        require_free(host, port)
    os.chdir(REPOSITORY)
    program = str(Path(sys.executable).with_name("bentoml"))
    os.execv(program, [program, "serve", SERVICE, "--host", host, "--port", str(port)])


@app.command()
def dev(port: Annotated[int, typer.Option(help="Port.")] = 3001, home: HomeOption = None) -> None:
    """Open the Dagster UI with its daemon: the asset graph, checks, plots, sensors."""
    from ft_resources.environments import REPOSITORY

    _open(home)
    os.chdir(REPOSITORY)
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-w", "workspace.yaml", "--port", str(port)])


@app.command()
def mlflow(port: Annotated[int, typer.Option(help="Port.")] = 5000, home: HomeOption = None) -> None:
    """Open the MLflow UI: runs step by step, registered versions, model cards."""
    uri = _open(home).environment.mlflow
    program = str(Path(sys.executable).with_name("mlflow"))
    os.execv(program, [program, "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)])


def _show_experiments(found: Any) -> None:
    names = ("started", "task", "run", "ended", "base", "method", "recipe", "rows", "accuracy", "macro-F1", "loss")
    table = _table(*names, "seconds", "tokens/s", "peak GB", "GPU GB", "Wh", "cost")
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
    table = _table(by.value, "runs", "finished", "failed", "pruned", "best accuracy", "mean", "best macro-F1")
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


def _verdict(outcome: Any, task: str, home: Path | None) -> None:
    if outcome.succeeded:
        console.print(f"[bold green]done[/bold green] (run {outcome.run_id})")
        return
    complaints.print(f"[bold red]stopped[/bold red] (run {outcome.run_id})")
    for reason in outcome.refusals:
        complaints.print(f"  refused by {reason}", markup=False)
    if outcome.failure:
        complaints.print(f"  {outcome.failure}", markup=False)
    if outcome.results:
        complaints.print(f"  What was known when it failed, and what to try: {outcome.results}", markup=False)
    if any(reason.startswith("eval_report.") for reason in outcome.refusals):
        complaints.print(f"  Page: {_open(home).report_page(task)}", markup=False)
        complaints.print(f"  A person can overrule it: ft release approve {task} --because TEXT", markup=False)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `ft` program."""
    app()


if __name__ == "__main__":
    main()
