"""Metering real work of real processes; only NVML's answers and the kernel's counters of other machines stand in."""

import csv
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from ft_resources import usage
from ft_resources.usage import Meter, Sample, sampled_usage

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


def compute(seconds: float) -> None:
    """Keep one core busy for that many seconds of processor time."""
    end, one = time.thread_time() + seconds, np.ones((60, 60))
    while time.thread_time() < end:
        one = one @ one % 7


def test_memory_and_processor_time_of_some_work() -> None:
    with Meter(seconds=0.05) as meter:
        before = meter.now()["memory_gb"]
        block = np.ones(120 * MIB // 8)
        compute(0.5)
        assert meter.now()["memory_gb"] - before > 0.1
        assert max(sample["cpu_utilisation"] for sample in meter.curve()) > 0
        running = meter.total()
        del block
    total = meter.total()
    assert 0.5 <= running.cpu_seconds <= total.cpu_seconds < 0.5 + 4 * total.wall_seconds
    assert total.peak_memory_bytes >= max(sample["memory_bytes"] for sample in meter.curve()) > 120 * MIB
    assert (total.gpu_seconds, total.peak_gpu_memory_bytes) == (0, 0)
    assert meter.total() == total  # nothing is counted after the end
    assert total.energy_source in ("estimate", "rapl")
    if total.energy_source == "estimate":
        assert total.energy_wh == pytest.approx(total.cpu_seconds * usage.WATTS_PER_CORE / 3600)


def test_a_peak_between_two_samples_is_not_missed() -> None:
    code = (
        "import numpy as np; from ft_resources.usage import Meter\n"
        "with Meter(seconds=60) as meter:\n"
        "    start = meter.curve()[0]['memory_bytes']\n"
        "    block = np.ones(200 * 1024 * 1024 // 8); del block\n"
        "print(start, meter.curve()[-1]['memory_bytes'], meter.total().peak_memory_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    start, end, peak = map(int, done.stdout.split())
    assert end - start < 50 * MIB
    assert 190 * MIB < peak - start < 230 * MIB


def test_the_peak_of_the_process_that_started_this_one_does_not_count() -> None:
    block = np.ones(300 * MIB // 8)
    code = "from ft_resources.usage import Meter\nwith Meter() as meter: pass\nprint(meter.total().peak_memory_bytes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 200 * MIB < block.nbytes


def test_children_count_while_they_run_and_after_they_ended() -> None:
    code = "import sys; b = bytearray(80 * 1024 * 1024); sum(range(10**7)); print('.', flush=True); sys.stdin.read()"
    with Meter(seconds=0.05) as meter:
        alone = meter.curve()[0]["memory_bytes"]
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.read(1) == b"."
        running, own = meter.total(), psutil.Process(child.pid).cpu_times().user
        child.communicate()
    assert max(sample["memory_bytes"] for sample in meter.curve()) - alone > 80 * MIB
    assert running.cpu_seconds >= own > 0
    assert meter.total().cpu_seconds >= running.cpu_seconds


def test_samples_are_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "resources.csv"
    with Meter(seconds=0.02, file=file) as meter:
        compute(0.3)
        with file.open(newline="") as source:
            rows = list(csv.DictReader(source))
    assert len(rows) >= 3
    assert list(rows[0]) == list(Sample.__dataclass_fields__)
    assert int(rows[0]["memory_bytes"]) == meter.curve()[0]["memory_bytes"]
    assert rows[0]["gpu_utilisation"] == ""


def test_what_a_killed_process_used_is_what_its_samples_say(tmp_path: Path) -> None:
    file = tmp_path / "resources.csv"
    with Meter(seconds=0.02, file=file) as meter:
        compute(0.3)
    total, used = meter.total(), sampled_usage(file)
    assert used is not None
    assert used.wall_seconds == pytest.approx(total.wall_seconds, abs=0.002)
    assert used.cpu_seconds == pytest.approx(total.cpu_seconds, abs=0.002)
    assert 0 < used.peak_memory_bytes <= total.peak_memory_bytes
    assert used.energy_wh == pytest.approx(used.cpu_seconds * usage.WATTS_PER_CORE / 3600)
    with file.open("a") as sink:
        sink.write("99.9,7")  # cut off by the end of the process
    assert sampled_usage(file) == used
    assert sampled_usage(tmp_path / "none.csv") is None


def test_a_warning_comes_once_when_memory_runs_short(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings, told = list[str](), threading.Event()

    def warn(text: str) -> None:
        warnings.append(text)
        told.set()

    with Meter(seconds=0.01, warn=warn):
        compute(0.1)
    assert warnings == []
    monkeypatch.setattr(usage, "ALARM", 0.001)
    with Meter(seconds=0.01, warn=warn) as meter:
        assert told.wait(20)
        compute(0.1)
    assert len(meter.curve()) > 2
    assert len(warnings) == 1
    assert "GB of the memory are in use" in warnings[0]
    assert "training.batch_size" in warnings[0]


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/kubepods/pod1", "kubepods/pod1", ("memory.max", "memory.current", "inactive_file")),
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:devices:/\n4:cpu,memory:/docker/abc\n0::/",
            "memory/docker/abc",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        # inside a container that sees the host's path but mounts its own group at the top
        (
            "4:memory:/docker/abc",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_limit_of_a_container(
    membership: str, folder: str, names: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those of Linux control groups, version 1 and 2; a limited container can't be started here."""
    (tmp_path / "membership").write_text(membership + "\n")
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text(f"{512 * MIB}\n")
    (group / names[1]).write_text(f"{300 * MIB}\n")
    (group / "memory.stat").write_text(f"anon 1\n{names[2]} {100 * MIB}\n")
    monkeypatch.setattr(usage, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(usage, "CGROUPS", tmp_path / "groups")
    assert usage.memory_limit() == 512 * MIB
    assert usage.memory_bounds()[1:] == [(200 * MIB, 512 * MIB)]
    (group / names[0]).write_text("max\n" if names[0] == "memory.max" else "9223372036854771712\n")
    assert usage.memory_limit() == psutil.virtual_memory().total


def test_measured_energy_with_a_counter_that_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are those of Linux powercap; most virtual machines have none."""
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("999999\n")
        (tmp_path / name / "energy_uj").write_text("900000\n")
    monkeypatch.setattr(usage, "POWERCAP", tmp_path)
    with Meter(seconds=60) as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("700000\n")  # once around and 0.8 J in all
    total = meter.total()
    assert total.energy_source == "rapl"
    assert total.energy_wh * 3600 == pytest.approx(0.8)


class NVMLError(Exception):
    pass


def refuse(*_: Any) -> None:
    raise NVMLError


def stand_in(monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
    """NVML and CUDA of one device, for machines without a GPU; it refuses to tell its temperature."""
    spent = iter([1000, 5000])

    def handle(identity: str) -> str:
        return identity if identity == "MIG-1234" else refuse()  # type: ignore[return-value]

    nvml = {
        "NVMLError": NVMLError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=83),
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=95, total=100),
        "nvmlDeviceGetTemperature": refuse,
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: next(spent),
        **other,
    }
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_properties=lambda _: SimpleNamespace(uuid="1234"),
        max_memory_reserved=lambda _: 77,
    )
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**nvml))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(device=str, cuda=cuda))


def test_a_gpu_is_metered_beside_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    warnings: list[str] = []
    with Meter(device="cuda", seconds=60, warn=warnings.append) as meter:
        now = meter.now()
    assert (now["gpu_utilisation"], now["gpu_memory_gb"]) == (83.0, 95e-9)
    assert "gpu_temperature" not in now
    total = meter.total()
    assert total.gpu_seconds == total.wall_seconds > 0
    assert total.peak_gpu_memory_bytes == 77
    assert total.energy_source in ("nvml+estimate", "nvml+rapl")
    assert total.energy_wh * 3600 >= 4
    assert len(warnings) == 1 and "GPU's memory" in warnings[0]


def test_a_gpu_whose_driver_library_is_missing_still_counts_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, nvmlInit=refuse, nvmlShutdown=refuse)
    with Meter(device="cuda:0", seconds=60) as meter:
        assert "gpu_utilisation" not in meter.now()
    total = meter.total()
    assert total.gpu_seconds > 0
    assert total.energy_source in ("estimate without GPU", "rapl without GPU")


def test_a_gpu_that_is_not_there_is_not_metered() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with Meter(device="cuda", seconds=60) as meter:
        assert "memory_gb" in meter.now()
    assert meter.total().gpu_seconds == 0


def test_a_meter_leaves_no_thread_behind() -> None:
    with Meter(seconds=60):
        assert "meter" in [thread.name for thread in threading.enumerate()]
    assert "meter" not in [thread.name for thread in threading.enumerate()]
    assert usage.usable_cores() <= (os.cpu_count() or 1)
