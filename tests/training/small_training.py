"""Small trainings for processes of their own; under torchrun: `small_training.py BASE LAKE FOLDER`, sharded."""

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from ft_assets.training.engine.checkpoints import Checkpoints
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.runs import TaskRows, fit, tokenise, use_cores
from ft_resources.base_models import resolve
from ft_resources.errors import OutOfMemory
from ft_resources.lake import Lake
from tests.training.small import LABELS, settings, texts


def train(
    base: str, lake: str, folder: str, tell: Callable[[str], None], *, precision: str, sharding: bool = False
) -> None:
    """Train on a checkpoint at every step; tells every step, and of several processes what each holds of shards.

    In a process with FT_MEMORY_GB memory runs out beyond it, which it tells.
    """
    world = World.join()
    use_cores(world)
    rows = TaskRows("text-classification", texts(48, 1), texts(16, 2), LABELS)
    chosen = settings(base, speed={"sharding": sharding}, training={"precision": precision, "checkpoint_minutes": 1e-9})
    data = tokenise(rows, resolve(base), chosen.base.max_tokens)
    begun = partial(
        fit,
        rows,
        data,
        resolve(base),
        chosen,
        Path(folder) if world.leads else Path(folder + "-other"),
        describe={"task": "small"},
        checkpoints=Checkpoints(Lake(lake), "t", "key"),
        world=world,
        memory=int(1e9 * float(os.environ["FT_MEMORY_GB"])) if "FT_MEMORY_GB" in os.environ else None,
        on_step=lambda step: tell(f"step {step.step}"),
    )
    try:
        begun()
    except OutOfMemory as error:
        tell(f"out of memory: {error.what}")
        return
    if world.size > 1:
        shards = [thing for thing in gc.get_objects() if isinstance(thing, DTensor) and isinstance(thing, Parameter)]
        held, whole = sum(shard.to_local().numel() for shard in shards), sum(shard.numel() for shard in shards)
        tell(f"held {held} of {whole}")


if __name__ == "__main__":
    train(*sys.argv[1:4], partial(print, flush=True), precision="fp32", sharding=True)  # type: ignore[misc]
