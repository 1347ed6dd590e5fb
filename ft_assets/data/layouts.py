"""How the columns of a row make its text and its answer; what is missing is named with file and line."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bento import conversation
from ft_assets.tasks import FilesSource, PackageSource, TaskSpec
from ft_resources.errors import DataError, SourceError

Row = Mapping[str, Any]
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


class Layout(Protocol):
    """How a row of a table is read."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it looks at."""

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        """Text and answer; None where there is no answer.

        Raises:
            SourceError: A column is missing, or holds what is no text.
        """


def layout_of(task: TaskSpec, source: FilesSource | PackageSource) -> Layout:
    """How rows of `source` are read for `task`."""
    if task.type == "text-classification":
        return Labelled(source.text, source.label)
    if task.type == "extraction":
        return Extracted(source.text, source.label)
    if source.layout == "alpaca":
        return Alpaca(task.system)
    if source.layout == "chat":
        return Chat(task.system)
    return Pair(source.text, source.label, task.system)


@dataclass(frozen=True)
class _TwoColumns:
    """Names of the columns of a text and of what belongs to it."""

    text: str
    label: str

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text, self.label


@dataclass(frozen=True)
class Labelled(_TwoColumns):
    """A text and its label."""

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        label = _value(row, self.label, where)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        return _text(row, self.text, where), _plain(label, self.label, where).strip() or None


@dataclass(frozen=True)
class Extracted(_TwoColumns):
    """A document and its fields: an object, or a text that holds one as JSON."""

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        values = _value(row, self.label, where)
        if isinstance(values, dict):
            values = json.dumps(values, ensure_ascii=False, default=str)
        return _text(row, self.text, where), _plain(values, self.label, where).strip() or None


@dataclass(frozen=True)
class Pair(_TwoColumns):
    """A question and its answer."""

    system: str

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        question = {"role": "user", "content": _text(row, self.text, where)}
        return _conversation([question], self.system), _answer(row, self.label, where)


@dataclass(frozen=True)
class Alpaca:
    """An instruction, what it is applied to, if anything, and the output."""

    system: str

    @property
    def columns(self) -> tuple[str, ...]:
        return "instruction", "input", "output"

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        asked = [_text(row, "instruction", where), _text(row, "input", where) if "input" in row else ""]
        content = "\n\n".join(part for part in asked if part.strip())
        return _conversation([{"role": "user", "content": content}], self.system), _answer(row, "output", where)


@dataclass(frozen=True)
class Chat:
    """Turns, as a list or as JSON, with role and content or from and value; the last one of the assistant is wanted.

    What cannot be read as turns is kept as it is, without an answer: cleaning rejects it and says why.
    """

    system: str

    @property
    def columns(self) -> tuple[str, ...]:
        return "messages", "conversations"

    def row(self, row: Row, where: str) -> tuple[str, str | None]:
        column = "conversations" if "conversations" in row and "messages" not in row else "messages"
        turns = _value(row, column, where)
        if isinstance(turns, str):
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError):
                return _storable(turns), None
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            return _storable(json.dumps(turns, ensure_ascii=False, default=str)), None
        messages = [
            {"role": _role(turn.get("role", turn.get("from"))), "content": turn.get("content", turn.get("value"))}
            for turn in turns
        ]
        last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return _conversation(messages, self.system), None
        wanted = messages[last]["content"]
        answer = _storable(wanted) if isinstance(wanted, str) and wanted.strip() else None
        return _conversation(messages[:last], self.system), answer


def missing(column: str, there: Iterable[str], where: str) -> SourceError:
    """That a column is not there, with the nearest of those that are."""
    names: Sequence[str] = [str(one) for one in there]
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return SourceError(f"there is no column '{column}'", where=where, mend=f"{hint}Columns there: {', '.join(names)}.")


def _role(name: Any) -> Any:
    return _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name


def _conversation(messages: list[dict[str, Any]], system: str) -> str:
    """Canonical JSON; of what is no conversation, JSON all the same, for cleaning to reject."""
    complete = conversation.with_system(messages, system)
    try:
        return _storable(conversation.dump(complete))
    except DataError:
        return _storable(json.dumps(messages, ensure_ascii=False, default=str))


def _answer(row: Row, column: str, where: str) -> str | None:
    answer = _text(row, column, where)
    return answer if answer.strip() else None


def _text(row: Row, column: str, where: str) -> str:
    return _plain(_value(row, column, where), column, where)


def _value(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise missing(column, row, where)
    return row[column]


def _plain(value: Any, column: str, where: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes | list | dict | tuple):
        kind = {"dict": "an object", "bytes": "a binary value"}.get(type(value).__name__, "a list")
        raise SourceError(f"column '{column}' holds {kind}, not a text", where=where, mend="Write it as a text.")
    if isinstance(value, bool):
        return str(value).lower()
    return _storable(value if isinstance(value, str) else str(value))


def _storable(text: str) -> str:
    """A lone surrogate, which a JSON escape can give, cannot be stored."""
    return text.encode("utf-8", "replace").decode()
