"""What a launch notice says: versions, reason, metrics, rows and settings, for people and for programs."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from ft_assets.release.notice import MOST_SETTINGS, Facts, build

FORMER = Facts(
    adapter="a" * 64,
    metrics={"accuracy": 0.9, "macro_f1": 0.8},
    compared_with=None,
    compared_metrics={},
    rows=frozenset({"1", "2", "3"}),
    settings={"recipe": "encoder-lora@1", "lora.rank": 4, "lora.alpha": 8},
)
NEW = Facts(
    adapter="b" * 64,
    metrics={"accuracy": 0.95, "macro_f1": 0.75, "ece": 0.02},
    compared_with="a" * 64,
    compared_metrics={"accuracy": 0.91, "macro_f1": 0.85},
    rows=frozenset({"2", "3", "4", "5"}),
    settings={"recipe": "encoder-lora@2", "lora.rank": 4, "lora.dropout": 0.1},
)


def release(kind: str, facts: Facts, version: str, **other: Any) -> dict[str, Any]:
    return {
        "task": "mail",
        "id": f"rel-{version}",
        "kind": kind,
        "adapter": facts.adapter,
        "model_version": version,
        "actor": "ada",
        "because": "new rows",
        "decision": {"refusals": {}},
        "created_at": datetime(2026, 3, 2, 12, tzinfo=UTC),
        **other,
    }


def test_a_release_is_told_with_what_differs() -> None:
    notice = build(release("release", NEW, "2"), release("release", FORMER, "1"), NEW, FORMER)
    assert notice["text"].splitlines() == [
        "mail: version 2 is live, in place of version 1",
        "release by ada: new rows",
        "adapter bbbbbbbbbbbb, before aaaaaaaaaaaa",
        "test (on the same test rows): accuracy 0.9500 (+0.0400), macro_f1 0.7500 (-0.1000), ece 0.0200",
        "training rows: 4, 2 added, 1 removed",
        "settings: lora.alpha None (was 8), lora.dropout 0.1 (was None), recipe encoder-lora@2 (was encoder-lora@1)",
    ]
    facts = notice["release"]
    assert facts["version"] == {"new": "2", "former": "1"}
    assert facts["adapter"] == {"new": "b" * 64, "former": "a" * 64}
    assert facts["metrics"]["accuracy"] == {"new": 0.95, "former": 0.91, "difference": pytest.approx(0.04)}
    assert facts["rows"] == {"now": 4, "added": 2, "removed": 1}
    assert facts["settings"]["recipe"] == {"new": "encoder-lora@2", "former": "encoder-lora@1"}
    assert (facts["actor"], facts["because"], facts["overruled"]) == ("ada", "new rows", {})


def test_reports_that_do_not_know_each_other_are_said_to_be_of_other_rows() -> None:
    notice = build(
        release("release", NEW, "3"), release("release", FORMER, "1"), replace(NEW, compared_with="c" * 64), FORMER
    )
    assert "test (each on the test rows of its report): accuracy 0.9500 (+0.0500)" in notice["text"]
    assert notice["release"]["same_test_rows"] is False


def test_a_rollback_compares_on_the_rows_of_the_report_that_it_leaves() -> None:
    notice = build(release("rollback", FORMER, "1"), release("release", NEW, "2"), FORMER, NEW)
    assert notice["text"].startswith("mail: version 1 is live again, in place of version 2\nrollback by ada: new rows")
    assert notice["release"]["metrics"]["accuracy"]["difference"] == pytest.approx(0.91 - 0.95)
    assert notice["release"]["rows"] == {"now": 3, "added": 1, "removed": 2}


def test_a_first_release_has_nothing_to_compare_with() -> None:
    notice = build(release("release", FORMER, "1"), None, FORMER, None)
    assert notice["text"].splitlines() == [
        "mail: version 1 is live, the first one",
        "release by ada: new rows",
        "adapter aaaaaaaaaaaa",
        "test: accuracy 0.9000, macro_f1 0.8000",
        "training rows: 3",
    ]
    assert notice["release"]["version"] == {"new": "1", "former": None}
    assert notice["release"]["metrics"]["accuracy"] == {"new": 0.9, "former": None, "difference": None}


def test_what_is_lost_is_said() -> None:
    notice = build(release("release", NEW, "2"), release("release", FORMER, "1"), NEW, None)
    assert "no longer in the store" in notice["text"]
    assert notice["release"]["rows"] == {"now": 4, "added": None, "removed": None}
    assert build(release("release", NEW, "2"), None, None, None)["release"]["metrics"] == {}


def test_an_approval_tells_what_it_overrules() -> None:
    overruled = {"meets_thresholds": "accuracy .90 < .95"}
    said = "<!channel> it is fine & urgent"
    notice = build(
        release("approval", NEW, "2", decision={"refusals": overruled}, because=said),
        release("release", FORMER, "1"),
        NEW,
        FORMER,
    )
    assert notice["release"]["overruled"] == overruled
    assert "overruled meets_thresholds: accuracy .90 &lt; .95" in notice["text"]
    assert "approval by ada: &lt;!channel&gt; it is fine &amp; urgent" in notice["text"]
    assert notice["release"]["because"] == said


def test_a_long_list_and_a_long_reason_are_cut_for_people_only() -> None:
    many = replace(NEW, settings={f"s{number:02}": number for number in range(30)})
    notice = build(release("release", many, "2", because="x" * 5000), release("release", FORMER, "1"), many, FORMER)
    assert f"and {33 - MOST_SETTINGS} more" in notice["text"]
    assert len(notice["text"]) < 2500
    assert len(notice["release"]["settings"]) == 33
    assert len(notice["release"]["because"]) == 5000
