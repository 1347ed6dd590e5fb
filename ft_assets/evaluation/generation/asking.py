"""Test rows put to the engine that serves: many at once for the answers, one at a time for what a caller waits."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bento.conversation import Fields, Message, answer_schema, extraction_messages, load
from bento.generation.interface import Completion, Generation, Sampling, TextGenerator
from bento.texts import sampling_of
from ft_assets.evaluation.generation.metrics import Kind
from ft_assets.evaluation.generation.report import AnswerLatency
from ft_resources.errors import RequestError

AT_ONCE = 32
"""Rows that are with the engine at the same time."""
REFUSED = "refused"


@dataclass(frozen=True)
class Question:
    """What is asked of every model: rows of one task."""

    kind: Kind
    fields: Fields
    instruction: str
    rows: Sequence[str]
    """Conversations in canonical JSON, or documents."""

    def messages(self, row: str) -> list[Message]:
        """The row as a conversation."""
        return load(row) if self.kind == "text-generation" else extraction_messages(row, self.fields, self.instruction)

    def sampling(self, adapter: Any) -> Sampling:
        """As the service samples for `adapter` where a caller asks for nothing else."""
        fields = self.fields if adapter is None else adapter.manifest.fields
        return sampling_of(None, answer_schema(fields) if fields else None)

    def prompts(self, engine: TextGenerator, adapter: Any) -> list[list[int]]:
        """Token ids of every row; `adapter` None: for the base model itself, in the same words."""
        if self.kind == "extraction" and adapter is not None:
            return [engine.prompt_extraction(row, adapter) for row in self.rows]
        return [engine.prompt(self.messages(row), adapter) for row in self.rows]


@dataclass(frozen=True)
class Answer:
    """What a model wrote; an empty text where it could not take the prompt."""

    text: str
    finish: str
    """stop, length or refused."""
    confidence: float
    """Geometric mean of the tokens' probabilities."""
    token_ids: tuple[int, ...] = ()


def ask(
    engine: TextGenerator,
    adapter: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    heard: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """An answer to every prompt, in their order.

    Args:
        heard: Told how many prompts were begun.

    Raises:
        ServiceError: The engine failed.
        RequestError: It refused a prompt for another reason than its length.
    """
    places = threading.Semaphore(AT_ONCE)
    begun: list[Generation | Answer] = []
    for number, prompt in enumerate(prompts):
        places.acquire()
        heard(number)
        begun.append(one := _begun(engine, adapter, prompt, sampling))
        if isinstance(one, Answer):
            places.release()
        else:
            one.future.add_done_callback(lambda future: places.release())
    return [one if isinstance(one, Answer) else answer_of(one.future.result()) for one in begun]


def answer_of(completion: Completion) -> Answer:
    """What the engine wrote, as it is reported."""
    sure = math.exp(min(0.0, completion.mean_logprob))
    return Answer(completion.text, completion.finish_reason, sure, completion.token_ids)


def ask_alone(
    engine: TextGenerator, adapter: Any, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> tuple[AnswerLatency, list[Answer]]:
    """Each prompt by itself, after one that warms the engine up: what a caller waits, and the answers."""
    firsts, seconds, tokens = list[float](), 0.0, 0
    answers: list[Answer] = []
    for number, prompt in enumerate([*prompts[:1], *prompts]):
        arrivals: list[float] = []
        started = time.perf_counter()

        def heard(piece: str, arrivals: list[float] = arrivals) -> None:
            arrivals.append(time.perf_counter())

        try:
            generation = engine.submit(prompt, adapter, sampling, heard)
        except RequestError as error:
            answers += [_refused(error)] * (number > 0)
            continue
        done = generation.future.result()
        ended = time.perf_counter()
        if number:
            firsts.append(((arrivals or [ended])[0] - started) * 1000)
            seconds, tokens = seconds + ended - started, tokens + done.completion_tokens
            answers.append(answer_of(done))
    latency = AnswerLatency(
        first_token_p50_ms=float(np.quantile(firsts, 0.5)) if firsts else math.nan,
        first_token_p95_ms=float(np.quantile(firsts, 0.95)) if firsts else math.nan,
        tokens_per_second=tokens / seconds if seconds else math.nan,
        requests=len(firsts),
    )
    return latency, answers


def _begun(engine: TextGenerator, adapter: Any, prompt: Sequence[int], sampling: Sampling) -> "Generation | Answer":
    try:
        return engine.submit(prompt, adapter, sampling)
    except RequestError as error:
        return _refused(error)


def _refused(error: RequestError) -> Answer:
    """A row too long for the model is answered by nothing, as a caller's would be; anything else is a failure."""
    if error.error_code != "input_too_large":
        raise error
    return Answer("", REFUSED, 0.0)
