"""Several processes that train one adapter: each computes its rows of a batch, gradients are summed.

Started by torchrun; one process alone needs none of it. Every process holds the same weights: they start from the same
seed and take the same summed step.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "World":
        """The world torchrun started this process in; alone without torchrun."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), size)

    @property
    def leads(self) -> bool:
        """Whether this process writes, reports and tracks."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every size-th item: of rows sorted by length, shares of like work."""
        return list(items[self.rank :: self.size])

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Sum each tensor over all processes, in place."""
        if self.size == 1:
            return
        every = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in every])
        dist.all_reduce(flat)
        for tensor, part in zip(every, flat.split([tensor.numel() for tensor in every]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def shard(self, layers: Iterable[torch.nn.Module], root: torch.nn.Module) -> None:
        """Divide the frozen weights of `layers`, and of what is left in `root`, among the processes (FSDP).

        A layer's weights are gathered when it computes and given back afterwards. Trained weights stay whole.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard

        trained = {weight for weight in root.parameters() if weight.requires_grad}
        for module in (*layers, root):
            fully_shard(module, ignored_params=trained)

    def most(self, count: int) -> int:
        """The largest `count` of any process."""
        if self.size == 1:
            return count
        counts = torch.tensor([count])
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts.item())

    def agree(self, flag: bool) -> bool:
        """Whether any process says so: all must leave a loop at the same step."""
        if self.size == 1:
            return flag
        said = torch.tensor([float(flag)])
        dist.all_reduce(said)
        return bool(said.item())
