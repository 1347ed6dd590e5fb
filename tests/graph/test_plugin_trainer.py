"""A task whose trainer is a plug-in: the same rows, report, gates and records; what it makes is not served."""

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest
from safetensors.numpy import load_file

from ft_assets.evaluation.report import EvalReport
from ft_assets.platform import Platform
from ft_assets.training import recipes
from ft_resources.errors import GateRefusal, SpecError
from ft_resources.files import file_hashes
from ft_resources.tracking import trainings
from tests.graph.small_task import TASK, TASK_FILE, open_home, write_task

OF_ADAPTERS = """\
  base: {max_tokens: 48}
  lora: {rank: 4, alpha: 8}
  training: {epochs: 1, precision: fp32}
"""
TREES = TASK_FILE.replace("encoder-lora@1", "boosted-trees@1").replace(OF_ADAPTERS, "  rounds: 30\n")
FAILING = """
from ft_assets.training.plugins.boosted_trees import BoostedTrees


class Failing(BoostedTrees):
    def train(self, rows, settings, folder, progress):
        progress(1, 2, 0.7)
        raise RuntimeError("the second tree does not grow")
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, training_mails: pd.DataFrame) -> Platform:
    """A home whose task trained boosted trees."""
    root = tmp_path_factory.mktemp("trees")
    platform = open_home(root / "home")
    platform.add_task(write_task(root / "mine", TREES, training_mails))
    outcome = platform.materialise(TASK)
    assert outcome.succeeded, outcome
    assert "plug-in trainer" in outcome.unserved
    return platform


def materialised(platform: Platform, asset: str) -> dict[str, object]:
    """Metadata of the newest materialisation."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset))
    (record,) = platform.instance.fetch_materializations(wanted, limit=1).records
    assert record.asset_materialization is not None
    return {name: value.value for name, value in record.asset_materialization.metadata.items()}


def test_it_is_evaluated_by_the_same_report_and_gates(platform: Platform) -> None:
    report = platform.report(TASK)
    assert isinstance(report, EvalReport)
    assert set(report.models) == {"candidate", "majority", "linear"}
    assert report.models["candidate"]["accuracy"].value > 0.75
    assert report.rows == len(platform.lake.require(TASK, "test_split").parquet("rows.parquet"))
    assert report.adapter == platform.lake.require(TASK, "adapter").digest
    assert report.latency.requests == 30
    assert report.serving is None
    page = platform.report_page(TASK).read_text(encoding="utf-8")
    assert "it cannot be served, so there is no release" in page


def test_it_leaves_the_records_of_any_training(platform: Platform) -> None:
    trained = platform.lake.require(TASK, "adapter")
    (run,) = platform.experiments(TASK).to_dict("records")
    assert (run["status"], run["method"], run["base"]) == ("FINISHED", "BoostedTrees", "none")
    assert run["adapter"] == trained.digest
    assert run["steps"] == len(trained.json("training.json")["loss"]) > 5
    assert run["accuracy"] == trained.json("training.json")["validation"][0]["accuracy"]
    assert run["wall_seconds"] > 0 and run["peak_memory_bytes"] > 50e6
    (tracked,) = trainings(platform.environment.mlflow, task=TASK)
    assert tracked.data.tags["adapter"] == trained.digest
    assert tracked.data.params["version"] == "1" and tracked.data.params["rounds"] == "30"
    seen = materialised(platform, "adapter")
    assert seen["trainer"] == "ft_assets.training.plugins.boosted_trees:BoostedTrees, version 1"
    folder = Path(str(seen["results"]))
    environment = json.loads((folder / "environment.json").read_text())["provenance"]
    assert environment["decisive"]["xgboost-cpu"]
    assert environment["plugin"] == trained.made_from["plugin"]
    assert "rounds: 30 # from task small-mail.yaml:7" in (folder / "config.yaml").read_text()


def test_what_it_made_holds_no_pickle_and_is_made_again_to_the_byte(platform: Platform) -> None:
    trained = platform.lake.require(TASK, "adapter")
    assert set(trained.files) == {
        "adapter.json",
        "training.json",
        *(f"model/{name}" for name in ("trees.ubj", "terms.json", "idf.safetensors")),
    }
    terms = json.loads(trained.read("model/terms.json"))["terms"]
    assert load_file(trained.path("model/idf.safetensors"))["idf"].shape == (len(terms),)
    again = platform.reproduce(TASK)
    assert again.identical and again.changed == {}
    assert again.verdict == "Reproduced: all 3 files have the same bytes."
    assert platform.materialise(TASK, only=["adapter"]).succeeded
    assert materialised(platform, "adapter")["reused"] is True
    assert platform.lake.require(TASK, "adapter").digest == trained.digest


def test_it_is_not_released(platform: Platform) -> None:
    refused = platform.materialise(TASK, only=["model_version"])
    assert not refused.succeeded
    assert "cannot be served, so it is not released" in refused.failure
    with pytest.raises(GateRefusal, match="could not be registered and built"):
        platform.approve(TASK, because="it is so good")
    assert platform.live(TASK) is None
    with pytest.raises(SpecError, match="this is for adapters on a base model"):
        platform.plan(TASK)


def test_a_trainer_that_fails_leaves_its_bundle_and_is_not_tried_again(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"failing_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    recipe = (recipes.RECIPES / "boosted-trees@1.yaml").read_text()
    named = recipe.replace("ft_assets.training.plugins.boosted_trees:BoostedTrees", f"{name}:Failing")
    (tmp_path / "failing@1.yaml").write_text(named.replace("name: boosted-trees", "name: failing"))
    for reader in (recipes.resolve, recipes.load, recipes.known, recipes.require_published):
        monkeypatch.setattr(reader, "__defaults__", (tmp_path,))
    before = platform.lake.require(TASK, "adapter").digest
    path = platform.tasks.get(TASK).path
    text = path.read_text()
    path.write_text(text.replace("boosted-trees@1", "failing@1"))
    outcome = platform.materialise(TASK, only=["adapter"])
    path.write_text(text)
    assert not outcome.succeeded
    assert "failed in training: RuntimeError: the second tree does not grow" in outcome.failure
    assert f"{name}.py:8" in outcome.failure
    assert outcome.results is not None
    failure = json.loads((outcome.results / "failure.json").read_text())
    assert (failure["type"], failure["code"]) == ("PluginError", "plugin_failed")
    assert any("the second tree" in line for line in failure["traceback"])
    assert "step 1/2, loss 0.700" in (outcome.results / "logs.txt").read_text()
    runs = platform.experiments(TASK)
    assert runs["error"].dropna().tolist() == ["plugin_failed"]
    assert runs["template"].tolist()[0] == "failing@1"
    assert platform.lake.require(TASK, "adapter").digest == before


@pytest.mark.slow
def test_it_is_compared_with_the_adapter_that_is_live(copied: Callable[[], Platform]) -> None:
    platform = copied()
    live = platform.live(TASK)
    assert live is not None
    path = platform.tasks.get(TASK).path
    text = path.read_text()
    assert OF_ADAPTERS in text
    path.write_text(text.replace("encoder-lora@1", "boosted-trees@1").replace(OF_ADAPTERS, "  rounds: 30\n"))
    outcome = platform.materialise(TASK)
    assert not outcome.failure, outcome
    report = platform.report(TASK)
    assert report.champion == live["adapter"]
    assert report.paired is not None and report.paired.rows == report.rows
    assert outcome.succeeded == (not outcome.refusals)
    assert platform.live(TASK) == live
    stored = platform.lake.require(TASK, "eval_report")
    assert "reference.npz" not in file_hashes(stored.folder)
