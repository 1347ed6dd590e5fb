"""Answering a whole file: CSV, JSONL or Parquet in, the same rows with the answers beside them out.

What was answered is kept in a journal beside the output until the output is complete, so a run that was interrupted
goes on where it stopped. A row that cannot be answered gets an error beside it and stops nothing.

Answers are recorded in the ledger before they reach the journal: of a process that is killed in between, the rows of
that one part are answered and recorded again. The output names the later record.
"""

import codecs
import csv
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pydantic

from bento.protocol import AnyInput, PredictRequest, explain
from ft_resources.errors import RequestError, SourceError

if TYPE_CHECKING:
    from bento.request_log import Prediction

Row = dict[str, Any]
FORMATS = (".csv", ".jsonl", ".parquet")
AT_ONCE = 256
"""Rows between two writes to the journal; also the most inputs of one request."""
ANSWER = (
    "prediction_id",
    "predicted_label",
    "confidence",
    "decision",
    "predicted_text",
    "extracted",
    "finish_reason",
    "model_version",
    "error_code",
    "error",
)
"""Columns that are added."""
OF_ONE_INPUT = ("invalid_input", "input_too_large", "content_filtered")
"""Refusals that one input brings upon the whole request."""
LONGEST_CELL = 2**31 - 1
"""Characters of a CSV cell that are read; whether they are too many for an input is told beside the row."""
INPUT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(AnyInput, config=pydantic.ConfigDict(strict=True))


class Answering(Protocol):
    """The part of `bento.scorer.Scorer` that answers."""

    def answer(self, request: PredictRequest) -> "Sequence[Prediction | RequestError]": ...

    def takes_conversations(self, task: str, model_version: str | None = None) -> bool: ...


@dataclass(frozen=True)
class Scored:
    """What became of a file."""

    out: Path
    rows: int
    failed: int
    """Rows with an error."""
    resumed: int
    """Rows that an earlier run had answered."""


def score_file(
    scorer: Answering,
    task: str,
    file: Path,
    out: Path | None = None,
    *,
    column: str = "text",
    model_version: str | None = None,
    show: Callable[[int, int], None] = lambda done, failed: None,
) -> Scored:
    """Answer every row of `file`; each answer is recorded like the service's.

    Args:
        out: Default: beside `file`, as `NAME.answers.ENDING`. Its ending decides its format.
        column: Holds the input: a text, or for text-generation also a conversation (in CSV as JSON). Other tasks take
            a cell that looks like a conversation as the text it is.
        show: Told how many rows are done and how many of them failed, after each part.

    Raises:
        SourceError: A file is missing, is no table, lacks the column, or has a column that would be added.
        RequestError: The task or the version is not known, or the log cannot be written: what was answered is kept.
    """
    out = out or file.with_name(f"{file.stem}.answers{file.suffix}")
    read, write = _reader(file), WRITERS[_format(out)]
    _check_columns(_columns(file), file, column)
    journal = out.with_name(f"{out.name}.journal")
    about = {"file": _digest(file), "task": task, "model_version": model_version, "column": column}
    known = _known(journal, about)
    done, failed = len(known), sum(bool(one["error_code"]) for one in known)
    resumed = done
    conversations = scorer.takes_conversations(task, model_version)
    with _appending(journal, about) as keep:
        rows = read(file)
        for _ in range(done):
            next(rows)
        while part := list(islice(rows, AT_ONCE)):
            answers = _answers(scorer, task, [_input(row, column, conversations) for row in part], model_version)
            keep(answers)
            done, failed = done + len(answers), failed + sum(bool(one["error_code"]) for one in answers)
            show(done, failed)
    aside = out.with_name(f"{out.name}.part")
    merged = (
        (row if isinstance(row, dict) else {}) | answer for row, answer in zip(read(file), _kept(journal), strict=True)
    )
    write(aside, file, _columns(file), merged)
    aside.replace(out)
    journal.unlink()
    return Scored(out, done, failed, resumed)


def _answers(scorer: Answering, task: str, inputs: Sequence[Any], model_version: str | None) -> list[Row]:
    answers: list[Row | None] = [None] * len(inputs)
    good = []
    for place, one in enumerate(inputs):
        problem = one if isinstance(one, RequestError) else _valid(one)
        if problem is None:
            good.append(place)
        else:
            answers[place] = _failure(problem)
    if good:
        results = _results(scorer, task, [inputs[place] for place in good], model_version)
        for place, result in zip(good, results, strict=True):
            answers[place] = _failure(result) if isinstance(result, RequestError) else _success(result)
    return [one for one in answers if one is not None]


def _results(
    scorer: Answering, task: str, inputs: Sequence[Any], model_version: str | None
) -> "list[Prediction | RequestError]":
    """Where one input spoils the request, halves are asked by themselves, down to that input."""
    try:
        request = PredictRequest.model_validate({"task": task, "inputs": inputs, "model_version": model_version})
    except pydantic.ValidationError as error:  # inputs are valid: it is the name of the task or of the version
        raise explain(error.errors()) from None
    try:
        return list(scorer.answer(request))
    except RequestError as error:
        if error.error_code not in OF_ONE_INPUT:
            raise
        if len(inputs) == 1:
            return [error]
    middle = len(inputs) // 2
    return [
        result for half in (inputs[:middle], inputs[middle:]) for result in _results(scorer, task, half, model_version)
    ]


def _valid(one: Any) -> RequestError | None:
    try:
        INPUT.validate_python(one)
    except pydantic.ValidationError as error:
        return explain([{**problem, "loc": ("input", *problem["loc"])} for problem in error.errors()])
    return None


def _input(row: Row | RequestError, column: str, conversations: bool) -> Any:
    if isinstance(row, RequestError):
        return row
    value = row.get(column)
    if value is None:
        return RequestError("invalid_input", f"column '{column}' is empty", status=422, mend="Give a text.")
    if conversations and isinstance(value, str) and value.startswith('[{"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _failure(error: RequestError) -> Row:
    return dict.fromkeys(ANSWER) | {"error_code": error.error_code, "error": str(error)}


def _success(one: "Prediction") -> Row:
    text = one.text
    return dict.fromkeys(ANSWER) | {
        "prediction_id": one.prediction_id,
        "predicted_label": one.label or None,
        "confidence": one.confidence,
        "decision": one.decision,
        "predicted_text": text and text.output,
        "extracted": json.dumps(dict(text.fields), ensure_ascii=False) if text and text.fields is not None else None,
        "finish_reason": text and text.finish_reason,
        "model_version": one.model_version,
    }


# -- the journal ------------------------------------------------------------------------------------------------------


def _known(journal: Path, about: Mapping[str, Any]) -> list[Row]:
    """Answers that an earlier run kept; a last line that was cut off is none."""
    if not journal.is_file():
        return []
    whole = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
    if whole and whole[0] != about:
        changed = ", ".join(name for name in about if whole[0].get(name) != about[name])
        raise SourceError(
            f"an earlier run was interrupted, and its {changed} differs from this one's",
            where=str(journal),
            mend="Repeat that run to finish it, or remove its journal to begin anew.",
        )
    return whole[1:]


def _kept(journal: Path) -> Iterator[Row]:
    with journal.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            yield json.loads(line)


@contextmanager
def _appending(journal: Path, about: Mapping[str, Any]) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Writes answers behind those that are there, on disk when it returns; a last line that was cut off goes."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab") as sink:

        def keep(rows: Sequence[Mapping[str, Any]]) -> None:
            sink.writelines(json.dumps(row).encode("ascii") + b"\n" for row in rows)
            sink.flush()
            os.fsync(sink.fileno())

        whole = journal.read_bytes().rfind(b"\n") + 1
        sink.truncate(whole)
        if not whole:
            keep([about])
        yield keep


def _digest(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# -- formats ----------------------------------------------------------------------------------------------------------


def _format(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise SourceError(
            f"'{path.suffix or path.name}' is no ending that is known here",
            where=str(path),
            mend=f"Use a file that ends in {', '.join(FORMATS)}.",
        )
    return path.suffix


def _reader(file: Path) -> Callable[[Path], Iterator[Any]]:
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers[_format(file)]
    if not file.is_file():
        raise SourceError("there is no such file", where=str(file), mend="Check the path.")
    return reader


def _read_csv(file: Path) -> Iterator[Row | RequestError]:
    csv.field_size_limit(LONGEST_CELL)
    with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as source:
        reader = csv.DictReader(source, restkey="")
        try:
            for row in reader:
                if "" in row:
                    yield RequestError(
                        "invalid_input",
                        f"line {reader.line_num} has more cells than the header",
                        mend="Quote the text.",
                    )
                else:
                    yield row
        except csv.Error as error:
            raise SourceError(
                f"it is no CSV: {error}", where=f"{file}, line {reader.line_num}", mend="Mend it."
            ) from None


def _read_jsonl(file: Path) -> Iterator[Row | RequestError]:
    with file.open(encoding="utf-8", errors="surrogateescape") as source:
        for number, line in enumerate(source, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                yield RequestError("invalid_input", f"line {number} is no JSON object", mend="Write one a line.")


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as source:
        for part in source.iter_batches(AT_ONCE):
            yield from part.to_pylist()


def _columns(file: Path) -> list[str]:
    """Columns of the file; of JSONL those of its first row."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(file).names)
        except pyarrow.ArrowException as error:
            raise SourceError(f"this is no Parquet file: {error}", where=str(file), mend="Check the file.") from None
    if file.suffix == ".csv":
        csv.field_size_limit(LONGEST_CELL)
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as source:
            return next(csv.reader(source), [])
    return list(next((row for row in _read_jsonl(file) if isinstance(row, dict)), {}))


def _check_columns(columns: Sequence[str], file: Path, column: str) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise SourceError(
            f"there is no column '{column}'",
            where=str(file),
            mend=f"{hint}Name it with --column; there are: {', '.join(columns) or 'none'}.",
        )
    taken = [name for name in columns if name in ANSWER]
    if taken:
        raise SourceError(
            f"it has a column '{taken[0]}' already", where=str(file), mend="Rename or remove the columns of answers."
        )


def _as_read(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes that were no UTF-8 are written as they came; half of a surrogate pair, which UTF-8 has not, as U+FFFD."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    written = (bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else "\ufffd".encode() for code in codes)
    return b"".join(written), error.end


AS_READ = "ft_as_read"
codecs.register_error(AS_READ, _as_read)


def _whole(text: str) -> str:
    """`text` without what UTF-8 has not."""
    return text.encode("utf-8", AS_READ).decode("utf-8", "replace")


def _write_csv(out: Path, source: Path, columns: Sequence[str], rows: Iterator[Row]) -> None:
    with out.open("w", newline="", encoding="utf-8", errors=AS_READ) as sink:
        writer = csv.DictWriter(sink, [*columns, *ANSWER], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _write_jsonl(out: Path, source: Path, columns: Sequence[str], rows: Iterator[Row]) -> None:
    with out.open("wb") as sink:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:  # half of a surrogate pair
                line = json.dumps(row, default=str).encode("ascii")
            sink.write(line + b"\n")


def _write_parquet(out: Path, source: Path, columns: Sequence[str], rows: Iterator[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float64()
    types = {name: number if name == "confidence" else text for name in ANSWER}
    if source.suffix == ".parquet":
        types |= {field.name: field.type for field in pyarrow.parquet.read_schema(source)}
    kept = list(rows)
    arrays = {}
    for name in (*columns, *ANSWER):
        values = [row.get(name) for row in kept]
        try:
            arrays[_whole(name)] = pyarrow.array(values, type=types.get(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, UnicodeEncodeError):  # cells of different types, no UTF-8
            told = (one if isinstance(one, str | None) else json.dumps(one, ensure_ascii=False) for one in values)
            arrays[_whole(name)] = pyarrow.array([one and _whole(one) for one in told], type=text)
    pyarrow.parquet.write_table(pyarrow.table(arrays), out)


WRITERS: dict[str, Callable[[Path, Path, Sequence[str], Iterator[Row]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
