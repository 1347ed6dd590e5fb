"""Batches requests without waiting: an idle engine starts at once, a busy one finds the next batch in the queue.

One thread computes, one writes the log, so the next batch is computed while the last one is recorded. Waiting
requests take turns: each batch takes a few texts of every request, so a large one does not hold up the small ones.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ft_resources.errors import RequestError

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Answer = TypeVar("Answer")

SLICE = 8
"""Texts of one request that enter a batch before the next request has its turn."""


class Overloaded(RequestError):
    """The queue is full, or the request waited for too long.

    Args:
        retry_after: Seconds after which it is worth asking again.
    """

    def __init__(self, what: str, retry_after: int) -> None:
        super().__init__("overloaded", what, status=503, mend=f"Try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(eq=False)
class Ticket(Generic[Piece, Result, Answer]):
    """A request in the queue."""

    pieces: Sequence[Piece]
    costs: Sequence[int]
    finish: Callable[[Sequence[Result]], Answer]
    future: "asyncio.Future[Answer]"
    arrived: float
    taken: int = 0
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
        most_waiting: Beyond this cost in the queue a request is refused, unless the queue is empty.
        patience: Seconds in the queue after which a request is refused.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Piece]], Sequence[Result | RequestError]],
        record: Callable[[Sequence[Answer]], None],
        *,
        batch_cost: int = 2048,
        most_waiting: int = 131_072,
        patience: float = 30.0,
    ) -> None:
        self._compute, self._record = compute, record
        self._batch_cost, self._most_waiting, self._patience = batch_cost, most_waiting, patience
        self._queue: deque[Ticket[Piece, Result, Answer]] = deque()
        self._waiting = 0
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
    def retry_after(self) -> int:
        """Whole seconds in which the queue should be worked off, from the measured rate; at least 1."""
        return max(1, math.ceil(self._waiting / self._rate)) if self._rate else 1

    async def submit(
        self, pieces: Sequence[Piece], costs: Sequence[int], finish: Callable[[Sequence[Result]], Answer]
    ) -> Answer:
        """The answer to one request; cancelling the caller takes it out of the queue.

        Args:
            finish: Makes the answer of the results, in the order of `pieces`; called in the recording thread.

        Raises:
            Overloaded: The queue is full, or the request waited for too long.
            Exception: What computing, finishing or recording this request raised.
        """
        cost = sum(costs)
        if self._waiting and self._waiting + cost > self._most_waiting:
            raise Overloaded("too many requests are waiting", self.retry_after)
        ticket = Ticket(pieces, costs, finish, asyncio.get_running_loop().create_future(), time.monotonic())
        self._queue.append(ticket)
        self._waiting += cost
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())
        return await ticket.future

    async def close(self) -> None:
        """Finish what is in the queue and end the threads."""
        if self._pump is not None:
            await self._pump
        await asyncio.gather(*self._recording)
        self._compute_thread.shutdown()
        self._record_thread.shutdown()

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
            rate = cost / max(time.monotonic() - started, 1e-6)
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
            done = self._deliver(batch, computing.result())
            if len(self._recording) >= 2:
                await asyncio.wait(self._recording, return_when=asyncio.FIRST_COMPLETED)
            if done:
                task = asyncio.create_task(self._answer(done))
                self._recording.add(task)
                task.add_done_callback(self._recording.discard)

    def _take(self) -> list[tuple[Ticket[Piece, Result, Answer], int]]:
        """The next batch: places in tickets, a slice of each in turn until the batch is full."""
        batch: list[tuple[Ticket[Piece, Result, Answer], int]] = []
        room = self._batch_cost
        while self._queue and room > 0:
            ticket = self._queue.popleft()
            if self._stale(ticket):
                self._waiting -= ticket.waiting_cost
                continue
            for _ in range(SLICE):
                cost = ticket.costs[ticket.taken]
                if batch and cost > room:
                    self._queue.appendleft(ticket)
                    return batch
                batch.append((ticket, ticket.taken))
                ticket.taken += 1
                room -= cost
                self._waiting -= cost
                if ticket.taken == len(ticket.pieces):
                    break
            else:
                self._queue.append(ticket)
        return batch

    def _stale(self, ticket: Ticket[Piece, Result, Answer]) -> bool:
        """Cancelled, failed, or waiting for too long without having been started."""
        if ticket.future.done():
            return True
        if ticket.taken == 0 and time.monotonic() - ticket.arrived > self._patience:
            waited = f"the request waited for {self._patience:g} seconds"
            ticket.future.set_exception(Overloaded(waited, self.retry_after))
            return True
        return False

    def _deliver(
        self, batch: Sequence[tuple[Ticket[Piece, Result, Answer], int]], results: Sequence[Result | RequestError]
    ) -> list[Ticket[Piece, Result, Answer]]:
        """Hand out the results; the tickets that are complete now."""
        done = []
        for (ticket, _), result in zip(batch, results, strict=True):
            if ticket.future.done():
                continue
            if isinstance(result, RequestError):
                ticket.future.set_exception(result)
                continue
            ticket.results.append(result)
            if len(ticket.results) == len(ticket.pieces):
                done.append(ticket)
        return done

    async def _answer(self, done: Sequence[Ticket[Piece, Result, Answer]]) -> None:
        recording = asyncio.get_running_loop().run_in_executor(self._record_thread, self._finish, done)
        await asyncio.wait([recording])
        failure = recording.exception()
        if failure is not None:
            _fail(done, failure)
            return
        for ticket, answer in zip(done, recording.result(), strict=True):
            if not ticket.future.done():
                ticket.future.set_result(answer)

    def _finish(self, done: Sequence[Ticket[Piece, Result, Answer]]) -> list[Answer]:
        answers = [ticket.finish(ticket.results) for ticket in done]
        self._record(answers)
        return answers


def _fail(tickets: Sequence[Ticket[Piece, Result, Answer]], failure: BaseException) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_exception(failure)
