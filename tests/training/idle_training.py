"""A training that stands still after its third step: `idle_training.py BASE LAKE FOLDER UTILISATION`.

It stands still until its GPU is taken from it, or for 4 seconds; the GPU's utilisation is the number given.
"""

import sys
import threading
from pathlib import Path

from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.engine.runs import TaskRows, fit, tokenise
from ft_assets.training.engine.trainer import Step
from ft_assets.training.idle import IdleWatch, reclaimed_when_idle
from ft_resources.base_models import resolve
from ft_resources.errors import TrainingError
from ft_resources.lake import Lake
from tests.training.small import LABELS, settings, texts

base, lake, folder, utilisation = sys.argv[1:]
rows = TaskRows("text-classification", texts(48, 1), texts(16, 2), LABELS)
chosen = settings(base)
lines, ended = list[str](), threading.Event()


def warn(line: str) -> None:
    lines.append(line)
    print(line, flush=True)
    if "given back" in line:
        ended.set()


def on_step(step: Step) -> None:
    lines.append(f"step {step.step}")
    if step.step == 3:
        ended.wait(4)


try:
    with reclaimed_when_idle(IdleWatch(quiet=1), lines, lambda: float(utilisation), warn):
        fit(
            rows,
            tokenise(rows, resolve(base), chosen.base.max_tokens),
            resolve(base),
            chosen,
            Path(folder),
            describe={"task": "small"},
            checkpoints=Checkpoints(Lake(lake), "t", "key"),
            on_step=on_step,
        )
    print("trained", flush=True)
except TrainingError as error:
    print("TrainingError", error, flush=True)
