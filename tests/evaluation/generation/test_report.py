"""Reports of written answers: composed, contradicted, decided on and shown."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from bento.conversation import Field, answer_json
from ft_assets.evaluation.gate import GATES, decide
from ft_assets.evaluation.generation.html import render
from ft_assets.evaluation.generation.report import (
    AnswerLatency,
    Forgetting,
    GenerationReport,
    TokenAgreement,
    build_report,
)
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.stored import Report
from ft_resources.errors import EvaluationError

ROWS = 200
FIELDS = {"total": Field(type="number"), "name": Field(type="string"), "paid": Field(type="boolean", required=False)}
LENIENT = GatePolicy(thresholds={}, non_inferiority_margin=0.1, forgetting_margin=0.1)


def answers(kind: str = "text-generation", *, champion: float | None = 0.9, candidate: float = 0.9) -> pd.DataFrame:
    """Two thirds of the rows were in the champion's test; the asked shares of answers are right, at random."""
    rng = np.random.default_rng(0)
    rows = []
    for at in range(ROWS):
        values = {"total": at * 1.5, "name": f"N {at}", "paid": [True, False, None][at % 3]}
        if kind == "extraction":
            text, right, wrong = f"Bill {at} " * (at % 7 + 1), values, {**values, "name": "?"}
            right, wrong = answer_json(right, FIELDS), answer_json(wrong, FIELDS)
        else:
            text = json.dumps([{"role": "user", "content": f"How about {at}? " * (at % 7 + 1)}])
            right, wrong = f"The answer to {at} is simple", f"The answer is not {at}"
        row = {
            "row_id": f"{at:032x}",
            "text": text,
            "label": right,
            "event_time": pd.Timestamp("2002-07-01", tz="UTC") + pd.Timedelta(days=at % 60),
            "origin": "files",
            "candidate_finish": "stop",
            "was_in_champion_test": at % 3 > 0,
        }
        for name, share in (("candidate", candidate), ("champion", champion), ("base", 0.1)):
            if share is not None:
                row[f"{name}_answer"] = right if rng.random() < share else wrong
                row |= {f"{name}_loss": 6.0 - share, f"{name}_tokens": 10}
        rows.append(row)
    return pd.DataFrame(rows)


def report_of(frame: pd.DataFrame, kind: str = "text-generation", **changes: object) -> GenerationReport:
    settings = {
        "kind": kind,
        "fields": FIELDS if kind == "extraction" else {},
        "task": "small",
        "adapter": "a" * 64,
        "champion": "c" * 64 if "champion_answer" in frame else None,
        "test_split": "5" * 64,
        "test_rows": ROWS,
        "max_tokens": 256,
        "latency": AnswerLatency(first_token_p50_ms=9.0, first_token_p95_ms=21.0, tokens_per_second=50.0, requests=10),
        "serving": TokenAgreement(
            precision="bfloat16", rows=9, tokens=100, same=0.99, agreement=1.0, max_logprob_difference=0.01
        ),
        "forgetting": Forgetting(questions=24, base_loss=1.0, candidate_loss=1.2) if kind != "extraction" else None,
        "created_from": {"adapter": "a" * 64},
    }
    return build_report(frame, **(settings | changes))


def changed(report: GenerationReport, **parts: object) -> GenerationReport:
    data = report.model_dump()
    for part, fields in parts.items():
        data[part] = (data[part] | fields) if isinstance(data[part], dict) and isinstance(fields, dict) else fields
    return GenerationReport.model_validate(data)


@pytest.fixture(scope="module")
def good() -> GenerationReport:
    return report_of(answers())


@pytest.mark.parametrize("kind", ["text-generation", "extraction"])
def test_a_candidate_as_good_as_its_champion_passes_and_says_what_does_not_apply(kind):
    report = report_of(answers(kind), kind)
    decision = decide(report, LENIENT)
    assert decision.passed, decision.verdict
    assert tuple(decision.gates) == GATES
    assert decision.verdict == "May be released: 6 gates pass; calibrated does not apply."
    assert decision.gate("calibrated").word == "n/a"
    assert all(gate.reason.endswith(".") for gate in decision.gates.values())
    assert GenerationReport.model_validate_json(report.model_dump_json()) == report


def test_a_worse_candidate_is_refused_by_every_comparison():
    report = report_of(answers(candidate=0.5))
    refusals = decide(report, LENIENT).refusals
    assert refusals == ["not_worse_than_champion", "no_slice_regression", "no_forgetting"]


def test_a_field_that_got_worse_blocks_though_the_others_make_up_for_it():
    frame = answers("extraction", champion=1.0, candidate=1.0)
    for name, model, rows in (("paid", "candidate", range(60)), ("name", "champion", range(60, 200))):
        for at in rows:
            values = json.loads(frame.at[at, "label"]) | {name: True if name == "paid" else "?"}
            frame.at[at, f"{model}_answer"] = answer_json(values, FIELDS)
    report = report_of(frame, "extraction")
    decision = decide(report, LENIENT)
    assert decision.gate("not_worse_than_champion").passed
    refused = decision.gate("no_slice_regression")
    assert not refused.passed
    assert refused.evidence["worst_slice"] == "field = paid"


def test_the_first_release_must_beat_the_base_model_beyond_chance():
    better = report_of(answers(champion=None))
    decision = decide(better, LENIENT)
    assert decision.passed
    assert decision.gate("no_slice_regression").word == "n/a"
    assert decision.gate("no_forgetting").word == "pass"
    frame = answers(champion=None).assign(base_answer=lambda rows: rows["candidate_answer"])
    refused = decide(report_of(frame), LENIENT).gate("not_worse_than_champion")
    assert not refused.passed
    assert "is not, beyond chance" in refused.reason


@pytest.mark.parametrize(
    ("gate", "changes", "policy"),
    [
        ("meets_thresholds", {}, {"thresholds": {"token_f1": 0.999}}),
        ("meets_thresholds", {}, {"min_test_rows": 201}),
        ("within_latency_budget", {}, {"first_token_p95_ms": 20.9}),
        ("within_latency_budget", {}, {"min_tokens_per_second": 50.1}),
        ("within_latency_budget", {"latency": {"requests": 0}}, {}),
        ("within_latency_budget", {"latency": {"tokens_per_second": math.nan}}, {}),
        ("serves_what_was_evaluated", {"serving": {"agreement": 0.9899, "same": 0.9}}, {}),
        ("serves_what_was_evaluated", {"serving": {"tokens": 0}}, {}),
        ("serves_what_was_evaluated", {"serving": {"max_logprob_difference": math.nan}}, {}),
        ("no_forgetting", {"forgetting": {"candidate_loss": 1.51}}, {}),
        ("no_forgetting", {"forgetting": {"base_loss": math.nan}}, {}),
        ("no_forgetting", {"forgetting": None}, {}),
        ("no_forgetting", {}, {"forgetting_margin": 0.001}),
        ("not_worse_than_champion", {}, {"non_inferiority_margin": 0.001}),
    ],
)
def test_each_gate_refuses_at_its_limit_and_says_where_it_stands(good, gate, changes, policy):
    assert decide(good, LENIENT).gate(gate).passed
    refused = decide(changed(good, **changes), LENIENT.model_copy(update=policy)).gate(gate)
    assert not refused.passed
    assert refused.evidence or "not measured" in refused.reason


def test_a_figure_that_was_not_measured_passes_nothing(good):
    figures = {name: {k: v.model_dump() for k, v in each.items()} for name, each in good.models.items()}
    figures["candidate"]["rouge_l"]["low"] = math.nan
    assert decide(changed(good, models=figures), LENIENT).refusals == ["meets_thresholds", "not_worse_than_champion"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"paired": {"mean": 0.2}}, "row by row"),
        ({"paired": None}, "were to be compared"),
        ({"paired": {"rows": 150}}, "150 rows of 200"),
        ({"over_base": {"mean_square": 0.0}}, "no scores have"),
        ({"champion": None}, "were to be compared"),
        ({"rows": 100}, "rows"),
        ({"cut": 150, "unanswered": 51}, "cut or not given"),
        ({"score": "rouge_l"}, "compared by token_f1"),
        ({"serving": {"same": 1.0, "agreement": 0.9}}, "more tokens are the same"),
        ({"latency": {"first_token_p50_ms": 30.0}}, "out of order"),
    ],
)
def test_a_report_that_contradicts_itself_is_no_evidence(good, changes, told):
    with pytest.raises(EvaluationError, match=re.escape(told)):
        decide(changed(good, **changes), LENIENT)


def test_fields_that_contradict_the_overall_figure_are_found():
    report = report_of(answers("extraction"), "extraction")
    wrong = {name: one.model_dump() for name, one in report.per_field.items()}
    wrong["name"] |= {"true_positives": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    with pytest.raises(EvaluationError, match="by the fields"):
        decide(changed(report, per_field=wrong), LENIENT)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda frame: frame.drop(columns="base_loss"), "base_loss"),
        (lambda frame: frame.assign(candidate_answer=None), "candidate_answer"),
        (lambda frame: pd.concat([frame, frame.head(1)]), "answered twice"),
        (lambda frame: frame.iloc[:0], "no answers"),
    ],
)
def test_answers_that_are_not_whole_make_no_report(change, told):
    with pytest.raises(EvaluationError, match=told):
        report_of(change(answers()))


class Page(HTMLParser):
    """The text of a page, and what stands in red."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text, self.wrong = set[str](), "", list[str]()
        self._open = list[bool]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br", "line", "rect"):
            self._open.append("down" in (dict(attrs).get("class") or "").split())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if any(self._open):
            self.wrong.append(data.strip())


def shown(report: Report, frame: pd.DataFrame) -> Page:
    assert isinstance(report, GenerationReport)
    return Page(render(report, decide(report, LENIENT), frame))


def test_the_page_shows_answers_side_by_side_with_wrong_fields_marked():
    frame = answers("extraction", champion=0.8)
    page = shown(report_of(frame, "extraction"), frame)
    assert "?" in page.wrong
    assert "Better or worse than the champion" in page.text
    assert "By field" in page.text
    assert "– n/a" in page.text


def test_words_that_the_reference_lacks_are_marked_and_hostile_text_stays_text():
    frame = answers(champion=None)
    frame.loc[0, "candidate_answer"] = "<script>alert(1)</script>\u202e"
    page = shown(report_of(frame), frame)
    assert "script" not in page.tags
    assert any("alert(1)" in piece for piece in page.wrong)
    assert "\u202e" not in page.text
    assert "does not apply" in page.text or "do not apply" in page.text
