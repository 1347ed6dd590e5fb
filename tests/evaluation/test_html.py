import re
from html.parser import HTMLParser

import pytest

from ft_assets.evaluation.gate import decide
from ft_assets.evaluation.html import Earlier, render
from ft_assets.evaluation.policy import GatePolicy
from ft_assets.evaluation.statistics import Interval

HOSTILE = (
    '<script>alert("x")</script><img src=http://evil.example/p.png onerror=alert(1)>{{ 7*7 }}\u202egnp.exe\x00\ud800'
)


class Page(HTMLParser):
    """Collects tags and attributes, so that tests see what a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def frame(made):
    return made.predictions(400, candidate_right=0.95, champion_right=0.93)


def test_a_hostile_mail_stays_text_and_nothing_outside_is_asked_for(made, frame):
    hostile = frame.assign(text=HOSTILE)
    report = made.report_of(hostile)
    page = render(report, decide(report, GatePolicy()), hostile)
    page.encode("utf-8")
    seen = Page(page)
    assert "script" not in seen.tags and "img" not in seen.tags and "link" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in {"src", "href"}]
    assert "alert" in seen.text and "{{ 7*7 }}" in seen.text
    assert not re.search("[\u202a-\u202e\x00]", page)
    assert re.search(r"default-src 'none'", page)
    assert "url(" not in page and "@import" not in page


def test_hostile_names_of_labels_and_history_are_escaped(made, frame):
    report = made.report_of(frame)
    evil = report.model_copy(update={"task": "<b>t</b>", "created_from": {"<i>x": "<u>y"}})
    page = render(evil, decide(report, GatePolicy()), frame, [Earlier("<s>", "<s>", 0.9), Earlier("2", "b", 0.91)])
    assert {"b", "i", "u", "s"}.isdisjoint(Page(page).tags)


def test_verdict_gates_mistakes_and_digests_are_on_the_page(made, frame):
    report = made.report_of(frame)
    decision = decide(report, GatePolicy(thresholds={"accuracy": 0.99}))
    text = re.sub(r"\s+", " ", Page(render(report, decision, frame)).text)
    assert decision.verdict.replace("_", " ") in text
    for result in decision.gates.values():
        assert result.reason in text
    wrong = frame[frame["candidate_label"] != frame["label"]].sort_values("candidate_confidence", ascending=False)
    shown = re.findall(r"\b[0-9a-f]{32}\b", text.split("Changed answers")[0])
    assert shown == wrong["row_id"].head(20).tolist()
    assert "20 of 20" in text or f"20 of {len(wrong)}" in text
    for digest in (report.adapter, report.champion, report.test_split):
        assert digest in text


def test_changed_answers_list_the_losses_first(made, frame):
    report = made.report_of(frame)
    text = Page(render(report, decide(report, GatePolicy()), frame)).text.split("Changed answers")[1]
    shown = re.findall(r"\b[0-9a-f]{32}\b", text)
    rows = frame.set_index("row_id").loc[shown]
    lost = (rows["champion_label"] == rows["label"]).tolist()
    assert lost == sorted(lost, reverse=True)
    assert any(lost)


def test_first_release_many_labels_and_nan_render(made):
    frame = made.predictions(200, candidate_right=1.0, champion_right=None)
    labels = [*made.labels, *(f"label {at}" for at in range(20))]
    frame = frame.assign(**{f"candidate_p_{label}": 0.0 for label in labels[2:]})
    report = made.report_of(frame, labels=labels)
    nan = report.models["candidate"] | {"macro_f1": Interval(value=float("nan"), low=0, high=1)}
    report = report.model_copy(update={"models": report.models | {"candidate": nan}})
    text = Page(render(report, decide(report, GatePolicy()), frame)).text
    assert "not measured" in text
    assert "No row is confused." in text
    assert "makes no mistake" in text
    assert "Changed answers" not in text
