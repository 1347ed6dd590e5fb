"""What makes another report: other code that answers, another device, other libraries."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ft_assets.evaluation import identity
from ft_resources.environments import REPOSITORY, Environment

WORKERS = ("ft_assets.evaluation.worker", "ft_assets.evaluation.generation.worker")


def test_every_module_that_answers_is_part_of_the_digest() -> None:
    code = f"import sys, {', '.join(WORKERS)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    modules = {name for name in loaded.stdout.split() if name.startswith("bento.")}
    hashed = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in identity.answering_code()
    }
    assert modules
    assert modules <= hashed


def test_what_is_left_out_is_there_and_a_new_module_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [name for name in identity.SERVICE_ONLY if not (REPOSITORY / name).exists()] == []
    (tmp_path / "bento" / "endpoints").mkdir(parents=True)
    for name in ("new.py", "front.py", "endpoints/new.py"):
        (tmp_path / "bento" / name).touch()
    monkeypatch.setattr(identity, "REPOSITORY", tmp_path)
    assert identity.answering_code() == ["bento/new.py"]


def test_device_instruction_sets_and_versions_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(Environment.read(home=tmp_path), compute="local", device="cpu")
    about = identity.environment_of_evaluation(here)
    assert about["torch"] and about["transformers"] and about["tokenizers"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert ("avx512_vnni" in about["computes_in"]) == ("avx512_vnni" in flags)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    monkeypatch.setattr(identity, "GPUS", tmp_path)
    there = identity.environment_of_evaluation(replace(here, device="cuda"))
    assert (there["device"], there["computes_in"]) == ("cuda", "NVIDIA H200")
