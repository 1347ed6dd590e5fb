"""The soak run of the benchmarks, short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_changes_of_routes_under_load_fail_nothing_and_mix_up_nothing(tmp_path: Path) -> None:
    settings = ["--minutes", "0.3", "--share", "0.4", "--every", "0.3", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["failures"], report["wrong answers"]) == (0, 0)
    assert report["answers"] > 100
    assert sum(report["changes of routes"].values()) > 10
    assert report["fingerprints told apart"] > 0.9, "else a mix-up would not be seen"
    assert (tmp_path / "soak.png").stat().st_size > 1000
