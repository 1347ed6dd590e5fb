"""The whole way from rows to answers where there is no network: nothing is fetched, and nothing leaves the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ft_resources.environments import REPOSITORY
from tests import isolation
from tests.graph.small_task import TASK, write_task

PIPELINE = f"""
import json, socket, sys
from pathlib import Path
from tests.graph.small_task import open_home

try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
    reached = "somewhere"
except OSError as error:
    reached = error.strerror
platform = open_home(Path(sys.argv[1]))
platform.add_task(Path(sys.argv[2]))
outcome = platform.materialise("{TASK}")
labels = [one.label for one in platform.predict("{TASK}", ["Please find the invoice attached."])]
print(json.dumps([reached, outcome.succeeded, outcome.failure, platform.live("{TASK}")["model_version"], labels]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not isolation.POSSIBLE, reason="needs root, util-linux and iproute2")
def test_rows_become_answers_without_a_network(tmp_path: Path, training_mails: pd.DataFrame) -> None:
    file = write_task(tmp_path / "mine", rows=training_mails)
    done = subprocess.run(
        [*isolation.CUT_OFF, sys.executable, "-c", PIPELINE, str(tmp_path / "home"), str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reached, succeeded, failure, version, labels = json.loads(done.stdout.splitlines()[-1])
    assert reached == "Network is unreachable"
    assert succeeded, failure
    assert version == "1"
    assert labels[0] in ("ham", "spam")
