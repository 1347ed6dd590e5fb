"""`ft`: a thin command line over the Python asset API."""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_assets import cli_export, cli_keys, cli_serving, cli_tracking, cli_training
from ft_assets.terminal import (
    MARKS,
    HomeOption,
    TaskArgument,
    complaints,
    console,
    make_table,
    open_platform,
    show_line,
    told,
)

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
app.add_typer(cli_keys.app, name="key")
app.add_typer(cli_tracking.app, name="tracking")
app.add_typer(cli_training.app)
app.add_typer(cli_export.app)
app.add_typer(cli_serving.app)
Because = Annotated[str, typer.Option("--because", help="Why; recorded with your name.")]


@task_app.command("check")
def task_check(file: Annotated[Path, typer.Argument(help="Task file.")], home: HomeOption = None) -> None:
    """Validate a task file; an error names file, line, field, what was expected and the nearest valid name."""
    with told():
        task, resolved = open_platform(home).check_task(file)
        console.print(f"[green]valid[/green]: task {task.name}, {task.spec.type}, recipe {resolved.template}")
        table = make_table("setting", "value", "from")
        for path, origin in resolved.origins.items():
            value: Any = resolved.settings.model_dump()
            for part in path.split("."):
                value = value[part]
            table.add_row(path, str(value), origin)
        console.print(table)


@task_app.command("add")
def task_add(file: Annotated[Path, typer.Argument(help="Task file.")], home: HomeOption = None) -> None:
    """Validate a task file and register it: `ft run` and the Dagster UI know it from then on."""
    with told():
        task = open_platform(home).add_task(file)
        console.print(f"[green]added[/green] {task.name} ({task.path}). Next: ft run {task.name}")


@task_app.command("list")
def task_list(home: HomeOption = None) -> None:
    """Every task file that is found, what is live for it, and the files that do not parse."""
    with told():
        platform = open_platform(home)
        tasks, errors = platform.tasks.load()
        table = make_table("task", "type", "recipe", "live", "file")
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
    with told():
        table = make_table("recipe", "types", "base model", "description")
        for one in open_platform(home).published_recipes():
            table.add_row(
                f"{one.name}@{one.version}",
                ", ".join(one.types),
                one.base_model or f"none: {one.trainer}",
                one.description,
            )
        console.print(table)


@recipe_app.command("show")
def recipe_show(
    recipe: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    basic: Annotated[bool, typer.Option("--basic/--advanced", help="Five fields, or every setting.")] = True,
    home: HomeOption = None,
) -> None:
    """The form that fills in a recipe, as JSON Schema with the recipe's values as defaults."""
    with told():
        found = open_platform(home).recipe_form(recipe, "basic" if basic else "advanced")
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
    with told():
        if detach:
            submitted = open_platform(home).submit(task, only=only or (), because=because)
            console.print(submitted)
            complaints.print(f"Follow it with: ft watch {submitted[:8]}. Its state: ft status {submitted[:8]}")
            return
        outcome = open_platform(home).materialise(task, only=only or (), because=because, show=show_line, run_id=run_id)
        _verdict(outcome, task, home)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="As of ft watch; without one, the newest runs.")] = None,
    home: HomeOption = None,
) -> None:
    """How a run stands, or the newest ones. Exit code 1 if the one that was asked for failed."""
    with told():
        from ft_assets.watching import line

        platform = open_platform(home)
        states = [platform.status(run)] if run else platform.recent()
        for state in states:
            console.print(line(state), markup=False)
    if run and states[0].succeeded is False:
        raise typer.Exit(1)


@app.command()
def cancel(
    run: Annotated[str, typer.Argument(help="Id of a submitted or queued run, or its start.")], home: HomeOption = None
) -> None:
    """Ask a submitted or queued run to end. What it had made stays, and the next run goes on from its checkpoint."""
    with told():
        from ft_assets.watching import line

        console.print(line(open_platform(home).cancel(run)), markup=False)


@app.command()
def monitor(
    task: TaskArgument,
    day: Annotated[str, typer.Argument(help="ISO day of the traffic, such as 2002-08-31.")],
    home: HomeOption = None,
) -> None:
    """Compact and judge one day of a task's traffic."""
    with told():
        _verdict(open_platform(home).monitor(task, day, show=show_line), task, home)


@app.command()
def report(task: TaskArgument, home: HomeOption = None) -> None:
    """The newest evaluation: metrics beside baselines and champion, the gates' verdict, the HTML page's path."""
    with told():
        from ft_assets.evaluation.gate import decide

        platform = open_platform(home)
        found = platform.report(task)
        table = make_table("model", *found.models["candidate"])
        for name, metrics in found.models.items():
            table.add_row(name, *(f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for i in metrics.values()))
        console.print(table)
        decision = decide(found, platform.tasks.get(task).spec.gates)
        for name, gate in decision.gates.items():
            mark = MARKS["refused" if not gate.passed else "passed" if gate.applies else "note"]
            console.print(f"{mark}{name}: {gate.reason}")
        console.print(decision.verdict)
        console.print(f"Page: {platform.report_page(task)}")


@app.command()
def predict(
    task: TaskArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(help="Texts, '-' to read one a line from standard input, or one .csv, .jsonl or .parquet file."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Of a file: where the answers go; default beside it.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="Of a file: holds the input.")] = "text",
    version: Annotated[
        str | None,
        typer.Option("--model-version", "--version", help="A released version instead of the live one."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Answer texts, or every row of a file, with the live release in this process; logged like the service's answers.

    A file's rows come out with the answers beside them. Run it again after an interruption: it goes on.
    """
    with told():
        from ft_assets.file_scoring import FORMATS

        if len(inputs) == 1 and inputs[0].endswith(FORMATS):
            with console.status("reading") as state:
                scored = open_platform(home).predict_file(
                    task,
                    inputs[0],
                    out,
                    column=column,
                    model_version=version,
                    show=lambda done, failed: state.update(f"{done:,} rows answered, {failed:,} of them with an error"),
                )
            resumed = f", {scored.resumed:,} of them by an earlier run" if scored.resumed else ""
            console.print(f"{scored.rows:,} rows answered{resumed}, {scored.failed:,} with an error: {scored.out}")
            return
        texts = [line.rstrip("\n") for line in sys.stdin] if inputs == ["-"] else inputs
        for answer in open_platform(home).predict(task, texts, model_version=version):
            said = answer.label if answer.text is None else answer.text.output
            console.print(f"{said}  {answer.confidence:.3f}  {answer.prediction_id}", markup=False)


@app.command()
def trace(
    prediction: Annotated[str, typer.Argument(help="A prediction_id, or a row id with --task.")],
    task: Annotated[str | None, typer.Option("--task", help="Trace a row of this task instead of an answer.")] = None,
    rows: Annotated[int, typer.Option("--rows", help="How many training rows to show.")] = 5,
    home: HomeOption = None,
) -> None:
    """From an answer back to the decision, the adapter and the rows it learned from; or from a row to its adapters."""
    with told():
        platform = open_platform(home)
        if task is not None:
            console.print_json(json.dumps(platform.trace_row(task, prediction), default=str))
            return
        found = platform.trace(prediction)
        answer = found.prediction
        said = answer["output"] or answer["label"]
        at = f"{answer['answered_at']:%Y-%m-%d %H:%M:%S}"
        console.print(f"answer   {said} ({answer['confidence']:.3f}) at {at}", markup=False)
        if found.release:
            one = found.release
            console.print(f"release  {one['id']}, version {one['model_version']}, by {one['actor']}: {one['because']}")
        console.print(f"recipe   {found.adapter['template']} on {found.adapter['base']['model']}")
        for name, digest in found.digests.items():
            console.print(f"{name:17}{digest}")
        console.print(f"trained on {len(found.rows)} rows, the first {min(rows, len(found.rows))} (more: --rows N):")
        table = make_table("row", "label", "source")
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
    with told():
        if at is not None:
            route = open_platform(home).live_at(task, at.replace(tzinfo=UTC))
            console.print_json(json.dumps(route, default=str)) if route else console.print("nothing was live then")
            return
        table = make_table("from", "release", "kind", "version", "adapter", "by", "because")
        for one in open_platform(home).history(task):
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
    with told():
        release = open_platform(home).approve(task, because=because)
        console.print(f"[yellow]approved[/yellow]: version {release['model_version']} is live as {release['id']}")


@release_app.command("rollback")
def release_rollback(
    task: TaskArgument,
    because: Annotated[str, typer.Option(help="Why.")],
    to: Annotated[str | None, typer.Option("--to", help="A release id; default the adapter before.")] = None,
    home: HomeOption = None,
) -> None:
    """Make an earlier adapter live again: one row, in effect in under a second, nothing restarts."""
    with told():
        release = open_platform(home).roll_back(task, to=to, because=because)
        console.print(f"[green]version {release['model_version']}[/green] is live again as {release['id']}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port.")] = 3000,
    host: Annotated[str, typer.Option(help="Address; callers from elsewhere need a key of FT_API_KEYS.")] = "127.0.0.1",
    home: HomeOption = None,
) -> None:
    """Serve every released task over HTTP with `bentoml serve`; releases and rollbacks need no restart."""
    from ft_assets.deploying import address
    from ft_resources.environments import REPOSITORY
    from ft_resources.serving import SERVICE, require_free

    platform = open_platform(home)
    with told():
        require_free(host, port)
        platform.deployments.note(host, port)
    console.print(f"Try the tasks at {address(host, port)}/")
    os.chdir(REPOSITORY)
    program = str(Path(sys.executable).with_name("bentoml"))
    os.execv(program, [program, "serve", SERVICE, "--host", host, "--port", str(port)])


@app.command()
def api(
    port: Annotated[int, typer.Option(help="Port.")] = 3002,
    host: Annotated[str, typer.Option(help="Address; callers from elsewhere need a key.")] = "127.0.0.1",
    home: HomeOption = None,
) -> None:
    """Serve experiments, runs and adapters over HTTP: submit a run, follow it, cancel it, list what was trained."""
    with told():
        from ft_assets.api.server import serve as serve_api
        from ft_resources.serving import require_free

        platform = open_platform(home)
        require_free(host, port)
        serve_api(platform, host, port)


@app.command()
def dev(port: Annotated[int, typer.Option(help="Port.")] = 3001, home: HomeOption = None) -> None:
    """Open the Dagster UI with its daemon: the asset graph, checks, plots, sensors."""
    from ft_resources.environments import REPOSITORY

    open_platform(home)
    os.chdir(REPOSITORY)
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-w", "workspace.yaml", "--port", str(port)])


@app.command()
def mlflow(port: Annotated[int, typer.Option(help="Port.")] = 5000, home: HomeOption = None) -> None:
    """Open the MLflow UI: runs step by step, registered versions, model cards."""
    uri = open_platform(home).environment.mlflow
    program = str(Path(sys.executable).with_name("mlflow"))
    os.execv(program, [program, "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)])


def _verdict(outcome: Any, task: str, home: Path | None) -> None:
    if outcome.succeeded:
        console.print(f"[bold green]done[/bold green] (run {outcome.run_id})")
        if outcome.unserved:
            console.print(f"  It ends before a release: {outcome.unserved}.", markup=False)
        return
    complaints.print(f"[bold red]stopped[/bold red] (run {outcome.run_id})")
    for reason in outcome.refusals:
        complaints.print(f"  refused by {reason}", markup=False)
    if outcome.failure:
        complaints.print(f"  {outcome.failure}", markup=False)
    if outcome.results:
        complaints.print(f"  What was known when it failed, and what to try: {outcome.results}", markup=False)
    if any(reason.startswith("eval_report.") for reason in outcome.refusals):
        complaints.print(f"  Page: {open_platform(home).report_page(task)}", markup=False)
        if outcome.unserved:
            raise typer.Exit(1)
        complaints.print(f"  A person can overrule it: ft release approve {task} --because TEXT", markup=False)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `ft` program."""
    app()


if __name__ == "__main__":
    main()
