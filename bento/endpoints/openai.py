"""OpenAI's endpoints: chats, completions, embeddings, models."""

import asyncio
import base64
import time
import uuid
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from bento.auth import Caller
from bento.backend import about, backend_for, backend_of, errors, measured, while_connected
from bento.endpoints.openai_stream import ChatEvents, CompletionEvents, stream, usage_of
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
)
from bento.protocol import LiveShare, Model, ModelsResponse
from bento.request_log import Prediction
from bento.routing import Route, RouteEntry
from bento.texts import Asked, Prompted, Writer, wrong_type
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
    """Answer a conversation, at once or as a stream.

    An answer is recorded before it is sent, with one exception: the pieces of a stream are sent as they are written.
    Their answer is recorded before the event with its `finish_reason` is sent, or as `cancelled` when the caller
    leaves or the time of the request is over; an error event instead says that it is not recorded.
    """
    writer = await _writer(body, request)
    turns = [one.turn for one in body.messages]
    given: Any = turns
    if writer.extracts:
        if len(turns) != 1 or turns[0].role != "user":
            raise wrong_type(body.task, "reads fields out of a document", "Send one message of the user: the document.")
        if body.json_schema is not None:
            raise wrong_type(body.task, "declares the fields of its answers itself", "Leave response_format out.")
        given = turns[0].content
    with request.state.phases("tokenise"):
        prompted = await asyncio.to_thread(
            writer.prompted, _asked(body, request), [given], body.parameters, schema=body.json_schema
        )
    if body.stream:
        return stream(request, prompted, ChatEvents(_head(prompted, "chat.completion.chunk"), body.with_usage))
    (prediction,) = await _all_written(request, prompted)
    head, text = _head(prompted, "chat.completion"), prediction.text
    assert text is not None and text.finish_reason != "cancelled"
    answer = ChatCompletion(
        **head,
        id=f"chatcmpl-{prediction.prediction_id}",
        prediction_id=prediction.prediction_id,
        choices=[ChatChoice(message=AnswerMessage(content=text.output), finish_reason=text.finish_reason)],
        usage=usage_of([prediction]),
    )
    return _json(answer)


async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue texts as they are, at once or one as a stream. They are recorded as those of chats are."""
    writer = await _writer(body, request)
    if writer.extracts:
        raise wrong_type(body.task, "reads fields out of a document", "Use /predict or /v1/chat/completions.")
    with request.state.phases("tokenise"):
        prompted = await asyncio.to_thread(
            writer.prompted, _asked(body, request), body.prompts, body.parameters, raw=True
        )
    if body.stream:
        return stream(request, prompted, CompletionEvents(_head(prompted, "text_completion"), body.with_usage))
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
        usage=usage_of(predictions),
    )
    return _json(answer)


async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """Embed texts with a task's adapter: what a classifier's head sees, or the mean of a generator's last states.

    Each is divided by its length.
    """
    backend, state = backend_for(request, body.task), request.state
    chosen = await asyncio.to_thread(backend.scorer.choose, body.task, body.user, _key(), body.model_version)
    about(request, body.task, chosen.entry)
    await asyncio.to_thread(backend.scorer.allow, body.task, body.texts)
    if isinstance(chosen, Writer):
        with state.phases("compute"):
            embedding = backend.embedder.submit(chosen, body.texts)
            embedded = await while_connected(request, asyncio.wrap_future(embedding))
        vectors, tokens = embedded.vectors, embedded.tokens
    else:
        pieces = await asyncio.to_thread(chosen.pieces, body.texts)
        scored, tokens = await measured(request, backend, body.task, pieces)
        vectors = np.stack([one.embedding for one in scored]).astype(np.float32)
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
    route = backend_for(request, task).scorer.table.route(task)
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
    backend = backend_for(request, body.task)
    chosen = await asyncio.to_thread(backend.scorer.choose, body.task, body.user, _key(), body.model_version)
    about(request, body.task, chosen.entry)
    if not isinstance(chosen, Writer):
        raise wrong_type(body.task, "answers with a label, it writes no text", "Use /predict.")
    return chosen


def _key() -> str:
    """What decides between the live shares for callers without a user: callers may choose their trace id."""
    return uuid.uuid4().hex


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


def _encoded(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _json(answer: Any) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")
