"""The shape of the graph: every asset, check, job and sensor as a snapshot, the import budget, the workspace file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ft_assets.definitions import defs

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = Path(__file__).with_name("asset_specs.json")
HEAVY = ("scipy", "torch", "transformers", "peft", "evaluate", "mlflow", "bentoml", "kubernetes")


def described() -> dict[str, Any]:
    graph = defs.resolve_asset_graph()
    assets = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assets[key.to_user_string()] = {
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "partitions": type(node.partitions_def).__name__,
            "versioned": node.code_version is not None,
        }
    checks = {
        f"{key.asset_key.to_user_string()}.{key.name}": {
            "blocking": graph.get(key).blocking,
            "partitions": type(graph.get(key).partitions_def).__name__,
        }
        for key in graph.asset_check_keys
    }
    repository = defs.get_repository_def()
    return {
        "assets": dict(sorted(assets.items())),
        "checks": dict(sorted(checks.items())),
        "jobs": sorted(job.name for job in repository.get_all_jobs() if not job.name.startswith("__")),
        "sensors": {
            sensor.name: sensor.default_status.value
            for sensor in sorted(repository.sensor_defs, key=lambda one: one.name)
        },
    }


def test_the_graph_is_the_one_that_was_agreed() -> None:
    """A change of the graph shows here; after a wanted one run this file as a script to write the snapshot."""
    assert described() == json.loads(SNAPSHOT.read_text())


def test_no_asset_depends_on_something_that_is_not_in_the_graph() -> None:
    graph = defs.resolve_asset_graph()
    assert [key for key in graph.get_all_asset_keys() if not graph.get(key).is_materializable] == []


def test_every_gate_blocks_and_is_partitioned_by_task() -> None:
    gates = [value for key, value in described()["checks"].items() if key.startswith("eval_report.")]
    assert len(gates) == 7
    assert all(gate == {"blocking": True, "partitions": "DynamicPartitionsDefinition"} for gate in gates)


@pytest.mark.parametrize("module", ["ft_assets.definitions", "ft_assets.api.server"])
def test_the_code_location_and_the_api_import_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_service_imports_neither_dagster_nor_the_graph() -> None:
    code = "import sys, bento.service; print([m for m in ('dagster', 'ft_assets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_workspace_file_validates(tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("dagster"))
    done = subprocess.run(
        [program, "definitions", "validate", "-w", "workspace.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "FT_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "ft_assets" in done.stdout + done.stderr


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(described(), indent=1) + "\n")
