"""What a training computes, counted on a shortened model: `python -m ft_assets.training.planning.worker JOB RESULT`.

The base model is loaded with its first layer alone and with its first two; a few real rows go through the real trainer
in both, and what the second layer adds stands for each of the others. Nothing is assumed about the architecture.
Imports torch; launched by `ft_assets.training.planning.workloads`.
"""

import json
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig

from bento.conversation import Field
from bento.devices import pick_device, pick_dtype
from ft_assets.training.engine.batching import PART_TOKENS, length_grouped, parts, steps_per_epoch
from ft_assets.training.engine.body import Body
from ft_assets.training.engine.examples import Example, Tokenised
from ft_assets.training.engine.learners import learner_of
from ft_assets.training.engine.runs import Data, TaskRows, tokenise
from ft_assets.training.engine.trainer import CACHE_BYTES, Trainer, seeded
from ft_assets.training.planning.cost_model import Counts
from ft_assets.training.recipes import Settings
from ft_resources.base_models import BaseModel, resolve
from ft_resources.errors import FtError
from ft_resources.usage import memory_limit

STEPS = 3
"""Steps of a measured run. Each has its own number of tokens, as in a training, so that kernels are made anew."""
VALIDATION_TOKENS = 1024
_aten = torch.ops.aten
PRODUCTS = (_aten.mm, _aten.addmm, _aten.addmm_)
FLOPS = {**flop_registry, _aten.addmm_: flop_registry[_aten.addmm]}


class Counter(TorchDispatchMode):
    """Counts the operations inside its block and follows the bytes of the tensors they make."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.live = self.peak = 0
        self._shapes: set[Any] = set()
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.is_view:
            return output
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        packet = func._overloadpacket
        if (count := FLOPS.get(packet)) is not None:
            flops = float(count(*args, **(kwargs or {}), out_val=output))
            self.counts += Counts(flops=flops, calls=1, shapes=float(self._is_new(packet, args)))
        else:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.counts += Counts(traffic=float(sum(map(_bytes, (*read, *made)))), calls=1)
        for tensor in made:
            self._follow(tensor.untyped_storage())
        return output

    def _is_new(self, packet: Any, args: tuple[Any, ...]) -> bool:
        if packet not in PRODUCTS:
            return False
        shape = packet, *(tuple(one.shape) for one in args if isinstance(one, torch.Tensor))
        before = len(self._shapes)
        self._shapes.add(shape)
        return len(self._shapes) > before

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Depth:
    """What was measured on a model of some layers."""

    step: Counts
    """One optimiser step on typical rows."""
    validation: Counts
    """One pass without gradients over the typical part of the validation rows."""
    created_bytes: float
    """Most bytes of tensors made in steps on the largest batch."""
    trained: float
    """Parameters, the head among them."""
    head: float
    total: float
    weight_bytes: float

    def plus(self, other: "Depth", factor: float) -> "Depth":
        """This one and `factor` times the other one."""
        return Depth(
            self.step + other.step.times(factor),
            self.validation + other.validation.times(factor),
            self.created_bytes + factor * other.created_bytes,
            self.trained + factor * other.trained,
            self.head + factor * other.head,
            self.total + factor * other.total,
            self.weight_bytes + factor * other.weight_bytes,
        )


@dataclass(frozen=True)
class Batches:
    """Rows that stand for all: of a step like most, of the one that needs most memory, and of a validation."""

    typical: list[Example]
    """Of `STEPS` steps."""
    others: list[Example]
    """As many again."""
    largest: list[Example]
    validation: list[Example]


def workload(
    run: Mapping[str, Any], rows: TaskRows, data: Data, base: BaseModel, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the training that `run` describes computes, and the timed computations if it says `timed`.

    Returns:
        The fields of `workloads.Workload`, and `{counts, seconds}` of each timed computation.
    """
    settings = Settings.model_validate(run["settings"])
    dtype = pick_dtype(settings.training.precision, device)
    config = AutoConfig.from_pretrained(base.path)
    layers = int(config.num_hidden_layers)
    trained_layers = min(settings.lora.top_layers or layers, layers) if settings.method == "lora" else layers
    chosen = _batches(data, settings, device)
    measured, timed = [], []
    for depth in (1, 2)[: min(2, layers)]:
        with _shortened(base, config, depth) as short:
            one, times = _measured(short, rows, settings, chosen, device, dtype, timed=run["timed"])
        measured.append(one)
        timed += times
    first, last = measured[0], measured[-1]
    layer = last.plus(first, -1)
    trained = first.plus(layer, trained_layers - 1)
    lower = layers - trained_layers
    training, validation = _size(data.training, run["rows"]), _size(data.validation, run["validation_rows"])
    batch_size = settings.training.batch_size
    steps = steps_per_epoch(training["kept"], batch_size)
    by_token = 1 / max(1, _tokens(chosen.validation))
    typical_tokens = _tokens(chosen.typical) / steps_per_epoch(len(chosen.typical), batch_size)
    frozen_token = layer.validation.times(lower * by_token)
    epoch = _scaled(trained.step, steps, training["tokens"] / typical_tokens)
    epoch += trained.validation.times(validation["tokens"] * by_token)
    shorter = settings.training.first_epoch_tokens
    first_tokens, recomputed = training["tokens"], 0
    if shorter is not None:
        cut = _tokens([one.cut_to(shorter) for one in data.training.examples])
        first_tokens = recomputed = round(first_tokens * cut / max(1, _tokens(data.training.examples)))
    saved = _scaled(trained.step, 0, (training["tokens"] - first_tokens) / typical_tokens)
    both = training["tokens"] + validation["tokens"]
    kept = (
        (both + recomputed) * int(config.hidden_size) * dtype.itemsize if lower and settings.speed.cache_frozen else 0
    )
    once = Counts()
    if kept and kept <= CACHE_BYTES:
        once = frozen_token.times(both + recomputed)
    else:
        kept, epoch = 0, epoch + frozen_token.times(both)
        saved += frozen_token.times(training["tokens"] - first_tokens)
    found = {
        "rows": training["kept"],
        "counted_rows": len(data.training.examples) + data.training.dropped,
        "validation_rows": validation["kept"],
        "tokens_per_epoch": training["tokens"],
        "first_epoch_tokens": first_tokens,
        "truncated_share": data.training.cut / max(1, len(data.training.examples) + data.training.dropped),
        "dropped": training["dropped"],
        "longest": data.training.longest,
        "steps": steps * settings.training.epochs,
        "trained_parameters": round(trained.trained),
        "head_parameters": round(trained.head),
        "total_parameters": round(trained.total + lower * (layer.total - layer.trained)),
        "weight_bytes": trained.weight_bytes + lower * layer.weight_bytes,
        "file_bytes": sum(file.stat().st_size for file in base.path.glob("*.safetensors")),
        "created_bytes": trained.created_bytes + kept,
        "once": asdict(once),
        "first_epoch": asdict(epoch + saved.times(-1)),
        "epoch": asdict(epoch),
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
    }
    return found, timed


def _scaled(step: Counts, steps: int, by_tokens: float) -> Counts:
    """A step's counts over an epoch: work grows with the tokens, the number of calls with the steps."""
    return Counts(step.flops * by_tokens, step.traffic * by_tokens, step.calls * steps, step.shapes * steps)


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(one.ids) for one in examples)


def _size(tokenised: Tokenised, rows: int) -> dict[str, int]:
    """Kept and dropped rows and tokens of `rows` rows, by those that were tokenised."""
    counted = len(tokenised.examples) + tokenised.dropped
    factor = rows / counted if counted else 0.0
    return {
        "kept": round(len(tokenised.examples) * factor),
        "dropped": round(tokenised.dropped * factor),
        "tokens": round(_tokens(tokenised.examples) * factor),
    }


def _batches(data: Data, settings: Settings, device: torch.device) -> Batches:
    examples = data.training.examples
    lengths = np.array([len(one.ids) for one in examples])
    batches = length_grouped(lengths.tolist(), settings.training.batch_size, settings.training.seed)
    tokens = np.array([lengths[batch].sum() for batch in batches])
    spread = np.array([np.square(lengths[batch]).sum() for batch in batches]) / tokens
    wanted = np.square(lengths).sum() / lengths.sum()
    unlike = np.abs(np.log(tokens / tokens.mean())) + np.abs(np.log(spread / wanted))
    chosen = np.argsort(unlike, kind="stable")[: 2 * STEPS]
    typical, others = chosen[:STEPS], chosen[STEPS:] if len(chosen) == 2 * STEPS else chosen[:STEPS]
    budget = settings.training.micro_batch_tokens or PART_TOKENS[device.type]
    weight = np.minimum(tokens, budget) * np.array([lengths[batch].max() for batch in batches])
    known = data.validation.examples
    groups = parts([len(one.ids) for one in known], VALIDATION_TOKENS, padded=False) if known else []
    return Batches(
        [examples[row] for at in typical for row in batches[at]],
        [examples[row] for at in others for row in batches[at]],
        [examples[row] for row in batches[int(np.argmax(weight))]],
        [known[row] for row in groups[len(groups) // 2]] if groups else [],
    )


@contextmanager
def _shortened(base: BaseModel, config: Any, depth: int) -> Iterator[BaseModel]:
    """The base model with its first `depth` layers alone, in a folder that points to its weights."""
    with tempfile.TemporaryDirectory() as scratch:
        for file in base.path.iterdir():
            if file.is_file() and file.name != "config.json":
                Path(scratch, file.name).symlink_to(file.resolve())
        short = AutoConfig.from_pretrained(base.path)
        kinds = getattr(config, "layer_types", None)
        short.num_hidden_layers = depth
        if kinds:
            short.layer_types = kinds[:depth]
        short.save_pretrained(scratch)
        yield BaseModel(base.reference, base.digest, Path(scratch))


def _measured(
    base: BaseModel,
    rows: TaskRows,
    settings: Settings,
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype,
    *,
    timed: bool,
) -> tuple[Depth, list[dict[str, Any]]]:
    """Counts on the model `base`, and if `timed` the seconds of the same computations."""
    settings = settings.model_copy(
        update={
            "lora": settings.lora.model_copy(update={"top_layers": None}),
            "training": settings.training.model_copy(update={"epochs": 1, "early_stopping": None}),
        }
    )
    seeded(settings.training.seed, device)
    body = Body(base, settings, device, dtype, causal=rows.kind != "text-classification")
    weight_bytes = sum(map(_bytes, body.network.parameters()))
    learner = learner_of(rows.kind, body, settings, rows.labels, batches.typical)

    def train(examples: list[Example], **changed: int) -> list[float]:
        """Moments at which the steps ended, in seconds."""
        ends: list[float] = []
        chosen = settings.model_copy(update={"training": settings.training.model_copy(update=changed)})
        Trainer(learner, examples, [], chosen, on_step=lambda _: ends.append(time.perf_counter())).run()
        return ends

    def validate() -> None:
        body.eval()
        with torch.no_grad(), body.states(batches.validation) as states:
            learner.output(states, batches.validation)

    steps = steps_per_epoch(len(batches.typical), settings.training.batch_size)
    step = _counted(lambda: train(batches.typical)).counts.times(1 / steps)
    # in the second step there are the optimiser's moments and the best weights so far
    largest = _counted(lambda: train(batches.largest, batch_size=len(batches.largest), epochs=2))
    validation = replace(_counted(validate).counts, shapes=0.0) if batches.validation else Counts()
    times: list[dict[str, Any]] = []
    if timed:
        by_tokens = _tokens(batches.others) / max(1, _tokens(batches.typical))
        for counts in (step, replace(step, shapes=0.0)):  # kernels are made in the first round, found in the second
            seconds = float(np.diff(train(batches.others)).mean()) if steps > 1 else 0.0
            if seconds:
                times.append({"counts": asdict(_scaled(counts, 1, by_tokens)), "seconds": seconds})
        if batches.validation:
            times.append({"counts": asdict(validation), "seconds": min(_seconds(validate) for _ in range(2))})
    trained = learner.trained()
    head = sum(weight.numel() for name, weight in trained.items() if name.startswith("head."))
    measured = Depth(
        step,
        validation,
        largest.peak,
        sum(weight.numel() for weight in trained.values()),
        head,
        sum(weight.numel() for weight in body.network.parameters()) + head,
        weight_bytes,
    )
    return measured, times


def _counted(work: Callable[[], Any]) -> Counter:
    with Counter() as counter:
        work()
    return counter


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """What every run of `job` computes, and what this machine is like.

    Args:
        job: `device` (empty: the best), `memory` (bytes there are), and `runs`, each with `kind`, `labels`, `fields`,
            `instruction`, `settings`, Parquet files `training` and `validation`, `rows` and `validation_rows` (of the
            whole splits, of which the files may be samples), and `timed`.
    """
    process = psutil.Process()
    device = pick_device(job["device"])
    tokenised: dict[Any, tuple[TaskRows, Data]] = {}
    sources = []
    for run in job["runs"]:
        base = run["settings"]["base"]
        key = run["training"], base["model"], base["max_tokens"]
        source = resolve(base["model"])
        if key not in tokenised:
            rows = task_rows(run)
            tokenised[key] = rows, tokenise(rows, source, base["max_tokens"])
        sources.append((run, *tokenised[key], source))
    start_seconds, baseline = time.time() - process.create_time(), process.memory_info().rss
    memory = int(job["memory"] or memory_limit())
    found = [workload(*source, device) for source in sources]
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if gpu else device.type,
        "memory": torch.cuda.get_device_properties(device).total_memory if gpu else memory,
        "start_seconds": start_seconds,
        "baseline_bytes": 0 if gpu else baseline,
        "workloads": [one for one, _ in found],
        "timed": [one for _, timed in found for one in timed],
    }


def task_rows(run: Mapping[str, Any]) -> TaskRows:
    """The rows of one of a job's `runs`."""
    return TaskRows(
        run["kind"],
        pd.read_parquet(run["training"]),
        pd.read_parquet(run["validation"]),
        run["labels"],
        {name: Field.model_validate(one) for name, one in run["fields"].items()},
        run["instruction"],
    )


def main(job: Path, result: Path) -> int:
    try:
        found: dict[str, Any] = measure(json.loads(job.read_text(encoding="utf-8")))
    except FtError as error:
        found = {"error": {"what": error.what, "where": error.where, "mend": error.mend}}
    result.write_text(json.dumps(found), encoding="utf-8")
    return 1 if "error" in found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
