"""Searches with real trainings of a tiny encoder: budgets, pruning, replays, plots and the learning curve."""

import io
import json
import os
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ft_assets.tasks import Task
from ft_assets.training.engine.examples import Example
from ft_assets.training.engine.frozen import LowerLayers
from ft_assets.training.engine.runs import TaskRows
from ft_assets.training.jobs import made_from
from ft_assets.training.recipes import Resolved, resolve
from ft_assets.training.searching import plots as search_plots
from ft_assets.training.searching import trials as search
from ft_assets.training.searching.learning_curve import DRAWS, Run, answer, share_of
from ft_assets.training.searching.trials import Objective, check_space
from ft_assets.training.searching.worker import search_job
from ft_resources.environments import Environment
from ft_resources.errors import SpecError, TrainingError
from ft_resources.lake import Lake
from ft_resources.tracking import client
from tests.training.forked import forked
from tests.training.forked import search as forked_search
from tests.training.small import settings, texts

RECIPE = """\
name: tiny
version: 1
types: [text-classification, text-generation]
settings:
  base: {{model: {base}, max_tokens: 64}}
  lora: {{rank: 4, alpha: 8}}
  training: {{epochs: 2, batch_size: 8, precision: fp32, learning_rate: 5.0e-3, head_learning_rate: 3.0e-3, seed: 3}}
"""
TASK = """\
name: weather
type: text-classification
labels: [cold, warm]
recipe: tiny@1
sources: [{kind: feedback}]
"""
RATES = "learning_rate: [1.0e-5, 5.0e-2]"
QUESTIONS = """\
name: weather
type: text-generation
recipe: tiny@1
sources: [{kind: feedback}]
"""


@dataclass
class Home:
    """A lake with the rows of a task, and what its searches said."""

    lake: Lake
    environment: Environment
    task: Task
    resolved: Resolved
    rows: Mapping[str, pd.DataFrame]
    lines: list[str] = field(default_factory=list)

    def job(self) -> dict[str, Any]:
        splits = {name: _publish_split(self.lake, name, rows) for name, rows in self.rows.items()}
        made = made_from(self.task, self.resolved, splits, self.environment)
        return search.job(made, self.task, self.resolved, self.environment, "d" * 32)

    def search(self) -> dict[str, Any]:
        def say(line: str, *, force: bool = False) -> None:
            self.lines.append(line)

        return search_job(self.job(), say)  # type: ignore[arg-type]


def noisy(rows: pd.DataFrame) -> pd.DataFrame:
    """Every fifth label is wrong, so that no trial is perfect."""
    wrong = rows["label"].map({"cold": "warm", "warm": "cold"})
    return rows.assign(label=rows["label"].where(rows.index % 5 != 0, wrong))


ROWS = {"train_split": noisy(texts(48, 1)), "validation_split": noisy(texts(32, 2))}


def _publish_split(lake: Lake, name: str, rows: pd.DataFrame) -> str:
    rows = rows.assign(row_id=[f"{name}-{number:03}" for number in range(len(rows))])
    with tempfile.TemporaryDirectory() as clean, tempfile.TemporaryDirectory() as split:
        rows.to_parquet(Path(clean) / "kept.parquet")
        made = {"clean_dataset": lake.publish("clean_dataset", Path(clean), {"rows": name}).digest}
        rows[["row_id"]].to_parquet(Path(split) / "rows.parquet")
        return lake.publish(name, Path(split), made).digest


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def home(
    tmp_path: Path, tiny: Callable[[str], str], tracker: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Home]:
    """Makes a home whose task has the given `search:` lines."""

    def make(
        search: str,
        name: str = "home",
        *,
        task: str = TASK,
        base: str = "bert",
        rows: Mapping[str, pd.DataFrame] = ROWS,
        prices: str | None = None,
    ) -> Home:
        folder = tmp_path / name
        folder.mkdir()
        file = folder / "weather.yaml"
        file.write_text(task + search)
        recipes = tmp_path / "recipes"
        recipes.mkdir(exist_ok=True)
        (recipes / "tiny@1.yaml").write_text(RECIPE.format(base=tiny(base)))
        monkeypatch.setenv("FT_DEVICE", "cpu")
        if prices:
            (folder / "prices.yaml").write_text(prices)
            monkeypatch.setenv("FT_PRICES", str(folder / "prices.yaml"))
        environment = Environment.read({**os.environ, "MLFLOW_TRACKING_URI": tracker}, home=folder)
        read = Task(file)
        return Home(Lake(environment.lake), environment, read, resolve(read, recipes), rows)

    return make


def scores(found: Mapping[str, Any]) -> list[Any]:
    return [(trial["values"], trial["state"], trial["score"], trial["adapter"]) for trial in found["trials"]]


def runs_below(tracker: str, parent: str) -> list[Any]:
    connection = client(tracker)
    experiment = connection.get_run(parent).info.experiment_id
    found: list[Any] = connection.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
    return found


def test_a_trial_is_ranked_by_the_epoch_its_adapter_has(home: Callable[..., Home]) -> None:
    longer = "overrides: {training: {epochs: 10, kept_epoch: last_as_good}}\n"
    one = home(f"{longer}search: {{trials: 4, learning_rate: [1.0e-3, 5.0e-2]}}\n", "one")
    found = one.search()
    highest = []
    for trial in found["trials"]:
        history = one.lake.open(trial["adapter"]).json("training.json")
        scores_of = [measured["macro_f1"] for measured in history["validation"]]
        assert trial["score"] == scores_of[history["best_epoch"] - 1]
        highest.append(max(scores_of))
    assert any(trial["score"] < most for trial, most in zip(found["trials"], highest, strict=True)), "shows nothing"
    again = one.search()
    assert scores(again) == scores(found)
    assert all(trial["reused"] for trial in again["trials"])


def test_trials_are_seeded_tracked_and_kept(home: Callable[..., Home], tracker: str) -> None:
    chosen = f"search: {{trials: 3, {RATES}, space: {{lora.target_modules: [all-linear, [query, value]]}}}}\n"
    one = home(chosen, "one")
    found = one.search()
    assert [trial["trial"] for trial in found["trials"]] == [1, 2, 3]
    assert len({json.dumps(trial["values"]) for trial in found["trials"]}) == 3
    assert all(trial["state"] == "finished" and trial["epochs"] == 2 for trial in found["trials"])
    best = max(found["trials"], key=lambda trial: (trial["score"], -trial["measured"]["loss"]))
    assert (found["best"], found["best_trial"]) == (best["values"], best["trial"])
    assert found["seconds"] >= sum(trial["seconds"] for trial in found["trials"]) > 0
    for trial in found["trials"]:
        adapter = one.lake.open(trial["adapter"])
        assert (
            adapter.json("adapter.json")["settings"]["training"]["learning_rate"]
            == (trial["values"]["training.learning_rate"])
        )
        history = adapter.json("training.json")
        assert history["validation"][history["best_epoch"] - 1]["macro_f1"] == trial["score"]
    children = runs_below(tracker, found["mlflow_run"])
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.tags["adapter"] for run in children} == {trial["adapter"] for trial in found["trials"]}
    assert client(tracker).get_run(found["mlflow_run"]).info.run_name == "search weather"

    assert scores(home(chosen, "two").search()) == scores(found)
    again = one.search()
    assert scores(again) == scores(found)
    assert all(trial["reused"] for trial in again["trials"])
    assert again["trials"][0]["seconds"] == found["trials"][0]["seconds"]


def test_a_trial_gives_the_bytes_of_a_training_alone(home: Callable[..., Home], tmp_path: Path) -> None:
    """Trials share a process, and still nothing of one is left in the next."""
    from ft_assets.training.engine.runs import fit, task_rows, tokenise
    from ft_assets.training.recipes import with_values
    from ft_resources.base_models import resolve as resolve_base

    made = home("search: {trials: 2, space: {lora.top_layers: [1, 2], training.batch_size: [8, 16]}}\n")
    found = made.search()
    job = made.job()
    for trial in found["trials"]:
        chosen = with_values(made.resolved, trial["values"], "alone").settings
        base, rows = resolve_base(chosen.base.model), task_rows(made.lake, job["made_from"])
        folder = tmp_path / f"alone-{trial['trial']}"
        fit(rows, tokenise(rows, base, 64), base, chosen, folder, describe={}, device="cpu")
        adapter = made.lake.open(trial["adapter"])
        for name in ("adapter_model.safetensors", "head.safetensors", "training.json"):
            assert adapter.read(name) == (folder / name).read_bytes()


def test_trials_share_what_the_frozen_layers_give(home: Callable[..., Home], monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    keep = LowerLayers.keep

    def counting(self: LowerLayers, examples: Sequence[Example], states: torch.Tensor) -> None:
        computed.append(len(examples))
        keep(self, examples, states)

    monkeypatch.setattr(LowerLayers, "keep", counting)
    made = home(f"overrides: {{lora: {{top_layers: 1}}}}\nsearch: {{trials: 3, {RATES}, learning_curve: true}}\n")
    found = made.search()
    assert len({trial["adapter"] for trial in found["trials"]}) == 3
    # all rows for the trials; a share of the training rows three times; all rows again for steps and rank
    rows, validation = 48, 32
    assert sum(computed) == 2 * (rows + validation) + 6 + 12 + 24 + 3 * validation


def test_lagging_trials_are_pruned_and_leave_no_adapter(home: Callable[..., Home], tracker: str) -> None:
    made = home(f"search: {{trials: 8, {RATES}, epochs: [4], pruning: median}}\n")
    found = made.search()
    pruned = [trial for trial in found["trials"] if trial["state"] == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial["adapter"] is None and trial["epochs"] < 4
        assert trial["trial"] > search.STARTUP_TRIALS
    assert found["best_trial"] not in [trial["trial"] for trial in pruned]
    adapters = list((Path(made.lake.url) / "keys" / "adapter").iterdir())
    assert len(adapters) == sum(trial["state"] == "finished" for trial in found["trials"])
    states = {run.data.tags["search_trial"]: run for run in runs_below(tracker, found["mlflow_run"])}
    for trial in pruned:
        run = states[f"trial {trial['trial']}"]
        assert (run.info.status, run.data.tags["trial_state"]) == ("KILLED", "pruned")
    assert scores(made.search()) == scores(found)


@pytest.mark.slow
def test_hyperband_gives_the_same_trials_again(home: Callable[..., Home]) -> None:
    chosen = f"search: {{trials: 6, {RATES}, epochs: [4], pruning: hyperband}}\n"
    found = home(chosen, "one").search()
    assert scores(home(chosen, "two").search()) == scores(found)
    assert {trial["state"] for trial in found["trials"]} <= {"finished", "pruned"}


def test_a_trial_ends_after_the_epoch_in_which_the_time_is_spent(home: Callable[..., Home]) -> None:
    made = home(f"search: {{trials: 4, {RATES}, epochs: [50], max_minutes: 1.0e-4}}\n")
    with pytest.raises(TrainingError, match=r"none of 1 trials finished; the last stopped: .* after epoch 1 of 50"):
        made.search()
    # the last epoch is paid for when it is over: such a trial is kept, and none follows
    found = home(f"search: {{trials: 4, {RATES}, epochs: [1], max_minutes: 1.0e-4}}\n", "short").search()
    assert [trial["state"] for trial in found["trials"]] == ["finished"]
    assert found["ended"].startswith("stopped after 1 of 4 trials")


@pytest.mark.slow
def test_the_cost_is_bounded(home: Callable[..., Home]) -> None:
    prices = "currency: EUR\ndevices: {cpu: {amount: 3600}}\n"  # one a core and second
    made = home(f"search: {{trials: 100, {RATES}, max_cost: 8}}\n", prices=prices)
    found = made.search()
    assert 1 <= len(found["trials"]) < 100
    assert found["currency"] == "EUR"
    assert "8 EUR are spent" in found["ended"]
    assert sum(trial["cost"] for trial in found["trials"][:-1]) <= 8
    assert found["cost"] == pytest.approx(
        found["seconds"] * (found["trials"][0]["cost"] / found["trials"][0]["seconds"])
    )


def test_a_trial_that_fails_does_not_end_the_search(home: Callable[..., Home]) -> None:
    made = home("search: {trials: 8, space: {lora.target_modules: [[query], [nowhere]]}}\n")
    found = made.search()
    failed = [trial for trial in found["trials"] if trial["state"] == "failed"]
    assert failed and "does not fit the base model" in failed[0]["why"] and failed[0]["score"] is None
    assert found["best"] == {"lora.target_modules": ["query"]}
    for image in search_plots.charts(found).values():
        assert image.startswith(b"\x89PNG")


def test_a_killed_search_goes_on_where_it_was(
    home: Callable[..., Home], processes: ForkServerContext, tmp_path: Path
) -> None:
    chosen = f"search: {{trials: 5, {RATES}, epochs: [3], pruning: median}}\n"
    whole = home(chosen, "whole").search()
    made = home(chosen, "killed")
    own = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made.environment = replace(made.environment, mlflow=own)
    variables = {**made.environment.variables(), "FT_DEVICE": "cpu"}
    with forked(processes, forked_search, made.job(), variables=variables) as (worker, lines):
        for line in lines:
            if line.startswith("trial 3/5"):
                worker.kill()
                break
    assert worker.exitcode == -signal.SIGKILL
    found = made.search()
    assert scores(found) == scores(whole)
    assert [trial["reused"] for trial in found["trials"]][:3] == [True] * 3
    assert not found["trials"][-1]["reused"]
    assert len(client(own).search_runs(["1"], "tags.search LIKE '%'")) == 1
    closed = [run for run in runs_below(own, found["mlflow_run"]) if run.info.status != "RUNNING"]
    assert sorted(run.data.tags["search_trial"] for run in closed) == [f"trial {number}" for number in range(1, 6)]


def test_charts_are_pictures_with_content(home: Callable[..., Home], tmp_path: Path) -> None:
    from matplotlib.image import imread

    made = home(f"search: {{trials: 3, {RATES}, rank: [2, 4], learning_curve: true}}\n")
    found = made.search()
    search_plots.write(tmp_path, found)
    images = {path.stem: imread(io.BytesIO(path.read_bytes())) for path in tmp_path.glob("*.png")}
    assert sorted(images) == ["history", "learning_curve", "parallel_coordinates", "pareto"]
    for pixels in images.values():
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 20
    table = search_plots.leaderboard(found)
    assert table[0]["trial"] == found["best_trial"]
    assert any(row["front"] for row in table)

    curve = found["learning_curve"]
    assert [point["rows"] for point in curve["points"]] == [6, 12, 24, 48]
    assert set(curve["gains"]) == {"rows", "epochs", "rank"}
    assert curve["gains"]["epochs"]["cost_factor"] > 0
    for part in (
        "Twice the rows (48 to 96): expected macro-F1",
        "twice the steps:",
        "twice the rank:",
        "32 validation",
    ):
        assert part in curve["sentence"]
    assert (tmp_path / "learning_curve.md").read_text().strip() == curve["sentence"]
    assert len(list((Path(made.lake.url) / "keys" / "adapter").iterdir())) == 3
    assert made.search()["learning_curve"] == curve


@pytest.mark.slow
def test_answers_are_searched_by_their_loss(home: Callable[..., Home], answers: TaskRows) -> None:
    rows = {"train_split": answers.training, "validation_split": answers.validation}
    chosen = f"search: {{trials: 3, {RATES}, learning_curve: true}}\n"
    found = home(chosen, task=QUESTIONS, base="llama", rows=rows).search()
    losses = {trial["trial"]: trial["score"] for trial in found["trials"]}
    assert found["best_trial"] == min(losses, key=lambda number: losses[number])
    assert search_plots.leaderboard(found)[0]["trial"] == found["best_trial"]
    curve = found["learning_curve"]
    assert curve["points"][-1]["error"] == pytest.approx(losses[found["best_trial"]], rel=1e-4)
    assert curve["sentence"].startswith("Twice the rows (48 to 96): expected loss ")


@pytest.mark.slow
def test_the_learning_curve_keeps_to_the_budget(home: Callable[..., Home]) -> None:
    made = home(f"search: {{trials: 2, {RATES}, max_minutes: 1.0e-4, epochs: [1], learning_curve: true}}\n")
    curve = made.search()["learning_curve"]
    assert curve["gains"] == {} and "minutes are spent" in curve["ended"]
    assert curve["sentence"].startswith("Nothing can be said")


@pytest.mark.parametrize(
    ("chosen", "line", "says"),
    [
        ("search:\n  trials: 3\n  space:\n    lora.rnak: [2, 4]\n", 9, ["no value 'lora.rnak'", "'lora.rank'"]),
        ("search:\n  trials: 3\n  space:\n    lora.rank: [2, 9999]\n", 9, ["'lora.rank' is 9999"]),
        ("search:\n  trials: 3\n  space:\n    lora.dropout: {low: 0.0, high: 1.5}\n", 9, ["'lora.dropout' is 1.5"]),
        ("search:\n  trials: 3\n  space:\n    lora.rank:\n      low: 1\n      high: 2.5\n", 9, ["whole number"]),
        ("search:\n  trials: 3\n  space:\n    training.schedule: {low: 0, high: 1}\n", 9, ["no number", "List its"]),
        ("search:\n  trials: 3\n  space:\n    training.seed: [1, 2]\n", 9, ["seed"]),
        ("search:\n  trials: 3\n  rank: [2, 9999]\n", 8, ["'lora.rank' is 9999"]),
        (
            "search:\n  trials: 3\n  space:\n    training.schedule:\n      - linear\n      - cosin\n",
            11,
            ["'training.schedule' is 'cosin'"],
        ),
    ],
)
def test_a_bad_space_is_named_with_its_line(home: Callable[..., Home], chosen: str, line: int, says: list[str]) -> None:
    made = home(chosen)
    with pytest.raises(SpecError) as caught:
        check_space(made.task, made.resolved)
    assert f"weather.yaml:{line}: " in str(caught.value)
    for expected in says:
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "line", "says"),
    [
        ("search:\n  trials: 3\n", 7, "more than one trial needs"),
        ("search:\n  space:\n    lora.rank: {low: 4, high: 4}\n", 8, "4 is not more than low, 4"),
        (
            "search:\n  space:\n    lora.dropout:\n      low: 0\n      high: 0.5\n      log: true\n",
            9,
            "has no logarithm",
        ),
        ("search:\n  space:\n    lora.rank: [4, 4]\n", 8, "distinct choices"),
        ("search:\n  space:\n    lora.rank: {low: 4, hihg: 8}\n", 8, "Did you mean 'high'?"),
        ("search:\n  rank: [4]\n  space:\n    lora.rank: [8]\n", 9, "`rank` says already"),
        ("search:\n  pruning: medain\n", 7, "Did you mean 'median'?"),
        ("search:\n  max_cost: 0\n", 7, "greater than 0"),
    ],
)
def test_a_bad_search_is_named_with_its_line(tmp_path: Path, chosen: str, line: int, says: str) -> None:
    (tmp_path / "weather.yaml").write_text(TASK + chosen)
    with pytest.raises(SpecError) as caught:
        Task(tmp_path / "weather.yaml")
    assert f"weather.yaml:{line}: " in str(caught.value)
    assert says in str(caught.value)


def test_a_power_law_is_found_again() -> None:
    """Right answers whose share follows a known law: doubling the rows must give what the law says."""
    generator = np.random.default_rng(0)
    rows, targets = 20_000, np.arange(20_000) % 2
    luck = generator.random(rows)  # one draw a row for all: the noise of the rows is shared, as in real trainings

    def run(name: str, count: int, error: float, seconds: float = 1.0) -> Run:
        answers = np.where(luck < error, 1 - targets, targets)
        return Run(name, count, seconds, np.eye(2, dtype=np.float32)[answers])

    def law(count: float) -> float:
        return 0.05 + 2.0 * count**-0.5

    runs = [run("all", 800, law(800)), *(run("rows", count, law(count)) for count in (100, 200, 400))]
    runs += [run("epochs", 800, law(800) - 0.01, 2.0), run("rank", 800, law(800), 1.5)]
    told = answer(runs, targets.tolist(), Objective("macro_f1", True), settings("unused"))
    expected = law(800) - law(1600)
    gain = told["gains"]["rows"]
    assert gain["low"] < expected < gain["high"]
    assert gain["gain"] == pytest.approx(expected, abs=0.006)
    assert told["gains"]["epochs"]["gain"] == pytest.approx(0.01, abs=0.003)
    assert told["gains"]["epochs"]["low"] > 0
    assert told["gains"]["rank"] == {"gain": 0.0, "low": 0.0, "high": 0.0, "cost_factor": 1.5}
    assert "More rows promise the most." in told["sentence"]
    assert DRAWS >= 200


def test_smaller_shares_are_parts_of_larger_ones_and_keep_every_class() -> None:
    classes = [0] * 40 + [1] * 3
    eighth, half = share_of(classes, 0.125, 7), share_of(classes, 0.5, 7)
    assert set(eighth) <= set(half)
    assert {classes[place] for place in eighth} == {0, 1}
    assert (len(eighth), len(half)) == (6, 22)
    assert share_of(classes, 0.5, 8) != half
