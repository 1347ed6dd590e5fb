"""Chats and completions as streams of events, in the form that OpenAI's clients read."""

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import Request, Response

from bento.backend import Backend, backend_of, record_cut_off
from bento.openai_protocol import Usage
from bento.protocol import error_content
from bento.request_log import Prediction
from bento.streaming import DONE, EventStream, event
from bento.texts import Prompt, Prompted, Running
from ft_resources.errors import RequestError


@dataclass(frozen=True)
class Events(ABC):
    """The events of one stream, as OpenAI's clients read them."""

    head: dict[str, Any]
    with_usage: bool
    prefix: ClassVar[str]
    """Of the stream's id."""

    @abstractmethod
    def start(self, name: str) -> bytes:
        """Before the first piece of text."""

    @abstractmethod
    def piece(self, name: str, text: str) -> bytes:
        """A piece of text."""

    @abstractmethod
    def end(self, name: str, reason: str) -> bytes:
        """After the last one."""

    def usage(self, name: str, usage: Usage) -> bytes:
        return self._event(name, [], usage=usage.model_dump())

    def _event(self, name: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self.with_usage else {}
        about = {"id": f"{self.prefix}{name}", **self.head, "prediction_id": name}
        return event(json.dumps({**about, "choices": choices, **usage, **more}, ensure_ascii=False))


class ChatEvents(Events):
    prefix = "chatcmpl-"

    def start(self, name: str) -> bytes:
        return self._delta(name, {"role": "assistant", "content": ""}, None)

    def piece(self, name: str, text: str) -> bytes:
        return self._delta(name, {"content": text}, None)

    def end(self, name: str, reason: str) -> bytes:
        return self._delta(name, {}, reason)

    def _delta(self, name: str, delta: dict[str, str], reason: str | None) -> bytes:
        return self._event(name, [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])


class CompletionEvents(Events):
    prefix = "cmpl-"

    def start(self, name: str) -> bytes:
        return b""

    def piece(self, name: str, text: str) -> bytes:
        return self._event(name, [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])

    def end(self, name: str, reason: str) -> bytes:
        return self._event(name, [{"index": 0, "text": "", "logprobs": None, "finish_reason": reason}])


def stream(request: Request, prompted: Prompted, events: Events) -> Response:
    """The answer to the one prompt as it is written; what is refused is refused before the stream begins."""
    (prompt,) = prompted.prompts
    if isinstance(prompt, RequestError):
        raise prompt
    return EventStream(written_events(request, backend_of(request), prompted, prompt, events))


async def written_events(
    request: Request, backend: Backend, prompted: Prompted, prompt: Prompt, events: Events
) -> AsyncGenerator[bytes, None]:
    """The stream of one answer, from its first piece on.

    When it is closed early the generation ends, and what there is is recorded. At the request's deadline, too; then
    the stream ends as if the answer had become as long as it may.

    Raises:
        RequestError: There is no answer, and nothing was sent yet; later an event tells it.
    """
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def hand_over(piece: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    state, name = request.state, prompt.prediction_id
    filtered = prompted.content_filter is not None  # nothing is sent before the whole was looked at
    begun = over = False
    running = Running(prompted, prompt, hand_over)
    try:
        running.generation.future.add_done_callback(lambda _: hand_over(None))
        late = False
        with state.phases.answering(lambda: running.generation.began):
            try:
                # before the first event the front keeps the time
                while (piece := await _before(state.deadline if begun else None, pieces)) is not None:
                    if filtered:
                        continue
                    if not begun:
                        begun = True
                        yield events.start(name)
                    yield events.piece(name, piece)
            except TimeoutError:
                late = True
        over = True
        try:
            with state.phases("log"):
                prediction = await asyncio.to_thread(_recorded, backend, running, late)
        except RequestError as error:
            if not begun:
                raise
            state.outcome = error.error_code
            yield event(json.dumps(error_content(error, state.trace_id, request.url.path)[0]))
            return
        text, usage = prediction.text, usage_of([prediction])
        assert text is not None
        state.predictions, state.tokens = 1, (usage.prompt_tokens, usage.completion_tokens)
        if late:
            state.outcome = "deadline_exceeded"
        if not begun:
            begun = True
            yield events.start(name)
            if text.output:
                yield events.piece(name, text.output)
        yield events.end(name, "length" if late else text.finish_reason)
        if events.with_usage:
            yield events.usage(name, usage)
        yield DONE
    finally:
        if not over:
            state.outcome = "cancelled"
            record_cut_off(backend, prompted, [running.cut_off()])


def _recorded(backend: Backend, running: Running, late: bool) -> Prediction:
    """The answer as it is recorded; `late`: what there is of it.

    Raises:
        RequestError: There is none, or it may not be told.
    """
    from bento.admitted import Answers

    prediction = running.cut_off() if late else running.outcome()
    (checked,) = running.prompted.checked([prediction])
    if isinstance(checked, RequestError):
        raise checked
    backend.scorer.record([Answers([checked])])
    return checked


async def _before(deadline: float | None, pieces: "asyncio.Queue[str | None]") -> str | None:
    """The next piece; None after the last one.

    Raises:
        TimeoutError: `deadline` (monotonic seconds) is over.
    """
    if deadline is None:
        return await pieces.get()
    left = deadline - time.monotonic()
    if left <= 0:  # also when pieces wait for a slow reader
        raise TimeoutError
    async with asyncio.timeout(left):
        return await pieces.get()


def usage_of(predictions: Sequence[Prediction]) -> Usage:
    """The tokens of some answers."""
    texts = [one.text for one in predictions if one.text is not None]
    read, wrote = sum(one.prompt_tokens for one in texts), sum(one.completion_tokens for one in texts)
    return Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)
