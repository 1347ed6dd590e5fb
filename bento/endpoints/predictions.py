"""/predict, /feedback and /explain: the platform's own protocol."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response

from bento.auth import permit
from bento.backend import (
    Backend,
    CallerGone,
    about,
    backend_for,
    backend_of,
    computed,
    errors,
    measured,
    record_cut_off,
    while_connected,
)
from bento.endpoints.body_route import BodyRoute
from bento.protocol import (
    MAX_NAME,
    ExplainRequest,
    ExplainResponse,
    FailedResult,
    FeedbackRequest,
    FeedbackResponse,
    PredictRequest,
    PredictResponse,
    PredictResult,
    TextResult,
)
from bento.request_log import Prediction
from bento.texts import Prompted, Work
from ft_resources.errors import RequestError

VERSION = "x-model-version"
VERSION_HEADER = {
    "name": VERSION,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": r"^[\w.-]+$"},
    "description": "`model_version`, for gateways that choose by header.",
}
Versioned = TypeVar("Versioned", PredictRequest, ExplainRequest)


def add_predictions(app: FastAPI) -> None:
    """Let `app` answer, take feedback and explain."""
    app.router.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        response_model=PredictResponse,
        responses=errors(),
        route_class_override=BodyRoute,
        openapi_extra={"parameters": [VERSION_HEADER]},
    )
    app.add_api_route("/feedback", feedback, methods=["POST"], response_model=FeedbackResponse, responses=errors())
    app.add_api_route(
        "/explain",
        explain,
        methods=["POST"],
        response_model=ExplainResponse,
        responses=errors(),
        openapi_extra={"parameters": [VERSION_HEADER]},
    )


async def predict(body: PredictRequest, request: Request) -> Response:
    """Answer inputs: texts with labels, or texts and conversations with texts, as the task is.

    Every answer is recorded before it is sent.
    """
    body = of_version(body, request)
    backend, state = backend_for(request, body.task), request.state
    scorer = backend.scorer
    with state.phases("tokenise"):
        if scorer.is_quick(body):
            admitted = scorer.admit(body, state.trace_id, state.arrived)
        else:
            admitted = await asyncio.to_thread(scorer.admit, body, state.trace_id, state.arrived)
    entry = admitted.entry
    about(request, body.task, entry)
    if isinstance(admitted, Prompted):
        results = await written(request, backend, admitted)
    else:
        answers = await computed(request, backend, body.task, admitted.pieces, admitted.costs, admitted.answers)
        results = answers.results
        state.tokens = (sum(admitted.costs), 0)
    shown = answered(results)
    state.predictions = sum(not isinstance(one, FailedResult) for one in shown)
    answer = PredictResponse(
        status="ok" if state.predictions == len(shown) else "partial",
        results=shown,
        task=body.task,
        model=f"{body.task}@{entry.model_version}",
        model_version=entry.model_version,
        release=entry.release_id,
        adapter=entry.adapter,
        base_model=admitted.adapter.manifest.base.name,
        trace_id=state.trace_id,
        latency_ms=(time.monotonic() - state.arrived) * 1000,
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def of_version(body: Versioned, request: Request) -> Versioned:
    """`body`, which asks for the version that the header of a gateway names.

    Raises:
        RequestError: `invalid_request`: the body asks for another one, or the header is longer than a version.
    """
    wanted = request.headers.get(VERSION)
    if wanted is None or wanted == body.model_version:
        return body
    if body.model_version is not None or not 0 < len(wanted) <= MAX_NAME:
        what = "and the body ask for different versions" if body.model_version else "names no version"
        raise RequestError(
            "invalid_request", f"header '{VERSION}' {what}", status=422, mend="Name one version.", field=VERSION
        )
    return body.model_copy(update={"model_version": wanted})


async def written(request: Request, backend: Backend, prompted: Prompted) -> Sequence[Prediction | RequestError]:
    """Generate and record the answers to a request; what is cut off by the caller's leaving is recorded as such."""
    from bento.admitted import Answers

    state = request.state
    work = Work(prompted)
    with state.phases.answering(lambda: work.began):
        try:
            results = await while_connected(request, asyncio.wrap_future(work.future))
        except (CallerGone, asyncio.CancelledError):
            record_cut_off(backend, prompted, work.cut_off())
            raise

    def record() -> Answers:
        answers = Answers(prompted.checked(results))
        backend.scorer.record([answers])
        return answers

    with state.phases("log"):
        answers = await asyncio.to_thread(record)
    texts = [one.text for one in answers.predictions if one.text is not None]
    state.tokens = (sum(one.prompt_tokens for one in texts), sum(one.completion_tokens for one in texts))
    return answers.results


def answered(results: Sequence[Prediction | RequestError]) -> list[PredictResult | TextResult | FailedResult]:
    """The results as they are sent.

    Raises:
        RequestError: The first one's, when every input failed.
    """
    first = results[0]
    if isinstance(first, RequestError) and all(isinstance(one, RequestError) for one in results):
        raise first
    return [_shown(one) for one in results]


def _shown(one: Prediction | RequestError) -> PredictResult | TextResult | FailedResult:
    if isinstance(one, RequestError):
        return FailedResult(error_code=one.error_code, message=one.what, mend=one.mend)
    if one.text is None:
        return PredictResult(
            prediction_id=one.prediction_id,
            label=one.label,
            confidence=one.confidence,
            probabilities=one.probabilities,
            decision=one.decision or "accept",
        )
    text = one.text
    assert text.finish_reason != "cancelled"
    return TextResult(
        prediction_id=one.prediction_id,
        text=text.output,
        fields=None if text.fields is None else dict(text.fields),
        confidence=one.confidence,
        finish_reason=text.finish_reason,
        prompt_tokens=text.prompt_tokens,
        completion_tokens=text.completion_tokens,
    )


async def feedback(body: FeedbackRequest, request: Request) -> FeedbackResponse:
    """Say what an answer should have been, or whether it was right. Corrected answers can be trained on."""
    scorer = backend_of(request).scorer
    task = await asyncio.to_thread(scorer.task_of, body.prediction_id)
    permit(request, task)
    stored = await asyncio.to_thread(scorer.feedback, body)
    return FeedbackResponse(prediction_id=body.prediction_id, stored=stored, trace_id=request.state.trace_id)


async def explain(body: ExplainRequest, request: Request) -> ExplainResponse:
    """What each part of a text adds to the probability of a label. Nothing of it is recorded as a prediction."""
    from bento.admitted import Classifier
    from bento.explanation import Question, visible
    from bento.texts import wrong_type

    body = of_version(body, request)
    backend, state = backend_for(request, body.task), request.state
    chosen = await asyncio.to_thread(backend.scorer.choose, body.task, None, uuid.uuid4().hex, body.model_version)
    about(request, body.task, chosen.entry)
    if not isinstance(chosen, Classifier):
        raise wrong_type(body.task, "writes texts; only labels are explained", "Ask for a classification task.")
    await asyncio.to_thread(backend.scorer.allow, body.task, [body.input])
    text = await asyncio.to_thread(visible, body.input, chosen.tokens)
    question = Question(text)
    pieces = await asyncio.to_thread(chosen.pieces, question.texts)
    scored, _ = await measured(request, backend, body.task, pieces)
    found = question.explain(
        np.stack([one.probabilities for one in scored]), chosen.adapter.manifest.labels, body.label
    )
    entry = chosen.entry
    return ExplainResponse(
        task=body.task,
        label=found.label,
        probability=found.probability,
        base=found.base,
        attributions=found.attributions,
        evaluations=len(question.texts),
        model=f"{body.task}@{entry.model_version}",
        model_version=entry.model_version,
        release=entry.release_id,
        adapter=entry.adapter,
        trace_id=state.trace_id,
        latency_ms=(time.monotonic() - state.arrived) * 1000,
    )
