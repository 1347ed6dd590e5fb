"""Requests in flight, and what of them the next pass holds."""

import math
import random
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
