"""How real servers begin and end, agree on routes, and tell what they did."""

import http.server
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bento.tracing import trace_number
from tests.bento.servers import Server, end, start

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET_INPUT = "a sentence that no log may hold"


@dataclass
class Receiver:
    """An OTLP receiver: takes spans over HTTP and decodes them."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def of(self, trace: bytes, seconds: float = 20) -> dict[str, Any]:
        """Spans of one trace by name, once its server span has come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = {span.name: span for span in self.spans if span.trace_id == trace}
            if "POST /predict" in found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"no spans of {trace.hex()} came")


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    import gzip

    receiver = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            receiver.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    yield receiver
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def world(make_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    world = make_world(tmp_path_factory.mktemp("operations"))
    world.release("t1", world.first, "1")
    world.release("t2", world.other, "1")
    yield world
    world.ledger.close()


@pytest.fixture(scope="module")
def server(world: Any, receiver: Receiver) -> Iterator[Server]:
    """Two workers that log JSON lines and export traces."""
    server = start(world.home, FT_WORKERS="2", FT_LOG="json", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url)
    yield server
    end(server)


def workers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in children if "_bentoml_impl.worker.service" in " ".join(one.cmdline())]


def lines(server: Server) -> list[dict[str, Any]]:
    """Lines of the log that are requests. Of one that is being written a reader may see what fits the file's page."""
    *written, _ = (server.home / "serve.log").read_text(errors="replace").split("\n")
    found = [json.loads(line) for line in written if line.startswith("{")]
    return [line for line in found if line["logger"] == "bento.requests"]


def test_a_trace_follows_a_request_through_its_phases(world: Any, server: Server, receiver: Receiver) -> None:
    parent = "00f067aa0ba902b7"
    response = server.client.post(
        "/predict", json={"task": "t1", "inputs": ["x"]}, headers={"traceparent": f"00-{TRACE}-{parent}-01"}
    )
    stored = world.stored()[response.json()["results"][0]["prediction_id"]]
    assert stored["trace_id"] == TRACE
    spans = receiver.of(bytes.fromhex(TRACE))
    assert set(spans) == {"POST /predict", "tokenise", "queue", "compute", "log"}
    root = spans["POST /predict"]
    assert root.parent_span_id == bytes.fromhex(parent)
    assert all(span.parent_span_id == root.span_id for name, span in spans.items() if span is not root)
    order = [spans[name] for name in ("tokenise", "queue", "compute", "log")]
    for before, after in itertools.pairwise(order):
        assert before.start_time_unix_nano <= before.end_time_unix_nano <= after.start_time_unix_nano + 1_000_000
    assert root.start_time_unix_nano <= order[0].start_time_unix_nano + 1_000_000
    assert abs(root.start_time_unix_nano / 1e9 - time.time()) < 60
    attributes = {one.key: one.value for one in root.attributes}
    assert attributes["ft.task"].string_value == "t1"
    assert attributes["ft.release"].string_value == response.json()["release"]
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["ft.tokens.input"].int_value > 0
    assert receiver.services == {"adapter_service"}


def test_a_request_without_a_trace_begins_one_and_an_error_is_marked(server: Server, receiver: Receiver) -> None:
    answer = server.ask(task="t1", inputs=["x"]).json()
    root = receiver.of(bytes.fromhex(answer["trace_id"]))["POST /predict"]
    assert root.parent_span_id == b""
    refused = server.ask(task="unknown", inputs=["x"]).json()
    root = receiver.of(bytes.fromhex(refused["trace_id"]))["POST /predict"]
    assert (root.status.code, root.status.message) == (2, "unknown_task")


def test_every_trace_id_stands_for_one_of_opentelemetry() -> None:
    assert trace_number(TRACE) == int(TRACE, 16)
    numbers = {trace_number(name) for name in ("order-4711", "order-4712", TRACE.upper())}
    assert len(numbers) == 3 and all(0 < number < 2**128 for number in numbers)


def test_each_request_is_one_json_line_without_what_was_said_or_shown(server: Server) -> None:
    for name, body in (("seen-0001", {"task": "t1", "inputs": [SECRET_INPUT]}), ("seen-0002", {"task": "none"})):
        server.client.post(
            "/predict", json=body, headers={"x-trace-id": name, "authorization": "Bearer ft_" + SECRET_INPUT[:10]}
        )
    answered = server.client.post("/predict", json={"task": "t1", "inputs": [SECRET_INPUT]})
    refused = server.client.post("/predict", json={"task": "none", "inputs": [SECRET_INPUT]})
    wrong = server.client.get("/v1/models", headers={"authorization": "Bearer key-of-the-tesT", "x-real-ip": "1.2.3.4"})
    until(lambda: wrong.headers["x-trace-id"] in {line["trace_id"] for line in lines(server)})  # written after answers
    by_trace = {line["trace_id"]: line for line in lines(server)}
    line = by_trace[answered.json()["trace_id"]]
    assert (line["path"], line["status"], line["outcome"], line["caller"]) == ("/predict", 200, "ok", "local")
    assert (line["task"], line["release"]) == ("t1", answered.json()["release"])
    assert line["ms"] >= line["compute_ms"] > 0
    assert by_trace[refused.json()["trace_id"]]["outcome"] == "unknown_task"
    assert (wrong.status_code, by_trace[wrong.headers["x-trace-id"]]["outcome"]) == (401, "unauthorized")
    log = (server.home / "serve.log").read_text(errors="replace")
    assert SECRET_INPUT not in log
    assert "key-of-the-tes" not in log
    assert SECRET_INPUT[:10] not in log


def test_phases_tokens_and_the_process_are_measured_by_release(world: Any, server: Server) -> None:
    release = server.ask(task="t1", inputs=["one", "two"]).json()["release"]
    text = server.client.get("/metrics").text
    labels = f'adapter="{world.first[:12]}",%srelease="{release}",task="t1",version="1"'

    def value(name: str, more: str = "") -> float:
        match = re.search(rf"^{name}{{{labels % more}}} (\S+)$", text, re.M)
        assert match is not None, text
        return float(match[1])

    for phase in ("tokenise", "queue", "compute", "log"):
        assert value("ft_phase_seconds_count", f'phase="{phase}",') >= 1
    assert value("ft_predictions_total") >= 2
    assert value("ft_tokens_total", 'direction="input",') >= 6
    assert value("ft_requests_total", 'outcome="ok",') >= 1
    for name, least in (("ft_cpu_seconds", 0.5), ("ft_memory_bytes", 1e8)):
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        assert found is not None and float(found[1]) > least


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="of Linux")
def test_threads_that_work_do_not_take_the_core_from_each_other(server: Server) -> None:
    def used(worker: psutil.Process) -> dict[int, float]:
        return {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}

    before = [used(worker) for worker in workers(server)]
    for _ in range(20):
        server.ask(task="t1", inputs=["many words to read"] * 64)
    after = [used(worker) for worker in workers(server)]
    busiest = {
        max(now, key=lambda thread: now[thread] - then.get(thread, 0.0))
        for now, then in zip(after, before, strict=True)
    }
    loops = {worker.pid for worker in workers(server)}
    assert busiest - loops, "no thread computes beside the event loop"
    assert {os.sched_getscheduler(thread) for thread in busiest | loops} == {os.SCHED_BATCH}


def test_workers_agree_on_a_new_route(world: Any, server: Server) -> None:
    assert len(workers(server)) == 2
    release = world.release("t1", world.second, "2")
    until = time.monotonic() + 20.0
    answers: list[str] = []
    while answers[-30:] != [release] * 30 and time.monotonic() < until:
        # a connection each: the workers share the listening socket
        with httpx.Client(base_url=server.client.base_url, timeout=30) as client:
            answer = client.post("/predict", json={"task": "t1", "inputs": ["x"], "user": "ann"}).json()
        answers.append(answer["release"])
    world.release("t1", world.first, "1")
    assert answers[-30:] == [release] * 30
    busy = [sum(worker.cpu_times()[:2]) for worker in workers(server)]
    assert min(busy) > 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is shared")
def test_workers_have_weights_in_memory_once(server: Server) -> None:
    found = [one for worker in workers(server) for one in worker.memory_maps() if one.path.endswith(".weights")]
    assert len(found) == 2
    assert found[0].path == found[1].path
    assert max(one.rss for one in found) > 20e6, "the embeddings at least"
    assert [one.anonymous for one in found] == [0, 0], "neither has pages of its own"


@pytest.mark.slow
def test_a_term_refuses_new_requests_answers_those_in_flight_and_resets_none(
    make_world: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = make_world(tmp_path_factory.mktemp("drained"))
    world.release("t1", world.first, "1")
    server = start(world.home, FT_DRAIN_SECONDS="2")
    statuses: list[int] = []
    failures: list[Exception] = []
    drained = threading.Event()
    large = {"task": "t1", "inputs": ["a long text of many words " * 40] * 256}

    def ask_until_refused() -> None:
        with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
            for number in range(10_000):
                try:
                    response = client.post("/predict", json={"task": "t1", "inputs": [f"text {number}"]})
                except httpx.HTTPError as error:
                    failures.append(error)
                    return
                statuses.append(response.status_code)
                if response.status_code == 503:
                    assert response.json()["error_code"] == "not_ready"
                    assert int(response.headers["retry-after"]) >= 1
                    drained.set()
                    return

    slow: list[httpx.Response] = []

    def ask_much() -> None:
        slow.append(httpx.post(f"{server.client.base_url}/predict", json=large, timeout=120))

    threads = [threading.Thread(target=ask_until_refused) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) >= 20)
        threads.append(threading.Thread(target=ask_much))
        threads[-1].start()
        until(lambda: waiting(server) > 0)
        server.process.send_signal(signal.SIGTERM)
        assert drained.wait(20)
        probe = httpx.get(f"{server.client.base_url}/readyz", timeout=20)
        assert (probe.status_code, probe.json()["ready"]) == (503, False)
        assert httpx.get(f"{server.client.base_url}/livez", timeout=20).status_code == 200
        for thread in threads:
            thread.join(120)
        server.process.wait(30)
    finally:
        end(server)
    assert failures == []
    assert set(statuses) == {200, 503}
    assert [response.status_code for response in slow] == [200], "what was in flight is answered"
    assert {one["prediction_id"] for one in slow[0].json()["results"]} <= set(world.stored())
    world.ledger.close()
    assert server.process.returncode == 0


def waiting(server: Server) -> float:
    text = httpx.get(f"{server.client.base_url}/metrics", timeout=20).text
    found = re.search(r"^ft_waiting_tokens(?:{[^}]*})? (\S+)$", text, re.M)
    return 0.0 if found is None else float(found[1])


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_do_not_outlive_a_killed_supervisor(server: Server) -> None:
    """The last one in this file: nothing is left of the server."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    try:
        assert workers(server)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=15)
        assert alive == []
    finally:
        for one in children:
            if one.is_running():
                one.kill()
