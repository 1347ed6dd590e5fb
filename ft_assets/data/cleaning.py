"""Cleaning: which rows are kept and how they read afterwards; every rejected row keeps its reason."""

import json
from dataclasses import dataclass

import pandas as pd

from bento.preparation import normalise, prepare
from ft_assets.data.near_duplicates import clusters, hashed, jaccard, near_pairs
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
            verdict[at] = (
                ("too_short", f"{len(texts[at])} characters, {spec.min_chars} are needed")
                if texts[at]
                else ("empty", "")
            )
    order = rows.assign(at=rows.index).sort_values(["event_time", "source"], na_position="last", kind="stable")["at"]
    speaker = {at: at for at in rows.index}
    _exact(rows, [at for at in order if at not in verdict], texts, speaker, verdict)
    _near(
        [at for at in order if at not in verdict],
        rows,
        texts,
        speaker,
        similarity=spec.near_duplicates,
        verdict=verdict,
    )
    kept_at = [at for at in rows.index if at not in verdict]
    labelled_by = rows.loc[[speaker[at] for at in kept_at]]
    kept = rows.loc[kept_at, ROW_COLUMNS].assign(
        text=[texts[at] for at in kept_at],
        label=labelled_by["label"].tolist(),
        label_version=labelled_by["label_version"].to_numpy(),
        annotator=labelled_by["annotator"].tolist(),
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
    speaker: dict[int, int],
    verdict: dict[int, tuple[str, str]],
) -> None:
    """Reject copies of one text; `speaker` tells from which row a kept row takes label, version and annotator."""
    labels, versions, sources = (rows[column].tolist() for column in ("label", "label_version", "source"))
    groups: dict[str, list[int]] = {}
    for at in order:
        groups.setdefault(texts[at], []).append(at)
    for members in groups.values():
        newest = max(versions[at] for at in members)
        current = [at for at in members if versions[at] == newest]
        said = sorted({labels[at] for at in current})
        first = members[0]
        if len(said) > 1:
            for at in members:
                verdict[at] = ("conflicting_labels", f"the same text is labelled {' and '.join(said)}")
            continue
        speaker[first] = current[0]
        for at in members[1:]:
            reason = "superseded" if versions[at] < newest else "exact_duplicate"
            verdict[at] = (reason, f"kept: {sources[first]}")


def _near(
    order: list[int],
    rows: pd.DataFrame,
    texts: dict[int, str],
    speaker: dict[int, int],
    *,
    similarity: float,
    verdict: dict[int, tuple[str, str]],
) -> None:
    """Reject every row that is near an earlier kept one with the same label.

    Rows that are alike but labelled differently all stay; the label_noise check may point at them.
    """
    contents = hashed([texts[at] for at in order])
    said = [rows["label"].iloc[speaker[at]] for at in order]
    kept: dict[int, list[int]] = {}
    for place, root in enumerate(clusters(len(order), near_pairs(contents, similarity))):
        earlier = kept.setdefault(root, [])
        for other in earlier:
            score = jaccard(contents[place], contents[other]) if said[place] == said[other] else 0.0
            if score >= similarity:
                verdict[order[place]] = (
                    "near_duplicate",
                    f"{score:.2f} like row {rows['row_id'].iloc[order[other]]}",
                )
                break
        else:
            earlier.append(place)
