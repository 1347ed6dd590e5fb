"""The whole graph on real rows: what it leaves behind, and that the same inputs make nothing twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ft_assets.platform import Platform
from ft_resources.lake import digest_of
from ft_resources.tracking import client
from tests.graph.small_task import TASK, Built, open_home


@pytest.fixture
def platform(built: Built) -> Platform:
    return open_home(built.home)


def test_the_release_is_live_and_carries_its_report(platform: Platform) -> None:
    live = platform.live(TASK)
    assert live is not None
    report = platform.report(TASK)
    assert live["adapter"] == report.adapter == platform.lake.require(TASK, "adapter").digest
    assert live["report"] == platform.lake.require(TASK, "eval_report").digest
    assert live["decision"]["passed"] is True
    assert platform.registry.alias(TASK, "champion") == live["model_version"] == "1"


def test_the_report_compares_with_baselines_on_every_test_row(platform: Platform) -> None:
    report = platform.report(TASK)
    assert set(report.models) == {"candidate", "majority", "linear"}
    assert report.models["candidate"]["accuracy"].value > report.models["majority"]["accuracy"].value
    answers = platform.lake.require(TASK, "eval_report").parquet("predictions.parquet")
    assert len(answers) == report.rows == len(platform.lake.require(TASK, "test_split").parquet("rows.parquet"))
    assert (answers["candidate_label"] == answers["label"]).mean() == pytest.approx(
        report.models["candidate"]["accuracy"].value
    )
    page = platform.report_page(TASK).read_text(encoding="utf-8")
    assert report.adapter[:12] in page


def test_the_adapter_loads_in_plain_peft_and_answers_as_evaluated(platform: Platform) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    from ft_resources.base_models import resolve

    adapter = platform.lake.require(TASK, "adapter")
    about = adapter.json("adapter.json")
    base = resolve(about["base"]["model"])
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base.path), adapter.folder).eval()
    head, tokenizer = load_file(adapter.folder / "head.safetensors"), AutoTokenizer.from_pretrained(base.path)
    rows = platform.lake.require(TASK, "eval_report").parquet("predictions.parquet").head(8)
    for row in rows.itertuples():
        inputs = tokenizer(row.text, truncation=True, max_length=about["max_tokens"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).last_hidden_state.mean(1) @ head["weight"].T + head["bias"]
        probabilities = torch.softmax(logits / about["temperature"], -1)[0].numpy()
        assert about["labels"][int(probabilities.argmax())] == row.candidate_label
        assert np.isclose(probabilities.max(), row.candidate_confidence, atol=0.02)


def test_mlflow_holds_every_step_and_the_card_of_the_version(platform: Platform) -> None:
    adapter = platform.lake.require(TASK, "adapter")
    run_id = platform.registry.run_of(TASK, digest_of(dict(adapter.made_from)))
    connection = client(platform.environment.mlflow)
    losses = [
        metric.value for metric in sorted(connection.get_metric_history(run_id, "loss"), key=lambda one: one.step)
    ]
    assert losses == pytest.approx(adapter.json("training.json")["loss"])
    run = connection.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["dagster_run_id"]
    assert run.data.params["lora.rank"] == "4"
    card = platform.registry.card(TASK, "1")
    assert card["adapter"] == adapter.digest
    assert card["rows"]["train"] > 200


def test_every_value_of_the_settings_tells_where_it_came_from(platform: Platform) -> None:
    origins = platform.lake.require(TASK, "adapter").json("adapter.json")["origins"]
    assert origins["base.model"] == "recipe encoder-lora@1"
    assert origins["lora.rank"] == "task small-mail.yaml"


def test_an_answer_is_traced_to_the_rows_it_learned_from(platform: Platform) -> None:
    answer = platform.predict(TASK, ["Dear friend, claim your free prize now"])[0]
    trace = platform.trace(answer.prediction_id)
    assert trace.release is not None
    assert trace.release["because"] == "the first one"
    assert trace.digests["raw_dataset"] == platform.lake.require(TASK, "raw_dataset").digest
    row = trace.rows.iloc[0]
    assert "rows.jsonl#" in row["source"]
    back = platform.trace_row(TASK, row["row_id"])
    assert back["split"] == "train"
    assert [one["version"] for one in back["trained"]] == ["1"]


def test_the_same_inputs_make_nothing_twice(copied: Callable[[], Platform]) -> None:
    platform = copied()
    names = (
        "raw_dataset",
        "clean_dataset",
        "train_split",
        "adapter",
        "eval_report",
        "model_version",
        "bento_service",
        "release",
    )
    before = {name: platform.lake.require(TASK, name).digest for name in names}
    notes: list[str] = []
    outcome = platform.materialise(TASK, show=lambda line: notes.append(line.text))
    assert outcome.succeeded, outcome
    after = {name: platform.lake.require(TASK, name).digest for name in names}
    assert after == before
    assert any("reused" in note for note in notes)
    assert len(platform.history(TASK)) == 1


def test_a_home_can_be_opened_twice(built: Built, tmp_path: Path) -> None:
    one, other = open_home(built.home), open_home(built.home)
    assert one.live(TASK) == other.live(TASK)
