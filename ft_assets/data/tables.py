"""Text and label columns out of JSONL, CSV and Parquet bytes; errors name file and line."""

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ft_assets.data.rows import frame
from ft_resources.errors import SourceError

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
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
    if columns.event_time and numbered and not any(columns.event_time in row for _, row in numbered):
        raise _missing(columns.event_time, numbered[0][1], f"{name}:{numbered[0][0]}")
    for line, row in numbered:
        for column in (columns.text, columns.label):
            if column not in row:
                raise _missing(column, row, f"{name}:{line}")
        texts.append(_text(row[columns.text], columns.text, f"{name}:{line}"))
        labels.append(_label(row[columns.label], columns.label, f"{name}:{line}"))
        sources.append(f"{name}#{line}")
        times.append(row.get(columns.event_time) if columns.event_time else None)
    if not texts:
        raise SourceError("the file holds no rows", where=name, mend="Write rows below the header.")
    return frame(texts, labels, sources, times, origin)


def _parquet(content: bytes, name: str, columns: Columns, origin: str) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [columns.text, columns.label, *([columns.event_time] if columns.event_time else [])]
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        for column in wanted:
            if column not in file.schema_arrow.names:
                raise _missing(column, file.schema_arrow.names, name)
        # Python values, not pandas ones: those turn whole numbers beside a null into fractions
        table = {column: file.read(columns=[column])[column].to_pylist() for column in wanted}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"not a readable Parquet file: {error}", where=name, mend="Write it again.") from error
    lines = range(1, len(table[columns.text]) + 1)
    if not lines:
        raise SourceError("the file holds no rows", where=name, mend="Write rows to it or leave it out.")
    return frame(
        [_text(value, columns.text, f"{name}:{n}") for n, value in zip(lines, table[columns.text], strict=True)],
        [_label(value, columns.label, f"{name}:{n}") for n, value in zip(lines, table[columns.label], strict=True)],
        [f"{name}#{number}" for number in lines],
        [_time_text(value) for value in table[columns.event_time]] if columns.event_time else [None] * len(lines),
        origin,
    )


def _decoded(content: bytes, name: str, encoding: str) -> str:
    try:
        return content.decode("utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        likely = [guess for guess in GUESSES if _decodes(content, guess)]
        raise SourceError(
            f"byte {error.start} (0x{content[error.start]:02x}) is not {encoding}",
            where=f"{name}:{line}",
            mend=f"Set encoding: {likely[0]} if that is what the file is." if likely else "Save the file as UTF-8.",
        ) from None
    except (LookupError, ValueError):  # ValueError: a codec that is none of files, such as idna
        raise SourceError(f"there is no encoding '{encoding}'", where=name, mend="Use a name such as utf-8.") from None


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeError:
        return False
    return encoding != "utf-16" or content[:2] in (b"\xff\xfe", b"\xfe\xff")


def _jsonl(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            row = None
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            bad.append(number)
    if bad:
        listed = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        raise SourceError(
            f"{len(bad)} lines are not JSON objects: {listed}",
            where=f"{name}:{bad[0]}",
            mend="Write one object a line.",
        )
    return rows


def _csv(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    start = 1
    try:
        header = next((row for row in reader if row), [])
        twice = [column for column in header if header.count(column) > 1]
        if twice:
            raise SourceError(
                f"the header names '{twice[0]}' twice", where=f"{name}:{reader.line_num}", mend="Rename one of them."
            )
        start = reader.line_num + 1
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
        raise SourceError(f"not valid CSV: {error}", where=f"{name}:{start}", mend="Check its quotes.") from None
    return rows


def _missing(column: str, there: Iterable[str], where: str) -> SourceError:
    names: Sequence[str] = [str(one) for one in there]
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return SourceError(f"there is no column '{column}'", where=where, mend=f"{hint}Columns there: {', '.join(names)}.")


def _text(value: Any, column: str, where: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes | list | dict | tuple):
        kind = {"dict": "an object", "bytes": "a binary value"}.get(type(value).__name__, "a list")
        raise SourceError(f"column '{column}' holds {kind}, not a text", where=where, mend="Write it as a text.")
    if isinstance(value, bool):
        return str(value).lower()
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate from a JSON escape cannot be stored


def _label(value: Any, column: str, where: str) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _text(value, column, where).strip() or None


def _time_text(value: Any) -> str | None:
    return None if pd.isna(value) else value.isoformat() if hasattr(value, "isoformat") else str(value)
