"""One training run from rows to a folder with the adapter: what the workers of training and search share."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bento.conversation import Field, extraction_messages, load
from bento.devices import pick_device, pick_dtype
from ft_assets.data.assembly import require_labels, split_rows
from ft_assets.evaluation.calibration import fit_temperature
from ft_assets.training.engine.body import Body
from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.examples import Tokenised, classified, conversations
from ft_assets.training.engine.frozen import layers_of
from ft_assets.training.engine.learners import ClassLearner, learner_of
from ft_assets.training.engine.saving import save
from ft_assets.training.engine.trainer import Step, Trained, Trainer, seeded
from ft_assets.training.jobs import without_lines
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import RELIEF, Relief
from ft_resources.base_models import BaseModel
from ft_resources.environments import Environment
from ft_resources.errors import TrainingError
from ft_resources.lake import Lake
from ft_resources.usage import memory_limit


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task and what they are to teach."""

    kind: str
    """The task's type."""
    training: pd.DataFrame
    """text, label."""
    validation: pd.DataFrame
    labels: Sequence[str] = ()
    """Of a classification, in the order of the head."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """Of an extraction."""
    instruction: str = ""
    system: str = ""
    """Of a generation: the system prompt of requests that have none, as the rows have it."""


@dataclass(frozen=True)
class Data:
    """Tokenised rows; several runs on the same base and `max_tokens` share them."""

    training: Tokenised
    validation: Tokenised


def task_rows(lake: Lake, made_from: Mapping[str, Any]) -> TaskRows:
    """The rows that an adapter is, or was, made from."""
    training, validation = (split_rows(lake, made_from[split]) for split in ("train_split", "validation_split"))
    fields = made_from.get("fields", {})
    return TaskRows(
        made_from.get("type", "text-classification"),  # the only one that older adapters were of
        training,
        validation,
        made_from["labels"],
        {name: Field.model_validate(fields[name]) for name in made_from.get("field_order", fields)},
        made_from.get("instruction", ""),
        made_from.get("system", ""),
    )


def tokenise(rows: TaskRows, base: BaseModel, max_tokens: int) -> Data:
    """Tokenise training and validation rows for `base`.

    Raises:
        TrainingError: No rows, a label without rows, or no row whose answer fits into `max_tokens`.
    """
    require_labels(rows.training, rows.labels)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    training = _examples(rows, rows.training, tokenizer, max_tokens, 0)
    if not training.examples:
        raise TrainingError(
            f"no row has an answer within {max_tokens} tokens; the longest has {training.longest}",
            where="base.max_tokens",
            mend="Raise it.",
        )
    validation = _examples(rows, rows.validation, tokenizer, max_tokens, len(training.examples))
    return Data(training, validation)


def _examples(rows: TaskRows, frame: pd.DataFrame, tokenizer: Any, max_tokens: int, start: int) -> Tokenised:
    texts, labels = frame["text"].tolist(), frame["label"].tolist()
    if rows.kind == "text-classification":
        numbers = {label: number for number, label in enumerate(rows.labels)}
        return classified(tokenizer, texts, [numbers[label] for label in labels], max_tokens, start)
    asked = [
        load(text) if rows.kind == "text-generation" else extraction_messages(text, rows.fields, rows.instruction)
        for text in texts
    ]
    return conversations(tokenizer, list(zip(asked, labels, strict=True)), max_tokens, start)


def fit(
    rows: TaskRows,
    data: Data,
    base: BaseModel,
    settings: Settings,
    folder: Path,
    *,
    describe: Mapping[str, Any],
    device: str = "",
    checkpoints: Checkpoints | None = None,
    world: World | None = None,
    memory: int | None = None,
    relief: Sequence[Relief] = (),
    kept: dict[int, torch.Tensor] | None = None,
    parent: Path | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, measured: None,
) -> Trained:
    """Train and write the adapter to `folder`.

    Args:
        describe: Further entries of `adapter.json`; see `described`.
        device: `cuda`, `mps` or `cpu`; empty picks the best one there is.
        relief: How later steps are computed, where this training ran out of memory before.
        kept: Filled with what the layers below `lora.top_layers` give, by the number of the row. Runs on the same data,
            base, `lora.top_layers`, precision and speed settings may share one, and compute it once.
        parent: Folder of an adapter whose weights, and head, this one starts from.

    Raises:
        TrainingError: The loss is not finite, or the settings do not fit the base model.
        ServiceError: The device is missing.
    """
    where = pick_device(device)
    if world is not None and world.size > 1 and where.type != "cpu":
        raise TrainingError(
            f"several processes train on CPUs only so far, not on {where.type}",
            where="FT_PROCESSES",
            mend="Unset it: one process uses one GPU.",
        )
    seeded(settings.training.seed, where)
    dtype = pick_dtype(settings.training.precision, where)
    body = Body(base, settings, where, dtype, causal=rows.kind != "text-classification", kept=kept)
    if settings.speed.sharding and world is not None:
        world.shard(layers_of(body.inner)[1], body.inner)
    learner = learner_of(rows.kind, body, settings, rows.labels, data.training.examples)
    if parent is not None:
        body.start_from(parent)
        if isinstance(learner, ClassLearner):
            learner.head.load_state_dict(load_file(parent / "head.safetensors"))
    trained = Trainer(
        learner,
        data.training.examples,
        data.validation.examples,
        settings,
        checkpoints=checkpoints,
        world=world,
        memory=memory,
        relief=relief,
        on_step=on_step,
        on_epoch=on_epoch,
    ).run()
    about: dict[str, Any] = {"type": rows.kind, **describe}
    head = None
    if isinstance(learner, ClassLearner):
        head = learner.head
        known = np.array([one.target for one in data.validation.examples])
        temperature = fit_temperature(trained.outputs, known) if len(known) else 1.0
        about |= {"labels": list(rows.labels), "pooling": settings.base.pooling, "temperature": temperature}
    else:
        about |= {
            "fields": {name: one.model_dump() for name, one in rows.fields.items()},
            "instruction": rows.instruction,
            **({"system": rows.system} if rows.system else {}),
        }
    save(folder, body, head, trained.history, base=base, settings=settings, describe=about)
    return trained


PASSED_ON = ("parent", RELIEF)
"""Of them, those that few adapters have, as they stand in what it is made from."""
DESCRIBED = ("task", "template", "origins", "preparation", "exactness", *PASSED_ON)
"""Entries of `adapter.json` that a training does not tell itself."""


def described(
    made_from: Mapping[str, Any], template: str, origins: Mapping[str, str], environment: Environment
) -> dict[str, Any]:
    """The entries `DESCRIBED` of the adapter that is made from this.

    Args:
        template: Name of the recipe and its version.
        origins: Path of each setting -> where it was set.
    """
    return {
        "task": made_from["task"],
        "template": template,
        "origins": without_lines(origins),
        "preparation": made_from["preparation"],
        "exactness": exactness(environment.device),
        **{name: made_from[name] for name in PASSED_ON if name in made_from},
    }


TRACE = "training_trace"
"""Artefact beside an adapter: what its trained tensors were after every step, as checksums."""


def publish_trace(lake: Lake, adapter: str, trained: Trained) -> None:
    """Keep the trace of the adapter with this digest."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"checksums": trained.trace}, Path(scratch) / "trace.safetensors")
        (Path(scratch) / "names.json").write_text(json.dumps(trained.names))
        lake.publish(TRACE, Path(scratch), {"adapter": adapter})


def use_cores(world: World) -> None:
    """Divide the cores among the processes that train together."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))


def memory_of(environment: Environment) -> int:
    """Bytes a training may use: as `FT_MEMORY_GB` says, else nearly all there is."""
    return int(environment.memory_gb * 1e9) if environment.memory_gb else int(0.95 * memory_limit())


def exactness(device: str) -> str:
    """What a repetition of a training on this device is held to."""
    return "bit-exact" if pick_device(device).type == "cpu" else TOLERANCE


TOLERANCE = "every loss within 1e-3"
"""For devices some of whose kernels have no deterministic form."""
