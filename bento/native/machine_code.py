"""Programs of this package, compiled for the CPU at hand when they are first needed."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from bento.native import attention_program, segments_program
from bento.native.kinds import KINDS, Kind

Function = Callable[[Sequence[int], int], None]
"""Takes the fields of its call and how many of torch's threads divide the work; Python runs on meanwhile."""
OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")


def missing(dtype: torch.dtype, device: torch.device) -> str:
    """Why `device` cannot run them on values of this type; empty: it can."""
    kinds = [kind for kind in KINDS if kind.dtype == dtype]
    if device.type != "cpu" or not kinds:
        return "it is for bfloat16 and float32 on CPUs"
    if not any(kind in computed() for kind in kinds):
        return _unable() or f"the CPU has no {kinds[-1].needs}, or LLVM does not know it"
    return ""


@cache
def _unable() -> str:
    """Why no processor can run them here; empty: some can."""
    if sys.platform != "linux":
        return "it is for Linux"
    if not all(hasattr(_torch_library(), name) for name in OPENMP):
        return "torch has no OpenMP, or another one"
    return ""


@cache
def computed() -> Sequence[Kind]:
    """What can be computed here, as far as LLVM knows the CPU; of each type the fastest first."""
    if _unable():
        return []
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return [kind for kind in KINDS if features.get(kind.feature)]


def kind_of(dtype: torch.dtype) -> Kind:
    """The fastest for values of this type, which is not `missing`."""
    return {kind.dtype: kind for kind in reversed(computed())}[dtype]


@cache
def _torch_library() -> ctypes.CDLL:
    """torch's library, which knows the OpenMP that it uses."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


class SegmentProducts(NamedTuple):
    """See `segments_program.program`."""

    low: Function
    add: Function


@cache
def segment_products(kind: Kind) -> SegmentProducts:
    """Compiled once in a process, which takes a third of a second."""
    return SegmentProducts(*_compiled(segments_program.program(kind), ("low", "add")))


@cache
def attend(kind: Kind, width: int) -> Function:
    """See `attention_program.program`; compiled once in a process.

    Args:
        width: Of a head.
    """
    return _compiled(attention_program.program(kind, width), ("attend",))[0]


def _compiled(program: str, names: Sequence[str]) -> list[Function]:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name in OPENMP:
        llvm.add_symbol(name, ctypes.cast(getattr(_torch_library(), name), ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(program)
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    memory = llvm.create_mcjit_compiler(module, machine)
    memory.finalize_object()

    def function(name: str) -> Function:
        address = memory.get_function_address(name)
        alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

        def run(fields: Sequence[int], threads: int, _memory: object = memory) -> None:
            numbers = (ctypes.c_int64 * len(fields))(*fields)
            if threads > 1:
                _torch_library().GOMP_parallel(ctypes.c_void_p(address), numbers, threads, 0)
            else:
                alone(numbers)

        return run

    return [function(name) for name in names]
