"""Schemathesis against a real server: whatever it is sent, it keeps what its OpenAPI document says."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def require_kept(url: str, folder: Path, *, hooks: str, undeclared: str) -> None:
    """Fail if any answer of the server at `url` breaks its contract.

    Args:
        folder: Where schemathesis works.
        hooks: Module of its hooks, which make requests name what is there more often than by chance.
        undeclared: Checks to leave out, separated by commas.
    """
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{url}/openapi.json",
            *("--checks", "all", "--exclude-checks", undeclared),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--max-time", "60"),
            *("--exclude-path-regex", "^/auth", "--generation-deterministic", "--no-shrink"),
        ],
        cwd=folder,
        env={**os.environ, "SCHEMATHESIS_HOOKS": hooks, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-16000:]
