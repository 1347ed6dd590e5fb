"""The queue in front of the engine: pieces are numbers here, computing doubles them."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from bento.batcher import Batcher, Overloaded
from bento.phases import Phases
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


async def flood(
    batcher: "Batcher[int, int, list[int]]", numbers: Sequence[int], *, task: str, caller: str = "", cost: int = 1
) -> list["asyncio.Task[list[int]]"]:
    """One request for each number."""
    tasks = [
        asyncio.create_task(batcher.submit([number], [cost], list, task=task, caller=caller)) for number in numbers
    ]
    await asyncio.sleep(0)
    return tasks


def test_a_flood_of_one_task_does_not_hold_up_another() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        many = await flood(batcher, range(1000, 1100), task="a")
        few = await flood(batcher, range(4), task="b")
        work.go.set()
        await asyncio.gather(busy, *few)
        await asyncio.gather(*many)

    work = run(test, batch_cost=4)
    assert [sum(piece < 1000 for piece in batch) for batch in work.batches[1:4]] == [2, 2, 0], "every second turn"


def test_within_a_task_callers_take_turns() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        loud = await flood(batcher, range(1000, 1020), task="a", caller="loud")
        quiet = await flood(batcher, range(2), task="a", caller="quiet")
        work.go.set()
        await asyncio.gather(busy, *loud, *quiet)

    work = run(test, batch_cost=4)
    assert {0, 1} <= set(work.batches[1])


def test_turns_count_cost_so_long_texts_get_no_more_than_short_ones() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        long = await flood(batcher, range(1000, 1010), task="long", cost=10)
        short = await flood(batcher, range(30), task="short", cost=1)
        work.go.set()
        await asyncio.gather(busy, *long, *short)

    work = run(test, batch_cost=20)
    begun = [piece for batch in work.batches[1:] for piece in batch]
    first_three = begun[: begun.index(1002) + 1]
    assert sum(piece < 1000 for piece in first_three) >= 18, "as much of the short ones went before the third long one"


def test_who_comes_new_does_not_pay_for_those_who_were_there_before() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        for _ in range(5):
            await asyncio.gather(*await flood(batcher, range(20), task="old"))
        busy = await work.hold(batcher)
        old, new = await flood(batcher, [1], task="old"), await flood(batcher, range(1000, 1010), task="new")
        work.go.set()
        await asyncio.gather(busy, *old, *new)

    assert 1 in run(test, batch_cost=4).batches[-3]


def test_a_request_not_begun_by_its_deadline_is_not_computed() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        phases = Phases()
        late = asyncio.create_task(batcher.submit([1], [1], list, deadline=time.monotonic() + 0.05))
        there = asyncio.create_task(batcher.submit([2], [1], list, deadline=time.monotonic() + 60, phases=phases))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.1, work.go.set)
        await busy
        for attempt in (late, batcher.submit([3], [1], list, deadline=time.monotonic() - 1)):
            with pytest.raises(RequestError) as caught:
                await attempt
            assert (caught.value.error_code, caught.value.status) == ("deadline_exceeded", 504)
        assert await there == [4]
        assert batcher.waiting == 0
        assert [phase.name for phase in phases.spent] == ["queue", "compute", "log"]
        assert all(phase.start <= phase.end for phase in phases.spent)

    assert run(test).batches == [[100], [2]]


def test_who_could_not_be_answered_in_time_is_told_at_once() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        await ask(batcher, [1])
        batcher._rate = 10.0  # as if 10 tokens per second had been measured
        busy = await work.hold(batcher)
        flooded = await flood(batcher, range(100), task="a", cost=4)
        assert batcher.expected_wait("a", 100) == pytest.approx(50.0)
        assert batcher.expected_wait("b", 10) == pytest.approx(2.0), "half of the engine is for b"
        with pytest.raises(Overloaded) as caught:
            await batcher.submit([5], [100], list, task="a", deadline=time.monotonic() + 20)
        assert caught.value.retry_after == pytest.approx(30, abs=1)
        mine = asyncio.create_task(batcher.submit([6], [10], list, task="b", deadline=time.monotonic() + 20))
        await asyncio.sleep(0)
        work.go.set()
        assert await mine == [12]
        await asyncio.gather(busy, *flooded)

    run(test, patience=100.0)


def test_a_flood_of_one_task_leaves_room_in_the_queue_for_others() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        busy = await work.hold(batcher)
        flooded = await flood(batcher, range(20), task="a")
        others = await flood(batcher, range(100, 120), task="b")
        work.go.set()
        got = await asyncio.gather(*flooded, return_exceptions=True)
        assert sum(isinstance(one, Overloaded) for one in got) == 10
        got = await asyncio.gather(*others, return_exceptions=True)
        assert sum(isinstance(one, Overloaded) for one in got) == 15, "half of the queue's room"
        await busy

    run(test, most_waiting=10)


def test_a_request_with_too_many_tokens_is_refused_and_cancelled_ones_make_room() -> None:
    async def test(work: Work, batcher: "Batcher[int, int, list[int]]") -> None:
        with pytest.raises(RequestError) as caught:
            await ask(batcher, [1] * 11)
        assert (caught.value.error_code, caught.value.status) == ("input_too_large", 413)
        busy = await work.hold(batcher)
        (gone,) = await queued(batcher, [1] * 9)
        assert batcher.waiting == 9
        gone.cancel()
        await asyncio.wait([gone])
        assert batcher.waiting == 0
        work.go.set()
        await busy

    run(test, most_cost=10)
