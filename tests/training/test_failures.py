"""The results folder: what is in it, what it never holds, and advice that fits the error."""

import errno
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ft_assets.training.failures import (
    RESOURCES,
    failed_results,
    failure_of,
    results_folder,
    write_results,
)
from ft_resources.compute import WorkerDied, _died
from ft_resources.environments import Environment
from ft_resources.errors import ArtefactError, DataError, FtError, OutOfMemory, SpecError, TrainingError
from ft_resources.provenance import provenance
from ft_resources.usage import Meter, sampled_usage, stored_samples

FILES = {"config.yaml", "metrics.json", "logs.txt", "environment.json", "resources.csv", "resources.png"}
CONFIG: dict[str, Any] = {
    "base": {"model": "package:small/model", "max_tokens": 128},
    "lora": {"target_modules": ["query", "value"], "dropout": 0.0},
    "prompt": {"template": "Sort this:\n{text} # not a comment\n", "empty": {}, "none": None},
}
ORIGINS = {
    "base.model": "recipe encoder-lora@1",
    "base.max_tokens": "task mine.yaml:8",
    "lora.target_modules": "default",
    "prompt.template": "task mine.yaml:11",
    "prompt.empty": "default",
    "prompt.none": "default",
}


@pytest.fixture(scope="module")
def metered_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metered") / RESOURCES


@pytest.fixture(scope="module")
def meter(metered_file: Path) -> Meter:
    with Meter(seconds=0.02, file=metered_file) as metered:
        sum(range(4_000_000))
    return metered


def write(folder: Path, meter: Meter, **other: Any) -> None:
    values: dict[str, Any] = {
        "config": CONFIG,
        "origins": ORIGINS,
        "metrics": {"accuracy": 0.9, "loss": [0.5, math.nan]},
        "log": ["step 1", "step 2\nstep 3"],
        "usage": meter.total(),
        "provenance": provenance(),
        **other,
    }
    write_results(folder, **values)


def environment(home: Path) -> Environment:
    return Environment.read({}, home=home)


def test_a_training_that_ended_well(tmp_path: Path, meter: Meter, metered_file: Path) -> None:
    folder = results_folder(environment(tmp_path), "team.mail", "team.mail 1a2b3c4d")
    assert folder == tmp_path / "results" / "team.mail" / "team.mail-1a2b3c4d"
    shutil.copy(metered_file, folder)
    write(folder, meter)
    assert {file.name for file in folder.iterdir()} == FILES
    text = (folder / "config.yaml").read_text()
    assert YAML(typ="safe").load(text) == CONFIG
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["max_tokens"].endswith("# from task mine.yaml:8")
    assert lines["target_modules"].endswith("# from default")
    assert lines["template"].endswith("# from task mine.yaml:11")
    assert json.loads((folder / "metrics.json").read_text()) == {"accuracy": 0.9, "loss": [0.5, "nan"]}
    assert (folder / "logs.txt").read_text().splitlines() == ["step 1", "step 2", "step 3"]
    found = json.loads((folder / "environment.json").read_text())
    assert found["usage"]["peak_memory_bytes"] == meter.total().peak_memory_bytes
    stored = [sample["memory_bytes"] for sample in stored_samples(folder / RESOURCES)]
    assert stored == [sample["memory_bytes"] for sample in meter.curve()]
    assert found["provenance"]["packages"]["peft"]
    assert (folder / "resources.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_one_says_why_and_a_later_good_one_clears_it(tmp_path: Path, meter: Meter) -> None:
    where = environment(tmp_path)
    folder = results_folder(where, "mail", "mail 1a2b3c4d trial 2")
    try:
        raise TrainingError("the loss became nan at step 3 of 40", where="task mail", mend="Lower it.")
    except TrainingError as error:
        failure = failure_of(error, checkpoint="lake://checkpoint/7")
    write(folder, meter, failure=failure)
    assert failed_results(where, "mail", "1a2b3c4d-0000-0000") == folder
    assert failed_results(where, "mail", "ffffffff-0000-0000") is None
    told = json.loads((folder / "failure.json").read_text())
    assert (told["type"], told["code"], told["where"]) == ("TrainingError", "training_failed", "task mail")
    assert told["checkpoint"] == "lake://checkpoint/7" and "go on from lake://checkpoint/7" in told["suggestion"]
    assert "training.learning_rate" in told["suggestion"]
    assert any("test_failures.py" in line for line in told["traceback"])
    write(folder, meter)
    assert failed_results(where, "mail", "1a2b3c4d-0000-0000") is None


def test_the_curve_of_a_worker_that_was_killed_is_kept(tmp_path: Path, meter: Meter) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from ft_resources.usage import Meter\n"
        "with Meter(seconds=0.01, file=Path(sys.argv[1])) as meter:\n"
        "    while len(meter.curve()) < 5: sum(range(10000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    file = tmp_path / RESOURCES
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(file)], check=False, cwd=root).returncode == -9
    with file.open("a") as sink:
        sink.write("1.2,77")  # a line cut off by the end of the process
    before = file.read_bytes()
    died = _died("ft_assets.training.worker", "External execution process failed with code -9")
    write(tmp_path, meter, usage=sampled_usage(file), failure=failure_of(died))
    assert file.read_bytes() == before and len(before.splitlines()) > 5
    used = json.loads((tmp_path / "environment.json").read_text())["usage"]
    assert used["wall_seconds"] > 0 and used["peak_memory_bytes"] > 5e6
    assert len((tmp_path / "resources.png").read_bytes()) > 5000
    write(tmp_path / "nothing", meter, usage=None)
    assert (tmp_path / "nothing" / "resources.png").exists()


def test_secrets_do_not_get_into_the_folder(tmp_path: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "variable": "quiet-river-stone",
        "url": "pw-in-the-url",
        "key": "below-a-key",
        "form": "hf" + "_" + "aBcD" * 8,
        "header": "c2VjcmV0LWhlYWRlcg",
        "database": "pw-of-the-ledger",
        "pem": "MIIEowIBAAKCAQEA",
    }
    monkeypatch.setenv("TRACKER_TOKEN", planted["variable"])
    monkeypatch.setenv("FT_LEDGER", f"postgresql://ft:{planted['database']}@db/ledger")
    url = f"https://ann:{planted['url']}@example.org/rows"
    pem = ["-----BEGIN " + "PRIVATE KEY-----", planted["pem"], "-----END " + "PRIVATE KEY-----"]
    secret = f"{planted['variable']} {url} {planted['form']} {planted['database']}"
    try:
        try:
            raise ValueError(f"cannot read {secret}")
        except ValueError as cause:
            raise DataError(f"bad rows at {url}", where=secret, mend=f"Use {planted['form']}.") from cause
    except DataError as error:
        failure = failure_of(error, checkpoint=url)
    write(
        tmp_path,
        meter,
        config={**CONFIG, "source": {"url": url, "api_key": planted["key"], "note": secret}},
        origins={**ORIGINS, "source.url": f"task {secret}"},
        metrics={"note": secret, secret: 1},
        log=[f"Authorization: Bearer {planted['header']}", *pem, secret],
        provenance={"system": secret},
        failure=failure,
    )
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(written) == (FILES - {RESOURCES}) | {"failure.json"}
    for name, content in written.items():
        for what, value in planted.items():
            assert value.encode() not in content, f"{what} in {name}"
    assert "https://ann:***@example.org/rows" in written["failure.json"].decode()
    assert YAML(typ="safe").load(written["config.yaml"])["source"]["api_key"] == "***"


def test_only_the_end_of_a_long_log_is_kept(tmp_path: Path, meter: Meter) -> None:
    write(tmp_path, meter, log="\n".join(map(str, range(5000))))
    lines = (tmp_path / "logs.txt").read_text().splitlines()
    assert (len(lines), lines[-1]) == (2000, "4999")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemory("out of memory", used=7_900_000_000, total=8_000_000_000), "7.9 of 8.0 GB were in use. Halve"),
        (MemoryError(), "Halve training.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "Halve training.batch_size"),
        (TrainingError("the loss became inf at step 2 of 9"), "Training diverged"),
        (TrainingError("there are no training rows for ['a']", mend="Add labelled rows."), "Add labelled rows."),
        (_died("m", "External execution process failed with code -9"), "was killed (SIGKILL)"),
        (_died("m", "container exited with code 137"), "was killed (SIGKILL)"),
        (_died("m", "External execution process failed with code -15"), "SIGTERM"),
        (_died("m", "External execution process failed with code -11"), "native library crashed (SIGSEGV)"),
        (_died("m", "External execution process failed with code 1"), "without saying why"),
        (WorkerDied("it reported no result"), "without saying why"),
        (DataError("row 3 is empty"), "The rows are the cause"),
        (SpecError("unknown key"), "A setting is the cause"),
        (ArtefactError("damaged"), "materialise the asset"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (ConnectionResetError(), "A file or the network failed"),
        (FtError("something"), "See the traceback"),
        (ZeroDivisionError("division by zero"), "looks like a defect"),
    ],
)
def test_advice_fits_the_error(error: BaseException, advice: str) -> None:
    failure = failure_of(error)
    assert advice in failure.suggestion
    assert failure.type == type(error).__name__


def test_an_untyped_error_names_its_line() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        failure = failure_of(error)
    assert failure.code == "defect"
    assert "decoder.py:" in failure.where


def test_out_of_memory_crosses_the_process_boundary_as_itself() -> None:
    from ft_resources.compute import _typed

    told = {"type": "OutOfMemory", "what": "7 of 8 GB", "where": "step 3", "mend": "Halve it."}
    error = _typed(told)
    assert isinstance(error, OutOfMemory) and isinstance(error, TrainingError)
    assert (error.code, error.used, error.total) == ("out_of_memory", 0, 0)
