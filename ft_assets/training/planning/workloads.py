"""What trainings compute: of rows that are planned for, and of runs that are recorded, counted by `plan_worker`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ft_assets.data.assembly import split_rows
from ft_assets.data.cleaning import clean
from ft_assets.data.forms import form_of
from ft_assets.data.sources import read_sources
from ft_assets.tasks import Task
from ft_assets.training.identity import TRAINER, environment_of_training
from ft_assets.training.jobs import SPLITS, inputs_of
from ft_assets.training.planning.cost_model import Counts, Observation, Rates, rates
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import RELIEF
from ft_assets.training.reporting import expected_device
from ft_resources.base_models import resolve as resolve_base
from ft_resources.environments import REPOSITORY, Environment, source_digest
from ft_resources.errors import ArtefactError, SpecError, TrainingError
from ft_resources.lake import Lake, digest_of, short
from ft_resources.ledger import Ledger

MOST_ROWS = 20_000
"""More training rows than this are counted by a sample."""
RECORDED_ROWS = 2_000
RECORDED_RUNS = 8
"""Recorded runs that a plan is calibrated on, at most."""
WORKER = "ft_assets.training.planning.worker"
PLANNER = source_digest("ft_assets/training/planning/cost_model.py", "ft_assets/training/planning/worker.py")
SAME_MACHINE = ("machine", "threads", "processes", "image", "gpus")
KERNELS = 1024
"""Matrix products for which oneDNN keeps a kernel, by default."""
KERNEL_BYTES = 0.9e6
"""Measured: growth of a CPU worker for each of them."""


@dataclass(frozen=True)
class Workload:
    """What one training computes. Sizes in bytes; counts of operations as `cost_model.Counts`."""

    rows: int
    """Training rows that are trained on."""
    counted_rows: int
    """Rows that were tokenised; fewer than there are: the other figures are scaled up."""
    validation_rows: int
    tokens_per_epoch: int
    first_epoch_tokens: int
    """Fewer where `training.first_epoch_tokens` cuts rows."""
    truncated_share: float
    """Of the rows: longer than `base.max_tokens`."""
    dropped: int
    """Rows of which no answer would be left."""
    longest: int
    """Tokens of the longest row before it is cut."""
    steps: int
    trained_parameters: int
    head_parameters: int
    total_parameters: int
    weight_bytes: float
    """The base model in memory."""
    file_bytes: float
    """Its files, which are mapped while it is loaded."""
    created_bytes: float
    """Most bytes of activations, gradients, moments and copies of trained weights at one time."""
    once: Counts
    """Done once, before the first epoch."""
    first_epoch: Counts
    epoch: Counts
    """Done in each later epoch, validation included."""
    precision: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Workload":
        """From what `plan_worker` writes."""
        return cls(**{**values, **{name: Counts(**values[name]) for name in ("once", "first_epoch", "epoch")}})

    def tokens(self, epochs: int) -> int:
        """Of all epochs."""
        return self.first_epoch_tokens + self.tokens_per_epoch * (epochs - 1)

    def work(self, tokens: float) -> Counts:
        """What is done until `tokens` tokens were trained on: all of them, or fewer where training stopped early."""
        later = (tokens - self.first_epoch_tokens) / max(1, self.tokens_per_epoch)
        return self.once + self.first_epoch + self.epoch.times(later)

    def memory(self, baseline: float) -> float:
        """Peak in a process that has `baseline` bytes before it loads the model; 0: of a GPU, which maps no files."""
        held = self.weight_bytes + self.created_bytes
        if not baseline:
            return held
        kernels = KERNEL_BYTES * min(KERNELS, self.epoch.shapes)
        return baseline + max(held + kernels, self.weight_bytes + self.file_bytes)


@dataclass(frozen=True)
class Measured:
    """What `plan_worker` found."""

    device: str
    device_name: str
    memory: int
    """Bytes there are."""
    start_seconds: float
    """From the start of a worker to the first tokens."""
    baseline_bytes: float
    """Of a worker before it loads the model; 0 where the device has its own memory."""
    workloads: list[Workload]
    rates: Rates


@dataclass(frozen=True)
class Rows:
    """Rows to count."""

    training: pd.DataFrame
    validation: pd.DataFrame
    training_rows: int
    """Of the whole split; `training` may be a sample."""
    validation_rows: int
    origin: str


def task_made(task: Task) -> dict[str, Any]:
    """The parts of what an adapter is made from that say how its rows are read."""
    spec = task.spec
    fields = {name: field.model_dump(mode="json") for name, field in spec.fields.items()}
    return {"type": spec.type, "labels": spec.labels, "fields": fields, "instruction": spec.instruction}


def measure(runs: Sequence[Mapping[str, Any]], environment: Environment, folder: Path) -> Measured:
    """Let a worker count what `runs` compute, in a process of its own; see `plan_worker.measure`.

    Raises:
        TrainingError: The worker refused, or died.
    """
    job, result = folder / "job.json", folder / "result.json"
    memory = int(environment.memory_gb * 1e9) if environment.memory_gb else None
    job.write_text(json.dumps({"device": environment.device, "memory": memory, "runs": runs}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", WORKER, str(job), str(result)],
        cwd=REPOSITORY,
        env={**os.environ, **environment.variables()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "error" in found:
        raise TrainingError(**found["error"])
    if done.returncode != 0:
        raise TrainingError(
            f"the training could not be measured (status {done.returncode}): {done.stderr.strip()[-500:]}",
            where="plan",
            mend="Check that the base model fits into memory and that its settings are right.",
        )
    timed = [(Counts(**one["counts"]), float(one["seconds"])) for one in found["timed"]]
    return Measured(
        found["device"],
        found["device_name"],
        found["memory"],
        found["start_seconds"],
        found["baseline_bytes"],
        [Workload.read(one) for one in found["workloads"]],
        rates(timed),
    )


def run_entry(folder: Path, made: Mapping[str, Any], settings: Settings, rows: Rows, *, timed: bool) -> dict[str, Any]:
    """The entry of a worker's job; rows are written to `folder` once."""
    files = {}
    for name, frame in (("training", rows.training), ("validation", rows.validation)):
        files[name] = str(folder / f"{name}-{id(frame)}.parquet")
        if not Path(files[name]).exists():
            frame[["text", "label"]].to_parquet(files[name], index=False)
    return {
        **{name: made[name] for name in ("labels", "fields", "instruction")},
        **files,
        "kind": made["type"],
        "settings": settings.model_dump(mode="json"),
        "rows": rows.training_rows,
        "validation_rows": rows.validation_rows,
        "timed": timed,
    }


def rows_of(lake: Lake, ledger: Ledger, environment: Environment, task: Task) -> Rows:
    """The task's rows: of its splits, or before there are any, of its sources, cleaned."""
    if all(lake.head(task.name, split) for split in SPLITS):
        return sample_of_splits(lake, inputs_of(lake, task), MOST_ROWS)
    raw = read_sources(task.spec, task.path.parent, environment.packages, lambda: ledger.feedback_rows(task.name))
    sampled = raw.sample(min(len(raw), MOST_ROWS), random_state=0)
    kept = clean(sampled.reset_index(drop=True), task.spec.cleaning, form_of(task.spec)).kept
    kept = kept.sample(frac=1, random_state=0)
    share, validation = len(raw) / max(1, len(sampled)), task.spec.split.validation
    at = max(1, round(len(kept) * validation)), round(len(kept) * (validation + task.spec.split.test))
    return Rows(
        _with_every_label(kept[at[1] :], kept),
        kept[: at[0]],
        round((len(kept) - at[1]) * share),
        round(at[0] * share),
        "sources, divided as they will be",
    )


def sample_of_splits(lake: Lake, inputs: Mapping[str, str], most: int) -> Rows:
    """At most about `most` rows of each of the splits with these digests."""
    training, validation = (split_rows(lake, inputs[split]) for split in SPLITS)
    return Rows(
        _with_every_label(training.sample(min(len(training), most), random_state=0), training),
        validation.sample(min(len(validation), most), random_state=0),
        len(training),
        len(validation),
        f"train_split {short(inputs['train_split'])}",
    )


def _with_every_label(sample: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """A sample may miss a rare label, without which nothing can be trained; answers of a conversation are free."""
    absent = rows[~rows["label"].isin(set(sample["label"]))].drop_duplicates("label")
    return sample if len(sample) == len(rows) else pd.concat([sample, absent.head(1000)])


@dataclass(frozen=True)
class Recorded:
    """A recorded run that a plan can be calibrated on."""

    made_from: Mapping[str, Any]
    tokens: int
    seconds: float
    peak_bytes: int
    peak_gpu_bytes: int
    same_base: bool
    cache: Path
    """Where its workload is kept."""
    workload: Workload | None
    """As an earlier plan found it."""

    def observation(self, workload: Workload, measured: Measured) -> Observation:
        """It beside what is computed for it."""
        counts = workload.work(self.tokens)
        return Observation(
            self.same_base,
            measured.rates.seconds(counts),
            self.seconds,
            workload.memory(measured.baseline_bytes),
            self.peak_bytes if measured.baseline_bytes else self.peak_gpu_bytes,
        )


def recorded_runs(lake: Lake, ledger: Ledger, environment: Environment, settings: Settings) -> list[Recorded]:
    """The newest comparable runs, of the same base model first, each way of training once."""
    every = ledger.training_runs()
    ended = every["status"] == "FINISHED"
    resumed = every["trained_from"].isin(every.loc[~ended, "trained_from"])  # took less than their steps do
    runs = every[ended & ~resumed]
    base, device = resolve_base(settings.base.model).digest, expected_device(environment)
    runs = runs[runs["device"] == device].dropna(subset=["tokens", "wall_seconds", "peak_memory_bytes", "adapter"])
    runs = runs.drop_duplicates("trained_from").assign(same=lambda frame: frame["base_digest"] == base)
    runs = runs.sort_values("same", ascending=False, kind="stable")
    found: list[Recorded] = []
    for run in runs.to_dict("records"):
        made = _comparable(lake, environment, run["adapter"])
        if made is None:
            continue
        cache = environment.home / "plans" / f"{digest_of([run['trained_from'], TRAINER, PLANNER])}.json"
        found.append(
            Recorded(
                made,
                int(run["tokens"]),
                float(run["wall_seconds"]),
                int(run["peak_memory_bytes"]),
                int(run["peak_gpu_memory_bytes"] or 1),
                bool(run["same"]),
                cache,
                Workload.read(json.loads(cache.read_text(encoding="utf-8"))) if cache.exists() else None,
            )
        )
        if len(found) == RECORDED_RUNS:
            break
    return found


def _comparable(lake: Lake, environment: Environment, adapter: str) -> Mapping[str, Any] | None:
    """What the adapter of a recorded run was made from; None if it ran out of memory, is of elsewhere, or is gone."""
    try:
        made = lake.open(adapter).made_from
        resolve_base(made["settings"]["base"]["model"])
        for split in SPLITS:
            lake.open(lake.open(made[split]).made_from["clean_dataset"])
    except (ArtefactError, SpecError):
        return None
    here = environment_of_training(environment)
    there = made["environment"]
    if RELIEF in made:
        return None
    return made if all(here.get(name) == there.get(name) for name in SAME_MACHINE) else None


def keep(file: Path, workload: Workload) -> Workload:
    """Write `workload` for later plans, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps(asdict(workload)), encoding="utf-8")
    aside.replace(file)
    return workload
