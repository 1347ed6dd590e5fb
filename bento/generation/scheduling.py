"""Requests in flight, and what of them the next pass holds."""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from bento.generation.adapters import GenerationAdapter
from bento.generation.answer import Answer
from bento.generation.cache import Place
from bento.generation.grammar import Matcher
from bento.generation.interface import OnText, Sampling
from bento.generation.sampling import Choice
from bento.generation.text import TextStream


class Request(Answer):
    """An answer of the torch engine."""

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
        super().__init__(len(ids), sampling, stream, matcher, on_text)
        self.prompt, self.adapter = list(ids), adapter
        self.place: Place | None = None
        self._wake = wake
        self._random = random.Random(sampling.seed)

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

    def cancel(self) -> None:
        """See `interface.Generation`."""
        super().cancel()
        self._wake()

    def choice(self) -> Choice:
        """How its next token is chosen; asked once for each."""
        return Choice(self.sampling.temperature, self.sampling.top_p, self._random.random())


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
