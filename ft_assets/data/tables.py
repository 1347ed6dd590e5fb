"""Texts and answers out of the bytes of JSONL, JSON, CSV, Orange's tab and Parquet files; errors name file and line."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pandas as pd

from ft_assets.data.layouts import Layout, missing
from ft_assets.data.rows import frame
from ft_resources.errors import SourceError

Numbered = list[tuple[int, dict[str, Any]]]
"""Rows with the line they start on, counted from 1."""

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tab": "tab",
    ".parquet": "parquet",
    ".pq": "parquet",
}
GUESSES = ("utf-16", "cp1252", "gb18030")
FIELD_LIMIT = 1 << 30


def format_of(name: str, wanted: str) -> str:
    """`jsonl`, `json`, `csv`, `tab` or `parquet`.

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


def read_table(
    content: bytes, name: str, kind: str, layout: Layout, event_time: str | None, encoding: str, origin: str
) -> pd.DataFrame:
    """Raw rows of one file.

    Args:
        layout: Which columns make the text and the answer of a row.
        event_time: Column with the time of a row.

    Raises:
        SourceError: The file is empty, not decodable, not of its format, or lacks a column.
    """
    if not content.strip():
        raise SourceError("the file is empty", where=name, mend="Write rows to it or leave it out.")
    if kind == "parquet":
        numbered = _parquet(content, name, {*layout.columns, event_time})
    else:
        numbered = READERS[kind](_decoded(content, name, encoding), name)
    if not numbered:
        raise SourceError("the file holds no rows", where=name, mend="Write rows to it or leave it out.")
    if event_time and not any(event_time in row for _, row in numbered):
        raise missing(event_time, numbered[0][1], f"{name}:{numbered[0][0]}")
    rows = [layout.row(row, f"{name}:{line}") for line, row in numbered]
    return frame(
        [text for text, _ in rows],
        [answer for _, answer in rows],
        [f"{name}#{line}" for line, _ in numbered],
        [row.get(event_time) if event_time else None for _, row in numbered],
        origin,
    )


def _parquet(content: bytes, name: str, wanted: set[str | None]) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Python values, not pandas ones: those turn whole numbers beside a null into fractions
        file = pq.ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        rows = file.read(columns=[column for column in names if column in wanted]).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"not a readable Parquet file: {error}", where=name, mend="Write it again.") from error
    unread: dict[str, Any] = dict.fromkeys(names)
    return [(number, unread | row) for number, row in enumerate(rows, start=1)]


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


def _jsonl(text: str, name: str) -> Numbered:
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


def _json(text: str, name: str) -> Numbered:
    """The objects of one array, each with the line it starts on; or one object a line."""
    at = _after_blanks(text, 0)
    if text[at : at + 1] != "[":
        return _jsonl(text, name)
    decoder = json.JSONDecoder()
    rows: Numbered = []
    line, counted, closed = 1, 0, False
    while not closed:
        at = _after_blanks(text, at + 1)  # behind the bracket or a comma
        if not rows and text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise SourceError("this is not JSON", where=f"{name}:{line}", mend="Check brackets and commas.") from None
        if not isinstance(row, dict):
            raise SourceError("this is not an object", where=f"{name}:{line}", mend="Write an array of objects.")
        rows.append((line, row))
        at = _after_blanks(text, at)
        if text[at : at + 1] not in (",", "]"):
            where = f"{name}:{line + text.count(chr(10), counted, at)}"
            raise SourceError("a comma or the array's end is missing", where=where, mend="Check brackets and commas.")
        closed = text[at] == "]"
    if text[at + 1 :].strip():
        raise SourceError("something stands behind the array", where=f"{name}:{line}", mend="Write one array a file.")
    return rows


def _after_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(text: str, name: str) -> Numbered:
    return _separated(text, name, ",", 0)


def _tab(text: str, name: str) -> Numbered:
    """Orange's format: below the header one line tells the columns' types and one their roles."""
    return _separated(text, name, "\t", 2)


def _separated(text: str, name: str, delimiter: str, skipped: int) -> Numbered:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Numbered = []
    start = 1
    try:
        header = next((row for row in reader if row), [])
        twice = [column for column in header if header.count(column) > 1]
        if twice:
            raise SourceError(
                f"the header names '{twice[0]}' twice", where=f"{name}:{reader.line_num}", mend="Rename one of them."
            )
        for _ in range(skipped):
            next(reader, None)
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise SourceError(
                    f"{len(row)} values, the header names {len(header)} columns",
                    where=f"{name}:{start}",
                    mend="Quote values that hold separators or line breaks.",
                )
            if row:
                rows.append((start, dict(zip(header, row, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise SourceError(f"not valid CSV: {error}", where=f"{name}:{start}", mend="Check its quotes.") from None
    return rows


READERS: dict[str, Callable[[str, str], Numbered]] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tab": _tab}
