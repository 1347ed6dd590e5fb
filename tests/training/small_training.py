"""A small training in a process of its own: `small_training.py BASE LAKE FOLDER`. Prints every step."""

import gc
import os
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.runs import TaskRows, fit, tokenise, use_cores
from ft_resources.base_models import resolve
from ft_resources.lake import Lake
from tests.training.small import LABELS, settings, texts

base, lake, folder = sys.argv[1:]
world = World.join()
use_cores(world)
rows = TaskRows("text-classification", texts(48, 1), texts(16, 2), LABELS)
sharding = {"sharding": bool(os.environ.get("SMALL_SHARDING"))}
chosen = settings(
    base, speed=sharding, training={"precision": os.environ.get("SMALL_PRECISION", "bf16"), "checkpoint_minutes": 1e-9}
)
data = tokenise(rows, resolve(base), chosen.base.max_tokens)
fit(
    rows,
    data,
    resolve(base),
    chosen,
    Path(folder) if world.leads else Path(folder + "-other"),
    describe={"task": "small"},
    checkpoints=Checkpoints(Lake(lake), "t", "key"),
    world=world,
    on_step=lambda step: print("step", step.step, flush=True),
)
if world.size > 1:
    shards = [thing for thing in gc.get_objects() if isinstance(thing, DTensor) and isinstance(thing, Parameter)]
    held, whole = sum(shard.to_local().numel() for shard in shards), sum(shard.numel() for shard in shards)
    print("held", held, "of", whole, flush=True)
