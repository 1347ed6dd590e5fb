"""The service as a real `bentoml serve` process over a real lake and ledger."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bento.servers import Load, Server, end, start
from tests.bento.writers import write_adapter, write_base

TEXTS = ["Please find the invoice attached.", "Win a free cruise, click here now!"]


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One world for the whole module: t1 is answered by `first`, t2 by `other`."""
    world = make_world(tmp_path_factory.mktemp("service"))
    world.release("t1", world.first, "1")
    world.release("t2", world.other, "1")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def server(world: Any) -> Iterator[Server]:
    server = start(world.home)
    yield server
    end(server)


def back_to_first(world: Any, server: Server) -> None:
    release = world.release("t1", world.first, "1", "rollback")
    deadline = time.monotonic() + 10
    while server.ask(task="t1", inputs=TEXTS).json()["release"] != release:
        assert time.monotonic() < deadline


def test_an_answer_says_who_gave_it_and_is_in_the_ledger(world: Any, server: Server) -> None:
    live = world.ledger.live_release("t1")
    response = server.ask(task="t1", inputs=TEXTS, user="ann", event_time="2024-02-29T12:00:00+02:00")
    answer = response.json()
    assert response.status_code == 200, answer
    assert answer["status"] == "ok"
    assert answer["error_code"] is None
    assert (answer["task"], answer["model_version"], answer["model"]) == ("t1", "1", "t1@1")
    assert (answer["release"], answer["adapter"]) == (live["id"], world.first)
    assert answer["trace_id"] == response.headers["x-trace-id"]
    assert answer["latency_ms"] > 0
    stored = world.stored()
    for text, result in zip(TEXTS, answer["results"], strict=True):
        row = stored[result["prediction_id"]]
        assert (row["input"], row["label"], row["caller"]) == (text, result["label"], "ann")
        assert (row["trace_id"], row["release_id"]) == (answer["trace_id"], live["id"])
        assert row["event_time"].startswith("2024-02-29 10:00")
        assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert result["confidence"] == result["probabilities"][result["label"]]


def test_a_callers_trace_id_is_kept(world: Any, server: Server) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    for headers, expected in (
        ({"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}, trace),
        ({"x-trace-id": "order-4711"}, "order-4711"),
    ):
        response = server.client.post("/predict", json={"task": "t1", "inputs": ["x"]}, headers=headers)
        assert response.headers["x-trace-id"] == response.json()["trace_id"] == expected
        assert world.stored()[response.json()["results"][0]["prediction_id"]]["trace_id"] == expected
    for bad in ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "nonsense"):
        made = server.client.get("/v1/models", headers={"traceparent": bad}).headers["x-trace-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
        assert made.strip("0")


def test_requests_of_two_tasks_at_once_get_their_own_labels(server: Server) -> None:
    answers: dict[str, list[dict[str, Any]]] = {"t1": [], "t2": []}

    def work(task: str) -> None:
        for _ in range(8):
            answers[task] += server.ask(task=task, inputs=TEXTS).json()["results"]

    threads = [threading.Thread(target=work, args=(task,)) for task in ("t1", "t2", "t1", "t2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {frozenset(result["probabilities"]) for result in answers["t1"]} == {frozenset({"ham", "spam"})}
    assert {frozenset(result["probabilities"]) for result in answers["t2"]} == {frozenset({"x", "y", "z"})}
    for results in answers.values():
        first = [round(value, 2) for value in results[0]["probabilities"].values()]
        assert len(results) == 32
        assert all(
            value == pytest.approx(expected, abs=0.05)
            for result in results[::2]
            for value, expected in zip(result["probabilities"].values(), first, strict=True)
        )


REFUSED: dict[str, tuple[Any, int, str, str]] = {
    "unknown task": ({"task": "t11", "inputs": ["a"]}, 404, "unknown_task", "Did you mean 't1'"),
    "unknown version": ({"task": "t1", "inputs": ["a"], "model_version": "99"}, 404, "unknown_version", "Versions: 1"),
    "no inputs": ({"task": "t1", "inputs": []}, 422, "invalid_request", "inputs"),
    "blank input": ({"task": "t1", "inputs": ["a", " \n"]}, 422, "invalid_request", "inputs.1"),
    "too many inputs": ({"task": "t1", "inputs": ["a"] * 257}, 413, "input_too_large", "256"),
    "too long an input": ({"task": "t1", "inputs": ["a" * 100_001]}, 413, "input_too_large", "100,000"),
    "unknown field": ({"task": "t1", "inputs": ["a"], "modelversion": "1"}, 422, "invalid_request", "modelversion"),
    "number as text": ({"task": "t1", "inputs": [1]}, 422, "invalid_request", "inputs.0"),
    "bad time": ({"task": "t1", "inputs": ["a"], "event_time": "soon"}, 422, "invalid_request", "event_time"),
    "time before time": (
        {"task": "t1", "inputs": ["a"], "event_time": "0001-01-01T00:00:00+12:00"},
        422,
        "invalid_request",
        "event_time",
    ),
    "array": (["t1"], 422, "invalid_request", "JSON object"),
    "not JSON": (b"{'task': 't1'}", 400, "invalid_request", "not JSON"),
    "empty body": (b"", 422, "invalid_request", "JSON object"),
    "not UTF-8": (b'{"task": "t1", "inputs": ["\xff\xfe"]}', 400, "invalid_request", "UTF-8"),
    "NUL": (b'{"task": "t1", "inputs": ["a\\u0000b"]}', 422, "invalid_request", "NUL"),
    "raw NUL": (b'{"task": "t1", "inputs": ["a\x00b"]}', 400, "invalid_request", "not JSON"),
    "lone surrogate": (b'{"task": "t1", "inputs": ["a\\ud800b"]}', 422, "invalid_request", "surrogate"),
    "lone surrogate as a name": (
        b'{"task": "t1", "inputs": ["a"], "\\udfff": 1}',
        422,
        "invalid_request",
        "JSON object",
    ),
    "lone surrogate as a task": (b'{"task": "\\udfff", "inputs": ["a"]}', 422, "invalid_request", "task"),
    "nested too deep": (b"[" * 100_000, 400, "invalid_request", "JSON"),
    "huge number": (b'{"task": "t1", "inputs": [' + b"9" * 10_000 + b"]}", 400, "invalid_request", "JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_gets_a_typed_error(server: Server, name: str) -> None:
    body, status, code, said = REFUSED[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post("/predict", content=content, headers={"content-type": "application/json"})
    answer = response.json()
    assert (response.status_code, answer["error_code"]) == (status, code), answer
    assert said in answer["message"] + answer["mend"]
    assert answer["status"] == "error"
    assert answer["results"] is None
    assert answer["mend"]
    assert answer["trace_id"] == response.headers["x-trace-id"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused_in_words(server: Server, chunked: bool) -> None:
    body = b" " * (33 * 2**20)
    content = iter([body[: 2**20]] * 33) if chunked else body
    response = server.client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error_code"]) == (413, "input_too_large")


def test_callers_who_hang_up_leave_nothing_in_the_queue(server: Server) -> None:
    body = json.dumps({"task": "t1", "inputs": ["long " * 500] * 16}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    address = (server.client.base_url.host, server.client.base_url.port)
    for _ in range(20):
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
    assert server.ask(task="t1", inputs=["still there?"]).status_code == 200
    deadline = time.monotonic() + 20
    while not re.search(r"^ft_waiting_tokens(\{.*\})? 0\.0$", server.client.get("/metrics").text, re.M):
        assert time.monotonic() < deadline
    assert "Traceback" not in (server.home / "serve.log").read_text(errors="replace")


def test_unknown_paths_and_methods_answer_json(server: Server) -> None:
    for response, status in ((server.client.get("/nothing"), 404), (server.client.delete("/predict"), 405)):
        assert response.status_code == status
        assert response.json()["error_code"] == "invalid_request"
    assert server.client.delete("/predict").headers["allow"] == "POST"


def test_what_comes_through_a_proxy_needs_a_key(server: Server) -> None:
    proxied = {"x-forwarded-for": "127.0.0.1"}
    for path in ("/v1/models", "/metrics", "/docs", "/schema.json"):
        refused = server.client.get(path, headers=proxied)
        assert (refused.status_code, refused.json()["error_code"]) == (401, "unauthorized")
        key = {"authorization": "Bearer key-of-the-test"}
        assert server.client.get(path, headers=proxied | key).status_code == 200
    probe = server.client.get("/readyz", headers=proxied)
    assert probe.json() == {"ready": True}, "probes are let in, but see no details"


def test_feedback_is_checked_and_kept_once(world: Any, server: Server) -> None:
    prediction = server.ask(task="t1", inputs=["Feedback follows."]).json()["results"][0]["prediction_id"]
    give = {"prediction_id": prediction, "label": "spam", "author": "ann"}
    first, again = server.ask("/feedback", **give).json(), server.ask("/feedback", **give).json()
    assert (first["status"], first["stored"]) == ("ok", True)
    assert again["stored"] is False
    assert server.ask("/feedback", prediction_id=prediction, rating=1, author="ann").json()["stored"] is True
    rows = world.ledger.feedback_rows("t1")
    assert rows[rows["source"] == f"feedback:{prediction}"][["label", "annotator"]].values.tolist() == [["spam", "ann"]]
    for body, status, code, said in (
        ({"prediction_id": prediction, "label": "x"}, 422, "unknown_label", "ham, spam"),
        ({"prediction_id": "0" * 32, "label": "spam"}, 404, "unknown_prediction", "prediction"),
        ({"prediction_id": prediction}, 422, "invalid_request", "label or a rating"),
        ({"prediction_id": prediction, "rating": 5}, 422, "invalid_request", "rating"),
    ):
        response = server.ask("/feedback", **body)
        assert (response.status_code, response.json()["error_code"]) == (status, code)
        assert said in response.text


def test_models_metrics_and_documentation_are_there(world: Any, server: Server) -> None:
    release = server.ask(task="t1", inputs=["count me"]).json()["release"]
    server.ask(task="no such task", inputs=["count me"])
    models = {entry["id"]: entry for entry in server.client.get("/v1/models").json()["data"]}
    assert set(models) == {"t1", "t2"}
    assert models["t2"]["live"][0]["adapter"] == world.other
    assert models["t2"]["live"][0]["share"] == 1
    metrics = server.client.get("/metrics").text
    labels = f'adapter="{world.first[:12]}",outcome="ok",release="{release}",task="t1",version="1"'
    assert float(re.search(rf"^ft_requests_total{{{labels}}} (\S+)$", metrics, re.M)[1]) >= 1  # type: ignore[index]
    assert "ft_request_seconds_bucket{" + labels.replace("outcome", 'le="30.0",outcome') + "}" in metrics
    assert 'outcome="unknown_task",release="",task=""' in metrics
    assert "no such task" not in metrics
    page = server.client.get("/docs").text
    for asset in re.findall(r'"(/static_content/[^"]+)"', page):
        assert server.client.get(asset).status_code == 200
    assert "cdn." not in page
    schema = server.client.get("/openapi.json").json()
    assert {"/predict", "/feedback", "/v1/models", "/readyz"} <= set(schema["paths"])
    assert "log_unavailable" in schema["components"]["schemas"]["ErrorResponse"]["properties"]["error_code"]["enum"]


def test_a_route_change_takes_effect_without_a_failed_request(world: Any, server: Server) -> None:
    back_to_first(world, server)
    with Load(server) as load:
        load.until(lambda: len(load.answers) >= 10, 20)
        for adapter, version in ((world.second, "2"), (world.first, "1")):
            release = world.release("t1", adapter, version)
            seen = len(load.answers)
            took = load.until(
                lambda release=release, seen=seen: any(a["release"] == release for a in load.answers[seen:]), 2
            )
            assert took < 2
    assert load.refusals == []
    assert {answer["adapter"] for answer in load.answers} == {world.first, world.second}
    assert load.answers[-1]["release"] == release
    asked = server.ask(task="t1", inputs=TEXTS, model_version="2").json()
    assert asked["adapter"] == world.second, "an earlier version can still be asked for"
    assert server.ask(task="t1", inputs=TEXTS, model_version=world.second[:8]).json()["model_version"] == "2"


def test_a_damaged_adapter_leaves_the_old_one_answering(
    world: Any, server: Server, workshop: Any, damage: Any, tmp_path: Path
) -> None:
    back_to_first(world, server)
    folder = workshop.write(tmp_path / "bad", task="t1", seed=77)
    digest = world.lake.publish("adapter", folder, {"name": "bad"}).digest
    damage(world.lake, digest)
    before = server.ask(task="t1", inputs=TEXTS).json()
    with Load(server) as load:
        world.release("t1", digest, "3")
        load.until(lambda: "t1" in server.client.get("/readyz").json()["errors"], 5)
        load.until(lambda count=len(load.answers): len(load.answers) > count + 10, 10)
    assert load.refusals == []
    assert {answer["release"] for answer in load.answers} == {before["release"]}
    assert "damaged" in server.client.get("/readyz").json()["errors"]["t1"]
    assert re.search(r"^ft_route_errors(\{.*\})? 1\.0$", server.client.get("/metrics").text, re.M)
    refused = server.ask(task="t1", inputs=TEXTS, model_version=digest[:12])
    assert refused.status_code in (404, 503)
    back_to_first(world, server)
    assert server.client.get("/readyz").json()["errors"] == {}


def talk(server: Server, said: list[str]) -> None:
    """Chat in streams until the server is gone; names of the answers whose end came go to `said`."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 12, "stream": True}
    try:
        while True:
            with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
                for line in response.iter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {"choices": []}
                    if any(choice["finish_reason"] for choice in event["choices"]):
                        said.append(event["prediction_id"])
    except httpx.TransportError:
        return


def test_every_answer_survives_a_kill_and_a_term_ends_cleanly(world: Any, server: Server) -> None:
    """The last one in this file: nothing is left of the server."""
    base = write_base(world.home / "base")
    folder = write_adapter(world.home / "chat", base, task="chat", seed=1)
    world.release("chat", world.lake.publish("adapter", folder, {"name": "chat"}).digest, "1")
    said: list[str] = []
    with Load(server) as load, ThreadPoolExecutor(2) as pool:
        talks = [pool.submit(talk, server, said) for _ in range(2)]
        load.until(lambda: len(load.answers) >= 25 and len(said) >= 5, 60)
        server.signal(signal.SIGKILL)
        for one in talks:
            one.result()
    server.process.wait(timeout=10)
    answered = {result["prediction_id"] for answer in load.answers for result in answer["results"]}
    stored = world.stored()
    assert len(answered) >= 25
    assert answered <= set(stored)
    assert {stored[name]["finish_reason"] for name in said} <= {"stop", "length"}
    again = start(world.home)
    try:
        with Load(again) as load:
            load.until(lambda: len(load.answers) >= 10, 30)
            again.process.send_signal(signal.SIGTERM)
            again.process.wait(timeout=20)
        assert again.process.returncode == 0
        # told to ask another instance, and at last nobody listens
        for refusal in load.refusals:
            assert isinstance(refusal, httpx.TransportError) or json.loads(refusal)["error_code"] == "not_ready"
        assert {r["prediction_id"] for a in load.answers for r in a["results"]} <= set(world.stored())
        with pytest.raises(ProcessLookupError):
            again.signal(0)
    finally:
        end(again)
    assert "Traceback" not in (world.home / "serve.log").read_text(errors="replace")
