"""Incremental retraining goes on from the live adapter, records it, repeats to the byte, and refuses what differs."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest

from ft_assets.platform import TRAINING_ASSETS, Platform
from ft_assets.tasks import Task
from ft_assets.training.continuing import check_incremental, parent_of
from ft_assets.training.jobs import job, made_from
from ft_assets.training.recipes import Resolved, resolve
from ft_assets.training.reproduce import reproduce
from ft_assets.training.worker import train_job
from ft_resources.environments import Environment
from ft_resources.errors import SpecError
from ft_resources.lake import Artefact, Lake, digest_of, short
from ft_resources.ledger import Ledger
from tests.training.small import texts

TASK = """\
name: small
type: text-classification
labels: [cold, warm]
recipe: {recipe}
{further}
sources:
  - kind: feedback
"""
RECIPE = """\
name: tiny
version: {version}
types: [text-classification]
settings:
  method: {method}
  base: {{model: {base}, max_tokens: 64}}
  lora: {{rank: 4, alpha: 8}}
  training: {{epochs: 3, batch_size: 8, precision: fp32, learning_rate: 5.0e-3, head_learning_rate: 2.0e-2}}
"""
OF_THE_GRAPH = """\
name: small
type: text-classification
labels: [cold, warm]
recipe: encoder-lora@1
retraining: incremental
overrides:
  base: {{model: {base}, max_tokens: 64}}
  lora: {{rank: 4}}
  training: {{epochs: 2, batch_size: 8, precision: fp32, learning_rate: 5.0e-3}}
sources:
  - {{kind: files, url: rows.jsonl}}
cleaning: {{min_chars: 1, near_duplicates: 1.0}}
"""
INCREMENTAL = "retraining: incremental"


@dataclasses.dataclass
class Home:
    """A task's home without Dagster: its rows, its live release, trainings through the real worker."""

    folder: Path
    lake: Lake
    ledger: Ledger
    environment: Environment

    def task(self, further: str = INCREMENTAL, recipe: str = "tiny@1") -> tuple[Task, Resolved]:
        path = self.folder / "small.yaml"
        path.write_text(TASK.format(further=further, recipe=recipe))
        task = Task(path)
        return task, resolve(task, self.folder / "recipes")

    def made(self, seed: int, further: str = INCREMENTAL, recipe: str = "tiny@1") -> dict[str, Any]:
        """What an adapter of the rows of `seed` is made from, its parent among it."""
        task, resolved = self.task(further, recipe)
        made = made_from(task, resolved, self.inputs(seed), self.environment)
        parent = parent_of(task, made, self.lake, self.ledger)
        return {**made, "parent": parent} if parent else made

    def inputs(self, seed: int) -> dict[str, str]:
        """Splits of generated rows."""
        return {"train_split": self._split(seed), "validation_split": self._split(100 + seed)}

    def train(self, made: dict[str, Any]) -> Artefact:
        told = job(made, self.task()[1], self.environment, "d" * 36)
        report = train_job(told, lambda line, force=False: None)  # type: ignore[arg-type]
        return self.lake.open(report["adapter"])

    def release(self, adapter: Artefact) -> None:
        live = self.ledger.live_release("small")
        self.ledger.record_release(
            task="small",
            kind="release",
            adapter=adapter.digest,
            base="base",
            report=None,
            model_version="1",
            bento=None,
            actor="tester",
            because="a test",
            decision={},
            expected_live=live["id"] if live else None,
        )

    def _split(self, seed: int) -> str:
        rows = texts(48 if seed < 100 else 16, seed)
        rows = rows.assign(row_id=[f"{seed}-{number:03}" for number in range(len(rows))])
        return _published(self.lake, seed, rows)


def _published(lake: Lake, seed: int, rows: pd.DataFrame) -> str:
    with tempfile.TemporaryDirectory() as clean, tempfile.TemporaryDirectory() as split:
        rows.to_parquet(Path(clean) / "kept.parquet")
        made = {"clean_dataset": lake.publish("clean_dataset", Path(clean), {"rows": seed}).digest}
        rows[["row_id"]].to_parquet(Path(split) / "rows.parquet")
        return lake.publish("split", Path(split), made).digest


@pytest.fixture
def home(tmp_path: Path, tiny: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    (tmp_path / "recipes").mkdir()
    for version, base, method in ((1, "bert", "lora"), (2, "roberta", "lora"), (3, "bert", "full")):
        text = RECIPE.format(version=version, base=tiny(base), method=method)
        (tmp_path / "recipes" / f"tiny@{version}.yaml").write_text(text)
    (tmp_path / "tasks").mkdir()
    environment = Environment.read({"FT_DEVICE": "cpu", "FT_TASKS": str(tmp_path / "tasks")}, home=tmp_path / "home")
    for name, value in environment.variables().items():
        monkeypatch.setenv(name, value)
    ledger = Ledger(environment.ledger)
    yield Home(tmp_path, Lake(environment.lake), ledger, environment)
    ledger.close()


def losses(adapter: Artefact) -> list[float]:
    return list(adapter.json("training.json")["loss"])


def test_it_goes_on_where_the_champion_ended_and_repeats_to_the_byte(home: Home) -> None:
    champion = home.train(home.made(1))
    assert "parent" not in champion.made_from, "nothing was live: it starts from fresh weights"
    home.release(champion)
    made = home.made(2)
    assert made["parent"] == champion.digest
    continued, fresh = home.train(made), home.train(home.made(2, "retraining: full"))
    assert continued.made_from["parent"] == continued.json("adapter.json")["parent"] == champion.digest
    assert "parent" not in fresh.made_from
    at_end = np.mean(losses(champion)[-3:])
    assert abs(losses(continued)[0] - at_end) < 0.25 * (losses(fresh)[0] - at_end)

    again = reproduce(home.lake, home.environment, continued.digest)
    assert again.identical, again.verdict

    home.release(continued)
    assert home.made(3)["parent"] == continued.digest
    assert digest_of(home.made(2)) == digest_of(made), "the same rows make the same adapter again"


def test_what_differs_from_the_champion_is_named(home: Home) -> None:
    home.release(home.train(home.made(1)))
    other = INCREMENTAL + "\noverrides:\n  lora: {rank: 8}"
    with pytest.raises(SpecError, match=r"lora\.rank is 8, was 4") as refused:
        home.made(2, other)
    assert refused.value.where.endswith("small.yaml:5")
    assert "retraining to full" in refused.value.mend
    with pytest.raises(SpecError, match=r"base is [0-9a-f]{12}, was [0-9a-f]{12}"):
        home.made(2, recipe="tiny@2")
    assert home.made(2, INCREMENTAL + "\noverrides:\n  training: {epochs: 1}")["parent"]


@pytest.mark.parametrize(
    ("further", "recipe", "what"),
    [
        (INCREMENTAL, "tiny@3", "method full makes none"),
        (INCREMENTAL + "\nsearch: {trials: 2, rank: [2, 4]}", "tiny@1", r"chooses lora\.rank"),
        (INCREMENTAL + "\nsearch: {learning_curve: true}", "tiny@1", "learning curve"),
    ],
)
def test_a_task_that_cannot_be_continued_is_refused(home: Home, further: str, recipe: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        check_incremental(*home.task(further, recipe))
    check_incremental(*home.task(further.replace("incremental", "full"), recipe))


@pytest.mark.slow
def test_the_graph_starts_from_the_live_adapter_and_says_so(home: Home, tiny: Callable[[str], str]) -> None:
    texts(100, 5).to_json(home.folder / "tasks" / "rows.jsonl", orient="records", lines=True)
    path = home.folder / "tasks" / "small.yaml"
    path.write_text(OF_THE_GRAPH.format(base=tiny("bert")))
    task = Task(path)
    champion = home.train(made_from(task, resolve(task), home.inputs(1), home.environment))
    home.release(champion)
    platform, notes = Platform(home.environment), list[str]()
    outcome = platform.materialise("small", only=TRAINING_ASSETS, show=lambda line: notes.append(line.text))
    assert outcome.succeeded, outcome
    assert f"incremental retraining starts from the weights of adapter {short(champion.digest)}" in notes
    trained = platform.lake.require("small", "adapter")
    assert trained.made_from["parent"] == champion.digest
    shown = platform.instance.get_latest_materialization_event(dg.AssetKey("adapter"))
    assert shown is not None and shown.asset_materialization is not None
    assert shown.asset_materialization.metadata["parent"].value == champion.digest
    platform.instance.dispose()
