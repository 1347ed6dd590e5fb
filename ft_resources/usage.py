"""What a process uses while it works: memory, processor, GPU and energy, sampled by one thread beside the work.

Peak memory is the kernel's own high-water mark, not the largest sample, so that it can be planned with. On Linux it
is VmHWM: `ru_maxrss` there starts at the peak of the process that forked this one, which can be far larger.
"""

import csv
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

WATTS_PER_CORE = 8.0
"""Estimate where nothing measures: a busy server core with its share of the package and of memory."""
ALARM = 0.9
"""Share of the memory there is from which a warning is given."""
POWERCAP = Path("/sys/class/powercap")
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
GIGABYTE = 1e9


@dataclass(frozen=True)
class Usage:
    """What some work used, in total. Sizes in bytes, times in seconds."""

    wall_seconds: float
    cpu_seconds: float
    """Of this process and its children, user and system."""
    gpu_seconds: float
    """Wall seconds for which a GPU was held."""
    peak_memory_bytes: int
    """Highest resident memory of this process since it started, or of it and its children together if more."""
    peak_gpu_memory_bytes: int
    """Highest memory that torch reserved on the GPU; the CUDA context is not in it."""
    energy_wh: float
    energy_source: str
    """`rapl` (measured for whole packages) or `estimate` (CPU seconds times `WATTS_PER_CORE`), with `nvml+` in front
    where a GPU was used whose energy is measured too, or ` without GPU` behind where it is not known."""


@dataclass(frozen=True)
class Sample:
    """One moment. The GPU's fields are None without one, or where it does not tell."""

    seconds: float
    """Since the metering began."""
    memory_bytes: int
    cpu_utilisation: float
    """Percent of the cores that this process may use."""
    cpu_seconds: float
    """Since the metering began, of this process and its children."""
    gpu_utilisation: float | None = None
    """Percent of the time with a kernel running."""
    gpu_memory_bytes: int | None = None
    """In use on the whole device, by anybody."""
    gpu_temperature: float | None = None
    """Degrees Celsius."""


class Meter:
    """Meters this process and its children while the body of a `with` statement runs.

    Args:
        device: The torch device that the work runs on; a GPU is metered when it is `cuda` or `cuda:N`.
        seconds: Time between two samples.
        file: CSV file that each sample is appended to at once, so that it outlives a process that is killed.
        warn: Called once, with a sentence, when memory in use passes 90 % of what there is: of a container's limit or
            of the machine, and on a GPU of the device.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        seconds: float = 1.0,
        file: Path | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._device, self._seconds, self._file, self._warn = device, seconds, file, warn
        self._process = psutil.Process()
        self._cores = usable_cores()
        self._samples: list[Sample] = []
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> "Meter":
        self._gpu = _gpu(self._device)
        self._packages = _packages()
        self._joules = 0.0
        self._began = self._at = time.monotonic()
        self._cpu_began = self._cpu = self._tree()[1]
        self._gpu_began = self._gpu.joules() if self._gpu else None
        self._sink = self._file.open("w", newline="", encoding="utf-8", buffering=1) if self._file else None
        if self._sink:
            csv.writer(self._sink).writerow(field.name for field in fields(Sample))
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()
        self._usage = self._total()
        if self._sink:
            self._sink.close()
        if self._gpu:
            self._gpu.close()

    def now(self) -> dict[str, float]:
        """The newest sample as metrics: `memory_gb`, `cpu_utilisation`, and with a GPU `gpu_utilisation`,
        `gpu_memory_gb` and `gpu_temperature`. Sizes in 1e9 bytes, utilisation in percent."""
        with self._lock:
            newest = self._samples[-1]
        values = {
            "memory_gb": newest.memory_bytes / GIGABYTE,
            "cpu_utilisation": newest.cpu_utilisation,
            "gpu_utilisation": newest.gpu_utilisation,
            "gpu_memory_gb": None if newest.gpu_memory_bytes is None else newest.gpu_memory_bytes / GIGABYTE,
            "gpu_temperature": newest.gpu_temperature,
        }
        return {name: value for name, value in values.items() if value is not None}

    def curve(self) -> list[dict[str, Any]]:
        """Every sample so far, oldest first; the keys are the fields of `Sample`."""
        with self._lock:
            return [asdict(sample) for sample in self._samples]

    def total(self) -> Usage:
        """What was used since the `with` statement began, up to now or to its end."""
        if self._over.is_set():
            return self._usage
        self._sample()
        return self._total()

    def _total(self) -> Usage:
        with self._lock:
            wall, cpu = self._at - self._began, self._cpu - self._cpu_began
            largest = max(sample.memory_bytes for sample in self._samples)
            joules = self._joules if self._packages else cpu * WATTS_PER_CORE
        source = "rapl" if self._packages else "estimate"
        if self._gpu:
            at_end = self._gpu.joules()
            if at_end is None or self._gpu_began is None:
                source = f"{source} without GPU"
            else:
                joules += at_end - self._gpu_began
                source = f"nvml+{source}"
        return Usage(
            wall_seconds=wall,
            cpu_seconds=cpu,
            gpu_seconds=wall if self._gpu else 0.0,
            peak_memory_bytes=max(largest, peak_memory()),
            peak_gpu_memory_bytes=self._gpu.peak() if self._gpu else 0,
            energy_wh=joules / 3600,
            energy_source=source,
        )

    def _watch(self) -> None:
        while not self._over.wait(self._seconds):
            self._sample()

    def _sample(self) -> None:
        memory, cpu = self._tree()
        gpu = self._gpu.sample() if self._gpu else {}
        with self._lock:
            at = time.monotonic()
            since, used = max(at - self._at, 1e-6), max(cpu - self._cpu, 0.0)
            if self._samples and since < self._seconds / 2:  # too short for a rate: the last one stands
                rate = self._samples[-1].cpu_utilisation
            else:
                rate = min(100.0, 100 * used / (since * self._cores)) if self._samples else 0.0
            self._at, self._cpu = at, max(cpu, self._cpu)
            self._joules += sum(package.spent() for package in self._packages)
            sample = Sample(at - self._began, memory, rate, self._cpu - self._cpu_began, **gpu)
            self._samples.append(sample)
            if self._sink and not self._sink.closed:
                row = asdict(sample).values()
                csv.writer(self._sink).writerow("" if value is None else round(value, 3) for value in row)
        self._alarm()

    def _alarm(self) -> None:
        if self._warn is None:
            return
        bounds = {"the memory": max(memory_bounds(), key=lambda bound: bound[0] / bound[1])}
        if self._gpu and (device := self._gpu.bound()):
            bounds["the GPU's memory"] = device
        for what, (used, total) in bounds.items():
            if used >= ALARM * total:
                warn, self._warn = self._warn, None
                warn(
                    f"{used / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB of {what} are in use ({used / total:.0%}): "
                    "it may run out; lower training.batch_size or base.max_tokens"
                )
                return

    def _tree(self) -> tuple[int, float]:
        """Resident bytes and CPU seconds of this process, its children, and children that ended."""
        memory, seconds = 0, 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                memory += process.memory_info().rss
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        return memory, seconds


def stored_samples(file: Path) -> list[dict[str, float]]:
    """The samples in the file of a `Meter`, if it is there; unknown values are NaN.

    A last line that was not written to its end is left out.
    """
    rows = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as source:
            for row in csv.DictReader(source):
                with suppress(TypeError, ValueError):
                    rows.append({name: float(value) if value != "" else math.nan for name, value in row.items()})
    return rows


def sampled_usage(file: Path) -> Usage | None:
    """What a process used up to the last sample in the file of its `Meter`, which was killed before it could say.

    Peaks are those of the samples, and of the whole GPU; the energy is an estimate. None: there is no sample.
    """
    samples = stored_samples(file)
    if not samples:
        return None
    last = samples[-1]
    on_gpu = [sample["gpu_memory_bytes"] for sample in samples if not math.isnan(sample["gpu_memory_bytes"])]
    return Usage(
        wall_seconds=last["seconds"],
        cpu_seconds=last["cpu_seconds"],
        gpu_seconds=last["seconds"] if on_gpu else 0.0,
        peak_memory_bytes=int(max(sample["memory_bytes"] for sample in samples)),
        peak_gpu_memory_bytes=int(max(on_gpu, default=0)),
        energy_wh=last["cpu_seconds"] * WATTS_PER_CORE / 3600,
        energy_source="estimate without GPU" if on_gpu else "estimate",
    )


class _Package:
    """A processor package whose energy the kernel counts."""

    def __init__(self, folder: Path) -> None:
        self._counter = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())

    def spent(self) -> float:
        """Joules since the last call; the counter starts again at its range, minutes apart at the least."""
        value = int(self._counter.read_text())
        spent = (value - self._last) % (self._range + 1)
        self._last = value
        return spent / 1e6


def _packages() -> list[_Package]:
    found = []
    for folder in sorted(POWERCAP.glob("*-rapl:*")):
        if folder.name.count(":") == 1:  # those with two are parts of these
            with suppress(OSError, ValueError):  # the counters are for root alone on most machines
                found.append(_Package(folder))
    return found


def _gpu(device: str) -> "_Gpu | None":
    if not device.startswith("cuda"):
        return None
    import torch

    # a GPU that is not there is the work's own error to tell
    return _Gpu(torch, torch.device(device)) if torch.cuda.is_available() else None


class _Gpu:
    """One GPU through NVML; what it does not tell stays None."""

    def __init__(self, torch: Any, device: Any) -> None:
        import pynvml

        self._nvml, self._torch, self._device, self._handle = pynvml, torch, device, None
        with suppress(pynvml.NVMLError):  # a container without the driver's library has CUDA alone
            pynvml.nvmlInit()
            # torch and NVML number the devices differently; they agree on its identity
            identity = str(torch.cuda.get_device_properties(device).uuid)
            try:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}")
            except pynvml.NVMLError:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{identity}")

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def _ask(self, question: Callable[..., Any], *words: Any) -> Any:
        if self._handle is None:
            return None
        try:
            return question(self._handle, *words)
        except self._nvml.NVMLError:  # parts of a GPU, and older ones, do not answer everything
            return None

    def sample(self) -> dict[str, Any]:
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates)
        degrees = self._ask(self._nvml.nvmlDeviceGetTemperature, self._nvml.NVML_TEMPERATURE_GPU)
        return {
            "gpu_utilisation": None if rates is None else float(rates.gpu),
            "gpu_memory_bytes": bound[0] if (bound := self.bound()) else None,
            "gpu_temperature": None if degrees is None else float(degrees),
        }

    def bound(self) -> tuple[int, int] | None:
        """Bytes in use on the device, and bytes there are."""
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else (int(memory.used), int(memory.total))

    def joules(self) -> float | None:
        """Energy counted since the driver was loaded."""
        counted = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if counted is None else float(counted) / 1000

    def peak(self) -> int:
        return int(self._torch.cuda.max_memory_reserved(self._device))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit() -> int:
    """Bytes that this process can use at most: the tightest of the machine's memory and its containers' limits."""
    return min(total for _, total in memory_bounds())


def memory_bounds() -> list[tuple[int, int]]:
    """Bytes in use and bytes there are: of the machine, then of every control group around this process with a limit.

    What the kernel would give back at once, the page cache not in active use, does not count as used.
    """
    machine = psutil.virtual_memory()
    return [(machine.total - machine.available, machine.total), *_control_groups(machine.total)]


def _control_groups(physical: int) -> Iterator[tuple[int, int]]:
    for folder, names in _group_folders():
        try:
            limit = int((folder / names["limit"]).read_text())
            used = int((folder / names["used"]).read_text())
            parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file, or `max`: no limit here
            continue
        if 0 < limit < physical:
            yield max(0, used - int(parts.get(names["cache"], 0))), limit


_UNIFIED = {"limit": "memory.max", "used": "memory.current", "cache": "inactive_file"}
_LEGACY = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_inactive_file"}


def _group_folders() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Folders of the groups this process is in, innermost first; inside a container the outer ones are not there."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":
            root, names = CGROUPS, _UNIFIED
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", _LEGACY
        else:
            continue
        below = Path(path.strip("/"))
        for part in (below, *below.parents) if path.strip("/") else (below,):
            yield root / part, names


def forget_peak_memory() -> None:
    """Start `peak_memory` anew at what is resident now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Highest resident memory of this process since it started, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
