"""What people deploy today, as they write it: the servers ours is measured beside.

Settings by environment: PEERS is a JSON object {"base": folder, "adapters": {task: folder}}.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bentoml
import pydantic
import torch
from fastapi import FastAPI
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

torch.set_num_threads(1)
MAX_TOKENS = 128


class Item(pydantic.BaseModel):
    task: str
    text: str


class Topic(pydantic.BaseModel):
    label: str
    confidence: float


class PeftClassifier:
    """transformers in fp32 with peft adapters, one active at a time."""

    def __init__(self) -> None:
        settings = json.loads(os.environ["PEERS"])
        folders: dict[str, str] = settings["adapters"]
        self.tokenizer = AutoTokenizer.from_pretrained(settings["base"])
        base = AutoModel.from_pretrained(settings["base"])
        first, *others = folders
        self.model: Any = PeftModel.from_pretrained(base, folders[first], adapter_name=first).eval()
        for task in others:
            self.model.load_adapter(folders[task], adapter_name=task)
        self.heads = {task: load_file(Path(folder) / "head.safetensors") for task, folder in folders.items()}
        self.labels = {
            task: json.loads((Path(folder) / "adapter.json").read_text())["labels"] for task, folder in folders.items()
        }
        self._turn = threading.Lock()

    def predict(self, item: Item) -> Topic:
        """`set_adapter`, then one text: the active adapter belongs to the whole model, hence the lock."""
        with self._turn, torch.no_grad():
            self.model.set_adapter(item.task)
            inputs = self.tokenizer(item.text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            pooled = self.model(**inputs).last_hidden_state.mean(1)
        return self._topic(item.task, pooled)

    def predict_batch(self, items: Sequence[Item]) -> list[Topic]:
        """peft's own batches of several adapters: `adapter_names`."""
        inputs = self.tokenizer(
            [item.text for item in items], truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt"
        )
        with self._turn, torch.no_grad():
            states = self.model(**inputs, adapter_names=[item.task for item in items]).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return [self._topic(item.task, pooled[row : row + 1]) for row, item in enumerate(items)]

    def _topic(self, task: str, pooled: torch.Tensor) -> Topic:
        head = self.heads[task]
        probabilities = (pooled @ head["weight"].t() + head["bias"]).softmax(-1)[0]
        best = int(probabilities.argmax())
        return Topic(label=self.labels[task][best], confidence=float(probabilities[best]))


def naive() -> FastAPI:
    """FastAPI with peft: `uvicorn --factory serving_peers:naive`."""
    app, classifier = FastAPI(), PeftClassifier()

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    @app.post("/predict")
    def predict(item: Item) -> Topic:
        return classifier.predict(item)

    return app


@bentoml.service(name="peft_plain", workers=1, traffic={"timeout": 120}, logging={"access": {"enabled": False}})
class Plain:
    """BentoML without batching."""

    def __init__(self) -> None:
        self.classifier = PeftClassifier()

    @bentoml.api
    def predict(self, task: str, text: str) -> Topic:
        return self.classifier.predict(Item(task=task, text=text))


@bentoml.service(name="peft_batching", workers=1, traffic={"timeout": 120}, logging={"access": {"enabled": False}})
class Batching:
    """BentoML's adaptive batching."""

    def __init__(self) -> None:
        self.classifier = PeftClassifier()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=20_000)
    def predict(self, items: list[Item]) -> list[Topic]:
        return self.classifier.predict_batch(items)
