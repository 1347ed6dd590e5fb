"""The queue in front of the engine: pieces are numbers here, computing doubles them."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bento.batcher import Batcher, Overloaded
from ft_resources.errors import RequestError

BAD = -1


class Work:
    """Computing that can be held up, and a record of what was asked."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.batches: list[list[int]] = []
        self.records: list[list[list[int]]] = []
        self.record_error: RequestError | None = None

    def compute(self, pieces: Sequence[int]) -> list[int | RequestError]:
        self.batches.append(list(pieces))
        self.started.set()
        assert self.go.wait(10)
        return [RequestError("internal", "bad piece") if piece == BAD else 2 * piece for piece in pieces]

    def record(self, answers: Sequence[list[int]]) -> None:
        if self.record_error is not None:
            raise self.record_error
        self.records.append([list(answer) for answer in answers])

    async def hold(self, batcher: "Batcher[int, int, list[int]]") -> "asyncio.Task[list[int]]":
        """A request that keeps the engine busy until `go` is set."""
        self.go.clear()
        self.started.clear()
        busy = asyncio.create_task(ask(batcher, [100]))
        assert await asyncio.to_thread(self.started.wait, 10)
        return busy


async def ask(batcher: "Batcher[int, int, list[int]]", numbers: list[int], cost: int = 1) -> list[int]:
    return await batcher.submit(numbers, [cost] * len(numbers), list)


def run(test: Callable[[Work, "Batcher[int, int, list[int]]"], Any], **settings: Any) -> Work:
    work = Work()

    async def main() -> None:
        batcher: Batcher[int, int, list[int]] = Batcher(work.compute, work.record, **settings)
        try:
            await asyncio.wait_for(test(work, batcher), 20)
        finally:
            work.go.set()
            await batcher.close()

    asyncio.run(main())
    return work


async def queued(batcher: "Batcher[int, int, list[int]]", *requests: list[int]) -> list["asyncio.Task[list[int]]"]:
    tasks = [asyncio.create_task(ask(batcher, numbers)) for numbers in requests]
    await asyncio.sleep(0)  # one turn of the loop: every task has submitted
    return tasks


def test_an_idle_engine_starts_at_once_and_a_busy_one_collects() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        waiting = await queued(batcher, [1, 2], [3], [4])
        work.go.set()
        assert await busy == [200]
        assert await asyncio.gather(*waiting) == [[2, 4], [6], [8]]

    work = run(test)
    assert work.batches == [[100], [1, 2, 3, 4]]
    assert work.records == [[[200]], [[2, 4], [6], [8]]], "all answers of a batch in one record"


def test_a_batch_keeps_its_budget_and_a_large_request_lets_small_ones_pass() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        large, small = await queued(batcher, list(range(40)), [7])
        work.go.set()
        assert await small == [14]
        assert not large.done()
        assert await large == [2 * number for number in range(40)]
        await busy

    work = run(test, batch_cost=10)
    assert max(map(len, work.batches)) <= 10
    assert 7 in work.batches[1], "the small request is in the first batch after it came"


def test_a_piece_above_the_budget_runs_alone() -> None:
    async def test(_: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        assert await ask(batcher, [1, 2], cost=50) == [2, 4]

    assert run(test, batch_cost=10).batches == [[1], [2]]


def test_one_bad_piece_fails_its_own_request_only() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        bad, good = await queued(batcher, [5, BAD], [6])
        work.go.set()
        await busy
        assert await good == [12]
        with pytest.raises(RequestError, match="bad piece"):
            await bad

    assert [[12]] in run(test).records


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        (waiting,) = await queued(batcher, [1, 2, 3])
        with pytest.raises(Overloaded) as caught:
            await ask(batcher, [4, 5, 6])
        assert caught.value.retry_after >= 1
        assert caught.value.status == 503
        work.go.set()
        await asyncio.gather(busy, waiting)
        assert batcher.waiting == 0
        assert await ask(batcher, list(range(50))) == [2 * number for number in range(50)], "an empty queue takes any"

    run(test, most_waiting=4)


def test_an_impatient_queue_gives_up_on_what_it_did_not_start() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        (waiting,) = await queued(batcher, [1])
        asyncio.get_running_loop().call_later(0.1, work.go.set)
        assert await busy == [200]
        with pytest.raises(Overloaded, match="waited"):
            await waiting

    assert run(test, patience=0.05).batches == [[100]]


def test_a_cancelled_caller_is_not_computed() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        gone, there = await queued(batcher, [1], [2])
        gone.cancel()
        await asyncio.wait([gone])
        work.go.set()
        await busy
        assert await there == [4]
        assert batcher.waiting == 0

    assert run(test).batches == [[100], [2]]


def test_what_cannot_be_recorded_is_not_answered() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        work.record_error = RequestError("log_unavailable", "disk full", status=503)
        with pytest.raises(RequestError, match="disk full"):
            await ask(batcher, [1])
        work.record_error = None
        assert await ask(batcher, [1]) == [2]

    assert run(test).records == [[[2]]]


def test_a_fault_reaches_its_callers_and_the_queue_goes_on() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        with pytest.raises(TypeError):
            await batcher.submit([None], [1], list)  # type: ignore[list-item]
        assert await ask(batcher, [3]) == [6]

    run(test)
