"""A step in passes through the model, within the memory there is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ft_assets.training.engine.batching import PART_TOKENS, parts
from ft_assets.training.engine.body import Body
from ft_assets.training.engine.distributed import World
from ft_assets.training.engine.examples import Example
from ft_assets.training.recipes import Settings
from ft_assets.training.relief import Relief
from ft_resources.errors import OutOfMemory
from ft_resources.usage import forget_peak_memory, peak_memory


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

    def of(self, rows: Sequence[Example]) -> Iterator[tuple[list[Example], float]]:
        """This process's share of `rows` in passes through the model, and 1 for each that counts.

        Processes that share out the base's weights pass equally often; what one has to add counts 0.
        """
        share = self._world.share(sorted(rows, key=lambda one: -len(one.ids)))
        passes = parts([len(one.ids) for one in share], self._tokens, padded=not self._body.packed)
        for part in passes:
            yield [share[at] for at in part], 1.0
        if self._sharded:
            for _ in range(len(passes), self._world.most(len(passes))):
                yield list(rows[:1]), 0.0

    @contextmanager
    def within_memory(self, part: Sequence[Example]) -> Iterator[None]:
        """Raises:
        OutOfMemory: What is done inside needs more than there is, or than may be used.
        """
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise self._out_of_memory(part) from error
        if self._memory is not None and peak_memory() > self._memory:
            raise self._out_of_memory(part)

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
            mend="Lower training.micro_batch_tokens or base.max_tokens, or set training.gradient_checkpointing.",
        )
