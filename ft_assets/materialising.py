"""What every asset body shares: typed failures, reuse of what was made before, and the metadata a person sees."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from ft_assets.plots import markdown
from ft_assets.tasks import Task, TaskFolders
from ft_resources.compute import WorkerDied
from ft_resources.environments import Environment
from ft_resources.errors import FtError
from ft_resources.lake import Artefact, Lake, short


@contextmanager
def typed_failures() -> Iterator[None]:
    """Turn a typed error into a Dagster failure; only a worker that died is worth a retry.

    A run that is stopped fails here as well: Dagster would try a step with a retry policy again.
    """
    try:
        yield
    except dg.DagsterExecutionInterruptedError as stopped:
        raise dg.Failure("the run was stopped", allow_retries=False) from stopped
    except FtError as error:
        metadata = {"error": type(error).__name__, "where": error.where or "-", "mend": error.mend or "-"}
        raise dg.Failure(str(error), metadata=metadata, allow_retries=isinstance(error, WorkerDied)) from error


def task_named(environment: Environment, name: str) -> Task:
    return TaskFolders(environment.task_folders).get(name)


def publish(
    context: dg.AssetExecutionContext,
    lake: Lake,
    head: tuple[str, str],
    kind: str,
    made_from: Mapping[str, Any],
    write: Callable[[Path], None],
) -> Artefact:
    """The artefact `kind` made from `made_from`: found, or written by `write(folder)` and published.

    Args:
        head: Task and asset whose pointer is set to it.
    """
    artefact = lake.find(kind, made_from)
    if artefact is None:
        with tempfile.TemporaryDirectory(prefix="ft-") as scratch:
            write(Path(scratch))
            artefact = lake.publish(kind, Path(scratch), made_from)
    else:
        context.log.info(f"{head[1]}: reused {short(artefact.digest)}, the same inputs made it before")
    lake.set_head(*head, artefact.digest, context.run.run_id)
    return artefact


def result(artefact: Artefact, metadata: Mapping[str, Any], asset_key: str | None = None) -> dg.MaterializeResult[Any]:
    """A materialisation that carries the digest as data version, and what a person sees."""
    return dg.MaterializeResult(
        asset_key=asset_key,
        data_version=dg.DataVersion(artefact.digest),
        metadata={
            "digest": dg.MetadataValue.text(artefact.digest),
            "uri": dg.MetadataValue.path(artefact.uri),
            **metadata,
        },
    )


def image(png: bytes, title: str) -> dg.MarkdownMetadataValue:
    """A picture that the Dagster UI shows inline."""
    return dg.MetadataValue.md(markdown(png, title))


def table(rows: list[dict[str, Any]]) -> dg.MarkdownMetadataValue:
    """Rows as a Markdown table; empty says so."""
    if not rows:
        return dg.MetadataValue.md("none")
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def check(
    name: str,
    asset: str,
    passed: bool,
    description: str,
    metadata: Mapping[str, Any] | None = None,
    *,
    warn: bool = False,
) -> dg.AssetCheckResult:
    """A check result; `warn` marks one that informs and never blocks."""
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=dg.AssetKey(asset),
        passed=bool(passed),
        description=description,
        metadata=dict(metadata or {}),
        severity=dg.AssetCheckSeverity.WARN if warn else dg.AssetCheckSeverity.ERROR,
    )
