"""`ft tracking`: backups of MLflow, and drills that show they can be restored."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_assets.terminal import HomeOption, console, told
from ft_resources.environments import Environment

if TYPE_CHECKING:
    from ft_resources.tracking_store import TrackingStore

app = typer.Typer(no_args_is_help=True, help="Backups of MLflow: make, restore, drill.")
BackupArgument = Annotated[str, typer.Argument(help="A backup, or a folder of them: the newest. Path or fsspec URL.")]
DatabaseOption = Annotated[
    str | None,
    typer.Option(
        help="SQLAlchemy URL of MLflow's database. Default: MLFLOW_BACKEND_STORE_URI, or MLFLOW_TRACKING_URI."
    ),
]
ArtifactsOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or fsspec URL of MLflow's artefacts. Default: MLFLOW_ARTIFACTS_DESTINATION, or `artifacts` "
        "beside a SQLite database."
    ),
]


@app.command("backup")
def make(
    target: Annotated[
        str, typer.Argument(help="Folder of backups: a path, or an fsspec URL such as s3://bucket/mlflow.")
    ],
    database: DatabaseOption = None,
    artifacts: ArtifactsOption = None,
    database_only: Annotated[
        bool, typer.Option("--database-only", help="Leave the artefacts to a bucket that keeps versions.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Remove older backups than the newest so many. Default: none.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Copy MLflow's database and artefacts, while it is in use, into a new folder of TARGET."""
    with told():
        from ft_resources.tracking_backup import backup

        made = backup(_store(home, database, artifacts), target, database_only=database_only, keep=keep)
        console.print(
            f"{made.rows:,} rows, {len(made.artifacts):,} artefacts, {made.bytes / 1e6:,.1f} MB: {made.folder.url}"
        )
        if made.runs_elsewhere:
            console.print(
                f"[yellow]note[/yellow] {made.runs_elsewhere:,} runs have their artefacts elsewhere: not in this backup"
            )


@app.command()
def restore(
    backup: BackupArgument,
    database: DatabaseOption = None,
    artifacts: ArtifactsOption = None,
    home: HomeOption = None,
) -> None:
    """Fill an empty MLflow from a backup, and compare every row and artefact with what was backed up."""
    with told():
        from ft_resources.tracking_backup import find
        from ft_resources.tracking_backup import restore as fill

        found, store = find(backup), _store(home, database, artifacts)
        fill(found, store)
        console.print(
            f"[green]restored[/green] {found.folder.url}: {found.rows:,} rows, {len(found.artifacts):,} artefacts, "
            f"as of {found.created_at:%Y-%m-%d %H:%M:%S} UTC"
        )


@app.command()
def drill(
    backup: BackupArgument,
    run: Annotated[
        str | None, typer.Option(help="MLflow run to read back. Default: of the newest registered version.")
    ] = None,
    database: DatabaseOption = None,
    artifacts: ArtifactsOption = None,
    home: HomeOption = None,
) -> None:
    """Restore a backup beside MLflow, read a run back, compare it with the original, remove the copy. Once a month."""
    with told():
        from ft_resources.tracking_backup import find
        from ft_resources.tracking_drill import drill as practise

        found, store = find(backup), _store(home, database, artifacts)
        done = practise(found, store, run_id=run)
        content = done.content
        points = sum(map(len, content.metrics.values()))
        console.print(
            f"[green]restored in {done.seconds:.1f} s[/green]: run {done.run_id} is back with "
            f"{len(content.params)} params, {points:,} points of {len(content.metrics)} metrics, "
            f"{len(content.artifacts)} artefacts, versions {', '.join(content.versions) or 'none'}"
        )
        console.print(f"{found.folder.url}: {found.rows:,} rows, {len(found.artifacts):,} artefacts, {done.age} old")
        told_versions = {True: "keeps versions", False: "keeps no versions", None: "does not tell about versions"}
        console.print(f"{store.artifacts.url} {told_versions[done.versioned]}")


def _store(home: Path | None, database: str | None, artifacts: str | None) -> "TrackingStore":
    from ft_resources.tracking_store import TrackingStore

    environment = Environment.read(home=home)
    # the artefacts of another database are not those of the environment
    default = "" if database else environment.mlflow_artifacts
    return TrackingStore(database or environment.mlflow_database, artifacts or default)
