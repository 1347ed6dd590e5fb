"""A training that fails, through the command line: the closing lines name the folder that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ft_resources.ledger import Ledger
from tests.graph.small_task import TASK, open_home, write_task


@pytest.mark.slow
def test_the_folder_of_a_failed_training_is_named_and_complete(tmp_path: Path, training_mails: pd.DataFrame) -> None:
    home = tmp_path / "home"
    platform = open_home(home)
    platform.add_task(write_task(tmp_path / "mine", rows=training_mails))
    platform.ledger.close()
    variables = {
        **os.environ,
        "FT_HOME": str(home),
        "FT_TASKS": str(home / "tasks"),
        "FT_DEVICE": "mps",  # what this machine has not
        "TRACKER_PASSWORD": "quiet-river-stone",
    }
    for name in ("FT_LEDGER", "FT_LAKE", "DAGSTER_HOME", "MLFLOW_TRACKING_URI"):
        variables.pop(name, None)
    ft = str(Path(sys.executable).with_name("ft"))
    done = subprocess.run([ft, "run", TASK], capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 1, done.stderr
    (named,) = [line for line in done.stderr.splitlines() if "what to try: " in line]
    folder = Path(named.split("what to try: ")[1])
    assert folder.parent == home / "results" / TASK
    failure = json.loads((folder / "failure.json").read_text())
    assert failure["type"] == "ServiceError"
    assert "mps" in failure["what"] and failure["suggestion"] and failure["traceback"]
    found = json.loads((folder / "environment.json").read_text())
    assert found["usage"]["peak_memory_bytes"] > 50e6 and found["provenance"]["packages"]["torch"]
    assert len((folder / "resources.csv").read_text().splitlines()) >= 2
    assert "learning_rate" in (folder / "config.yaml").read_text()
    ledger = Ledger(platform.environment.ledger)
    assert ledger.training_runs(TASK)["status"].tolist() == ["FAILED"]
    assert ledger.training_runs(TASK)["error"].tolist() == ["service"]
    ledger.close()
    watched = subprocess.run([ft, "watch", TASK, "--once"], capture_output=True, text=True, check=False, env=variables)
    assert watched.returncode == 1
    assert "FAILURE" in watched.stdout
