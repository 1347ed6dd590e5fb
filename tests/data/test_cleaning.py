import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bento.preparation import find
from ft_assets.data.cleaning import Cleaned, clean
from ft_assets.data.forms import Classification
from ft_assets.data.rows import ROW_COLUMNS, row_id
from ft_assets.tasks import CleaningSpec

LABELS = Classification(["ham", "spam"])
LETTER = " ".join(f"word{n}" for n in range(60))


def raw(*rows: dict[str, object]) -> pd.DataFrame:
    """Raw rows; what is not given is a plain ham row of its own line in a file."""
    full = [
        {
            "row_id": row_id(str(row.get("text", "hello there"))),
            "text": "hello there",
            "label": "ham",
            "source": f"a.jsonl#{line}",
            "event_time": None,
            "label_version": 1,
            "annotator": "source",
            "origin": "files",
            **row,
        }
        for line, row in enumerate(rows, start=1)
    ]
    frame = pd.DataFrame(full, columns=ROW_COLUMNS)
    times = pd.to_datetime(frame["event_time"], utc=True).astype("datetime64[us, UTC]")
    return frame.assign(event_time=times, label_version=frame["label_version"].astype("int64"))


def reasons(cleaned: Cleaned) -> list[str]:
    return cleaned.rejected["reason"].tolist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "é" * 501}, "too_long_bytes"),
        ({"text": "hello\x00there"}, "bad_encoding"),
        ({"text": "\ufffd" * 4 + "hello there"}, "bad_encoding"),
        ({"text": " \t\n "}, "empty"),
        ({"text": ""}, "empty"),
        ({"text": "hi   you"}, "too_short"),
        ({"label": None}, "no_label"),
        ({"label": "eggs"}, "unknown_label"),
    ],
)
def test_unfit_rows_are_rejected_with_their_reason(row: dict[str, object], reason: str) -> None:
    cleaned = clean(raw(row), CleaningSpec(max_row_bytes=1_000), LABELS)
    assert reasons(cleaned) == [reason]
    assert cleaned.kept.empty


def test_one_lost_character_in_a_long_text_is_no_reason() -> None:
    assert len(clean(raw({"text": f"{LETTER} \ufffd"}), CleaningSpec(), LABELS).kept) == 1


def test_text_is_normalised_and_masked_under_the_id_of_the_raw_text() -> None:
    text = "Write  to\x07 e\u0301va@example.org or eva@example.org\u00a0now"
    kept = clean(raw({"text": text}), CleaningSpec(), LABELS).kept
    assert "eva@example.org" not in kept["text"][0]
    assert "<EMAIL> now" in kept["text"][0]
    assert "Write to " in kept["text"][0]
    assert kept["row_id"][0] == row_id(text)
    assert json.loads(kept["masked"][0])["email"] >= 1


def test_long_texts_are_cut_and_counted() -> None:
    cleaned = clean(raw({"text": LETTER}, {"text": "short enough"}), CleaningSpec(max_chars=100), LABELS)
    assert cleaned.truncated == 1
    assert cleaned.kept["text"].str.len().max() <= 100


def test_earliest_copy_is_kept() -> None:
    cleaned = clean(
        raw(
            {"source": "c", "event_time": None},
            {"source": "b", "event_time": "2024-02-01", "text": "hello  there"},
            {"source": "a", "event_time": "2024-02-01"},
            {"source": "d", "event_time": "2024-03-01"},
        ),
        CleaningSpec(),
        LABELS,
    )
    assert cleaned.kept["source"].tolist() == ["a"]
    assert reasons(cleaned) == ["exact_duplicate"] * 3
    assert cleaned.rejected["detail"].str.contains("a").all()


def test_corrected_label_wins_and_says_who_gave_it() -> None:
    cleaned = clean(
        raw(
            {"event_time": "2024-01-01"},
            {"event_time": "2024-01-02"},
            {"event_time": "2024-01-03", "label": "spam", "label_version": 2, "annotator": "ada"},
        ),
        CleaningSpec(),
        LABELS,
    )
    kept = cleaned.kept.iloc[0]
    assert (kept["label"], kept["label_version"], kept["annotator"]) == ("spam", 2, "ada")
    assert kept["event_time"] == pd.Timestamp("2024-01-01", tz="UTC")
    assert reasons(cleaned) == ["superseded", "exact_duplicate"]


def test_contradicting_labels_of_one_version_reject_every_copy() -> None:
    cleaned = clean(raw({}, {"label": "spam"}, {}), CleaningSpec(), LABELS)
    assert reasons(cleaned) == ["conflicting_labels"] * 3


def test_a_correction_ends_a_contradiction() -> None:
    cleaned = clean(raw({}, {"label": "spam"}, {"label": "spam", "label_version": 2}), CleaningSpec(), LABELS)
    assert cleaned.kept["label"].tolist() == ["spam"]


def test_near_copies_of_a_kept_row_are_rejected_and_name_it() -> None:
    cleaned = clean(
        raw({"text": LETTER, "event_time": "2024-01-02"}, {"text": f"{LETTER} x", "event_time": "2024-01-01"}),
        CleaningSpec(),
        LABELS,
    )
    assert cleaned.kept["text"].tolist() == [f"{LETTER} x"]
    assert reasons(cleaned) == ["near_duplicate"]
    assert row_id(f"{LETTER} x") in cleaned.rejected["detail"][0]
    assert "0.98" in cleaned.rejected["detail"][0]


def test_near_copies_with_another_label_stay() -> None:
    cleaned = clean(raw({"text": LETTER}, {"text": f"{LETTER} x", "label": "spam"}), CleaningSpec(), LABELS)
    assert len(cleaned.kept) == 2


def test_a_row_near_to_a_rejected_row_alone_stays() -> None:
    words = LETTER.split()
    chain = [" ".join(words[start : start + 40]) for start in (0, 2, 4)]
    cleaned = clean(raw(*({"text": text} for text in chain)), CleaningSpec(near_duplicates=0.85), LABELS)
    assert cleaned.kept["text"].tolist() == [chain[0], chain[2]]


def test_no_input_and_nothing_kept() -> None:
    assert clean(raw(), CleaningSpec(), LABELS).kept.columns.tolist() == [*ROW_COLUMNS, "masked"]
    assert clean(raw({"label": None}), CleaningSpec(), LABELS).kept.empty


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "text": st.one_of(
                    st.text(max_size=40),
                    st.sampled_from(
                        ["hello there", "hello  there", LETTER, f"{LETTER} x", "a@b.org wrote to 10.0.0.1"]
                    ),
                ),
                "label": st.sampled_from(["ham", "spam", "eggs", None]),
                "label_version": st.integers(1, 3),
            }
        ),
        max_size=12,
    )
)
def test_every_row_is_kept_or_rejected(rows: list[dict[str, object]]) -> None:
    spec = CleaningSpec()
    frame = raw(*rows)
    cleaned = clean(frame, spec, LABELS)
    assert sorted([*cleaned.kept["row_id"], *cleaned.rejected["row_id"]]) == sorted(frame["row_id"])
    assert cleaned.kept["text"].is_unique
    assert cleaned.kept["label"].isin(LABELS.labels).all()
    assert all(find(text, spec.pii) == [] for text in cleaned.kept["text"])


def test_real_mails(real_mails: pd.DataFrame) -> None:
    spec = CleaningSpec(max_chars=4_000, pii=["email", "phone", "url", "ip", "credit_card"])
    sample = real_mails.sample(1_500, random_state=11)
    cleaned = clean(sample, spec, LABELS)
    assert len(cleaned.kept) + len(cleaned.rejected) == len(sample)
    assert {"exact_duplicate", "near_duplicate"} <= set(reasons(cleaned))
    assert 0.5 * len(sample) < len(cleaned.kept) < 0.99 * len(sample)
    assert cleaned.truncated > 50
    assert all(find(text, spec.pii) == [] for text in cleaned.kept["text"])
