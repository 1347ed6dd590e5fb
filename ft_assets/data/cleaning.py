"""Cleaning: which rows are kept and how they read afterwards; every rejected row keeps its reason."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ft_assets.data.forms import Form, Prepared, Unfit
from ft_assets.data.near_duplicates import clusters, hashed, jaccard, near_pairs
from ft_assets.data.rows import ROW_COLUMNS
from ft_assets.tasks import CleaningSpec

CLEANER_VERSION = "1"
MOST_REPLACEMENTS = 0.05
"""A larger share of U+FFFD means that the text was decoded with the wrong encoding."""
SHOWN_CHARS = 500


@dataclass(frozen=True)
class Cleaned:
    """Kept rows (raw columns, text and answer as cleaned; `masked`: JSON counts of personal data) and rejected ones."""

    kept: pd.DataFrame
    rejected: pd.DataFrame
    truncated: int
    """Kept rows that were longer than `max_chars`."""


def clean(rows: pd.DataFrame, spec: CleaningSpec, form: Form) -> Cleaned:
    """Decide every row; kept and rejected together are exactly the input rows.

    Row ids stay those of the raw text. Of copies the earliest stays, with the newest answer. Of contradicting answers
    of the same version the earliest stays, or all are rejected, as `form` has it.
    """
    rows = rows.reset_index(drop=True)
    verdict: dict[int, tuple[str, str]] = {}
    prepared: dict[int, Prepared] = {}
    compared: dict[int, str] = {}
    for at, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
        try:
            _readable(text, label, spec)
            prepared[at] = form.prepared(text, None if pd.isna(label) else label, spec)
            compared[at] = form.compared(prepared[at].text)
            if len(compared[at]) < spec.min_chars:
                raise _too_short(compared[at], spec)
        except Unfit as unfit:
            verdict[at] = (unfit.reason, unfit.detail)
    order = rows.assign(at=rows.index).sort_values(["event_time", "source"], na_position="last", kind="stable")["at"]
    speaker = {at: at for at in rows.index}
    _exact(rows, [at for at in order if at not in verdict], prepared, speaker, verdict, form)
    _near(
        [at for at in order if at not in verdict],
        rows,
        compared,
        [prepared[speaker[at]].answer for at in order if at not in verdict],
        similarity=spec.near_duplicates,
        verdict=verdict,
    )
    kept_at = [at for at in rows.index if at not in verdict]
    labelled_by = rows.loc[[speaker[at] for at in kept_at]]
    kept = rows.loc[kept_at, ROW_COLUMNS].assign(
        text=[prepared[at].text for at in kept_at],
        label=[prepared[speaker[at]].answer for at in kept_at],
        label_version=labelled_by["label_version"].to_numpy(),
        annotator=labelled_by["annotator"].tolist(),
        masked=[json.dumps(dict(prepared[at].masked), sort_keys=True) for at in kept_at],
    )
    rejected_at = sorted(verdict)
    rejected = pd.DataFrame(
        {
            "row_id": rows["row_id"].loc[rejected_at],
            "text": rows["text"].loc[rejected_at].str[:SHOWN_CHARS],
            "label": rows["label"].loc[rejected_at].astype(object).str[:SHOWN_CHARS],
            "source": rows["source"].loc[rejected_at],
            "reason": [verdict[at][0] for at in rejected_at],
            "detail": [verdict[at][1] for at in rejected_at],
        }
    )
    return Cleaned(
        kept.reset_index(drop=True), rejected.reset_index(drop=True), sum(prepared[at].cut for at in kept_at)
    )


def _readable(text: str, label: str | None, spec: CleaningSpec) -> None:
    size = len(text.encode("utf-8", "replace"))
    if size > spec.max_row_bytes:
        raise Unfit("too_long_bytes", f"{size} bytes, {spec.max_row_bytes} are allowed")
    for name, value in (("text", text), ("answer", label)):
        if isinstance(value, str) and "\x00" in value:
            raise Unfit("bad_encoding", f"the {name} holds NUL characters")
        if isinstance(value, str) and value.count("�") > MOST_REPLACEMENTS * max(len(value), 1):
            raise Unfit("bad_encoding", f"{value.count('�')} characters of the {name} could not be decoded")


def _too_short(text: str, spec: CleaningSpec) -> Unfit:
    return Unfit("too_short", f"{len(text)} characters, {spec.min_chars} are needed") if text else Unfit("empty")


def _exact(
    rows: pd.DataFrame,
    order: list[int],
    prepared: Mapping[int, Prepared],
    speaker: dict[int, int],
    verdict: dict[int, tuple[str, str]],
    form: Form,
) -> None:
    """Reject copies of one text; `speaker` tells from which row a kept row takes answer, version and annotator."""
    versions, sources = (rows[column].tolist() for column in ("label_version", "source"))
    groups: dict[str, list[int]] = {}
    for at in order:
        groups.setdefault(prepared[at].text, []).append(at)
    for members in groups.values():
        newest = max(versions[at] for at in members)
        current = [at for at in members if versions[at] == newest]
        said = sorted({prepared[at].answer for at in current})
        first = members[0]
        if len(said) > 1 and not form.keeps_one:
            for at in members:
                verdict[at] = (form.conflict, f"the same text is labelled {' and '.join(said)}"[:SHOWN_CHARS])
            continue
        speaker[first] = current[0]
        for at in members[1:]:
            reason = "exact_duplicate" if prepared[at].answer == prepared[current[0]].answer else form.conflict
            verdict[at] = ("superseded" if versions[at] < newest else reason, f"kept: {sources[first]}")


def _near(
    order: list[int],
    rows: pd.DataFrame,
    texts: Mapping[int, str],
    said: Sequence[str],
    *,
    similarity: float,
    verdict: dict[int, tuple[str, str]],
) -> None:
    """Reject every row whose text is near that of an earlier kept one with the same answer.

    Rows that are alike but answered differently all stay; the label_noise check may point at them.

    Args:
        texts: What is compared.
        said: Answers, in the order of `order`.
    """
    contents = hashed([texts[at] for at in order])
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
