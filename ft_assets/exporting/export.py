"""Export of a released classifier as ONNX, in fp32 or int8, refused where it answers otherwise than plain peft.

The folder holds `model.onnx` (token ids and attention mask to calibrated probabilities), the tokenizer,
`export.json` (what a caller needs to know) and the comparison, as `parity.json` and `parity.md`.
"""

import fcntl
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bento.adapter_files import read_manifest
from bento.routing import Route, RouteEntry, released_entries
from ft_assets.data.assembly import split_rows
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.exporting.forms import CONFIGURATION, MODEL, Configuration, Exported, ExportPrecision, Parity, Speed
from ft_assets.home import Home
from ft_assets.tasks import Task
from ft_resources.base_models import BaseModel, resolve
from ft_resources.errors import ArtefactError, GateRefusal, ServiceError, SpecError
from ft_resources.files import flush_folder
from ft_resources.lake import Artefact
from ft_resources.usage import usable_cores

if TYPE_CHECKING:
    import numpy as np

PACKAGES = {"onnx": "1.23.2", "onnxruntime": "1.32.0", "onnxscript": "0.7.2"}
"""What an export needs beside the platform: the extra `export` of pyproject.toml."""
PARITY_ROWS = 1000
"""Validation rows that are compared; plain peft takes tens of milliseconds for one."""
ALONE = 30
"""Rows that plain peft is also asked one at a time."""
WARM = 32
"""Rows that are asked before times are taken."""


@dataclass
class Timed:
    """Answers like `ask`, which is warm by then, and notes for how long."""

    ask: "Callable[[Sequence[str]], np.ndarray]"
    calls: list[tuple[int, float]] = field(default_factory=list)
    """Rows and seconds of each call."""

    def __call__(self, texts: Sequence[str]) -> "np.ndarray":
        started = time.perf_counter()
        answers = self.ask(texts)
        self.calls.append((len(texts), time.perf_counter() - started))
        return answers

    def speed(self) -> Speed:
        """Of the first call, which is for all rows, and of those for one row."""
        rows, seconds = self.calls[0]
        alone = [each for count, each in self.calls[1:] if count == 1]
        return Speed(batched=1000 * seconds / rows, alone=1000 * median(alone))


def export(home: Home, task: str, out: Path, *, version: str | None = None, int8: bool = False) -> Exported:
    """Write a released classifier to the folder `out`; see `Platform.export`."""
    spec = home.tasks.get(task)
    entry, adapter = _released(home, spec, version)
    _require_packages()
    with _written_whole(out) as folder:
        return Exported(out, *_export(home, spec, entry, adapter, folder, int8=int8))


def _released(home: Home, task: Task, version: str | None) -> tuple[RouteEntry, Artefact]:
    """The release that is asked for, by default the live one, and its adapter."""
    if task.spec.type != "text-classification":
        raise SpecError(
            f"task '{task.name}' is of type {task.spec.type}, and only text-classification is exported",
            where=str(task.path),
            mend="Serve it with: ft serve",
        )
    live = home.ledger.live_release(task.name)
    if live is None:
        raise ArtefactError(
            f"task '{task.name}' has no live release", where=home.environment.lake, mend=f"ft run {task.name}"
        )
    known = Route(task.name, 0, released_entries([live]), released_entries(home.ledger.releases(task.name)))
    entry = known.entries[0] if version is None else known.version(version)
    return entry, home.lake.open(entry.adapter)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServiceError(
            f"an export needs {', '.join(missing)}, not installed here",
            mend="pip install " + " ".join(f"{name}=={number}" for name, number in PACKAGES.items()),
        )


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the body ends, and is removed when it fails.

    It lies beside `out` under a name of its own, locked. What a process that was killed left there is removed by the
    next one.
    """
    aside = out.absolute().with_name(f".{out.absolute().name}.incomplete")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ArtefactError("this is no empty folder", where=str(out), mend="Name another one, or empty it.")
        aside.mkdir(exist_ok=True)
        lock = os.open(aside, os.O_RDONLY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArtefactError(
                    "another export writes this folder", where=str(out), mend="Wait for it, or name another folder."
                ) from None
            try:
                for path in aside.iterdir():
                    path.unlink()
                yield aside
                for path in aside.iterdir():
                    with path.open("rb") as stream:
                        os.fsync(stream.fileno())
                flush_folder(aside)
                aside.rename(out)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)
    except OSError as error:
        raise ArtefactError(
            f"the export could not be written: {error.strerror or error}",
            where=str(out),
            mend="Check that the folder above exists, its permissions and the free space there.",
        ) from error


def _export(
    home: Home, task: Task, entry: RouteEntry, adapter: Artefact, folder: Path, *, int8: bool
) -> tuple[Configuration, Parity]:
    """Write everything to `folder`.

    Raises:
        GateRefusal: What was written answers otherwise than the task's gates allow.
    """
    from ft_assets.exporting.writing import write_model

    manifest = read_manifest(adapter.folder)
    base = resolve(manifest.base.model)
    precision: ExportPrecision = "int8" if int8 else "fp32"
    write_model(base, adapter.folder, folder, int8=int8)
    about = Configuration(
        **manifest.model_dump(include={"labels", "max_tokens", "pooling", "temperature", "preparation"}),
        task=task.name,
        precision=precision,
        base=manifest.base.name,
        adapter=adapter.digest,
        release_id=entry.release_id,
        model_version=entry.model_version,
    )
    (folder / CONFIGURATION).write_text(about.model_dump_json(indent=1), encoding="utf-8")
    parity = _parity(home, task.spec.gates, about, base, adapter, folder)
    (folder / "parity.json").write_text(parity.model_dump_json(indent=1), encoding="utf-8")
    (folder / "parity.md").write_text(parity.markdown(), encoding="utf-8")
    return about, parity


def _parity(
    home: Home, policy: GatePolicy, about: Configuration, base: BaseModel, adapter: Artefact, folder: Path
) -> Parity:
    """The export in `folder` beside plain peft, on the rows that decided when training stopped, never trained on."""
    from ft_assets.evaluation.precision import Plain, compare, keeps
    from ft_assets.exporting.reading import ExportedModel

    split = adapter.made_from["validation_split"]
    texts = split_rows(home.lake, split)["text"].tolist()[:PARITY_ROWS]
    if not texts:
        raise GateRefusal(
            "there are no validation rows to compare the export with plain peft on",
            where=f"validation_split {split[:12]}",
            mend="Add labelled rows, train and release again.",
        )
    plain = Timed(Plain(base, adapter.folder, adapter.json("adapter.json")))
    plain.ask(texts[:WARM])
    right = plain(texts)
    for text in texts[:ALONE]:
        plain([text])
    exported = Timed(ExportedModel(folder))
    exported.ask(texts[:WARM])
    found = compare(exported, about.precision, texts, right)
    if not keeps(found, policy):
        raise GateRefusal(
            f"the {about.precision} export gives the label of plain peft on a share of {found.agreement:.4f} of "
            f"{found.rows} validation rows and shifts probabilities by up to {found.probability_shift:.2g} on 95 % of "
            f"them; the task asks for {policy.min_serving_agreement:g} and {policy.max_probability_shift:g}",
            where=f"export of {about.task}, version {about.model_version}",
            mend=("Export it without --int8" if about.precision == "int8" else "Serve it with `ft serve`")
            + ", or change gates.min_serving_agreement or gates.max_probability_shift in the task file.",
        )
    return Parity(
        task=about.task,
        adapter=about.adapter,
        model_version=about.model_version,
        validation_split=split,
        agreement=found,
        min_agreement=policy.min_serving_agreement,
        max_probability_shift=policy.max_probability_shift,
        exported_mb=_megabytes(folder.glob(f"{MODEL}*")),
        plain_mb=_megabytes((*base.path.glob("*.safetensors"), *adapter.folder.glob("*.safetensors"))),
        exported_ms=exported.speed(),
        plain_ms=plain.speed(),
        cores=usable_cores(),
        versions={name: installed(name) for name in (*PACKAGES, "torch", "transformers", "peft")},
    )


def _megabytes(paths: Iterable[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e6
