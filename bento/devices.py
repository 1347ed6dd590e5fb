"""Where an engine computes, and in which precision."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from bento.int8 import int8_gap
from ft_resources.errors import ServiceError

logger = logging.getLogger(__name__)
Precision = Literal["int8", "bf16", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DTYPES: dict[Precision, torch.dtype] = {"int8": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Of what is not multiplied in int8."""
PASS_TOKENS = {"cpu": 3072, "mps": 8192, "cuda": 65536}
"""Tokens of one pass through the model; larger passes gain little on that kind of device."""


def pick_device(wanted: str = "") -> torch.device:
    """CUDA, else MPS, else the CPU; `wanted` overrides.

    Raises:
        ServiceError: `wanted` is not a device this process has.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted and not there.get(wanted, False):
        raise ServiceError(
            f"device '{wanted}' is not available",
            where="FT_DEVICE",
            mend=f"Set it to one of {[name for name, usable in there.items() if usable]}, or unset it.",
        )
    return torch.device(wanted or next(name for name, usable in there.items() if usable))


def pick_precision(wanted: str, device: torch.device) -> Precision:
    """What `auto` stands for on `device`: bf16 where it is native, else fp32; other precisions stand for themselves.

    Raises:
        ServiceError: `wanted` is no precision, or int8 and the device cannot multiply in int8.
    """
    if wanted == "auto":
        return "bf16" if native_bf16(device) else "fp32"
    if wanted not in PRECISIONS:
        raise ServiceError(f"precision '{wanted}' is not known", mend=f"Use auto, {', '.join(PRECISIONS)}.")
    gap = int8_gap(device) if wanted == "int8" else ""
    if gap:
        raise ServiceError(f"precision int8 cannot be had: {gap}", where=str(device), mend="Use bf16 or fp32.")
    return wanted


def served_in(released: str, device: torch.device) -> Precision:
    """What a release in `released` is served in on `device`: see `pick_precision`, but fp32 where that is not to be had
    or the slower one.

    Int8 and bf16 are released because they give the answers of fp32.

    Raises:
        ServiceError: `released` is no precision.
    """
    gap = int8_gap(device) if released == "int8" else ""
    if released == "bf16" and device.type == "cpu" and not native_bf16(device):
        gap = "this CPU does not multiply bf16 itself"
    if gap:
        logger.warning("released in %s, served in fp32: %s", released, gap)
    return pick_precision("fp32" if gap else released, device)


def precisions_of(device: torch.device) -> tuple[Precision, ...]:
    """What `device` computes faster than fp32, and fp32; fastest first.

    Native bf16 is the faster one of the two, and nearer to fp32: rounding tokens to int8 takes longer than it saves.
    """
    there: dict[Precision, bool] = {"bf16": native_bf16(device), "int8": not int8_gap(device), "fp32": True}
    return tuple(precision for precision, computed in there.items() if computed)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that are computed with as they are: see `pick_precision`.

    Raises:
        ServiceError: `wanted` is none of auto, bf16 and fp32.
    """
    if wanted == "int8":
        raise ServiceError("precision int8 is for serving encoders", mend="Use auto, bf16 or fp32.")
    return DTYPES[pick_precision(wanted, device)]


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 itself: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@contextmanager
def fast_matmul(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply float32 on CPUs where it does so exactly: 1.4 times as fast as the default library.

    The setting allows rounding to bf16 too, which oneDNN does where the CPU has AMX.
    """
    if device.type != "cpu" or dtype != torch.float32 or torch.cpu.get_capabilities().get("amx_bf16"):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
