import json
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bento.conversation import (
    Field,
    answer_json,
    dump,
    extraction_messages,
    load,
    parse_answer,
    prepare_conversation,
    prepare_values,
    with_system,
)
from bento.preparation import PATTERNS, prepare_content
from ft_resources.errors import DataError

ALL = list(PATTERNS)
CODE = "def f(x):\n    if x:\n\treturn  1\n\n\n    return 2"
FIELDS = {
    "sender": Field(type="string", description="who wrote it"),
    "amount": Field(type="number", required=False),
    "count": Field(type="integer", required=False),
    "urgent": Field(type="boolean", required=False),
    "currency": Field(type="string", enum=["EUR", "USD"], required=False),
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_conversation_is_written_one_way_only() -> None:
    text = dump([{"content": "sei höflich", "role": "system"}, user("Grüße 漢")])
    assert text == '[{"content":"sei höflich","role":"system"},{"content":"Grüße 漢","role":"user"}]'
    assert dump(load(text)) == text
    assert load(json.dumps(load(text), indent=2)) == load(text)


@pytest.mark.parametrize(
    ("messages", "where", "says"),
    [
        ([], "conversation", "at least one message"),
        ({"role": "user"}, "conversation", "at least one message"),
        ([user("a"), "b"], "message 2", "role and content"),
        ([{"role": "user"}], "message 1", "role and content"),
        ([{**user("a"), "name": "x"}], "message 1", "no other"),
        ([{"role": "usr", "content": "a"}], "message 1", "Did you mean 'user'?"),
        ([{"role": 1, "content": "a"}], "message 1", "there is no role 1"),
        ([user("  \n")], "message 1", "empty"),
        ([user(None)], "message 1", "empty or no text"),
        ([user("a"), {"role": "system", "content": "b"}, user("c")], "message 2", "only at the start"),
        ([user("a"), {"role": "assistant", "content": "b"}], "message 2", "ends with 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, where: str, says: str) -> None:
    for refused in (lambda: dump(messages), lambda: load(json.dumps(messages))):
        with pytest.raises(DataError) as caught:
            refused()
        assert caught.value.where == where
        assert says in str(caught.value)
        assert caught.value.mend


@pytest.mark.parametrize("text", ["", "hello", "[" * 100_000, "1" * 5_000])
def test_what_is_not_even_json(text: str) -> None:
    with pytest.raises(DataError):
        load(text)


def test_indentation_survives_and_personal_data_does_not() -> None:
    text, masked = prepare_conversation(
        dump([user(f"\r\n{CODE}\r\n  "), user("mail ada@example.org\x07  now")]), ALL, 900
    )
    assert [message["content"] for message in load(text)] == [CODE, "mail <EMAIL>  now"]
    assert masked == {"email": 1}
    assert prepare_content(CODE, ALL, 900) == (CODE, {})
    assert prepare_content("call +44 20 7946 0958", ["phone"], 900) == ("call <PHONE>", {"phone": 1})


def test_each_content_is_cut_and_what_loses_its_content_is_refused() -> None:
    text, _ = prepare_conversation(dump([user("a" * 20), user("b" * 5)]), ALL, 10)
    assert [message["content"] for message in load(text)] == ["a" * 10, "b" * 5]
    with pytest.raises(DataError, match="message 1: its content is empty"):
        prepare_conversation(dump([user("\x07")]), ALL, 10)


PIECES = st.sampled_from(
    ["ada@example.org", "+14155552671", "\u0301", "\u0338", " ", "\n", "\r", "\t", "é", "x", "\x1f"]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.integers(1, 30))
def test_preparing_twice_changes_nothing(content: str, most: int) -> None:
    once, _ = prepare_conversation(dump([user(f"a{content}")]), ALL, most)
    assert prepare_conversation(once, ALL, most) == (once, {})
    answer, _ = prepare_content(content, ALL, most)
    assert prepare_content(answer, ALL, most) == (answer, {})
    values, _ = prepare_values({"sender": content}, FIELDS, ALL)
    assert prepare_values(json.loads(values), FIELDS, ALL) == (values, {})


def test_the_task_s_system_prompt_stands_first_unless_there_is_one() -> None:
    own = [{"role": "system", "content": "own"}, user("a")]
    assert with_system([user("a")], "be brief") == [{"role": "system", "content": "be brief"}, user("a")]
    assert with_system(own, "be brief") == own
    assert with_system([user("a")], "") == [user("a")]


def test_the_model_is_told_every_field() -> None:
    system, document = extraction_messages("Dear Bob,\n  pay.", FIELDS, "Read the letter.")
    assert document == user("Dear Bob,\n  pay.")
    assert system["content"].splitlines()[0] == "Read the letter."
    assert system["content"].splitlines()[2:] == [
        "- sender (string): who wrote it",
        "- amount (number, or null)",
        "- count (integer, or null)",
        "- urgent (boolean, or null)",
        '- currency (string, one of "EUR", "USD", or null)',
    ]
    assert extraction_messages("x", FIELDS)[0]["content"].startswith("Extract ")


def test_an_answer_is_written_in_declared_order() -> None:
    values = {"currency": "EUR", "sender": "Bö", "count": 3.0, "amount": 1.5, "urgent": False}
    text = answer_json(values, FIELDS)
    assert text == '{"sender":"Bö","amount":1.5,"count":3,"urgent":false,"currency":"EUR"}'
    assert parse_answer(text, FIELDS) == values
    assert list(parse_answer(f" {text}\n", FIELDS)) == list(FIELDS)
    assert answer_json({"sender": ""}, FIELDS).count("null") == 4


@pytest.mark.parametrize(
    ("answer", "where", "says"),
    [
        ("Bob", "answer", "not JSON"),
        ("[1]", "answer", "no JSON object"),
        ('{"sender": "a"} and more', "answer", "not JSON"),
        ('{"sender": "a", "amount": NaN}', "answer", "not JSON"),
        ("{}", "field 'sender'", "missing"),
        ('{"sender": null}', "field 'sender'", "missing"),
        ('{"sender": 3}', "field 'sender'", "3 is no string"),
        ('{"sender": "a", "amount": "3"}', "field 'amount'", "no number"),
        ('{"sender": "a", "amount": true}', "field 'amount'", "no number"),
        ('{"sender": "a", "count": 1.5}', "field 'count'", "no integer"),
        ('{"sender": "a", "urgent": 1}', "field 'urgent'", "no boolean"),
        ('{"sender": "a", "currency": "eur"}', "field 'currency'", "Use one of EUR, USD"),
        ('{"sender": "a", "sendr": "a"}', "field 'sendr'", "Did you mean 'sender'?"),
        ('{"sender": "a", "sender": "b"}', "field 'sender'", "twice"),
    ],
)
def test_an_answer_that_does_not_fit_names_its_field(answer: str, where: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_answer(answer, FIELDS)
    assert caught.value.where == where
    assert says in str(caught.value)


def test_strings_of_an_answer_read_as_the_document_does() -> None:
    values = {"sender": "Ada  <ada@example.org>", "currency": "EUR"}
    text, masked = prepare_values(values, FIELDS, ALL)
    assert json.loads(text)["sender"] == "Ada <<EMAIL>>"
    assert masked == {"email": 1}
    public = {"site": Field(type="string", enum=["www.a.org", "www.b.org"])}
    assert prepare_values({"site": "www.a.org"}, public, ALL) == ('{"site":"www.a.org"}', {})


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"type": "text"}, "'string', 'number', 'integer' or 'boolean'"),
        ({"type": "string", "enum": []}, "at least one"),
        ({"type": "string", "enum": ["a", "a"]}, "distinct"),
        ({"type": "integer", "enum": ["a"]}, "of type integer"),
        ({"type": "boolean", "enum": ["a"]}, "two values already"),
        ({"type": "string", "requird": False}, "Extra inputs"),
    ],
)
def test_a_field_that_cannot_be(field: dict[str, Any], says: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=says):
        Field.model_validate(field)
