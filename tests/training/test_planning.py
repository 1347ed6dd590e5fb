"""What a plan says, against what training really does."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from ft_assets.tasks import Task
from ft_assets.training.engine.batching import PART_TOKENS
from ft_assets.training.engine.runs import TaskRows, fit, tokenise
from ft_assets.training.jobs import inputs_of, made_from
from ft_assets.training.planning.cost_model import Counts, Observation, calibrate, rates
from ft_assets.training.planning.plan import plan, render
from ft_assets.training.planning.workloads import measure, rows_of, run_entry, task_made
from ft_assets.training.recipes import resolve as resolve_recipe
from ft_assets.training.recipes import with_values
from ft_assets.training.relief import SMALLEST_PART, Relief, reliefs_of, relieved, under
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.errors import TrainingError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger
from ft_resources.training_runs import TrainingRun
from tests.training.small import LABELS, settings, texts

# -- the plan of a task -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment.read({"FT_DEVICE": "cpu"}, home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], str]) -> Task:
    folder = tmp_path_factory.mktemp("task")
    texts(200, 3).assign(text=lambda rows: [f"{text} {at}" for at, text in enumerate(rows["text"])]).to_json(
        folder / "rows.jsonl", orient="records", lines=True
    )
    (folder / "weather.yaml").write_text(
        f"""
name: weather
type: text-classification
labels: {LABELS}
recipe: encoder-lora@1
overrides:
  base: {{model: {tiny("bert")}, max_tokens: 12}}
  lora: {{rank: 4}}
  training: {{batch_size: 8, epochs: 3, precision: fp32}}
sources:
  - {{kind: files, url: rows.jsonl}}
cleaning: {{near_duplicates: 1.0}}
"""
    )
    return Task(folder / "weather.yaml")


def test_a_plan_before_anything_ran(environment: Environment, task: Task, tmp_path: Path) -> None:
    found = plan(Lake(tmp_path / "lake"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), environment, task)
    lora, full = found.methods
    assert found.chosen is lora and (lora.method, full.method) == ("lora", "full")
    assert found.rows == pytest.approx(140, abs=10) and found.steps == 3 * -(-found.rows // 8)
    assert found.tokens == 3 * found.tokens_per_epoch and 5 * found.rows < found.tokens_per_epoch < 12 * found.rows
    assert found.longest > 12 and 0.1 < found.truncated_share < 0.95
    assert any("base.max_tokens" in line for line in found.advice)
    assert "Not calibrated yet" in found.calibration
    assert full.trained_share == 1 and 0 < lora.trained_share < 0.2
    assert min(full.memory_mb.expected, lora.memory_mb.expected) > 300
    for one in found.methods:
        assert one.seconds.low < one.seconds.expected < one.seconds.high
        assert one.cost and one.cost.expected == pytest.approx(one.core_hours.expected * 0.05)
    assert json.loads(found.json())["methods"][0]["seconds"]["low"] == lora.seconds.low

    console = Console(width=140, record=True)
    console.print(render(found))
    shown = console.export_text()
    assert "lora (this task)" in shown and f"{lora.trained_parameters:,}" in shown and found.calibration in shown


def publish(lake: Lake, name: str, frame: pd.DataFrame, made: dict[str, Any], folder: Path) -> str:
    (folder / name).mkdir()
    frame.to_parquet(folder / name / ("kept.parquet" if name == "clean_dataset" else "rows.parquet"))
    return lake.publish(name, folder / name, made).digest


@pytest.mark.slow
def test_a_plan_is_calibrated_on_what_was_recorded(environment: Environment, task: Task, tmp_path: Path) -> None:
    lake, ledger = Lake(tmp_path / "lake"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    rows = texts(120, 4).assign(row_id=[f"{number:032x}" for number in range(120)])
    clean = publish(lake, "clean_dataset", rows, {}, tmp_path)
    for name, part in (("train_split", rows[:90]), ("validation_split", rows[90:])):
        lake.set_head(task.name, name, publish(lake, name, part[["row_id"]], {"clean_dataset": clean}, tmp_path), "run")
    made = made_from(task, resolve_recipe(task), inputs_of(lake, task), environment)
    adapter = publish(lake, "adapter", rows[:1], made, tmp_path)

    def record(number: int, method: str, accuracy: float) -> None:
        moment = datetime(2026, 1, number, tzinfo=UTC)
        ledger.record_training(
            TrainingRun(
                run_id=str(number),
                dagster_run_id="run",
                task=task.name,
                status="FINISHED",
                trained_from=method,
                training_rows_digest=made["train_split"],
                validation_rows_digest=made["validation_split"],
                base=made["settings"]["base"]["model"],
                base_digest=made["base"],
                template="encoder-lora@1",
                method=method,
                started=moment,
                ended=moment,
                adapter=adapter,
                device="cpu",
                precision="fp32",
                tokens=2000,
                wall_seconds=600.0,
                cpu_seconds=900.0,
                peak_memory_bytes=3_000_000_000,
                peak_gpu_memory_bytes=0,
                accuracy=accuracy,
            )
        )

    record(1, "lora", 0.8)
    before = plan(lake, ledger, environment, task)
    assert before.rows == 90 and before.rows_from.startswith("train_split")
    assert "1 recorded run on cpu" in before.calibration
    assert before.chosen.seconds.expected > 30 and before.chosen.memory_mb.expected > 1000
    assert "Use lora unless" in before.advice[0]
    assert len(list((environment.home / "plans").glob("*.json"))) == 1

    record(2, "full", 0.9)
    record(3, "lora", 0.7)
    again = plan(lake, ledger, environment, task)
    assert again.advice[0] == "Use full: best validation accuracy so far is full 0.900, lora 0.800."
    assert "2 recorded runs" in again.calibration


def test_the_size_of_the_result_is_that_of_one_that_is_written(
    environment: Environment, tiny: Callable[[str], str], task: Task, tmp_path: Path
) -> None:
    rows = rows_of(Lake(tmp_path / "lake"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), environment, task)
    real = TaskRows("text-classification", rows.training, rows.validation, LABELS)
    data = tokenise(real, resolve(tiny("bert")), 64)
    choices = [
        settings(tiny("bert"), method=method, lora={"rank": 64}, training={"epochs": 1}) for method in ("lora", "full")
    ]
    runs = [run_entry(tmp_path, task_made(task), chosen, rows, timed=True) for chosen in choices]
    measured = measure(runs, environment, tmp_path)
    for chosen, workload in zip(choices, measured.workloads, strict=True):
        folder = tmp_path / chosen.method
        trained = fit(real, data, resolve(tiny("bert")), chosen, folder, describe={}, device="cpu")
        assert workload.trained_parameters == trained.history.trainable_parameters
        assert workload.total_parameters == trained.history.total_parameters
        assert workload.tokens_per_epoch == trained.history.tokens
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        counted = workload.trained_parameters if chosen.method == "lora" else workload.total_parameters
        assert counted * 4 == pytest.approx(written, rel=0.05)


def test_a_base_model_that_the_settings_do_not_fit_is_refused(
    environment: Environment, task: Task, tmp_path: Path
) -> None:
    wrong = with_values(resolve_recipe(task), {"lora.target_modules": ["nothing"]}, "test")
    with pytest.raises(TrainingError, match=r"lora\.target_modules"):
        plan(Lake(tmp_path / "lake"), Ledger(f"sqlite:///{tmp_path / 'ledger.db'}"), environment, task, wrong)


# -- the cost model -----------------------------------------------------------------------------------------------


def test_rates_are_found_again_and_are_not_negative() -> None:
    true = {"flops": 2e-12, "traffic": 1e-10, "calls": 1e-5, "shapes": 3e-3}
    counts = [Counts(1e9, 1e8, 400, 20), Counts(8e9, 2e8, 800, 0), Counts(1e10, 9e8, 300, 5), Counts(3e9, 4e8, 900, 9)]
    found = rates([(one, sum(getattr(one, name) * rate for name, rate in true.items())) for one in counts])
    assert (found.flop, found.byte, found.call, found.shape) == pytest.approx(tuple(true.values()), rel=1e-6)
    assert min(vars(rates([(Counts(1e9, 1e8, 400, 20), 1.0), (Counts(2e9, 1e8, 400, 20), 0.5)])).values()) >= 0


def test_calibration_learns_a_slow_machine_and_ignores_one_run_that_was_disturbed() -> None:
    runs = [Observation(True, work, 9 + 1.6 * work, 1e9, 1.1e9) for work in (10, 40, 90, 200)]
    alone, fitted = calibrate([], 8.0), calibrate(runs, 8.0)
    assert fitted.seconds(120).expected == pytest.approx(201, rel=0.05)
    assert fitted.memory(2e9).expected == pytest.approx(2.2e9, rel=0.02)
    assert alone.seconds(120).expected == pytest.approx(128) and alone.memory(2e9).expected == pytest.approx(2e9)

    def width(which: object) -> float:
        interval = which.seconds(120)  # type: ignore[attr-defined]
        return float(interval.high / interval.low)

    assert width(fitted) < width(alone)
    disturbed = [*runs, replace(runs[1], seconds=600.0)]
    assert calibrate(disturbed, 8.0).seconds(120).expected == pytest.approx(201, rel=0.12)
    assert width(calibrate(disturbed, 8.0)) > width(fitted)


# -- after out of memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "rows", "longest"), [(16, 5000, 900), (64, 40, 8192), (4, 10_000, 100), (1, 1, 3)])
def test_relief_shrinks_the_passes_then_recomputes_then_ends(batch: int, rows: int, longest: int) -> None:
    told = settings("base", base={"max_tokens": 4096}, training={"batch_size": batch})
    seen: list[Relief] = []
    while not (seen and seen[-1].gradient_checkpointing):
        seen.append(relieved(told, seen, len(seen), longest, rows))
        assert len(seen) < 20
    with pytest.raises(TrainingError, match=r"Lower base.max_tokens \(4096\)"):
        relieved(told, seen, len(seen), longest, rows)
    budgets = [relief.micro_batch_tokens for relief in seen[:-1]]
    assert budgets == sorted(set(budgets), reverse=True)
    assert all(before >= 2 * after or after == max(8, min(longest, 4096)) for before, after in pairwise(budgets))
    assert all(budget <= SMALLEST_PART // 2 or budget == min(longest, 4096) for budget in budgets)
    assert [relief.after_step for relief in seen] == list(range(len(seen)))


def test_relief_begins_with_what_the_settings_say() -> None:
    told = settings("base", training={"micro_batch_tokens": 256, "gradient_checkpointing": True})
    first = relieved(told, [], 7, 64, 1000)
    assert first == Relief(after_step=7, micro_batch_tokens=128, gradient_checkpointing=True)


def test_what_an_adapter_is_made_from_tells_its_reliefs() -> None:
    made = {"task": "mails"}
    reliefs = [Relief(after_step=7, micro_batch_tokens=128, gradient_checkpointing=False)]
    assert under(made, []) == made
    assert reliefs_of(made) == []
    assert reliefs_of(under(made, reliefs)) == reliefs


def test_the_first_relief_is_one_on_every_device() -> None:
    assert min(PART_TOKENS.values()) == SMALLEST_PART
    for tokens in PART_TOKENS.values():
        relief = relieved(settings("base", base={"max_tokens": 4096}, training={"batch_size": 64}), [], 0, 2000, 64)
        assert 0 < relief.micro_batch_tokens < tokens
