"""What a server's OpenAPI document promises: schemathesis finds whether it is kept, matrices of roles miss nothing."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def unasked(document: dict[str, Any], requests: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Method and path of each endpoint of `document`, but for the probes, that none of `requests` goes to."""
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    asked = {(method, path.partition("?")[0]) for method, path in requests}
    return [
        (method, path)
        for method, path in described - {("GET", "/livez"), ("GET", "/readyz")}
        if not any(method == one and re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), other) for one, other in asked)
    ]
