"""The results folder of a training, good or not: all that is needed to understand it, and to repeat it.

FT_HOME/results/TASK/RUN/ holds config.yaml (each value with where it comes from), metrics.json, logs.txt,
environment.json, resources.csv and resources.png; of a failed training also failure.json. Secrets are masked in all.
"""

import errno
import io
import json
import math
import re
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ft_assets.plots import BLUE, ORANGE, new_axes, png
from ft_resources.compute import WorkerDied
from ft_resources.environments import Environment
from ft_resources.errors import (
    ArtefactError,
    DataError,
    FtError,
    OutOfMemory,
    SourceError,
    SpecError,
    TrainingError,
)
from ft_resources.masking import mask, mask_text
from ft_resources.usage import GIGABYTE, Usage, stored_samples

LOG_LINES = 2000
TRACEBACK_LINES = 60
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
FAILURE = "failure.json"
INTERRUPTED = "interrupted"
"""Code of a training that was asked to end."""
RESOURCES = "resources.csv"
"""The file for `Meter(file=...)`: what it holds outlives a worker that is killed."""


@dataclass(frozen=True)
class Failure:
    """Why a training ended without an adapter, and what to do."""

    type: str
    code: str
    what: str
    where: str
    mend: str
    suggestion: str
    """What to try, in words, chosen by the kind of error."""
    traceback: list[str]
    """Its last lines."""
    checkpoint: str | None
    """Where to go on from."""


def failure_of(error: BaseException, *, checkpoint: str | None = None) -> Failure:
    """The description of `error`, which may be of any kind.

    Args:
        checkpoint: Where the newest complete checkpoint is.
    """
    lines = "".join(traceback.format_exception(error)).splitlines()
    told = error if isinstance(error, FtError) else FtError(str(error), where=_where(error))
    return Failure(
        type=type(error).__name__,
        code=error.code if isinstance(error, FtError) else INTERRUPTED if _interrupted(error) else "defect",
        what=told.what,
        where=told.where,
        mend=told.mend,
        suggestion=_suggestion(error) + (f" Training can go on from {checkpoint}." if checkpoint else ""),
        traceback=lines[-TRACEBACK_LINES:],
        checkpoint=checkpoint,
    )


def results_folder(environment: Environment, task: str, run_name: str) -> Path:
    """The folder of one training's results, created when it is not there.

    Args:
        task: Full name.
        run_name: Name of the training; it holds the first 8 digits of its Dagster run, by which `failed_results`
            finds it.
    """
    folder = environment.home / "results" / task / re.sub(r"[^A-Za-z0-9._-]+", "-", run_name).strip(".-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def failed_results(environment: Environment, task: str, dagster_run: str) -> Path | None:
    """The newest results folder of a failed training of this Dagster run."""
    found = (environment.home / "results" / task).glob(f"*{dagster_run[:8]}*/{FAILURE}")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest else None


def write_results(
    folder: Path,
    *,
    config: Mapping[str, Any],
    origins: Mapping[str, str],
    metrics: Mapping[str, Any],
    log: str | Sequence[str],
    usage: Usage | None,
    provenance: Mapping[str, Any],
    failure: Failure | None = None,
) -> None:
    """Write all files of a results folder, beside the `resources.csv` that the worker's meter wrote itself.

    Those of an earlier attempt of the same run are replaced.

    Args:
        config: The merged configuration, nested.
        origins: Dotted path of a value of `config` -> where it comes from.
        log: Text or lines; the last 2,000 are kept.
        usage: None when nobody can say.
        failure: None for a training that ended well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = log.splitlines() if isinstance(log, str) else [part for entry in log for part in entry.splitlines()]
    (folder / CONFIG).write_text(_yaml(mask(config), origins), encoding="utf-8")
    _write_json(folder / "metrics.json", metrics)
    # in one piece: a private key spans lines
    (folder / "logs.txt").write_text(mask_text("\n".join(lines[-LOG_LINES:])) + "\n", encoding="utf-8")
    _write_json(folder / ENVIRONMENT, {"provenance": provenance, "usage": asdict(usage) if usage else None})
    (folder / "resources.png").write_bytes(_resources(stored_samples(folder / RESOURCES)))
    if failure is None:
        (folder / FAILURE).unlink(missing_ok=True)
    else:
        _write_json(folder / FAILURE, asdict(failure))


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(_finite(mask(value)), indent=1, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON knows no NaN: `nan`, `inf` and `-inf` become text."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _yaml(config: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def node(value: Any, path: str) -> Any:
        if isinstance(value, Mapping) and value:
            tree = CommentedMap()
            for key, one in value.items():
                below = f"{path}.{key}" if path else str(key)
                tree[key] = node(one, below)
                if below in origins:
                    tree.yaml_add_eol_comment(f"from {mask_text(' '.join(origins[below].split()))}", key)
            return tree
        if isinstance(value, list):
            sequence = CommentedSeq([node(one, "") for one in value])
            sequence.fa.set_flow_style()
            return sequence
        if isinstance(value, str) and not value.isprintable():
            return DoubleQuotedScalarString(value)  # on one line, so that its comment stands beside it
        return value if value is None or isinstance(value, Mapping | str | int | float) else str(value)

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 1_000_000
    yaml.representer.ignore_aliases = lambda *_: True
    text = io.StringIO()
    yaml.dump(node(config, ""), text)
    return text.getvalue()


def _resources(rows: Sequence[Mapping[str, float]]) -> bytes:
    figure, memory = new_axes(6.4, 3.2)
    utilisation: Any = memory.twinx()
    for side in ("top", "left", "right", "bottom"):
        utilisation.spines[side].set_visible(False)
    at = [row["seconds"] for row in rows]
    for prefix, style, what in (("", "-", ""), ("gpu_", "--", "GPU ")):
        used = [row[f"{prefix}memory_bytes"] / GIGABYTE for row in rows]
        busy = [row[f"{prefix or 'cpu_'}utilisation"] for row in rows]
        if prefix and all(map(math.isnan, used)):
            continue
        memory.plot(at, used, color=BLUE, linewidth=1.6, linestyle=style, label=f"{what}memory")
        utilisation.plot(at, busy, color=ORANGE, linewidth=1.2, linestyle=style, label=f"{what or 'CPU '}utilisation")
    memory.set_ylim(bottom=0)
    utilisation.set_ylim(0, 103)
    memory.set_xlabel("seconds")
    memory.set_ylabel("memory, GB", color=BLUE)
    utilisation.set_ylabel("utilisation, %", color=ORANGE)
    if rows:
        handles = [*memory.lines, *utilisation.lines]
        memory.legend(handles, [line.get_label() for line in handles], frameon=False, fontsize=9, loc="lower right")
    return png(figure)


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


# -- what to try ------------------------------------------------------------------------------------------------

LESS_MEMORY = (
    "Halve training.batch_size, then lower base.max_tokens; bf16 (training.precision) and a lower lora.rank save a "
    "little more. Otherwise train where there is more memory."
)


def _suggestion(error: BaseException) -> str:
    for applies, words in SUGGESTIONS:
        if applies(error):
            return words(error)
    return "This looks like a defect of the platform: report it with this folder."


def _out_of_memory(error: BaseException) -> bool:
    # torch's own errors, by name and by text: this module does not import torch
    return isinstance(error, OutOfMemory | MemoryError) or (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _of_memory(error: BaseException) -> str:
    if isinstance(error, OutOfMemory) and error.total:
        used = f"{error.used / GIGABYTE:.1f} of {error.total / GIGABYTE:.1f} GB were in use. "
    else:
        used = ""
    return f"Memory ran out. {used}{LESS_MEMORY} resources.png shows how memory grew."


def _interrupted(error: BaseException) -> bool:
    # the trainer's own, by name: this module does not import torch
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Interrupted"


def _diverged(error: BaseException) -> bool:
    return isinstance(error, TrainingError) and bool(re.search(r"\b(nan|inf|finite)\b", error.what))


def _ended_by(error: BaseException) -> signal.Signals | None:
    """The signal that ended a worker: `-9` as a subprocess is told, `137` as a container is."""
    number = re.search(r"\bcode:? (-?\d+)", str(error))
    if number is None:
        return None
    code = int(number[1])
    with suppress(ValueError):
        return signal.Signals(-code if code < 0 else code - 128)
    return None


def _of_death(error: BaseException) -> str:
    by = _ended_by(error)
    if by == signal.SIGKILL:
        return (
            "The worker was killed (SIGKILL), which is mostly the operating system or the cluster when memory is "
            f"short: see the end of resources.csv. {LESS_MEMORY}"
        )
    if by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"Somebody or the cluster asked the worker to end ({by.name}): run again when the machine is free."
    if by in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
        return (
            f"A native library crashed ({by.name}): compare the versions in environment.json with "
            "requirements.txt, and try training.precision fp32."
        )
    if by is not None:
        return f"The worker was ended by {by.name}: run again."
    return "The worker ended without saying why: the end of logs.txt and the run's compute log show its last words."


SUGGESTIONS: Sequence[tuple[Callable[[BaseException], bool], Callable[[BaseException], str]]] = (
    (_out_of_memory, _of_memory),
    (
        _diverged,
        lambda _: (
            "Training diverged. Divide training.learning_rate by 3 to 10, raise training.warmup_share, lower "
            "training.max_grad_norm, and train once in fp32 (training.precision) to rule out rounding; the last "
            "losses are in metrics.json. Very long or empty texts and wrong labels do this too."
        ),
    ),
    (lambda error: isinstance(error, WorkerDied), _of_death),
    (
        _interrupted,
        lambda _: "Its run was stopped. Another run of the task on the same rows goes on from what was saved.",
    ),
    (
        lambda error: isinstance(error, DataError | SourceError),
        lambda _: (
            "The rows are the cause, and training again without changing them ends the same: mend what is named, "
            "then see rejected rows and their reasons at clean_dataset."
        ),
    ),
    (
        lambda error: isinstance(error, SpecError),
        lambda _: (
            "A setting is the cause: config.yaml names the file and line each one comes from. "
            "ft task check FILE tells whether it is mended."
        ),
    ),
    (
        lambda error: isinstance(error, ArtefactError),
        lambda _: "A stored artefact is the cause: materialise the asset that made it again, then train.",
    ),
    (
        lambda error: isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT),
        lambda _: (
            "The disk is full: free some space below FT_HOME and on the temporary folder's disk, then train again."
        ),
    ),
    (lambda error: isinstance(error, OSError), lambda _: "A file or the network failed: check it, then train again."),
    (
        lambda error: isinstance(error, FtError),
        lambda error: getattr(error, "mend", "") or "See the traceback and the end of logs.txt.",
    ),
)
