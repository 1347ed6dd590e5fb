"""The demo as the README tells to run it, on an empty home."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_demo_ends_well_and_retraining_helps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deployments" / "local" / "demo.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "FT_HOME": str(tmp_path / "home"), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"accuracy ([.\d]+) before, ([.\d]+) after retraining", done.stdout)
    assert found is not None
    before, after = map(float, found.groups())
    assert after > before
    assert "Dagster UI" in done.stdout
