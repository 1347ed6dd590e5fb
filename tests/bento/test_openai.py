"""OpenAI's protocol, asked with OpenAI's own client, against a real service."""

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.bento.served import Served

ASKED: list[Any] = [{"role": "user", "content": "What is for sale?"}]


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_answered_and_recorded(served: Served, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="chat", messages=ASKED, max_completion_tokens=12, user="ann", n=1, metadata={"a": "b"}
    )
    answer = raw.parse()
    assert answer.model == "chat@1"
    assert answer.object == "chat.completion"
    assert abs(answer.created - time.time()) < 60
    choice, usage = answer.choices[0], answer.usage
    assert choice.finish_reason == "length"
    assert usage is not None
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    more: Any = answer.model_extra
    assert more["adapter"] == served.adapters["chat"]
    assert more["trace_id"] == raw.headers["x-trace-id"]
    row = served.stored(more["prediction_id"])
    assert (row["output"], row["finish_reason"], row["caller"]) == (choice.message.content, "length", "ann")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (usage.prompt_tokens, 12)
    assert json.loads(row["input"]) == ASKED
    assert (row["label"], row["trace_id"], row["model_version"]) == ("", more["trace_id"], "1")
    assert 0 <= row["confidence"] <= 1
    # what a client sends back of an answer, with all the empty fields it has, is a conversation
    again = [*ASKED, choice.message.model_dump(), {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    second = client.chat.completions.create(model="chat@1", messages=again, max_tokens=2).usage
    assert second is not None
    assert second.prompt_tokens > usage.prompt_tokens + 12


def test_a_stream_has_the_same_text_and_is_recorded_before_its_end(served: Served, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="chat", messages=ASKED, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model="chat", messages=ASKED, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [one.choices[0].delta.content for one in chunks if one.choices and one.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [one.choices[0].finish_reason for one in chunks if one.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({one.id for one in chunks}) == 1
    seen = 0
    with client.chat.completions.create(model="chat", messages=ASKED, max_tokens=8, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].finish_reason:
                seen += 1
                row = served.stored(chunk.model_extra["prediction_id"])  # type: ignore[index]
                assert row["finish_reason"] == chunk.choices[0].finish_reason
    assert seen == 1


def test_a_reader_who_leaves_ends_the_generation(served: Served, client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="chat", messages=ASKED, max_tokens=480, stream=True) as stream:
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
    name = first.model_extra["prediction_id"]  # type: ignore[index]
    deadline = time.monotonic() + 30
    while not (rows := [row for key, row in served.world.stored().items() if key == name]):
        assert time.monotonic() < deadline
    assert rows[0]["finish_reason"] == "cancelled"
    assert rows[0]["output"].startswith(first.choices[0].delta.content)
    assert rows[0]["completion_tokens"] < 480


def test_many_ask_at_once_with_the_asynchronous_client(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="chat", messages=ASKED, max_tokens=16, temperature=1.0, seed=number % 2, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(8)))

    texts = asyncio.run(ask())
    assert len(set(texts[::2])) == len(set(texts[1::2])) == 1, "the same seed gives the same text"
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_each_phase_of_a_written_answer_is_measured(served: Served, client: openai.OpenAI, stream: bool) -> None:
    def counts() -> dict[str, float]:
        found = re.findall(
            r'^ft_phase_seconds_count{.*phase="(\w+)".*task="chat".*} (\S+)$',
            httpx.get(f"{served.url}/metrics").text,
            re.M,
        )
        return {phase: float(count) for phase, count in found}

    before = counts()
    answer: Any = client.chat.completions.create(model="chat", messages=ASKED, max_tokens=4, stream=stream)
    if stream:
        list(answer)
    deadline = time.monotonic() + 10  # a stream is counted after its last piece
    while (after := counts()) == before:
        assert time.monotonic() < deadline
    assert {phase: after[phase] - before.get(phase, 0) for phase in after} == dict.fromkeys(
        ("tokenise", "queue", "compute", "log"), 1
    )


def test_texts_are_continued(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="chat", prompt=["A house", "A flat"], max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = client.completions.create(model="chat", prompt="A house", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
    text = answer.choices[0].text
    stopped = client.completions.create(model="chat", prompt="A house", max_tokens=6, stop=text[-1])
    assert stopped.choices[0].text == text[: text.index(text[-1])]
    assert stopped.choices[0].finish_reason == "stop"


def test_an_answer_fits_the_schema_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "ok": {"type": "boolean"}},
        "required": ["size", "ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="chat",
        messages=ASKED,
        response_format={"type": "json_schema", "json_schema": {"name": "house", "schema": schema, "strict": True}},
    )
    said = json.loads(answer.choices[0].message.content or "")
    assert set(said) == {"size", "ok"}
    assert answer.choices[0].finish_reason == "stop"


def test_an_extraction_answers_a_document(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="read", messages=[{"role": "user", "content": "A house in Lund."}])
    assert list(json.loads(answer.choices[0].message.content or "")) == ["kind", "furnished", "rooms"]
    for wrong in (
        {"messages": [{"role": "system", "content": "x"}, *ASKED]},
        {"messages": ASKED, "response_format": {"type": "json_object"}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="read", **wrong)
        assert caught.value.code == "wrong_task_type"


@pytest.mark.parametrize("task", ["t1", "chat"])
def test_embeddings_have_length_one_in_both_forms(served: Served, client: openai.OpenAI, task: str) -> None:
    texts = ["invoice for October", "Win a prize", "invoice for October"]
    answer = client.embeddings.create(model=task, input=texts, encoding_format="float")
    vectors = np.array([one.embedding for one in answer.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[2] == pytest.approx(1, abs=1e-2)
    assert vectors[0] @ vectors[1] < 0.99
    assert answer.usage.prompt_tokens > 3
    raw = client.embeddings.with_raw_response.create(model=task, input=texts[0], encoding_format="base64")
    packed = json.loads(raw.text)["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), vectors[0], atol=2e-2)
    # what the client asks for by itself
    assert len(client.embeddings.create(model=task, input=texts[0]).data[0].embedding) == vectors.shape[1]


def test_models_are_listed_in_openais_form(served: Served, client: openai.OpenAI) -> None:
    found = {one.id: one for one in client.models.list()}
    assert set(found) == {"t1", "t2", "chat", "read"}
    assert found["chat"].object == "model"
    assert found["chat"].owned_by == "default"
    assert abs(found["chat"].created - time.time()) < 600
    assert client.models.retrieve("chat@1").id == "chat@1"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("chat@9")


REFUSED: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = {
    "unknown task": ({"model": "chad"}, openai.NotFoundError, "model_not_found", None),
    "unknown version": ({"model": "chat@7"}, openai.NotFoundError, "model_not_found", None),
    "a classifier": ({"model": "t1"}, openai.BadRequestError, "wrong_task_type", "task"),
    "two answers": ({"n": 2}, openai.BadRequestError, "unsupported_parameter", "n"),
    "tools": ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter", "tools"),
    "log-probabilities": ({"logprobs": True}, openai.BadRequestError, "unsupported_parameter", "logprobs"),
    "a penalty": ({"frequency_penalty": 0.5}, openai.BadRequestError, "unsupported_parameter", "frequency_penalty"),
    "a misspelt name": (
        {"extra_body": {"temprature": 1}},
        openai.BadRequestError,
        "unsupported_parameter",
        "temprature",
    ),
    "too hot": ({"temperature": 3}, openai.BadRequestError, "invalid_request", "temperature"),
    "no messages": ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
    "the last word": (
        {"messages": [*ASKED, {"role": "assistant", "content": "x"}]},
        openai.BadRequestError,
        "invalid_input",
        "inputs.0",
    ),
    "too long": (
        {"messages": [{"role": "user", "content": "house " * 2000}]},
        openai.BadRequestError,
        "context_length_exceeded",
        None,
    ),
    "no schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        openai.BadRequestError,
        "invalid_request",
        None,
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_raises_the_clients_own_error(client: openai.OpenAI, name: str, stream: bool) -> None:
    given, kind, code, param = REFUSED[name]
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "chat", "messages": ASKED, "stream": stream, **given})
    assert (caught.value.code, caught.value.param) == (code, param)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]
    assert caught.value.response.headers["x-trace-id"]


def test_a_key_that_is_not_valid_is_an_authentication_error(served: Served) -> None:
    headers = {"x-forwarded-for": "203.0.113.9"}
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", default_headers=headers, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    known = openai.OpenAI(base_url=f"{served.url}/v1", api_key="key-of-the-test", default_headers=headers)
    with known:
        assert len(list(known.models.list())) == 4
