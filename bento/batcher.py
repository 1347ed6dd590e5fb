"""Batches requests without waiting: an idle engine starts at once, a busy one finds the next batch in the queue.

One thread computes, one writes the log, so the next batch is computed while the last one is recorded. Waiting
requests take turns (`fair_queue`): each batch takes a few texts of every task, caller and request, so neither a flood
of one task nor a large request holds up the others. Who could not be answered in time is told so at once.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bento.fair_queue import FairQueue
from bento.limits import check_tokens
from bento.phases import Phases
from ft_resources.errors import RequestError

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Answer = TypeVar("Answer")

SLICE = 8
"""Texts of one request that enter a batch before the next request has its turn."""


class Overloaded(RequestError):
    """The queue is full, or the request waited or would wait for too long.

    Args:
        retry_after: Seconds after which it is worth asking again.
    """

    def __init__(self, what: str, retry_after: int) -> None:
        super().__init__("overloaded", what, status=503, mend=f"Try again in {retry_after} s.", retry_after=retry_after)


@dataclass(eq=False)
class Ticket(Generic[Piece, Result, Answer]):
    """A request in the queue."""

    pieces: Sequence[Piece]
    costs: Sequence[int]
    finish: Callable[[Sequence[Result]], Answer]
    future: "asyncio.Future[Answer]"
    task: str
    arrived: float
    deadline: float
    phases: Phases
    taken: int = 0
    started: float = 0.0
    dropped: bool = False
    results: list[Result] = field(default_factory=list)

    @property
    def waiting_cost(self) -> int:
        return sum(self.costs[self.taken :])


class Batcher(Generic[Piece, Result, Answer]):
    """Runs requests in shared batches; belongs to one event loop.

    Args:
        compute: Pieces of any requests -> a result, or the error that is the answer, for each; in one thread.
        record: Answers of all requests that a batch completed; they are sent when it returns; in one thread.
            An error it raises is the answer to all of them.
        batch_cost: A batch is full at this cost (tokens).
        most_waiting: Beyond this cost in the queue a request is refused if its task has its share of it already,
            unless the queue is empty.
        most_cost: Cost of the largest request that is taken.
        patience: Seconds in the queue after which a request is refused; also when that is foreseeable.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Piece]], Sequence[Result | RequestError]],
        record: Callable[[Sequence[Answer]], None],
        *,
        batch_cost: int = 2048,
        most_waiting: int = 131_072,
        most_cost: int = 131_072,
        patience: float = 30.0,
    ) -> None:
        self._compute, self._record = compute, record
        self._batch_cost, self._most_waiting, self._most_cost = batch_cost, most_waiting, most_cost
        self._patience = patience
        self._queue: FairQueue[Ticket[Piece, Result, Answer]] = FairQueue()
        self._waiting = 0
        self._by_task: Counter[str] = Counter()
        self._rate = 0.0
        self._pump: asyncio.Task[None] | None = None
        self._recording: set[asyncio.Task[None]] = set()
        self._compute_thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._record_thread = ThreadPoolExecutor(1, thread_name_prefix="record")

    @property
    def waiting(self) -> int:
        """Cost of everything in the queue."""
        return self._waiting

    @property
    def rate(self) -> float:
        """Cost computed per second, a moving average over batches that were at least half full; 0 before the first."""
        return self._rate

    def expected_wait(self, task: str, cost: int) -> float:
        """Seconds until a new request of `task` would be computed: others get no more before it than it has itself."""
        if not self._rate:
            return 0.0
        own = self._by_task[task] + cost
        return (own + sum(min(own, waiting) for name, waiting in self._by_task.items() if name != task)) / self._rate

    async def submit(
        self,
        pieces: Sequence[Piece],
        costs: Sequence[int],
        finish: Callable[[Sequence[Result]], Answer],
        *,
        task: str = "",
        caller: str = "",
        deadline: float = math.inf,
        phases: Phases | None = None,
    ) -> Answer:
        """The answer to one request; cancelling the caller takes it out of the queue.

        Args:
            finish: Makes the answer of the results, in the order of `pieces`; called in the recording thread.
            task: Tasks take turns, and within a task its callers do.
            deadline: Monotonic seconds; what is not begun by then is not computed.
            phases: Where the times of queue, compute and log are noted.

        Raises:
            Overloaded: The queue is full, or the request waited or would wait for too long.
            RequestError: `deadline_exceeded`; `input_too_large`.
            Exception: What computing, finishing or recording this request raised.
        """
        cost, now = sum(costs), time.monotonic()
        self._admit(task, cost, deadline - now)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        ticket = Ticket(pieces, costs, finish, future, task, now, deadline, phases or Phases())
        self._queue.put((task, caller), ticket)
        self._count(task, cost)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        try:
            return await future
        finally:
            self._drop(ticket)

    async def close(self) -> None:
        """Finish what is in the queue and end the threads."""
        if self._pump is not None:
            await self._pump
        await asyncio.gather(*self._recording)
        self._compute_thread.shutdown()
        self._record_thread.shutdown()

    def _admit(self, task: str, cost: int, seconds: float) -> None:
        if seconds <= 0:
            raise _too_late()
        check_tokens(cost, self._most_cost)
        if not self._waiting:
            return
        if self._waiting + cost > self._most_waiting:
            tasks = len(self._by_task.keys() | {task})
            if self._by_task[task] + cost > self._most_waiting / tasks:
                raise Overloaded("too many requests are waiting", self._retry_after(task, cost, 0.0))
        wait, limit = self.expected_wait(task, cost), min(seconds, self._patience)
        if wait > limit:
            raise Overloaded(f"it would take {wait:.1f} s", self._retry_after(task, cost, limit))

    def _retry_after(self, task: str, cost: int, limit: float) -> int:
        """Whole seconds, at least 1, after which such a request should be taken."""
        return max(1, math.ceil(self.expected_wait(task, cost) - limit))

    def _count(self, task: str, cost: int) -> None:
        self._waiting += cost
        self._by_task[task] += cost
        if self._by_task[task] == 0:
            del self._by_task[task]

    def _drop(self, ticket: Ticket[Piece, Result, Answer]) -> None:
        """Count what is left of a request whose caller does not wait any more as gone."""
        if not ticket.dropped:
            ticket.dropped = True
            self._count(ticket.task, -ticket.waiting_cost)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._take()
            if not batch:
                continue
            pieces = [ticket.pieces[place] for ticket, place in batch]
            cost = sum(ticket.costs[place] for ticket, place in batch)
            started = time.monotonic()
            computing = loop.run_in_executor(self._compute_thread, self._compute, pieces)
            await asyncio.wait([computing])
            failure = computing.exception()
            if failure is not None:  # a fault of the program: its callers get it, the queue goes on
                _fail([ticket for ticket, _ in batch], failure)
                continue
            self._learn(cost, time.monotonic() - started)
            done = self._deliver(batch, computing.result())
            if len(self._recording) >= 2:
                await asyncio.wait(self._recording, return_when=asyncio.FIRST_COMPLETED)
            if done:
                task = asyncio.create_task(self._answer(done))
                self._recording.add(task)
                task.add_done_callback(self._recording.discard)

    def _learn(self, cost: int, seconds: float) -> None:
        """Small batches are slower per token than those of a queue that is worked off: they only raise the rate."""
        rate = cost / max(seconds, 1e-6)
        if 2 * cost >= self._batch_cost:
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        elif self._rate:
            self._rate = max(self._rate, rate)

    def _take(self) -> list[tuple[Ticket[Piece, Result, Answer], int]]:
        """The next batch: places in tickets, a slice of each in turn until the batch is full."""
        batch: list[tuple[Ticket[Piece, Result, Answer], int]] = []
        room, now = self._batch_cost, time.monotonic()
        while self._queue and room > 0:
            turn = self._queue.take()
            ticket = turn.item
            if self._stale(ticket, now):
                self._queue.give_back(turn, 0, again=False)
                continue
            served = 0
            full = False
            for place in range(ticket.taken, min(ticket.taken + SLICE, len(ticket.pieces))):
                cost = ticket.costs[place]
                full = bool(batch) and cost > room
                if full:
                    break
                batch.append((ticket, place))
                room -= cost
                served += cost
                ticket.taken = place + 1
            if ticket.started == 0 and ticket.taken:
                ticket.started = now
                ticket.phases.add("queue", ticket.arrived, now)
            self._count(ticket.task, -served)
            self._queue.give_back(turn, served, again=ticket.taken < len(ticket.pieces))
            if full:
                break
        return batch

    def _stale(self, ticket: Ticket[Piece, Result, Answer], now: float) -> bool:
        """Cancelled, failed, or not begun in time."""
        if ticket.future.done():
            return True
        if ticket.taken == 0 and now > ticket.deadline:
            ticket.future.set_exception(_too_late())
        elif ticket.taken == 0 and now - ticket.arrived > self._patience:
            waited = f"the request waited for {self._patience:g} seconds"
            ticket.future.set_exception(Overloaded(waited, self._retry_after(ticket.task, 0, 0.0)))
        else:
            return False
        self._drop(ticket)
        return True

    def _deliver(
        self, batch: Sequence[tuple[Ticket[Piece, Result, Answer], int]], results: Sequence[Result | RequestError]
    ) -> list[Ticket[Piece, Result, Answer]]:
        """Hand out the results; the tickets that are complete now."""
        done = []
        now = time.monotonic()
        for (ticket, _), result in zip(batch, results, strict=True):
            if ticket.future.done():
                continue
            if isinstance(result, RequestError):
                ticket.future.set_exception(result)
                continue
            ticket.results.append(result)
            if len(ticket.results) == len(ticket.pieces):
                ticket.phases.add("compute", ticket.started, now)
                done.append(ticket)
        return done

    async def _answer(self, done: Sequence[Ticket[Piece, Result, Answer]]) -> None:
        started = time.monotonic()
        recording = asyncio.get_running_loop().run_in_executor(self._record_thread, self._finish, done)
        await asyncio.wait([recording])
        failure = recording.exception()
        if failure is not None:
            _fail(done, failure)
            return
        now = time.monotonic()
        for ticket, answer in zip(done, recording.result(), strict=True):
            ticket.phases.add("log", started, now)
            if not ticket.future.done():
                ticket.future.set_result(answer)

    def _finish(self, done: Sequence[Ticket[Piece, Result, Answer]]) -> list[Answer]:
        answers = [ticket.finish(ticket.results) for ticket in done]
        self._record(answers)
        return answers


def _too_late() -> RequestError:
    return RequestError(
        "deadline_exceeded",
        "the request could not be begun in the time the caller allows",
        status=504,
        mend="Allow more time with x-timeout-ms, or try again later.",
    )


def _fail(tickets: Sequence[Ticket[Piece, Result, Answer]], failure: BaseException) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_exception(failure)
