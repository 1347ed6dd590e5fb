"""From inputs to generated texts: prompts for one adapter, the engine's answers, and what is recorded of them."""

import functools
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bento.content_filter import ContentFilter
from bento.conversation import answer_schema, dump, parse_answer, with_context
from bento.generation.interface import Completion, Generation, Sampling, TextGenerator
from bento.limits import check_tokens
from bento.protocol import DEFAULT_TOKENS, Parameters
from bento.request_log import Prediction, Text
from bento.routing import RouteEntry
from ft_resources.errors import DataError, RequestError

if TYPE_CHECKING:
    from bento.generation.interface import Adapter

logger = logging.getLogger(__name__)
AT_ONCE = 8
"""Inputs of one request that are generated at the same time, so that a large one leaves places to others."""
NO_EMBEDDING = np.empty(0, np.float16)


@dataclass(frozen=True)
class Asked:
    """Who asks what of a task that writes texts."""

    task: str
    user: str | None
    trace_id: str
    arrived: float
    """Monotonic seconds."""
    event_time: datetime | None = None


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def informed(given: str | Sequence[Turn], context: Sequence[str]) -> list[Turn]:
    """The conversation with `context` before what is said last."""
    *before, last = [Turn("user", given)] if isinstance(given, str) else given
    return [*before, last._replace(content=with_context(last.content, context))]


@dataclass(frozen=True)
class Prompt:
    """One input, ready for the engine."""

    prediction_id: str
    input: str
    """As it is recorded: the text of a document, a raw prompt, or a conversation in canonical JSON."""
    ids: Sequence[int]


@dataclass(frozen=True, eq=False)
class Prompted:
    """A request that has its adapter and its prompts; an input that cannot be asked has its error instead."""

    asked: Asked
    entry: RouteEntry
    engine: TextGenerator
    adapter: "Adapter"
    prompts: tuple[Prompt | RequestError, ...]
    sampling: Sampling
    content_filter: ContentFilter | None = None
    """Looks at what was written before it is recorded and answered."""

    def submit(self, prompt: Prompt, on_text: Callable[[str], None]) -> Generation:
        """Raises:
        RequestError: See `TextGenerator.submit`.
        """
        return self.engine.submit(prompt.ids, self.adapter, self.sampling, on_text)

    def prediction(self, prompt: Prompt, answer: Completion) -> Prediction:
        """What is recorded and answered, if the content filter lets it pass; see `checked`."""
        text = Text(_plain(answer.text), answer.finish_reason, answer.prompt_tokens, answer.completion_tokens)
        fields = self.adapter.manifest.fields
        if fields:
            text = replace(text, fields=_parsed(text.output, fields))
        return self._recorded(prompt, text, math.exp(min(0.0, answer.mean_logprob)))

    def checked(self, results: Sequence[Prediction | RequestError]) -> list[Prediction | RequestError]:
        """The results, with an error in place of each text that the content filter refuses. May take long."""
        return [one if isinstance(one, RequestError) else self._checked(one) for one in results]

    def _checked(self, prediction: Prediction) -> Prediction | RequestError:
        if self.content_filter is not None and prediction.text is not None:
            try:
                self.content_filter.check(self.asked.task, [prediction.text.output], "output")
            except RequestError as error:
                return error
        return prediction

    def cut_off(self, prompt: Prompt, output: str) -> Prediction:
        """What is recorded of an answer whose caller went away after `output`."""
        said = _plain(output)
        tokens = len(self.engine.tokens(said)) if said else 0
        return self._recorded(prompt, Text(said, "cancelled", len(prompt.ids), tokens), 0.0)

    def _recorded(self, prompt: Prompt, text: Text, confidence: float) -> Prediction:
        asked = self.asked
        return Prediction(
            prediction_id=prompt.prediction_id,
            task=asked.task,
            release_id=self.entry.release_id,
            model_version=self.entry.model_version,
            adapter=self.entry.adapter,
            input=prompt.input,
            label="",
            confidence=confidence,
            probabilities={},
            embedding=NO_EMBEDDING,
            user=asked.user,
            trace_id=asked.trace_id,
            latency_ms=(time.monotonic() - asked.arrived) * 1000,
            event_time=asked.event_time or datetime.now(UTC),
            text=text,
        )


@dataclass(frozen=True, eq=False)
class Writer:
    """The adapter that writes the answers to a request."""

    entry: RouteEntry
    engine: TextGenerator
    adapter: "Adapter"
    most_tokens: int
    """Of all prompts of one request."""
    content_filter: ContentFilter | None = None

    @property
    def extracts(self) -> bool:
        return self.adapter.manifest.type == "extraction"

    def prompted(
        self,
        asked: Asked,
        inputs: Sequence[str | Sequence[Turn]],
        parameters: Parameters | None,
        *,
        raw: bool = False,
        schema: Mapping[str, Any] | None = None,
    ) -> Prompted:
        """The request with its prompts and its schema compiled; may take long.

        Args:
            inputs: Texts or conversations.
            raw: The texts are to be continued, not to be answered.
            schema: JSON schema that the answers fit; an extraction has its own.

        Raises:
            RequestError: `content_filtered`; `input_too_large`, the prompts have too many tokens together;
                `invalid_request`, the schema cannot be followed.
        """
        if self.content_filter is not None:
            said = [one for given in inputs for one in ([given] if isinstance(given, str) else _contents(given))]
            self.content_filter.check(asked.task, said, "input")
        prompts = []
        tokens = 0
        for place, one in enumerate(inputs):
            prompt = self._prompt(one, f"inputs.{place}", raw)
            prompts.append(prompt)
            if isinstance(prompt, Prompt):
                tokens += len(prompt.ids)
                check_tokens(tokens, self.most_tokens)
        if self.extracts:
            schema = answer_schema(self.adapter.manifest.fields)
        sampling = sampling_of(parameters, schema)
        self.engine.prepare(sampling)
        return Prompted(asked, self.entry, self.engine, self.adapter, tuple(prompts), sampling, self.content_filter)

    def _prompt(self, given: str | Sequence[Turn], place: str, raw: bool) -> Prompt | RequestError:
        name = uuid.uuid4().hex
        try:
            if raw:
                assert isinstance(given, str)
                return Prompt(name, given, self.engine.tokens(given))
            if self.extracts:
                if not isinstance(given, str):
                    return _unfit(place, "it is a conversation, this task reads fields out of a text", "Send a text.")
                return Prompt(name, given, self.engine.prompt_extraction(given, self.adapter))
            turns = [Turn("user", given)] if isinstance(given, str) else given
            messages = [{"role": one.role, "content": one.content} for one in turns]
            return Prompt(name, dump(messages), self.engine.prompt(messages, self.adapter))
        except DataError as error:
            return _unfit(place, f"{error.where}: {error.what}" if error.where else error.what, error.mend)
        except RequestError as error:
            return error


@dataclass(eq=False)
class Running:
    """One prompt on its way through the engine."""

    prompted: Prompted
    prompt: Prompt
    on_text: Callable[[str], None] = lambda piece: None
    pieces: list[str] = field(default_factory=list)
    generation: Generation = field(init=False)

    def __post_init__(self) -> None:
        self.generation = self.prompted.submit(self.prompt, self._hear)

    def _hear(self, piece: str) -> None:
        piece = _plain(piece)
        self.pieces.append(piece)
        self.on_text(piece)

    def outcome(self) -> Prediction:
        """The answer of a generation that is over.

        Raises:
            RequestError: There is none.
        """
        error = self.generation.future.exception()
        if error is not None:
            raise unanswerable(self.prompted.entry.adapter, error)
        return self.prompted.prediction(self.prompt, self.generation.future.result())

    def cut_off(self) -> Prediction:
        """Give up; what was written so far."""
        self.generation.cancel()
        return self.prompted.cut_off(self.prompt, "".join(self.pieces))


class Work:
    """Generates the answers to all prompts of a request, a few at a time. Safe in any number of threads.

    The answers have not passed the content filter; see `Prompted.checked`.

    Attributes:
        future: A prediction or an error for each input, in their order. Cancelling it gives up what is not finished.
    """

    def __init__(self, prompted: Prompted) -> None:
        self.future: Future[list[Prediction | RequestError]] = Future()
        self._prompted = prompted
        self._results: list[Prediction | RequestError | None] = [
            prompt if isinstance(prompt, RequestError) else None for prompt in prompted.prompts
        ]
        self._waiting = [place for place, result in enumerate(self._results) if result is None]
        self._running: dict[int, Running] = {}
        self._begun = 0
        self._first: Running | None = None
        self._lock = threading.Lock()  # never held while the engine is called: it calls back from its own thread
        self.future.add_done_callback(self._given_up)
        self._fill()

    @property
    def began(self) -> float | None:
        """`time.monotonic()` when the engine took the first prompt from its queue; None: all wait."""
        return None if self._first is None else self._first.generation.began

    def cut_off(self) -> list[Prediction]:
        """Give up; the answers that are there, and what was written so far of those that were begun."""
        self.future.cancel()
        with self._lock:
            begun = list(self._running.values())
            done = [result for result in self._results if isinstance(result, Prediction)]
        return [*done, *(running.cut_off() for running in begun)]

    def _fill(self) -> None:
        while (place := self._next()) is not None:
            prompt = self._prompted.prompts[place]
            assert isinstance(prompt, Prompt)
            try:
                running = Running(self._prompted, prompt)
            except Exception as error:  # whatever it is: an input without a result would hold up the request for ever
                refused = unanswerable(self._prompted.entry.adapter, error)
                with self._lock:
                    self._begun -= 1
                    if refused.error_code == "overloaded" and self._begun:  # its turn comes when one of these is over
                        self._waiting.insert(0, place)
                        return
                    self._results[place] = refused
                continue
            with self._lock:
                self._running[place] = running
                self._first = self._first or running
            if self.future.cancelled():
                running.generation.cancel()
            running.generation.future.add_done_callback(functools.partial(self._finish, place))
        with self._lock:
            over = not self._waiting and not self._begun and not self.future.done()
            if over and self.future.set_running_or_notify_cancel():
                self.future.set_result([result for result in self._results if result is not None])

    def _next(self) -> int | None:
        with self._lock:
            if self.future.done() or not self._waiting or self._begun >= AT_ONCE:
                return None
            self._begun += 1
            return self._waiting.pop(0)

    def _finish(self, place: int, future: "Future[Completion]") -> None:
        if future.cancelled():
            return
        try:
            result: Prediction | RequestError = self._running[place].outcome()
        except Exception as error:  # as above
            result = unanswerable(self._prompted.entry.adapter, error)
        with self._lock:
            self._results[place] = result
            self._begun -= 1
            del self._running[place]
        self._fill()

    def _given_up(self, future: "Future[Any]") -> None:
        if future.cancelled():
            with self._lock:
                running = list(self._running.values())
            for one in running:
                one.generation.cancel()


def sampling_of(parameters: Parameters | None, schema: Any = None) -> Sampling:
    """How the engine samples for `parameters`; `schema`: JSON schema of the answer."""
    chosen = parameters or Parameters()
    return Sampling(
        max_tokens=chosen.max_tokens or DEFAULT_TOKENS,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=chosen.seed,
        stop=tuple(chosen.stop),
        json_schema=schema,
    )


def unanswerable(adapter: str, error: BaseException) -> RequestError:
    """The error that answers an input on which the engine failed."""
    if isinstance(error, RequestError):
        return error
    logger.error("adapter %s failed on an input", adapter[:12], exc_info=error)
    return RequestError(
        "internal",
        f"adapter {adapter[:12]} cannot answer this input",
        status=500,
        mend="The operator finds the cause in the service's log.",
    )


def wrong_type(task: str, what: str, mend: str) -> RequestError:
    """The refusal of a task whose adapters do something else."""
    return RequestError("wrong_task_type", f"task '{task}' {what}", status=422, mend=mend, field="task")


def _unfit(place: str, what: str, mend: str) -> RequestError:
    return RequestError("invalid_input", f"field '{place}': {what}", status=422, mend=mend, field=place)


def _contents(turns: Sequence[Turn]) -> list[str]:
    return [turn.content for turn in turns]


def _plain(text: str) -> str:
    """Not every database holds NUL characters."""
    return text.replace("\0", "\ufffd")


def _parsed(output: str, fields: Any) -> Any:
    try:
        return parse_answer(output, fields)
    except DataError:
        return None
