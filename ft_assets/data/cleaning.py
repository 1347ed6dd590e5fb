"""Cleaning: which rows are kept and how they read afterwards; every rejected row keeps its reason."""

import json
from dataclasses import dataclass

import pandas as pd

from bento.preparation import normalise, prepare
from ft_assets.data.near_duplicates import pairs
from ft_assets.data.rows import ROW_COLUMNS
from ft_assets.tasks import CleaningSpec

CLEANER_VERSION = "1"
MOST_REPLACEMENTS = 0.05
"""A larger share of U+FFFD means that the text was decoded with the wrong encoding."""
SHOWN_CHARS = 500


@dataclass(frozen=True)
class Cleaned:
    """Kept rows (raw columns with the cleaned text, and `masked`: JSON counts of personal data) and rejected rows."""

    kept: pd.DataFrame
    rejected: pd.DataFrame
    truncated: int
    """Kept rows that were longer than `max_chars`."""


def clean(rows: pd.DataFrame, spec: CleaningSpec, labels: list[str]) -> Cleaned:
    """Decide every row; kept and rejected together are exactly the input rows.

    Row ids stay those of the raw text. Of copies the earliest stays, with the newest label; copies with contradicting
    labels of the same version are all rejected.
    """
    rows = rows.reset_index(drop=True)
    verdict: dict[int, tuple[str, str]] = {}
    texts: dict[int, str] = {}
    masked: dict[int, dict[str, int]] = {}
    truncated: set[int] = set()
    for at, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
        reason = _unfit(text, label, spec, labels)
        if reason is not None:
            verdict[at] = reason
            continue
        texts[at], masked[at] = prepare(text, spec.pii, spec.max_chars)
        if len(text) > spec.max_chars and len(normalise(text)) > spec.max_chars:
            truncated.add(at)
        if len(texts[at]) < spec.min_chars:
            verdict[at] = ("too_short", f"{len(texts[at])} characters, {spec.min_chars} are needed") if texts[at] else ("empty", "")
    order = rows.assign(at=rows.index).sort_values(["event_time", "source"], na_position="last", kind="stable")["at"]
    labels_now = rows["label"].to_dict()
    _exact(rows, [at for at in order if at not in verdict], texts, labels_now, verdict)
    _near([at for at in order if at not in verdict], rows, texts, labels_now, spec.near_duplicates, verdict)
    kept_at = [at for at in rows.index if at not in verdict]
    kept = rows.loc[kept_at, ROW_COLUMNS].assign(
        text=[texts[at] for at in kept_at],
        label=[labels_now[at] for at in kept_at],
        masked=[json.dumps(masked[at], sort_keys=True) for at in kept_at],
    )
    rejected_at = sorted(verdict)
    rejected = pd.DataFrame(
        {
            "row_id": rows["row_id"].loc[rejected_at],
            "text": rows["text"].loc[rejected_at].str[:SHOWN_CHARS],
            "label": rows["label"].loc[rejected_at],
            "source": rows["source"].loc[rejected_at],
            "reason": [verdict[at][0] for at in rejected_at],
            "detail": [verdict[at][1] for at in rejected_at],
        }
    )
    return Cleaned(kept.reset_index(drop=True), rejected.reset_index(drop=True), len(truncated & set(kept_at)))


def _unfit(text: str, label: str | None, spec: CleaningSpec, labels: list[str]) -> tuple[str, str] | None:
    size = len(text.encode("utf-8", "replace"))
    if size > spec.max_row_bytes:
        return "too_long_bytes", f"{size} bytes, {spec.max_row_bytes} are allowed"
    if "\x00" in text:
        return "bad_encoding", "the text holds NUL characters"
    if text.count("�") > MOST_REPLACEMENTS * max(len(text), 1):
        return "bad_encoding", f"{text.count('�')} characters could not be decoded"
    if label is None or pd.isna(label):
        return "no_label", ""
    if label not in labels:
        return "unknown_label", f"'{label}' is not one of the task's labels"
    return None


def _exact(
    rows: pd.DataFrame,
    order: list[int],
    texts: dict[int, str],
    labels_now: dict[int, str],
    verdict: dict[int, tuple[str, str]],
) -> None:
    groups: dict[str, list[int]] = {}
    for at in order:
        groups.setdefault(texts[at], []).append(at)
    for members in groups.values():
        newest = max(rows["label_version"].iloc[at] for at in members)
        current = [at for at in members if rows["label_version"].iloc[at] == newest]
        said = sorted({labels_now[at] for at in current})
        first = members[0]
        if len(said) > 1:
            for at in members:
                verdict[at] = ("conflicting_labels", f"the same text is labelled {' and '.join(said)}")
            continue
        labels_now[first] = said[0]
        for at in members[1:]:
            older = rows["label_version"].iloc[at] < newest
            verdict[at] = ("superseded" if older else "exact_duplicate", f"kept: {rows['source'].iloc[first]}")


def _near(
    order: list[int],
    rows: pd.DataFrame,
    texts: dict[int, str],
    labels_now: dict[int, str],
    similarity: float,
    verdict: dict[int, tuple[str, str]],
) -> None:
    for earlier, later, jaccard in pairs([texts[at] for at in order], similarity):
        one, other = order[earlier], order[later]
        if one in verdict or other in verdict:
            continue
        if labels_now[one] != labels_now[other]:
            continue  # alike but labelled differently: both stay, and the label_noise check may point at them
        verdict[other] = ("near_duplicate", f"{jaccard:.2f} like row {rows['row_id'].iloc[one]}")
