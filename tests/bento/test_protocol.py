"""The platform's own protocol against a real service: every type of task, feedback, explanations, OpenAPI."""

import json
from typing import Any

import httpx
import pytest

from tests.bento.served import Served


def test_a_doubtful_label_is_for_review(served: Served) -> None:
    texts = ["invoice for October", "WIN a FREE cruise", "the meeting moves", "ok", "my friend", "send money"]
    seen = set()
    for result in served.server.ask(task="t2", inputs=texts).json()["results"]:
        assert result["decision"] == ("review" if result["confidence"] < 0.95 else "accept")
        assert served.stored(result["prediction_id"])["decision"] == result["decision"]
        seen.add(result["decision"])
    assert "review" in seen
    accepted = served.server.ask(task="t1", inputs=texts).json()["results"]
    assert {one["decision"] for one in accepted} == {"accept"}


def test_texts_and_conversations_are_answered_with_texts(served: Served) -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is for sale?"}]
    body = {"task": "chat", "inputs": ["What is for sale?", conversation], "parameters": {"max_tokens": 8}}
    answer = served.server.ask(**body).json()
    assert answer["status"] == "ok", answer
    assert answer["adapter"] == served.adapters["chat"]
    for result in answer["results"]:
        row = served.stored(result["prediction_id"])
        assert (row["output"], row["finish_reason"]) == (result["text"], result["finish_reason"])
        assert row["completion_tokens"] == result["completion_tokens"] == 8
        assert result["fields"] is None
        assert 0 <= result["confidence"] <= 1
    assert json.loads(served.stored(answer["results"][1]["prediction_id"])["input"]) == conversation
    assert served.server.ask(**body).json()["results"][0]["text"] == answer["results"][0]["text"]
    warm = body | {"parameters": {"max_tokens": 8, "temperature": 1.5, "seed": 3}}
    first, second = (served.server.ask(**warm).json()["results"][0]["text"] for _ in range(2))
    assert first == second != answer["results"][0]["text"]


def test_an_answer_rests_on_passages_that_are_recorded_with_it(served: Served) -> None:
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "What is for sale?"},
    ]
    passages = ["A house in Lund is for sale.", "Flats are let by the week."]
    body = {"task": "chat", "inputs": [conversation, "What is for sale?"], "parameters": {"max_tokens": 8}}
    plain, informed = (served.server.ask(**body | more).json()["results"] for more in ({}, {"context": passages}))
    for before, after in zip(plain, informed, strict=True):
        assert after["prompt_tokens"] > before["prompt_tokens"]
        *earlier, last = json.loads(served.stored(after["prediction_id"])["input"])
        assert earlier in ([], conversation[:-1])
        lines = last["content"].split("\n\n")
        assert lines[1:] == [f"[1] {passages[0]}", f"[2] {passages[1]}", "What is for sale?"]


def test_fields_are_extracted(served: Served) -> None:
    answer = served.server.ask(task="read", inputs=["A house in Lund, furnished.", "A flat"]).json()
    for result in answer["results"]:
        assert result["finish_reason"] == "stop"
        assert result["fields"] == json.loads(result["text"])
        assert list(result["fields"]) == ["kind", "furnished", "rooms"]
        assert isinstance(result["fields"]["furnished"], bool)
        assert served.stored(result["prediction_id"])["input"] in ("A house in Lund, furnished.", "A flat")


def test_an_input_that_cannot_be_answered_fails_alone(served: Served) -> None:
    inputs: list[Any] = ["short", "house " * 2000, [{"role": "assistant", "content": "x"}]]
    answer = served.server.ask(task="chat", inputs=inputs, parameters={"max_tokens": 4})
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "partial"
    assert body["results"][0]["completion_tokens"] <= 4
    assert [one.get("error_code") for one in body["results"]] == [None, "input_too_large", "invalid_input"]
    alone = served.server.ask(task="chat", inputs=inputs[1:2])
    assert alone.json()["error_code"] == "input_too_large"
    assert alone.status_code in (400, 413)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"task": "t1", "inputs": ["x"], "parameters": {"max_tokens": 3}}, "unsupported_parameter"),
        ({"task": "t1", "inputs": ["x"], "context": ["y"]}, "unsupported_parameter"),
        ({"task": "read", "inputs": ["x"], "context": ["y"]}, "unsupported_parameter"),
        ({"task": "chat", "inputs": ["x"], "context": []}, "invalid_request"),
        ({"task": "chat", "inputs": ["x"], "context": ["y"] * 65}, "invalid_request"),
        ({"task": "t1", "inputs": [[{"role": "user", "content": "x"}]]}, "invalid_input"),
        ({"task": "chat", "inputs": ["x"], "parameters": {"max_tokens": 0}}, "invalid_request"),
        ({"task": "chat", "inputs": ["x"], "parameters": {"temperature": "hot"}}, "invalid_request"),
        ({"task": "chat", "inputs": [[{"role": "robot", "content": "x"}]]}, "invalid_request"),
        ({"task": "chat", "inputs": [[]]}, "invalid_request"),
    ],
)
def test_what_does_not_belong_to_a_task_is_refused(served: Served, body: dict[str, Any], code: str) -> None:
    answer = served.server.ask(**body)
    assert (answer.status_code, answer.json()["error_code"]) == (422, code), answer.text


def test_corrected_texts_come_back_as_rows(served: Served) -> None:
    said = served.server.ask(task="chat", inputs=["Where is it?"], parameters={"max_tokens": 3}).json()["results"][0]
    read = served.server.ask(task="read", inputs=["A flat."]).json()["results"][0]
    label = served.server.ask(task="t1", inputs=["x"]).json()["results"][0]
    for body, status, code in (
        ({"prediction_id": said["prediction_id"], "text": "In Lund.", "rating": -1}, 200, None),
        ({"prediction_id": said["prediction_id"], "label": "ham"}, 422, "wrong_task_type"),
        ({"prediction_id": label["prediction_id"], "text": "ham"}, 422, "wrong_task_type"),
        ({"prediction_id": read["prediction_id"], "text": '{"kind": "boat"}'}, 422, "invalid_input"),
        ({"prediction_id": read["prediction_id"], "text": '{"furnished": true, "kind": "flat"}'}, 200, None),
    ):
        answer = served.server.ask("/feedback", **body)
        assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    rows = served.world.ledger.feedback_rows("chat")
    assert rows["label"].tolist() == ["In Lund."]
    assert json.loads(rows["text"][0]) == [{"role": "user", "content": "Where is it?"}]
    assert served.world.ledger.feedback_rows("read")["label"].tolist() == [
        '{"kind":"flat","furnished":true,"rooms":null}'
    ]


@pytest.mark.parametrize("text", ["Win a FREE cruise now!", "The meeting about the kernel moves. " * 5])
def test_an_explanation_adds_up(served: Served, text: str) -> None:
    answer = served.server.ask("/explain", task="t2", input=text).json()
    assert answer["status"] == "ok", answer
    whole = served.server.ask(task="t2", inputs=[text]).json()["results"][0]
    assert answer["label"] == whole["label"]
    assert answer["probability"] == pytest.approx(whole["confidence"], abs=0.02)
    weights = [part["weight"] for part in answer["attributions"]]
    assert answer["base"] + sum(weights) == pytest.approx(answer["probability"], abs=1e-5)
    assert any(abs(weight) > 1e-4 for weight in weights)
    for part in answer["attributions"]:
        assert text[part["start"] : part["end"]] == part["text"]
    other = served.server.ask("/explain", task="t2", input=text, label="x").json()
    assert other["label"] == "x"
    refused = served.server.ask("/explain", task="chat", input=text)
    assert (refused.status_code, refused.json()["error_code"]) == (422, "wrong_task_type")
    refused = served.server.ask("/explain", task="t2", input=text, label="nothing")
    assert (refused.status_code, refused.json()["error_code"]) == (422, "unknown_label")


def test_every_endpoint_says_how_it_refuses(served: Served) -> None:
    schema = served.server.client.get("/openapi.json").json()
    for path, method in (
        ("/predict", "post"),
        ("/feedback", "post"),
        ("/explain", "post"),
        ("/v1/chat/completions", "post"),
        ("/v1/completions", "post"),
        ("/v1/embeddings", "post"),
        ("/v1/models", "get"),
    ):
        found = schema["paths"][path][method]
        assert {"401", "403", "429", "503", "504"} <= set(found["responses"]), path
        assert found["description"], path
    raw: httpx.Response = served.server.client.get("/v1/models/nothing")
    assert raw.status_code == 404
    assert raw.json()["error"]["code"] == "model_not_found"
    assert raw.json()["error_code"] == "unknown_task"
