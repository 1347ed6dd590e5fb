"""Tiny decoders with random weights, adapters on them written by peft, and what plain transformers and peft answer."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from bento.generation.engine import Generator
from bento.generation.vllm_engine import VllmGenerator
from ft_resources.base_models import BaseModel, resolve
from tests.bento.writers import SIZES, write_base

Engine = TypeVar("Engine", Generator, VllmGenerator)

LORA: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "other": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "everything": {"r": 8, "target_modules": "all-linear", "use_rslora": True},
    "odd": {"r": 3, "target_modules": ["down_proj", "k_proj"], "rank_pattern": {"k_proj": 5}},
}

WIDE = {"head_dim": 32}
"""Heads as wide as vLLM's kernels on a CPU ask for."""


@dataclass(frozen=True)
class Tiny:
    """A base model and adapters on it, by name."""

    base: BaseModel
    adapters: dict[str, Path]

    def expected(self, adapter: str | None, ids: Sequence[int], tokens: int) -> list[int]:
        """Greedy answer of plain transformers, and peft, in fp32; the end token, if it came, is the last."""
        made = self._model(adapter).generate(
            torch.tensor([ids]),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(ids)),
        )
        return made[0, len(ids) :].tolist()

    def states(self, adapter: str | None, ids: Sequence[int]) -> torch.Tensor:
        """Last hidden states [tokens, hidden]."""
        with torch.no_grad():
            output = self._model(adapter)(torch.tensor([ids]), output_hidden_states=True)
        return output.hidden_states[-1][0]

    def _model(self, adapter: str | None) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base.path).eval()
        return model if adapter is None else PeftModel.from_pretrained(model, str(self.adapters[adapter])).eval()


def write(folder: Path, base: BaseModel, seed: int, lora: dict[str, Any], size: float = 0.3, **manifest: Any) -> Path:
    """An adapter with random updates of visible size."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path)
    model = get_peft_model(model, LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.normal_(0, size)
    model.save_pretrained(str(folder))
    about = {
        "format": 1,
        "task": folder.name,
        "type": "text-generation",
        "base": {"model": base.reference, "digest": base.digest},
        "max_tokens": 128,
        **manifest,
    }
    (folder / "adapter.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A base model and four adapters: `llama`, `qwen2`, or a llama with `WIDE` heads, `wide`."""
    made: dict[str, Tiny] = {}

    def get(kind: str) -> Tiny:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            write_base(root / "base", **(WIDE if kind == "wide" else {}))
            config = transformers.AutoConfig.from_pretrained(root / "base")
            if kind == "qwen2":
                config = transformers.Qwen2Config(
                    vocab_size=config.vocab_size, eos_token_id=0, pad_token_id=0, bos_token_id=0, **SIZES
                )
            torch.manual_seed(7)
            config.initializer_range = 0.3  # answers that differ from prompt to prompt
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
            base = resolve(str(root / "base"))
            made[kind] = Tiny(
                base, {name: write(root / name, base, seed, lora) for seed, (name, lora) in enumerate(LORA.items())}
            )
        return made[kind]

    return get


@pytest.fixture(scope="session")
def tiny(make_tiny: Callable[[str], Tiny]) -> Tiny:
    return make_tiny("llama")


def loaded(kind: type[Engine], tiny: Tiny) -> Iterator[Engine]:
    """An engine of this kind in fp32 with all adapters of `tiny`, each under its name, which ends afterwards."""
    engine = kind(tiny.base, "fp32")
    for name, folder in tiny.adapters.items():
        engine.load(name, folder)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def generator(tiny: Tiny) -> Iterator[Generator]:
    """An engine in fp32 with all adapters loaded, each under its name."""
    yield from loaded(Generator, tiny)
