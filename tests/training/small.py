"""Tiny base models with random weights, of the architectures people fine-tune, and rows to train them on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from ft_assets.training.engine.runs import TaskRows, fit, tokenise
from ft_assets.training.engine.trainer import Step, Trained
from ft_assets.training.recipes import Settings
from ft_resources.base_models import resolve

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ENCODERS = {
    "bert": (transformers.BertConfig, SIZES),
    "roberta": (transformers.RobertaConfig, {**SIZES, "max_position_embeddings": 130, "type_vocab_size": 1}),
    "distilbert": (transformers.DistilBertConfig, {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4}),
    "albert": (transformers.AlbertConfig, {**SIZES, "embedding_size": 16}),
}
DECODERS = {
    "llama": (transformers.LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {**SIZES, "num_key_value_heads": 2}),
}
TINY = {**ENCODERS, **DECODERS}
LABELS = ["cold", "warm"]
WORDS = {
    "cold": ["ice", "snow", "winter", "frost", "glacier"],
    "warm": ["sun", "summer", "beach", "fire", "desert"],
}


def texts(count: int, seed: int) -> pd.DataFrame:
    """Sentences of 3 to 20 words with a class that their words tell."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        label = LABELS[number % 2]
        length = 3 + int(torch.randint(18, (1,), generator=generator))
        words = [WORDS[label][int(torch.randint(5, (1,), generator=generator))] for _ in range(length)]
        rows.append({"text": " ".join(words), "label": label})
    return pd.DataFrame(rows)


def settings(model: str, /, **sections: dict[str, object] | str) -> Settings:
    """Settings of a short run in fp32; `sections` override parts of them."""
    training = {"epochs": 2, "batch_size": 8, "precision": "fp32", "learning_rate": 5e-3, "head_learning_rate": 2e-2}
    given = dict(sections)
    return Settings.model_validate(
        {
            **{name: value for name, value in given.items() if name not in ("base", "training", "lora")},
            "base": {"model": model, "max_tokens": 64, **(given.get("base") or {})},  # type: ignore[dict-item]
            "lora": {"rank": 4, "alpha": 8, **(given.get("lora") or {})},  # type: ignore[dict-item]
            "training": {**training, **(given.get("training") or {})},  # type: ignore[dict-item]
        }
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of an adapter."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def train(rows: TaskRows, chosen: Settings, folder: Path, **further: Any) -> Trained:
    """Train on these rows and write the adapter to `folder`; `further` arguments are those of `fit`."""
    base = resolve(chosen.base.model)
    data = tokenise(rows, base, chosen.base.max_tokens)
    return fit(rows, data, base, chosen, folder, describe={"task": "small"}, **further)


class Died(Exception):
    """Stands for a process that ends between two steps."""


def dies_at(number: int) -> Callable[[Step], None]:
    """For `on_step`: raises `Died` after this step."""

    def on_step(step: Step) -> None:
        if step.step == number:
            raise Died

    return on_step
