"""Text and label columns out of JSONL, CSV and Parquet bytes; errors name file and line."""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ft_assets.data.rows import frame
from ft_resources.errors import SourceError

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}
GUESSES = ("utf-16", "cp1252", "gb18030")
FIELD_LIMIT = 1 << 30


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    text: str
    label: str
    event_time: str | None


def format_of(name: str, wanted: str) -> str:
    """`jsonl`, `csv` or `parquet`.

    Raises:
        SourceError: `auto`, and the ending tells nothing.
    """
    if wanted != "auto":
        return wanted
    for ending, kind in ENDINGS.items():
        if name.lower().endswith(ending):
            return kind
    raise SourceError(
        "the ending does not tell the format", where=name, mend=f"Set format, or use one of {', '.join(ENDINGS)}."
    )


def read_table(content: bytes, name: str, kind: str, columns: Columns, encoding: str, origin: str) -> pd.DataFrame:
    """Raw rows of one file.

    Raises:
        SourceError: The file is empty, not decodable, not of its format, or lacks a column.
    """
    if not content.strip():
        raise SourceError("the file is empty", where=name, mend="Write rows to it or leave it out.")
    if kind == "parquet":
        return _parquet(content, name, columns, origin)
    text = _decoded(content, name, encoding)
    numbered = _jsonl(text, name) if kind == "jsonl" else _csv(text, name)
    texts, labels, sources, times = [], [], [], []
    for line, row in numbered:
        for column in (columns.text, columns.label):
            if column not in row:
                raise _missing(column, row, f"{name}:{line}")
        texts.append(_text(row[columns.text]))
        labels.append(_label(row[columns.label]))
        sources.append(f"{name}#{line}")
        times.append(row.get(columns.event_time) if columns.event_time else None)
    if not texts:
        raise SourceError("the file holds no rows", where=name, mend="Write rows below the header.")
    return frame(texts, labels, sources, times, origin)


def _parquet(content: bytes, name: str, columns: Columns, origin: str) -> pd.DataFrame:
    import pyarrow as pa

    try:
        table = pd.read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"not a readable Parquet file: {error}", where=name, mend="Write it again.") from error
    for column in (columns.text, columns.label, *([columns.event_time] if columns.event_time else [])):
        if column not in table:
            raise _missing(column, list(table.columns), name)
    times = table[columns.event_time].map(_time_text) if columns.event_time else [None] * len(table)
    return frame(
        [_text(value) for value in table[columns.text]],
        [_label(value) for value in table[columns.label]],
        [f"{name}#{number}" for number in range(1, len(table) + 1)],
        times,
        origin,
    )


def _decoded(content: bytes, name: str, encoding: str) -> str:
    try:
        return content.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise SourceError(f"there is no encoding '{encoding}'", where=name, mend="Use a name such as utf-8.") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        likely = [guess for guess in GUESSES if _decodes(content, guess)]
        raise SourceError(
            f"byte {error.start} (0x{content[error.start]:02x}) is not {encoding}",
            where=f"{name}:{line}",
            mend=f"Set encoding: {likely[0]} if that is what the file is." if likely else "Save the file as UTF-8.",
        ) from None


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeError:
        return False
    return encoding != "utf-16" or content[:2] in (b"\xff\xfe", b"\xfe\xff")


def _jsonl(text: str, name: str) -> Iterable[tuple[int, dict[str, Any]]]:
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            bad.append(number)
    if bad:
        listed = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise SourceError(
            f"{len(bad)} lines are not JSON objects: {listed}", where=f"{name}:{bad[0]}", mend="Write one object a line."
        )
    return rows


def _csv(text: str, name: str) -> Iterable[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader)
        rows, start = [], reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise SourceError(
                    f"{len(row)} values, the header names {len(header)} columns",
                    where=f"{name}:{start}",
                    mend="Quote values that hold commas or line breaks.",
                )
            if row:
                rows.append((start, dict(zip(header, row, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"not valid CSV: {error}", where=f"{name}:{reader.line_num}", mend="Check its quotes.") from None
    return rows


def _missing(column: str, there: Iterable[str], where: str) -> SourceError:
    names: Sequence[str] = [str(one) for one in there]
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return SourceError(f"there is no column '{column}'", where=where, mend=f"{hint}Columns there: {', '.join(names)}.")


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate from a JSON escape cannot be stored


def _label(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _text(value).strip() or None


def _time_text(value: Any) -> str | None:
    return None if pd.isna(value) else value.isoformat() if hasattr(value, "isoformat") else str(value)
