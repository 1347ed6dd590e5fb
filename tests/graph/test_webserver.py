"""The Dagster UI's server on the state of a home: what a person sees is what was made."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_resources.environments import REPOSITORY
from ft_resources.serving import free_port
from tests.graph.small_task import Built, open_home

QUERY = """{ assetNodes { assetKey { path } groupName description
  assetMaterializations(partitions: ["small-mail"], limit: 1) { metadataEntries { label } } } }"""


@pytest.fixture(scope="module")
def server(built: Built) -> Iterator[str]:
    platform = open_home(built.home)
    port = free_port()
    program = str(Path(sys.executable).with_name("dagster-webserver"))
    log = built.home / "webserver.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [program, "-w", "workspace.yaml", "-h", "127.0.0.1", "-p", str(port)],
            cwd=REPOSITORY,
            env={**os.environ, **platform.environment.variables()},
            stdout=sink,
            stderr=sink,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    try:
        while True:
            try:
                urllib.request.urlopen(url + "/server_info", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_every_asset_page_has_its_digest_its_counts_and_its_pictures(server: str) -> None:
    request = urllib.request.Request(
        server + "/graphql", json.dumps({"query": QUERY}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        nodes = {node["assetKey"]["path"][-1]: node for node in json.loads(answer.read())["data"]["assetNodes"]}
    assert len(nodes) == 14
    assert {node["groupName"] for node in nodes.values()} == {
        "1_data",
        "2_training",
        "3_evaluation",
        "4_release",
        "5_monitoring",
    }
    assert all(node["description"] for node in nodes.values())
    seen = {
        name: {entry["label"] for one in node["assetMaterializations"] for entry in one["metadataEntries"]}
        for name, node in nodes.items()
    }
    made = [name for name, labels in seen.items() if labels]
    assert len(made) == 11
    assert all({"digest", "uri"} <= seen[name] for name in made)
    assert {"rows", "labels"} <= seen["raw_dataset"]
    assert {"loss_curve", "trainable", "mlflow"} <= seen["adapter"]
    assert {"confusion", "reliability", "report", "metrics"} <= seen["eval_report"]
    assert {"bento", "golden_requests", "dockerfile"} <= seen["bento_service"]
