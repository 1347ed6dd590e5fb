"""Requests to tasks that write, on their way to the engine and back: limits, filters, waiting, embeddings, streams."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bento.adapter_files import read_reference
from bento.adapters import BasePool
from bento.content_filter import ContentFilter
from bento.embedding import Embedder
from bento.endpoints.openai_stream import ChatEvents, written_events
from bento.generation.engine import Generator
from bento.phases import Phases
from bento.protocol import Parameters
from bento.request_log import Prediction
from bento.routing import RouteEntry
from bento.texts import Asked, Prompt, Prompted, Work, Writer
from ft_resources.errors import RequestError
from tests.bento.generation.conftest import Tiny

ENTRY = RouteEntry(adapter="odd", model_version="1", release_id="r", share=1.0)
ASKED = Asked("odd", None, "trace", 0.0)


@pytest.fixture
def make(tiny: Tiny) -> Iterator[Callable[..., Writer]]:
    """Writers with an engine of their own."""
    engines: list[Generator] = []

    def make(tokens: int = 10_000, content_filter: ContentFilter | None = None, **settings: Any) -> Writer:
        engines.append(Generator(tiny.base, "fp32", **settings))
        adapter = engines[-1].load("odd", tiny.adapters["odd"])
        return Writer(ENTRY, engines[-1], adapter, tokens, content_filter)

    yield make
    for engine in engines:
        engine.close()


def prompted(writer: Writer, texts: Sequence[str], tokens: int = 4, **more: Any) -> Prompted:
    parameters = Parameters(max_tokens=tokens, temperature=1.0, seed=1)
    return writer.prompted(ASKED, texts, parameters, raw=True, **more)


def test_a_request_of_many_inputs_waits_for_its_own_when_the_queue_is_full(make: Callable[..., Writer]) -> None:
    writer = make(most_rows=1, most_waiting=1)
    work = Work(prompted(writer, [f"A house {number}" for number in range(12)]))
    results = work.future.result(60)
    assert [type(one) for one in results] == [Prediction] * 12
    assert [one.input for one in results if isinstance(one, Prediction)] == [f"A house {one}" for one in range(12)]


def test_an_engine_that_was_closed_fails_the_inputs(make: Callable[..., Writer]) -> None:
    writer = make()
    asked = prompted(writer, ["A house", "A flat"])
    writer.engine.close()
    assert not writer.engine.alive
    results = Work(asked).future.result(60)
    assert [one.error_code for one in results if isinstance(one, RequestError)] == ["internal"] * 2


def test_a_pool_with_a_closed_engine_is_not_alive(tiny: Tiny) -> None:
    pool = BasePool(precision="fp32")
    engine = pool.engine(read_reference(tiny.adapters["odd"]))
    assert pool.alive
    assert isinstance(engine, Generator)
    engine.close()
    assert not pool.alive


def test_the_tokens_of_all_prompts_together_are_bounded(make: Callable[..., Writer]) -> None:
    writer = make(tokens=10)
    count = len(writer.engine.tokens("A house"))
    assert count <= 5 < count * 6
    prompted(writer, ["A house"])
    with pytest.raises(RequestError, match="at most 10 tokens") as caught:
        prompted(writer, ["A house"] * 6)
    assert (caught.value.error_code, caught.value.status) == ("input_too_large", 413)


def test_a_schema_is_refused_before_anything_is_submitted(make: Callable[..., Writer]) -> None:
    with pytest.raises(RequestError, match="cannot be followed"):
        prompted(make(), ["A house"], schema={"type": "strin"})


def test_written_texts_are_filtered_outside_the_engines_thread(make: Callable[..., Writer]) -> None:
    threads: list[str] = []

    def refuse(task: str, texts: Sequence[str], direction: str, /) -> str | None:
        threads.append(threading.current_thread().name)
        return "never" if direction == "output" else None

    asked = prompted(make(content_filter=ContentFilter(refuse)), ["A house", "A flat"])
    results = asked.checked(Work(asked).future.result(60))
    assert [one.error_code for one in results if isinstance(one, RequestError)] == ["content_filtered"] * 2
    assert set(threads) == {threading.current_thread().name}


def test_embeddings_are_bounded_in_tokens_and_in_number(make: Callable[..., Writer]) -> None:
    writer, embedder = make(), Embedder(most_tokens=20, most_waiting=2)
    try:
        done = embedder.submit(writer, ["A house", "A flat", "A house"]).result(60)
        assert done.vectors.shape == (3, writer.engine.hidden)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(done.vectors[0], done.vectors[2])
        assert done.tokens == sum(len(writer.engine.tokens(text)) for text in ("A house", "A flat", "A house"))
        with pytest.raises(RequestError, match="at most 20 tokens"):
            embedder.submit(writer, ["A house in the old town"] * 30).result(60)
        with writer.engine._computing:  # type: ignore[attr-defined]  # no embedding comes to an end
            first, second = (embedder.submit(writer, ["A house"] * 3) for _ in range(2))
            with pytest.raises(RequestError, match="on their way") as caught:
                embedder.submit(writer, ["A flat"])
            assert caught.value.status == 503
            first.cancel()
            third = embedder.submit(writer, ["A flat"])
        assert not wait([second, third], 60).not_done
        assert third.result().vectors.any()
    finally:
        embedder.close()


class Recorder:
    """Takes what is recorded."""

    def __init__(self) -> None:
        self.predictions: list[Prediction] = []

    def record(self, answers: Any) -> None:
        self.predictions += [one for answer in answers for one in answer.predictions]


def test_a_stream_ends_at_its_deadline_and_is_recorded(make: Callable[..., Writer]) -> None:
    writer, recorder = make(), Recorder()
    asked = prompted(writer, ["A house"], tokens=400)
    state = SimpleNamespace(deadline=time.monotonic() + 600, phases=Phases(), trace_id="trace", outcome="")
    request: Any = SimpleNamespace(state=state, url=SimpleNamespace(path="/v1/chat/completions"))
    backend: Any = SimpleNamespace(scorer=recorder)

    async def read() -> list[Any]:
        stream = written_events(request, backend, asked, cast(Prompt, asked.prompts[0]), ChatEvents({}, True))
        told = [await anext(stream), await anext(stream)]
        state.deadline = time.monotonic()
        told += [one async for one in stream]
        assert told.pop() == b"data: [DONE]\n\n"
        return [json.loads(one.removeprefix(b"data: ")) for one in told]

    *pieces, end, usage = asyncio.run(read())
    assert end["choices"][0]["finish_reason"] == "length"
    (prediction,) = recorder.predictions
    assert prediction.text is not None
    assert prediction.text.finish_reason == "cancelled"
    assert prediction.text.output.startswith("".join(one["choices"][0]["delta"]["content"] for one in pieces))
    assert usage["usage"]["completion_tokens"] == prediction.text.completion_tokens < 400
    assert state.outcome == "deadline_exceeded"
    assert {one.name for one in state.phases.spent} == {"queue", "compute", "log"}


def test_a_stream_nobody_reads_computes_nothing(make: Callable[..., Writer]) -> None:
    asked = prompted(make(), ["A house"])
    request: Any = SimpleNamespace(state=SimpleNamespace())
    backend: Any = SimpleNamespace(scorer=Recorder())

    async def leave() -> None:
        await written_events(request, backend, asked, cast(Prompt, asked.prompts[0]), ChatEvents({}, False)).aclose()

    asyncio.run(leave())
    assert not asked.engine.running and not asked.engine.waiting  # type: ignore[attr-defined]
