"""A hyper-parameter search through the graph: real trials, a budget, and the winner is not trained twice."""

from pathlib import Path

import pandas as pd
import pytest

from tests.graph.small_task import TASK, TASK_FILE, open_home, write_task

SEARCH = """
search:
  trials: 2
  max_minutes: 10
  rank: [2, 4]
  space:
    training.learning_rate: {low: 0.0005, high: 0.002, log: true}
"""


@pytest.mark.slow
def test_the_winner_of_the_search_becomes_the_adapter(tmp_path: Path, training_mails: pd.DataFrame) -> None:
    platform = open_home(tmp_path / "home")
    platform.add_task(write_task(tmp_path / "mine", TASK_FILE + SEARCH, training_mails))
    splits = ["train_split", "validation_split", "test_split"]
    notes: list[str] = []
    outcome = platform.materialise(
        TASK,
        only=["raw_dataset", "clean_dataset", *splits, "search_results", "adapter"],
        show=lambda line: notes.append(line.text),
    )
    assert outcome.succeeded, outcome
    results = platform.lake.require(TASK, "search_results")
    found = results.json("trials.json")
    assert [trial["trial"] for trial in found["trials"]] == [1, 2]
    best = max(found["trials"], key=lambda trial: (trial["score"], -trial["measured"]["loss"]))
    assert found["best"] == best["values"]
    for chart in ("history", "parallel_coordinates", "pareto"):
        assert results.read(f"{chart}.png").startswith(b"\x89PNG")
    adapter = platform.lake.require(TASK, "adapter")
    assert adapter.digest == best["adapter"]
    about = adapter.json("adapter.json")
    assert about["settings"]["lora"]["rank"] == found["best"]["lora.rank"]
    assert about["origins"]["lora.rank"] == f"search trial {best['trial']}"
    assert sum("is reused" in note for note in notes) == 1
    recorded = platform.ledger.training_runs(TASK)
    assert set(recorded["adapter"]) == {trial["adapter"] for trial in found["trials"]}
    assert (recorded["cost"] > 0).all() and (recorded["status"] == "FINISHED").all()
