"""A step in passes through the model, within the memory there is."""

from collections.abc import Callable, Iterator, Sequence

import torch

from ft_assets.training.engine.batching import PART_TOKENS, parts
from ft_assets.training.engine.body import Body
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.examples import Example
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import Relief
from ft_resources.errors import OutOfMemory
from ft_resources.usage import forget_peak_memory, peak_memory

MEND = "Lower training.micro_batch_tokens or base.max_tokens, or set training.gradient_checkpointing."


class Passes:
    """Divides rows into passes, as the settings say or, after a training ran out of memory, its relief.

    Args:
        memory: Bytes this process may use; None: no limit.
        relief: How later steps are computed, where this training ran out of memory before.
    """

    def __init__(
        self, body: Body, settings: Settings, world: World, memory: int | None, relief: Sequence[Relief]
    ) -> None:
        self._body, self._world, self._memory, self._relief = body, world, memory, relief
        self._lacking: OutOfMemory | None = None
        self._sharded = settings.speed.sharding
        self._tokens = settings.training.micro_batch_tokens or PART_TOKENS[body.device.type]

    def begin(self, step: int) -> None:
        """Begin a training that has taken `step` steps so far; what this process held before does not count."""
        self.relieve(step)
        if self._memory is not None:
            forget_peak_memory()

    def relieve(self, step: int) -> None:
        """Take up how the step after `step` is computed."""
        for one in self._relief:
            if one.after_step <= step:
                self._tokens = one.micro_batch_tokens
                if one.gradient_checkpointing:
                    self._body.recompute()

    def each(self, rows: Sequence[Example], compute: Callable[[list[Example], float], None]) -> torch.Tensor:
        """Call `compute` with every pass of this process's share of `rows`, and 1 for each that counts.

        Processes that share out the base's weights pass equally often; what one has to add counts 0.

        Returns:
            float64 []: above 0 where memory ran out, which the other processes are told in a sum, for `end_if_any`.

        Raises:
            OutOfMemory: It ran out, and no other process waits for this one.
        """
        self._lacking = None
        for part, counts in self._of(rows):
            try:
                compute(part, counts)
                over = self._memory is not None and peak_memory() > self._memory
                lacking = self._out_of_memory(part) if over else None
            except (torch.OutOfMemoryError, MemoryError) as error:
                lacking = self._out_of_memory(part)
                lacking.__cause__ = error
            if lacking is not None:
                if self._world.size == 1 or self._sharded:
                    raise lacking
                self._lacking = lacking
                break
        return torch.tensor(float(self._lacking is not None), dtype=torch.float64)

    def end_if_any(self, lacking: torch.Tensor) -> None:
        """Args:
            lacking: The sum over all processes.

        Raises:
            OutOfMemory: Memory ran out in one of them.
        """
        if lacking > 0:
            raise self._lacking or OutOfMemory(
                "a process that trains along needs more memory than there is", where="training", mend=MEND
            )

    def _of(self, rows: Sequence[Example]) -> Iterator[tuple[list[Example], float]]:
        share = self._world.share(sorted(rows, key=lambda one: -len(one.ids)))
        passes = parts([len(one.ids) for one in share], self._tokens, padded=not self._body.packed)
        for part in passes:
            yield [share[at] for at in part], 1.0
        if self._sharded:
            for _ in range(len(passes), self._world.most(len(passes))):
                yield list(rows[:1]), 0.0

    def _out_of_memory(self, part: Sequence[Example]) -> OutOfMemory:
        device = self._body.device
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            used = total - free
        else:
            used, total = peak_memory(), self._memory or 0
        tokens = sum(len(one.ids) for one in part)
        return OutOfMemory(
            f"a pass over {len(part)} rows ({tokens} tokens) needs more memory than there is",
            used=used,
            total=total,
            where="training",
            mend=MEND,
        )
