"""The service keeps what its OpenAPI document says, whatever it is sent: schemathesis against a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bento.served import Served

ROOT = Path(__file__).resolve().parents[2]
UNDECLARED = "positive_data_acceptance,ignored_auth"
"""Valid data is refused for what a schema cannot say: a conversation ends with the user, a prompt fits the context, a
name exists. Callers on this machine need no key."""


@pytest.mark.slow
def test_no_request_breaks_the_contract(served: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{served.url}/openapi.json",
            *("--checks", "all", "--exclude-checks", UNDECLARED),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--max-time", "60"),
            *("--exclude-path-regex", "^/auth", "--generation-deterministic", "--no-shrink"),
        ],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.bento.fuzzing", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert served.server.client.get("/readyz").status_code == 200
