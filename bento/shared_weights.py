"""Weights that the workers of one machine have in memory once: pages of a file that each of them maps."""

import ctypes
import logging
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock

from ft_resources.environments import Environment, ServiceSettings

logger = logging.getLogger(__name__)
ALIGNED = 64
"""Bytes at whose multiples a tensor begins: a line of the processor's caches."""


def share_weights(name: str, tensors: Iterable[torch.Tensor]) -> Path | None:
    """Move tensors of the CPU that do not change any more into `FT_HOME/bases/NAME.weights`, if several workers serve.

    The first worker writes the file. Another one reads it only if every byte in it is what it would have written
    itself, so that nobody computes with weights that they did not load. Where the file cannot be written, the tensors
    stay where they are.

    Args:
        name: What the tensors are a function of: base model, precision and order.
        tensors: Views of one memory stay so.

    Returns:
        The file; None if nothing is shared.
    """
    if ServiceSettings.read().workers == 1:
        return None
    tensors = {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.nbytes}.values()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    starts, end = dict[int, int](), 0
    for place, storage in storages.items():
        starts[place] = end
        end += -(-storage.nbytes() // ALIGNED) * ALIGNED
    file = Environment.read().home / "bases" / f"{name}.weights"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            mapped = _map(file, end)
            if mapped is None or not _holds(mapped, storages, starts):
                _write(file, storages)
                mapped = _map(file, end)
            if mapped is None:
                raise OSError(f"{file} was changed while it was written")
    except (OSError, RuntimeError) as error:  # torch raises the latter where it cannot map
        logger.warning("this worker has its own copy of the base model: %s", error)
        return None
    for tensor in tensors:
        start = starts[tensor.untyped_storage().data_ptr()] // tensor.element_size()
        view = torch.empty(0, dtype=tensor.dtype).set_(
            mapped.untyped_storage(), start + tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        tensor.data = view
    storages.clear()
    _give_back()
    return file


def _map(file: Path, size: int) -> torch.Tensor | None:
    """uint8 [size]: the bytes of `file`, unless it has another size. What a process writes to them is its own."""
    try:
        if file.stat().st_size != size:
            return None
    except FileNotFoundError:
        return None
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)


def _holds(mapped: torch.Tensor, storages: dict[int, torch.UntypedStorage], starts: dict[int, int]) -> bool:
    return all(
        torch.equal(mapped[starts[place] : starts[place] + storage.nbytes()], _bytes(storage))
        for place, storage in storages.items()
    )


def _write(file: Path, storages: dict[int, torch.UntypedStorage]) -> None:
    prefix = f".{file.name}-"
    for left in file.parent.glob(f"{prefix}*"):  # by a worker that was killed; the lock is held
        left.unlink()
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=prefix)
    try:
        with os.fdopen(handle, "wb") as sink:
            for storage in storages.values():
                sink.write(_bytes(storage).numpy().data)
                sink.write(bytes(-storage.nbytes() % ALIGNED))
        Path(scratch).replace(file)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _give_back() -> None:
    """Let glibc return to the system what the tensors were in."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
