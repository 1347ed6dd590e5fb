"""What a language model is asked and what it should answer: conversations, and the declared fields of extraction.

Training rows, requests and evaluation share these forms. A conversation is a list of messages, each with a role and a
content, written as canonical JSON; an extracted answer is a JSON object of the declared fields in declared order.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from pydantic import ValidationInfo, field_validator

from bento.preparation import prepare, prepare_content
from ft_resources.errors import DataError

Message = dict[str, str]
Value = str | int | float | bool | None
Fields = Mapping[str, "Field"]

ROLES = ("system", "user", "assistant")
INSTRUCTION = "Extract the fields below from the document."
CONTEXT = "Answer from these passages:"
ALPACA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
"""The chat template given to a base model that has none."""
WRITTEN = {"whitespace_flexible": False, "json_allowed_escapes": 'nrtbf\\"'}
"""How `answer_json` writes, in the words of the grammar library: no blanks, and no character as its number."""
FIELD_NAME = re.compile(r"\w(?:[\w .-]{0,62}\w)?")
_EXACT = 2**53
"""Whole numbers up to here are the same as integers and as floats."""


class Field(pydantic.BaseModel):
    """One declared field of an extraction task."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Literal["string", "number", "integer", "boolean"] = pydantic.Field(description="What its value is.")
    description: str = pydantic.Field("", description="What the model is told about it.")
    enum: list[str | int | float] | None = pydantic.Field(None, description="The only values it may have.")
    required: bool = pydantic.Field(True, description="false: null where the document does not say it.")

    @field_validator("enum")
    @classmethod
    def _enum(cls, value: list[str | int | float] | None, info: ValidationInfo) -> list[str | int | float] | None:
        kind = info.data.get("type")
        if value is None or kind is None:
            return value
        if kind == "boolean":
            raise ValueError("nothing: a boolean has its two values already")
        if not value or len(set(value)) < len(value) or any(not _is_a(one, kind) for one in value):
            raise ValueError(f"distinct values of type {kind}, at least one")
        return value


def dump(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as canonical JSON: sorted keys, no blanks, not escaped to ASCII.

    Raises:
        DataError: It is no conversation that a model could answer; see `load`.
    """
    return _written(_checked(messages))


def load(text: str) -> list[Message]:
    """The messages behind `text`, each with the keys `role` and `content`.

    A conversation has at least one message, contents that are not blank, a system message only at its start, and ends
    with what the user says.

    Raises:
        DataError: `text` is not JSON, or not such a conversation; names the message, counted from 1.
    """
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
        raise DataError("this is not a conversation in JSON", where="conversation", mend=_SHAPE) from None
    return _checked(messages)


def prepare_conversation(text: str, kinds: Sequence[str], max_chars: int) -> tuple[str, dict[str, int]]:
    """The conversation a model sees, and how many personal data of each kind were masked.

    Each content is prepared by itself and cut after `max_chars` characters; blanks and line breaks in it stay.
    Preparing twice changes nothing.

    Raises:
        DataError: `text` is no conversation, or nothing is left of one of its contents.
    """
    counts: dict[str, int] = {}
    messages = []
    for message in load(text):
        content, masked = prepare_content(message["content"], kinds, max_chars)
        counts = {kind: counts.get(kind, 0) + masked.get(kind, 0) for kind in (*counts, *masked)}
        messages.append({**message, "content": content})
    return dump(messages), counts


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """The messages below the task's system prompt; one that they bring themselves stays instead."""
    if not system or (messages and messages[0].get("role") == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def with_context(question: str, passages: Sequence[str]) -> str:
    """What the user says, below numbered passages that the answer is to rest on (retrieval-augmented generation)."""
    numbered = [f"[{number}] {passage}" for number, passage in enumerate(passages, 1)]
    return "\n\n".join([CONTEXT, *numbered, question])


def extraction_messages(document: str, fields: Fields, instruction: str = "") -> list[Message]:
    """What the model is asked to extract `fields` from `document`: the instruction with the fields, then the document.

    Args:
        instruction: What is said before the fields; empty: `INSTRUCTION`.
    """
    lines = [
        instruction or INSTRUCTION,
        "Answer with one JSON object and nothing else, with these fields in this order:",
        *(
            f"- {name} ({_declared(field)})" + (f": {field.description}" * bool(field.description))
            for name, field in fields.items()
        ),
    ]
    return [{"role": "system", "content": "\n".join(lines)}, {"role": "user", "content": document}]


def answer_json(values: Mapping[str, Any], fields: Fields) -> str:
    """The declared fields of `values` in declared order as canonical JSON; equal values give equal text.

    Raises:
        DataError: A value does not fit its field; see `parse_answer`.
    """
    return json.dumps(_fitting(values, fields), ensure_ascii=False, separators=(",", ":"))


def answer_schema(fields: Fields) -> dict[str, Any]:
    """The JSON schema of an answer: every declared field in declared order, null where one need not be there."""
    properties: dict[str, Any] = {}
    for name, field in fields.items():
        value: dict[str, Any] = {"enum": list(field.enum)} if field.enum else {"type": field.type}
        properties[name] = value if field.required else {"anyOf": [value, {"type": "null"}]}
    return {
        "type": "object",
        "properties": properties,
        "required": list(fields),
        "additionalProperties": False,
        "x-guidance": WRITTEN,
    }


def parse_answer(text: str, fields: Fields) -> dict[str, Value]:
    """The values of `fields` in the JSON object `text`, in declared order; None where one need not be there.

    A whole number is an integer however it is written (`3.0`).

    Raises:
        DataError: `text` is no JSON object; a field is missing, not declared, given twice, of another type, or not one
            of its enum. Names the field.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise DataError("the answer is not JSON", where="answer", mend="Write one JSON object.") from None
    return _fitting(values, fields)


def prepare_values(values: Mapping[str, Any], fields: Fields, kinds: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The wanted answer of an extraction row as JSON, and what was masked.

    Strings are prepared as the document is, so that they read as they stand in it; values of an enum stay.

    Raises:
        DataError: A value does not fit its field.
    """
    counts: dict[str, int] = {}
    prepared: dict[str, Any] = {}
    for name, value in _fitting(values, fields).items():
        prepared[name] = value
        if isinstance(value, str) and fields[name].enum is None:
            prepared[name], masked = prepare(value, kinds)
            counts = {kind: counts.get(kind, 0) + masked.get(kind, 0) for kind in (*counts, *masked)}
    return answer_json(prepared, fields), counts


_SHAPE = 'Write [{"role": "user", "content": "..."}], with roles system, user and assistant, the last one user.'


def _checked(messages: Any) -> list[Message]:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("a conversation is a list of at least one message", where="conversation", mend=_SHAPE)
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise DataError("a message has the keys role and content and no other", where=where, mend=_SHAPE)
        role, content = message["role"], message["content"]
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise DataError(f"there is no role {role!r}", where=where, mend=f"{hint}Use one of {', '.join(ROLES)}.")
        if not isinstance(content, str) or not content.strip():
            raise DataError("its content is empty or no text", where=where, mend="Write a text.")
        if role == "system" and number > 1:
            raise DataError("a system message stands only at the start", where=where, mend="Move it there.")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"the conversation ends with '{messages[-1]['role']}'", where=f"message {len(messages)}", mend=_SHAPE
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _written(messages: Sequence[Message]) -> str:
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _declared(field: Field) -> str:
    values = f", one of {json.dumps(field.enum, ensure_ascii=False)[1:-1]}" if field.enum else ""
    return f"{field.type}{values}" + ("" if field.required else ", or null")


def _fitting(values: Any, fields: Fields) -> dict[str, Value]:
    if not isinstance(values, Mapping):
        raise DataError("the answer is no JSON object", where="answer", mend="Write {} with the declared fields.")
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise DataError(
                f"there is no field '{name}'", where=f"field '{name}'", mend=f"{hint}Declared: {', '.join(fields)}."
            )
    return {name: _value(values.get(name), name, field) for name, field in fields.items()}


def _value(value: Any, name: str, field: Field) -> Value:
    where = f"field '{name}'"
    if value is None:
        if field.required:
            raise DataError("it is missing", where=where, mend="Give a value, or declare it with required: false.")
        return None
    if not _is_a(value, field.type):
        shown = json.dumps(value, ensure_ascii=False, default=str)
        raise DataError(f"{shown[:80]} is no {field.type}", where=where, mend=f"Give a {field.type}.")
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        value = int(value)
    if field.enum is not None and value not in field.enum:
        listed = ", ".join(map(str, field.enum))
        raise DataError(f"'{str(value)[:80]}' is not one of its values", where=where, mend=f"Use one of {listed}.")
    return value


def _is_a(value: Any, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    if isinstance(value, int):
        return True
    return isinstance(value, float) and math.isfinite(value) and (kind == "number" or value.is_integer())


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError("it is given twice", where=f"field '{twice}'", mend="Give each field once.")
    return found


def _no_constant(name: str) -> Value:
    raise ValueError(f"{name} is not JSON")
