"""Requests in flight, and what of them the next pass holds."""

import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from bento.generation.adapters import GenerationAdapter
from bento.generation.cache import Place
from bento.generation.grammar import Matcher
from bento.generation.interface import Completion, OnText, Sampling
from bento.generation.sampling import Choice
from bento.generation.text import TextStream
from ft_resources.errors import FtError, ServiceError


class Request:
    """One answer on its way; what a caller holds of it is `interface.Generation`."""

    def __init__(
        self,
        ids: Sequence[int],
        adapter: GenerationAdapter | None,
        sampling: Sampling,
        stream: TextStream,
        matcher: Matcher | None,
        on_text: OnText | None,
        wake: Callable[[], None],
    ) -> None:
        self.future: Future[Completion] = Future()
        self.prompt, self.adapter, self.sampling = list(ids), adapter, sampling
        self.place: Place | None = None
        self.began: float | None = None
        self.last = -1
        """The token written last."""
        self.matcher = matcher
        self._stream, self._on_text, self._wake = stream, on_text, wake
        self._random = random.Random(sampling.seed)
        self._written = list[int]()
        self._logprobs = 0.0

    @property
    def at(self) -> Place:
        """Its slot, once it has joined."""
        assert self.place is not None
        return self.place

    @property
    def task(self) -> str:
        """Of its adapter; empty for the base model itself."""
        return "" if self.adapter is None else self.adapter.manifest.task

    @property
    def most(self) -> int:
        """Tokens it can come to."""
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the model has not read."""
        return max(0, len(self.prompt) - (self.place.kept if self.place else 0))

    @property
    def over(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """See `interface.Generation`."""
        self.future.cancel()
        self._wake()

    def choice(self) -> Choice:
        """How its next token is chosen; asked once for each."""
        return Choice(self.sampling.temperature, self.sampling.top_p, self._random.random())

    def write(self, token: int, logprob: float, ends: frozenset[int]) -> None:
        """Take the next token; the future is done if it was the last one."""
        if not math.isfinite(logprob):
            self.fail(ServiceError("the model's output is not finite", mend="Train the adapter again."))
            return
        self.last = token
        self._written.append(token)
        self._logprobs += logprob
        if token in ends:
            self._finish("stop")
            return
        if self.matcher is not None and not self.matcher.accept(token):
            self.fail(ServiceError("the JSON schema became too complex to follow", mend="Simplify it."))
            return
        self._show(self._stream.add(token))
        if self._stream.stopped or (self.matcher is not None and self.matcher.complete):
            self._finish("stop")
        elif len(self._written) == self.sampling.max_tokens:
            self._finish("length")

    def fail(self, error: FtError) -> None:
        """End it with an error."""
        if not self.over and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def _finish(self, reason: str) -> None:
        self._show(self._stream.end())
        if self.over or not self.future.set_running_or_notify_cancel():
            return
        self.future.set_result(
            Completion(
                text=self._stream.text,
                finish_reason="stop" if reason == "stop" else "length",
                prompt_tokens=len(self.prompt),
                completion_tokens=len(self._written),
                mean_logprob=self._logprobs / len(self._written),
                token_ids=tuple(self._written),
            )
        )

    def _show(self, text: str) -> None:
        if not text or self._on_text is None or self.over:
            return
        try:
            self._on_text(text)
        except Exception as error:  # the caller's code: whatever is wrong with it, its neighbours get their answers
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)


class Waiting:
    """Requests without a slot: tasks take turns, and within a task whoever came first goes first.

    Not safe in several threads.
    """

    def __init__(self) -> None:
        self._by_task: OrderedDict[str, deque[Request]] = OrderedDict()
        """The task whose turn it is stands first; none is empty."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, request: Request) -> None:
        self._by_task.setdefault(request.task, deque()).append(request)
        self._size += 1

    def first(self) -> Request | None:
        """Whose turn it is; the same one until it is removed or over."""
        while self._by_task:
            request = next(iter(self._by_task.values()))[0]
            if not request.over:
                return request
            self.remove(request)
        return None

    def remove(self, request: Request) -> None:
        """Take it out; its task's next turn comes after those of the others."""
        queue = self._by_task.pop(request.task)
        queue.remove(request)
        self._size -= 1
        if queue:
            self._by_task[request.task] = queue

    def drop_over(self) -> None:
        """Take out those that were given up."""
        left = {task: deque(one for one in queue if not one.over) for task, queue in self._by_task.items()}
        self._by_task = OrderedDict((task, queue) for task, queue in left.items() if queue)
        self._size = sum(map(len, self._by_task.values()))

    def clear(self) -> list[Request]:
        """Take all out."""
        requests = [one for queue in self._by_task.values() for one in queue]
        self._by_task.clear()
        self._size = 0
        return requests


def shares(reading: Sequence[Request], tokens: int) -> list[tuple[Request, int]]:
    """Which requests read how many of the next `tokens` prompt tokens.

    The one that came first gets at least half, then the shortest come, so that a long prompt stops nobody for long and
    is itself never stopped.

    Args:
        reading: Requests with unread tokens, in the order they came.
    """
    if not reading:
        return []
    first, *others = reading
    given = {first: min(first.unread, tokens if not others else max(1, tokens // 2))}
    left = tokens - given[first]
    for request in sorted(others, key=lambda one: one.unread):
        if left <= 0:
            break
        given[request] = min(request.unread, left)
        left -= given[request]
    given[first] = min(first.unread, given[first] + left)
    return [(request, given[request]) for request in reading if request in given]
