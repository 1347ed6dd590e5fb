"""Tasks that write text, through the whole graph: from their rows to a live release that answers and is watched."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ft_assets.evaluation.generation.report import GenerationReport
from ft_assets.platform import Platform
from ft_assets.release import promotion
from ft_resources.errors import GateRefusal
from tests.graph.small_task import open_home
from tests.graph.small_texts import ANSWERS, FIELDS, GENERAL, answer_rows, field_rows, tiny_chat, write_texts

TASK = "small-answers"
ASKED = "serving:\n  test_requests:\n    - {text: 'How is it: snow ice?', contains: it is}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    tiny_chat(root / "base")
    return root


@pytest.fixture(scope="module")
def answering(home: Path) -> Platform:
    """A home whose text-generation task is live."""
    platform = open_home(home)
    platform.add_task(
        write_texts(home / "answers", home / "base", ANSWERS, answer_rows(150), epochs=8, more=GENERAL + ASKED)
    )
    outcome = platform.materialise(TASK, because="the first one")
    assert outcome.succeeded, outcome
    assert outcome.unserved == ""
    return platform


def report_of(platform: Platform, task: str) -> GenerationReport:
    report = platform.report(task)
    assert isinstance(report, GenerationReport)
    return report


def test_a_generation_task_goes_the_whole_way(answering: Platform) -> None:
    live, report = answering.live(TASK), report_of(answering, TASK)
    assert live is not None
    assert live["adapter"] == report.adapter == answering.lake.require(TASK, "adapter").digest
    assert live["decision"]["gates"]["calibrated"]["applies"] is False
    assert set(report.models) == {"candidate", "base"}
    assert report.models["candidate"]["token_f1"].value > report.models["base"]["token_f1"].value + 0.3
    assert report.models["candidate"]["loss"].value < report.models["base"]["loss"].value
    assert report.serving.tokens > 100
    assert report.rows == len(answering.lake.require(TASK, "test_split").parquet("rows.parquet"))
    service = answering.lake.require(TASK, "bento_service").json("service.json")
    assert len(service["golden"]) >= 5
    assert all(one["answered"] == one["expected"] for one in service["golden"])
    (sample,) = service["test_requests"]
    assert (sample["expected"], sample["right"]) == ("a text with 'it is'", True)
    card = answering.registry.card(TASK, "1")
    assert card["adapter"] == report.adapter
    assert "labels" not in card
    assert report.adapter[:12] in answering.report_page(TASK).read_text(encoding="utf-8")


def test_texts_are_served_in_what_they_were_evaluated_in_by_what_wrote_them(answering: Platform) -> None:
    live, report, route = answering.live(TASK), report_of(answering, TASK), answering.ledger.route(TASK)
    assert live is not None and route is not None
    assert report.serving.engine == live["decision"]["engine"] == "torch"
    assert (
        report.serving.precision == live["decision"]["precision"] == route["plan"]["shares"][0]["precision"] != "auto"
    )
    with pytest.raises(GateRefusal, match="evaluated as torch writes them"):
        promotion.examine(answering.lake, answering.ledger, answering.tasks.get(TASK).spec, engine="vllm")


def test_the_answers_are_those_of_plain_peft(answering: Platform) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bento.conversation import load
    from ft_resources.base_models import resolve

    adapter = answering.lake.require(TASK, "adapter")
    base = resolve(adapter.json("adapter.json")["base"]["model"])
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter.folder).eval()
    stored = answering.lake.require(TASK, "eval_report").parquet("predictions.parquet").head(6)
    alike = 0
    for row in stored.itertuples():
        prompt = tokenizer.apply_chat_template(load(row.text), tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written = model.generate(
                **{name: inputs[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=40, do_sample=False
            )
        answer = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        alike += answer.strip() == row.candidate_answer.strip()
    assert alike >= 5  # in bf16 a near tie may fall the other way


def test_live_answers_are_logged_corrected_and_watched(answering: Platform) -> None:
    rows = answer_rows(60, seed=9)
    asked = [row["text"] for row in rows]
    given = answering.predict(TASK, asked, event_time=datetime(2026, 3, 2, tzinfo=UTC))
    assert sum(one.text is not None and one.text.finish_reason == "stop" for one in given) > 50
    answering.ledger.add_feedback(
        prediction_id=given[0].prediction_id, label=None, rating=None, author="someone", text="It is mild there."
    )
    outcome = answering.monitor(TASK, "2026-03-02")
    assert outcome.succeeded, outcome
    found = answering.lake.require(TASK, "drift_report/2026-03-02").json("drift.json")
    assert set(found["drift"]["tests"]) in (set(), {"inputs", "predictions", "confidence"})
    assert "1 corrected texts" in found["accuracy"]["reason"]
    queue = answering.lake.require(TASK, "relabel_queue/2026-03-02").parquet("queue.parquet")
    assert given[0].prediction_id not in set(queue["prediction_id"])


def test_a_threshold_that_is_missed_blocks_and_release_asks_again(answering: Platform) -> None:
    task = answering.tasks.get(TASK)
    before = answering.live(TASK)
    text = task.path.read_text(encoding="utf-8")
    task.path.write_text(text.replace("gates:\n", "gates:\n  thresholds: {exact_match: 1.0}\n"), encoding="utf-8")
    try:
        outcome = answering.materialise(TASK, only=("eval_report", "model_version"))
        with pytest.raises(GateRefusal, match="another report"):  # what is built is of the report before
            promotion.release(answering.lake, answering.ledger, answering.tasks.get(TASK).spec, actor="x", because="y")
    finally:
        task.path.write_text(text, encoding="utf-8")
    assert not outcome.succeeded
    assert any(refusal.startswith("eval_report.meets_thresholds: exact_match") for refusal in outcome.refusals)
    assert answering.live(TASK) == before


@pytest.mark.slow
def test_the_next_candidate_is_compared_with_the_champion_row_by_row(answering: Platform, home: Path) -> None:
    champion = answering.live(TASK)
    assert champion is not None
    rows = answer_rows(150) + answer_rows(60, seed=3)
    answering.add_task(write_texts(home / "answers", home / "base", ANSWERS, rows, epochs=8, more=GENERAL))
    outcome = answering.materialise(TASK, because="more rows")
    report = report_of(answering, TASK)
    assert report.champion == champion["adapter"]
    assert report.paired is not None
    assert report.retained is not None
    assert 0 < report.retained.rows < report.paired.rows == report.rows
    assert set(report.models) == {"candidate", "champion", "base"}
    live = answering.live(TASK)
    assert live is not None
    assert (live["adapter"] == report.adapter) is outcome.succeeded


@pytest.mark.slow
def test_an_extraction_task_goes_the_whole_way(home: Path) -> None:
    platform = open_home(home)
    platform.add_task(write_texts(home / "fields", home / "base", FIELDS, field_rows(300), epochs=16))
    outcome = platform.materialise("small-fields", because="the first one")
    assert outcome.succeeded, outcome
    report = report_of(platform, "small-fields")
    in_order = ["weather", "windy", "place"]
    assert list(report.fields) == in_order == list(report.per_field)
    assert list(platform.lake.require("small-fields", "adapter").json("adapter.json")["fields"]) == in_order
    assert report.models["candidate"]["valid_json"].value == 1
    assert report.models["candidate"]["field_f1"].value > report.models["base"]["field_f1"].value
    decision = platform.live("small-fields")["decision"]["gates"]  # type: ignore[index]
    assert decision["no_forgetting"]["applies"] is False
    answer = platform.predict("small-fields", ["ice snow frost storm at the river"])[0]
    assert answer.text is not None
    assert answer.text.fields is not None
    assert set(answer.text.fields) == set(report.per_field)
    assert json.loads(answer.text.output)


@pytest.mark.slow
def test_what_the_service_cannot_serve_ends_with_the_adapter(home: Path) -> None:
    platform = open_home(home)
    head = ANSWERS.replace(TASK, "small-dora")
    path = write_texts(home / "dora", home / "base", head, answer_rows(80), epochs=1, more=GENERAL)
    path.write_text(path.read_text().replace("alpha: 32}", "alpha: 32, use_dora: true}"), encoding="utf-8")
    platform.add_task(path)
    outcome = platform.materialise("small-dora")
    assert outcome.succeeded, outcome
    assert "DoRA" in outcome.unserved
    assert platform.lake.head("small-dora", "eval_report") is None
    refused = platform.materialise("small-dora", only=("eval_report",))
    assert not refused.succeeded
    assert "cannot be served" in refused.failure
