"""OpenAI's endpoints: chats, completions, embeddings, models."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from bento.auth import Caller, permit
from bento.backend import Backend, about, backend_of, errors, record_cut_off, while_connected
from bento.endpoints.predictions import written
from bento.openai_protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    Generating,
    Usage,
)
from bento.protocol import LiveShare, Model, ModelsResponse, error_content
from bento.request_log import Prediction
from bento.routing import Route, RouteEntry
from bento.streaming import DONE, EventStream, event
from bento.texts import Asked, Prompted, Running, Writer, wrong_type
from ft_resources.errors import RequestError

STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The answer, or a stream."}
}


def add_openai(app: FastAPI) -> None:
    """Let `app` speak OpenAI's protocol below /v1/."""
    refused = errors(413, 422)  # a client of OpenAI's knows them as 400
    for path, handler, answer, more in (
        ("/v1/chat/completions", chat, ChatCompletion, STREAM),
        ("/v1/completions", complete, CompletionResponse, STREAM),
        ("/v1/embeddings", embed, EmbeddingResponse, {}),
    ):
        app.add_api_route(path, handler, methods=["POST"], response_model=answer, responses=refused | more)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=ModelsResponse, responses=refused)
    app.add_api_route("/v1/models/{model}", model, methods=["GET"], response_model=Model, responses=refused)


async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, at once or as a stream. The answer is recorded before its end is sent."""
    writer = await _writer(body, request)
    turns = [one.turn for one in body.messages]
    given: Any = turns
    if writer.extracts:
        if len(turns) != 1 or turns[0].role != "user":
            raise wrong_type(body.task, "reads fields out of a document", "Send one message of the user: the document.")
        if body.json_schema is not None:
            raise wrong_type(body.task, "declares the fields of its answers itself", "Leave response_format out.")
        given = turns[0].content
    prompted = await asyncio.to_thread(
        writer.prompted, _asked(body, request), [given], body.parameters, schema=body.json_schema
    )
    if body.stream:
        return _stream(request, prompted, _ChatEvents(_head(prompted, "chat.completion.chunk"), body.with_usage))
    (prediction,) = await _all_written(request, prompted)
    head, text = _head(prompted, "chat.completion"), prediction.text
    assert text is not None and text.finish_reason != "cancelled"
    answer = ChatCompletion(
        **head,
        id=f"chatcmpl-{prediction.prediction_id}",
        prediction_id=prediction.prediction_id,
        choices=[ChatChoice(message=AnswerMessage(content=text.output), finish_reason=text.finish_reason)],
        usage=_usage([prediction]),
    )
    return _json(answer)


async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue texts as they are, at once or one as a stream."""
    writer = await _writer(body, request)
    if writer.extracts:
        raise wrong_type(body.task, "reads fields out of a document", "Use /predict or /v1/chat/completions.")
    prompted = await asyncio.to_thread(writer.prompted, _asked(body, request), body.prompts, body.parameters, raw=True)
    if body.stream:
        return _stream(request, prompted, _CompletionEvents(_head(prompted, "text_completion"), body.with_usage))
    predictions = await _all_written(request, prompted)
    choices = []
    for index, prediction in enumerate(predictions):
        text = prediction.text
        assert text is not None and text.finish_reason != "cancelled"
        choice = CompletionChoice(
            index=index, text=text.output, finish_reason=text.finish_reason, prediction_id=prediction.prediction_id
        )
        choices.append(choice)
    answer = CompletionResponse(
        **_head(prompted, "text_completion"),
        id=f"cmpl-{predictions[0].prediction_id}",
        choices=choices,
        usage=_usage(predictions),
    )
    return _json(answer)


async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """Embed texts with a task's adapter: what a classifier's head sees, or the mean of a generator's last states.

    Each is divided by its length.
    """
    from bento.admitted import Measured

    permit(request, body.task)
    backend, state = backend_of(request), request.state
    chosen = await asyncio.to_thread(backend.scorer.choose, body.task, body.user, state.trace_id, body.model_version)
    about(request, body.task, chosen.entry)
    backend.scorer.allow(body.task, body.texts)
    if isinstance(chosen, Writer):
        vectors = await asyncio.to_thread(chosen.engine.embed, body.texts, chosen.adapter)
        tokens = sum(len(chosen.engine.tokens(text)) for text in body.texts)
    else:
        pieces = await asyncio.to_thread(chosen.pieces, body.texts)
        costs = [len(piece.encoded.ids) for piece in pieces]
        work = backend.batcher.submit(
            pieces,
            costs,
            Measured,
            task=body.task,
            caller=state.caller.name,
            deadline=state.deadline,
            phases=state.phases,
        )
        measured = await while_connected(request, work)
        assert isinstance(measured, Measured)
        vectors, tokens = np.stack([one.embedding for one in measured.whole()]).astype(np.float32), sum(costs)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    state.tokens = (tokens, 0)
    answer = EmbeddingResponse(
        data=[
            Embedding(index=index, embedding=_encoded(vector, body.encoding_format))
            for index, vector in enumerate(vectors)
        ],
        model=f"{body.task}@{chosen.entry.model_version}",
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        release=chosen.entry.release_id,
        adapter=chosen.entry.adapter,
        trace_id=state.trace_id,
    )
    return _json(answer)


async def models(request: Request) -> ModelsResponse:
    """Released tasks that the caller may use, the adapters that answer them, and the versions that may be asked for."""
    caller: Caller = request.state.caller
    table = backend_of(request).scorer.table
    return ModelsResponse(
        data=[_model(task, route) for task, route in sorted(table.routes.items()) if caller.may_use(task)]
    )


async def model(model: str, request: Request) -> Model:
    """One released task, or one version of it as `task@model_version`."""
    task, _, version = model.rpartition("@") if "@" in model else (model, "", "")
    permit(request, task)
    route = backend_of(request).scorer.table.route(task)
    if version:
        route.version(version)
    return _model(model, route)


def _model(name: str, route: Route) -> Model:
    versions = list(dict.fromkeys(entry.model_version for entry in (*route.released, *route.entries)))
    tenant = route.task.partition(".")[0] if "." in route.task else "default"
    return Model(
        id=name,
        created=int(route.since),
        owned_by=tenant,
        live=[
            LiveShare(
                adapter=entry.adapter,
                model_version=entry.model_version,
                release=entry.release_id,
                share=entry.share,
            )
            for entry in route.entries
        ],
        versions=versions,
    )


async def _writer(body: Generating, request: Request) -> Writer:
    permit(request, body.task)
    chosen = await asyncio.to_thread(
        backend_of(request).scorer.choose, body.task, body.user, request.state.trace_id, body.model_version
    )
    about(request, body.task, chosen.entry)
    if not isinstance(chosen, Writer):
        raise wrong_type(body.task, "answers with a label, it writes no text", "Use /predict.")
    return chosen


def _asked(body: Generating, request: Request) -> Asked:
    return Asked(body.task, body.user, request.state.trace_id, request.state.arrived)


async def _all_written(request: Request, prompted: Prompted) -> list[Prediction]:
    """The answers to all prompts.

    Raises:
        RequestError: One of them has none.
    """
    results = await written(request, backend_of(request), prompted)
    for one in results:
        if isinstance(one, RequestError):
            raise one
    predictions = [one for one in results if isinstance(one, Prediction)]
    request.state.predictions = len(predictions)
    return predictions


def _head(prompted: Prompted, kind: str) -> dict[str, Any]:
    entry: RouteEntry = prompted.entry
    return {
        "object": kind,
        "created": int(time.time()),
        "model": f"{prompted.asked.task}@{entry.model_version}",
        "system_fingerprint": f"ft-{entry.adapter[:12]}",
        "release": entry.release_id,
        "adapter": entry.adapter,
        "trace_id": prompted.asked.trace_id,
    }


def _usage(predictions: Sequence[Prediction]) -> Usage:
    texts = [one.text for one in predictions if one.text is not None]
    read, wrote = sum(one.prompt_tokens for one in texts), sum(one.completion_tokens for one in texts)
    return Usage(prompt_tokens=read, completion_tokens=wrote, total_tokens=read + wrote)


def _encoded(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _json(answer: Any) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


@dataclass(frozen=True)
class _Events:
    """The events of one stream, as OpenAI's clients read them."""

    head: dict[str, Any]
    with_usage: bool

    def start(self, name: str) -> bytes:
        """Before the first piece of text."""
        raise NotImplementedError

    def piece(self, name: str, text: str) -> bytes:
        """A piece of text."""
        raise NotImplementedError

    def end(self, name: str, reason: str) -> bytes:
        """After the last one."""
        raise NotImplementedError

    def usage(self, name: str, usage: Usage) -> bytes:
        return self._event(name, [], usage=usage.model_dump())

    def _event(self, name: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self.with_usage else {}
        about = {"id": f"{self.prefix}{name}", **self.head, "prediction_id": name}
        return event(json.dumps({**about, "choices": choices, **usage, **more}, ensure_ascii=False))

    @property
    def prefix(self) -> str:
        raise NotImplementedError


class _ChatEvents(_Events):
    prefix = "chatcmpl-"

    def start(self, name: str) -> bytes:
        return self._delta(name, {"role": "assistant", "content": ""}, None)

    def piece(self, name: str, text: str) -> bytes:
        return self._delta(name, {"content": text}, None)

    def end(self, name: str, reason: str) -> bytes:
        return self._delta(name, {}, reason)

    def _delta(self, name: str, delta: dict[str, str], reason: str | None) -> bytes:
        return self._event(name, [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])


class _CompletionEvents(_Events):
    prefix = "cmpl-"

    def start(self, name: str) -> bytes:
        return b""

    def piece(self, name: str, text: str) -> bytes:
        return self._event(name, [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}])

    def end(self, name: str, reason: str) -> bytes:
        return self._event(name, [{"index": 0, "text": "", "logprobs": None, "finish_reason": reason}])


def _stream(request: Request, prompted: Prompted, events: _Events) -> Response:
    """Starts to generate: what is refused is refused before the stream begins."""
    (prompt,) = prompted.prompts
    if isinstance(prompt, RequestError):
        raise prompt
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def hand_over(piece: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    running = Running(prompted, prompt, hand_over)
    running.generation.future.add_done_callback(lambda _: hand_over(None))
    return EventStream(_events(request, backend_of(request), running, pieces, events))


async def _events(
    request: Request, backend: Backend, running: Running, pieces: "asyncio.Queue[str | None]", events: _Events
) -> AsyncGenerator[bytes, None]:
    """The stream of one answer; when it is closed early the generation ends and what there is is recorded."""
    from bento.admitted import Answers

    state, prompt, over = request.state, running.prompt, False
    try:
        yield events.start(prompt.prediction_id)
        filtered = running.prompted.content_filter is not None  # nothing is sent before the whole was looked at
        while (piece := await pieces.get()) is not None:
            if not filtered:
                yield events.piece(prompt.prediction_id, piece)
        over = True
        try:
            prediction = running.outcome()
            await asyncio.to_thread(backend.scorer.record, [Answers([prediction])])
        except RequestError as error:
            state.outcome = error.error_code
            yield event(json.dumps(error_content(error, state.trace_id, request.url.path)[0]))
            return
        text, usage = prediction.text, _usage([prediction])
        assert text is not None
        if filtered:
            yield events.piece(prompt.prediction_id, text.output)
        state.predictions, state.tokens = 1, (usage.prompt_tokens, usage.completion_tokens)
        yield events.end(prompt.prediction_id, text.finish_reason)
        if events.with_usage:
            yield events.usage(prompt.prediction_id, usage)
        yield DONE
    finally:
        if not over:
            state.outcome = "cancelled"
            record_cut_off(backend, [running.cut_off()])
