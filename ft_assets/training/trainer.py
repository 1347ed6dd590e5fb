"""Training a LoRA classifier. Runs in the training worker only: this module imports torch.

The same rows, settings and seed give the same adapter bytes on the same machine: seeds are set before the model
and the adapter are created, the batch order is seeded, and deterministic kernels are required.
"""

import copy
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from bento.devices import pick_device, pick_dtype
from ft_assets.evaluation.calibration import fit_temperature
from ft_assets.training.batching import length_grouped
from ft_assets.training.recipes import Settings
from ft_resources.base_models import BaseModel
from ft_resources.errors import TrainingError


@dataclass(frozen=True)
class Rows:
    """Texts and the numbers of their labels."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Step:
    """One optimiser step, as it is streamed to the tracker."""

    step: int
    steps: int
    epoch: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass
class History:
    """The deterministic part of a run, kept inside the adapter."""

    loss: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0


class Classifier(torch.nn.Module):
    """Encoder, pooling and a linear head: logits = head(pool(states))."""

    def __init__(self, encoder: torch.nn.Module, hidden: int, labels: int, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.head = torch.nn.Linear(hidden, labels)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [rows, labels] float32 of token ids [rows, tokens]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            return self.head(states[:, 0])
        weights = mask.unsqueeze(-1).float()
        return self.head((states * weights).sum(1) / weights.sum(1))


def train(
    rows: Rows,
    validation: Rows,
    labels: Sequence[str],
    base: BaseModel,
    settings: Settings,
    folder: Path,
    *,
    describe: dict[str, Any],
    device: str = "",
    on_step: Callable[[Step], None],
    on_epoch: Callable[[int, dict[str, float]], None],
) -> History:
    """Train an adapter and write it to `folder` in the platform's adapter layout.

    Args:
        describe: Further entries of `adapter.json`, such as task and origins of the settings.

    Raises:
        TrainingError: No rows, a label without rows, a loss that is not finite, or a missing device.
    """
    missing = [label for number, label in enumerate(labels) if number not in set(rows.labels)]
    if not rows.texts or missing:
        raise TrainingError(
            f"there are no training rows for {missing or list(labels)}",
            where=f"task {describe.get('task')}",
            mend="Add labelled rows for them, or remove these labels from the task.",
        )
    options = settings.training
    where = pick_device(device)
    bf16 = pick_dtype(options.precision, where) == torch.bfloat16
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True, warn_only=where.type != "cpu")

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = _classifier(base, settings, len(labels), bf16).to(where)
    encoded = _tokenise(tokenizer, rows.texts, settings.base.max_tokens)
    held_out = _tokenise(tokenizer, validation.texts, settings.base.max_tokens)

    def forward(batch: list[list[int]]) -> torch.Tensor:
        ids, mask = _pad(batch, where)
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            logits: torch.Tensor = model(ids, mask)
        return logits.float()

    adapted = [weight for weight in model.encoder.parameters() if weight.requires_grad]
    groups = [
        {"params": adapted, "lr": options.learning_rate},
        {"params": list(model.head.parameters()), "lr": options.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    steps = options.epochs * math.ceil(len(rows.texts) / options.batch_size)
    warmup = max(1, round(steps * options.warmup_share))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))
    )
    criterion = torch.nn.CrossEntropyLoss(
        weight=_class_weights(rows.labels, len(labels), options.class_weighting, where),
        label_smoothing=options.label_smoothing,
    )
    history = History(
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(p.numel() for p in model.parameters()),
    )
    best: tuple[float, float] | None = None
    best_weights: dict[str, torch.Tensor] = {}
    best_logits = np.zeros((0, len(labels)), dtype=np.float32)
    started, step = time.perf_counter(), 0
    for epoch in range(1, options.epochs + 1):
        model.train()
        for batch in length_grouped([len(ids) for ids in encoded], options.batch_size, options.seed + epoch):
            loss = criterion(
                forward([encoded[row] for row in batch]),
                torch.tensor([rows.labels[row] for row in batch], device=where),
            )
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} at step {step + 1} of {steps}",
                    where=f"task {describe.get('task')}",
                    mend="Lower training.learning_rate or set training.precision to fp32.",
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapted, options.max_grad_norm)
            rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            history.loss.append(value)
            on_step(
                Step(
                    step,
                    steps,
                    epoch,
                    value,
                    rate,
                    sum(len(encoded[row]) for row in batch),
                    time.perf_counter() - started,
                )
            )
        measured, logits = _measure(model, forward, held_out, validation.labels)
        history.validation.append(measured)
        on_epoch(epoch, measured)
        score = (measured["macro_f1"], -measured["loss"])
        if best is None or score > best:
            best, best_logits, history.best_epoch = score, logits, epoch
            best_weights = {
                name: copy.deepcopy(w) for name, w in model.state_dict().items() if _is_trained(model, name)
            }
    model.load_state_dict(best_weights, strict=False)
    temperature = fit_temperature(best_logits, np.array(validation.labels)) if validation.labels else 1.0
    _save(model, labels, base, settings, history, temperature, folder, describe)
    return history


def _classifier(base: BaseModel, settings: Settings, labels: int, bf16: bool) -> Classifier:
    lora = settings.lora
    encoder = AutoModel.from_pretrained(
        base.path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation="eager",  # the fused kernel's backward pass is the slower one on CPU
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=["pooler.dense"],  # not on the way from the states to the head
        use_rslora=lora.use_rslora,
    )
    try:
        adapted = get_peft_model(encoder, config)
    except ValueError as error:
        raise TrainingError(
            f"the adapter does not fit the base model: {error}",
            where="lora.target_modules",
            mend="Name linear layers of the base model, or use all-linear.",
        ) from error
    return Classifier(adapted, encoder.config.hidden_size, labels, settings.base.pooling)


def _tokenise(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    return encoded


def _pad(batch: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids.to(device), mask.to(device)


def _class_weights(labels: list[int], count: int, weighting: str, device: torch.device) -> torch.Tensor | None:
    if weighting == "none":
        return None
    frequency = torch.bincount(torch.tensor(labels), minlength=count).float()
    return (len(labels) / (count * frequency)).to(device)


@torch.no_grad()
def _measure(
    model: Classifier, forward: Callable[[list[list[int]]], torch.Tensor], encoded: list[list[int]], labels: list[int]
) -> tuple[dict[str, float], np.ndarray]:
    """Validation loss, accuracy and macro-F1, and the logits [rows, labels] they come from."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = model.head.out_features
    logits = np.zeros((len(encoded), classes), dtype=np.float32)
    if not encoded:
        return {"loss": 0.0, "accuracy": 0.0, "macro_f1": 0.0}, logits
    model.eval()
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        logits[rows] = forward([encoded[row] for row in rows]).cpu().numpy()
    predicted = logits.argmax(1)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.tensor(labels))
    return {
        "loss": float(loss),
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0)),
    }, logits


def _is_trained(model: Classifier, name: str) -> bool:
    return "lora_" in name or name.startswith("head.")


def _save(
    model: Classifier,
    labels: Sequence[str],
    base: BaseModel,
    settings: Settings,
    history: History,
    temperature: float,
    folder: Path,
    describe: dict[str, Any],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.encoder.float().save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.reference
    config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set, whose order is not stable
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the model card is the registry's
    save_file(
        {k: v.detach().float().cpu().contiguous() for k, v in model.head.state_dict().items()},
        folder / "head.safetensors",
    )
    adapter = {
        "format": 1,
        "type": "text-classification",
        "labels": list(labels),
        "base": {"model": base.reference, "digest": base.digest},
        "max_tokens": settings.base.max_tokens,
        "pooling": settings.base.pooling,
        "temperature": temperature,
        "settings": settings.model_dump(),
        **describe,
    }
    (folder / "adapter.json").write_text(json.dumps(adapter, indent=1, sort_keys=True, ensure_ascii=False))
    (folder / "training.json").write_text(json.dumps(asdict(history), indent=1, sort_keys=True))
