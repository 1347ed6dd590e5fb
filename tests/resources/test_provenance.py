"""Provenance of a training: a real git checkout, the packages of this environment, this machine."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ft_resources.provenance import code, provenance

ROOT = Path(__file__).resolve().parents[2]


def git(folder: Path, *words: str) -> str:
    named = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *named, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert code(tmp_path) == {"commit": None, "dirty": None}  # nothing committed yet
    (tmp_path / "a.py").write_text("a = 1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    assert code(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "a.py").write_text("a = 2\n")
    assert code(tmp_path)["dirty"] is True
    (tmp_path / "installed").mkdir()
    assert code(tmp_path / "installed") == {"commit": None, "dirty": None}


def test_without_git_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code(tmp_path) == {"commit": None, "dirty": None}


def test_packages_and_hardware() -> None:
    found = json.loads(json.dumps(provenance()))
    assert found["packages"]["peft"] == version("peft")
    assert found["packages"]["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**28
    assert found["hardware"]["cpu"]


def test_it_needs_no_torch_and_asks_it_when_it_is_there() -> None:
    ask = "import sys, json; from ft_resources.provenance import provenance; p = provenance(); "
    without = ask + "print(json.dumps([p['hardware']['gpus'], 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == [None, False]
    there = "import torch; print(len(p['hardware']['gpus']) == torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", "import torch; " + ask + there], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "True"
