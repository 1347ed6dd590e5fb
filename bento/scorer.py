"""The whole path from a text to a recorded answer, without HTTP: route, adapter, engine, log."""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pydantic
from sqlalchemy.exc import SQLAlchemyError

from bento.adapters import ADAPTER_MEMORY, MEGABYTE, AdapterStore, BakedAdapter, BasePool, LakeAdapters
from bento.admitted import Admitted, Answers, Classifier, Failed, Measured, Piece
from bento.classify import Scored
from bento.content_filter import ContentFilter, load_filter
from bento.conversation import answer_json, parse_answer
from bento.engine import Adapter, Encoded, Engine
from bento.generation.manifest import GenerationManifest
from bento.protocol import FeedbackRequest, PredictRequest, explain
from bento.request_log import Prediction, RequestLog
from bento.route_watcher import Routes
from bento.routing import RouteEntry, RouteTable, read_baked
from bento.texts import Asked, Prompted, Turn, Work, Writer, informed, unanswerable, wrong_type
from ft_resources.environments import REQUEST_TOKENS, Environment, ServiceSettings
from ft_resources.errors import DataError, FtError, RequestError, ServiceError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

logger = logging.getLogger(__name__)


class Scorer:
    """Answers requests of any task that has a route, and records every answer before it is given.

    Use `open`; with a running `RouteWatcher` on `routes` set `follow=False`.
    """

    def __init__(
        self,
        routes: Routes,
        store: AdapterStore,
        bases: BasePool,
        ledger: Ledger,
        *,
        content_filter: ContentFilter | None = None,
        request_tokens: int = REQUEST_TOKENS,
        follow: bool = True,
    ) -> None:
        self.routes, self.store, self._bases, self.content_filter = routes, store, bases, content_filter
        self._request_tokens = request_tokens
        self._ledger, self._log, self._follow = ledger, RequestLog(ledger), follow

    @classmethod
    def open(
        cls,
        lake: Lake,
        ledger: Ledger,
        *,
        baked: Path | None = None,
        adapter_memory: int = ADAPTER_MEMORY,
        precision: str = "auto",
        threads: int | None = None,
        device: str = "",
        generation: str = "torch",
        content_filter: ContentFilter | None = None,
        request_tokens: int = REQUEST_TOKENS,
        follow: bool = True,
    ) -> "Scorer":
        """A scorer over the routes of `ledger` and the adapters of `lake`.

        Args:
            adapter_memory: Bytes that loaded adapters may take.
            baked: Folder with a `release.json` to fall back on for a task without a route.
            generation: Engine of tasks that write texts: `torch` or `vllm`.
            content_filter: Looks at inputs, and at texts that were written.
            request_tokens: Most tokens of the prompts of one request to a task that writes texts.
            follow: Look for a changed route before every request; else a `RouteWatcher` does.

        Raises:
            ServiceError: The baked release is not whole.
        """
        release = read_baked(baked) if baked is not None else None
        source = LakeAdapters(lake)
        bases = BasePool(
            [release.base] if release else [],
            precision=precision,
            threads=threads,
            device=device,
            generation=generation,
        )
        store = AdapterStore(BakedAdapter(release, source) if release else source, bases, adapter_memory)
        routes = Routes(ledger, store, release.route if release else None)
        return cls(
            routes, store, bases, ledger, content_filter=content_filter, request_tokens=request_tokens, follow=follow
        )

    @classmethod
    def of(
        cls,
        environment: Environment,
        settings: ServiceSettings,
        lake: Lake,
        ledger: Ledger,
        *,
        baked: Path | None = None,
        threads: int | None = None,
        follow: bool = True,
    ) -> "Scorer":
        """`open`, as the environment asks for it: device, engine of texts, memory of adapters, content filter.

        Raises:
            ServiceError: The baked release is not whole.
            SpecError: The content filter cannot be loaded.
        """
        return cls.open(
            lake,
            ledger,
            baked=baked,
            adapter_memory=environment.adapter_memory_mb * MEGABYTE,
            threads=threads,
            device=environment.device,
            generation=environment.generation_engine,
            content_filter=load_filter(settings.content_filter),
            request_tokens=settings.request_tokens,
            follow=follow,
        )

    def predict(
        self,
        task: str,
        inputs: Sequence[str],
        model_version: str | None = None,
        user: str | None = None,
        event_time: datetime | None = None,
        *,
        trace_id: str | None = None,
    ) -> list[Prediction]:
        """Answers in the order of `inputs`, each recorded in the ledger.

        Raises:
            RequestError: See `protocol.ErrorCode`.
        """
        try:
            request = PredictRequest(
                task=task, inputs=list(inputs), model_version=model_version, user=user, event_time=event_time
            )
        except pydantic.ValidationError as error:
            raise explain(error.errors()) from None
        results = self.answer(request, trace_id=trace_id)
        for one in results:
            if isinstance(one, RequestError):
                raise one
        return [one for one in results if isinstance(one, Prediction)]

    def answer(self, request: PredictRequest, *, trace_id: str | None = None) -> Sequence[Prediction | RequestError]:
        """Answers in the order of the inputs, each recorded; an input that cannot be answered has its error.

        Raises:
            RequestError: None of them can be answered at all; see `protocol.ErrorCode`.
        """
        admitted = self.admit(request, trace_id or uuid.uuid4().hex)
        if isinstance(admitted, Prompted):
            answers = Answers(admitted.checked(Work(admitted).future.result()))
        else:
            answers = admitted.answers(self.compute(admitted.pieces))
        self.record([answers])
        return answers.results

    def admit(self, request: PredictRequest, trace_id: str, arrived: float | None = None) -> "Admitted | Prompted":
        """Choose the adapter, load it if need be, and tokenise.

        Args:
            arrived: `time.monotonic()` when the request came in; default now.

        Raises:
            RequestError: `unknown_task`, `unknown_version`, `not_ready`; `invalid_input`, the task takes other inputs;
                `unsupported_parameter`.
        """
        arrived = time.monotonic() if arrived is None else arrived
        ids = tuple(uuid.uuid4().hex for _ in request.inputs)
        chosen = self.choose(request.task, request.user, ids[0], request.model_version)
        if isinstance(chosen, Writer):
            asked = Asked(request.task, request.user, trace_id, arrived, request.event_time)
            if request.context and chosen.extracts:
                raise _unsupported("context", request.task, "reads fields out of a text and answers no question")
            turns = [one if isinstance(one, str) else [Turn(m.role, m.content) for m in one] for one in request.inputs]
            if request.context:
                turns = [informed(one, request.context) for one in turns]
            return chosen.prompted(asked, turns, request.parameters)
        for name in ("parameters", "context"):
            if getattr(request, name) is not None:
                raise _unsupported(name, request.task, "classifies texts, it generates none")
        texts = [text for text in request.inputs if isinstance(text, str)]
        if len(texts) < len(ids):
            place = next(place for place, text in enumerate(request.inputs) if not isinstance(text, str))
            raise RequestError(
                "invalid_input",
                f"field 'inputs.{place}' is a conversation, task '{request.task}' classifies texts",
                status=422,
                mend="Send a text.",
                field=f"inputs.{place}",
            )
        self.allow(request.task, texts)
        bound = self.table.route(request.task).review_below
        return Admitted(request, chosen, bound, ids, chosen.pieces(texts), trace_id, arrived)

    def choose(self, task: str, user: str | None, key: str, model_version: str | None) -> "Classifier | Writer":
        """The adapter that answers, loaded if need be, with its engine.

        Args:
            key: Decides between the live shares when there is no user.

        Raises:
            RequestError: `unknown_task`, `unknown_version`, `not_ready`.
        """
        if self._follow:
            self.routes.refresh()
        entry = self.table.choose(task, user, key, model_version)
        engine, adapter = self._adapter(entry)
        if isinstance(adapter, Adapter):
            assert isinstance(engine, Engine)
            return Classifier(entry, engine, adapter)
        return Writer(entry, engine, adapter, self._request_tokens, self.content_filter)

    def takes_conversations(self, task: str, model_version: str | None = None) -> bool:
        """Whether a conversation is an input of this task; others take texts alone.

        Raises:
            RequestError: As `choose`.
        """
        chosen = self.choose(task, None, "", model_version)
        return isinstance(chosen, Writer) and chosen.adapter.manifest.type == "text-generation"

    def allow(self, task: str, texts: Sequence[str]) -> None:
        """Let the content filter look at what comes in.

        Raises:
            RequestError: `content_filtered`.
        """
        if self.content_filter is not None:
            self.content_filter.check(task, texts, "input")

    def is_quick(self, request: PredictRequest) -> bool:
        """Whether `admit` may run on an event loop: it loads nothing, tokenises little, and asks nobody's filter."""
        if self.content_filter is not None or sum(map(_size, request.inputs)) > 4096:
            return False
        try:
            entry = self.table.choose(request.task, request.user, "", request.model_version)
        except RequestError:
            return True
        live = self.table.route(request.task).entries
        return all(self._labels(one) for one in (entry, *live) if one is entry or one.share > 0)

    def compute(self, pieces: Sequence[Piece]) -> list[Scored | Failed]:
        """An answer or a failure for each piece; a piece that fails does not fail the others."""
        results: list[Scored | Failed | None] = [None] * len(pieces)
        for engine in {piece.engine for piece in pieces}:
            places = [place for place, piece in enumerate(pieces) if piece.engine is engine]
            encoded = [pieces[place].encoded for place in places]
            for place, result in zip(places, _run(engine, encoded), strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    def record(self, answers: Sequence[Answers | Measured]) -> None:
        """Store the predictions of several requests in one transaction.

        Raises:
            RequestError: `log_unavailable`.
        """
        self._log.write([prediction for one in answers for prediction in one.predictions])

    def feedback(self, request: FeedbackRequest) -> bool:
        """Store what a person says of an answer; False when exactly that was known.

        Raises:
            RequestError: `unknown_prediction`, `unknown_label`, `log_unavailable`; `wrong_task_type`, a label for an
                answer that is a text, or a text for a label; `invalid_input`, the text is not what was to be extracted;
                `not_ready`, the adapter that says so cannot be loaded.
        """
        try:
            prediction = self._ledger.prediction(request.prediction_id)
            return self._ledger.add_feedback(
                prediction_id=request.prediction_id,
                label=request.label and _known_label(request.label, prediction),
                text=request.text and self._fitting_text(request.text, prediction),
                rating=request.rating,
                author=request.author,
            )
        except SQLAlchemyError as error:
            raise RequestError(
                "log_unavailable", "the feedback could not be stored", status=503, mend="Try again later."
            ) from error

    def task_of(self, prediction_id: str) -> str:
        """The task that gave an answer.

        Raises:
            RequestError: `unknown_prediction`, `log_unavailable`.
        """
        try:
            return str(self._ledger.prediction(prediction_id)["task"])
        except SQLAlchemyError as error:
            raise RequestError(
                "log_unavailable", "the answer cannot be looked up", status=503, mend="Try again later."
            ) from error

    @property
    def alive(self) -> bool:
        """Whether its engines compute."""
        return self._bases.alive

    def close(self) -> None:
        """End the engines that write texts; what they have not answered fails."""
        self._bases.close()

    @property
    def table(self) -> RouteTable:
        """The routes in force."""
        return self.routes.table

    def _labels(self, entry: RouteEntry) -> bool:
        """Whether its adapter is in memory and a classifier's: one that writes may have a schema to compile."""
        there = self.store.peek(entry.adapter, entry.precision)
        return there is not None and isinstance(there[1], Adapter)

    def _adapter(self, entry: RouteEntry) -> tuple[Any, Any]:
        try:
            return self.store.get(entry.adapter, entry.precision)
        except FtError as error:
            logger.error("adapter %s cannot be loaded: %s", entry.adapter[:12], error)
            raise RequestError(
                "not_ready",
                f"adapter {entry.adapter[:12]} of release {entry.release_id} cannot be loaded",
                status=503,
                mend="Ask for another model version; the operator finds the cause in the service's log.",
            ) from error

    def _entry_of(self, prediction: Mapping[str, Any]) -> RouteEntry:
        """The entry that gave an answer, in the precision it is served in."""
        route = self.table.routes.get(prediction["task"])
        for entry in () if route is None else (*route.entries, *route.released):
            if entry.release_id == prediction["release_id"]:
                return entry
        known = {name: prediction[name] for name in ("adapter", "model_version", "release_id")}
        return RouteEntry(**known, share=0.0)  # a release beside the service that a route has taken the place of

    def _fitting_text(self, text: str, prediction: Mapping[str, Any]) -> str:
        """`text` as a training row holds it."""
        if prediction["output"] is None:
            raise wrong_type(prediction["task"], "answers with a label", "Send the true label instead of a text.")
        _, adapter = self._adapter(self._entry_of(prediction))
        fields = adapter.manifest.fields if isinstance(adapter.manifest, GenerationManifest) else {}
        if not fields:
            return text
        try:
            return answer_json(parse_answer(text, fields), fields)
        except DataError as error:
            raise RequestError(
                "invalid_input", f"field 'text': {error.where}: {error.what}", status=422, mend=error.mend, field="text"
            ) from None


def _known_label(label: str, prediction: Mapping[str, Any]) -> str:
    labels = list(prediction["probabilities"])
    if not labels:
        raise wrong_type(prediction["task"], "answers with a text", "Send the text it should have been.")
    if label not in labels:
        raise RequestError(
            "unknown_label",
            f"task '{prediction['task']}' has no label '{label}'",
            status=422,
            mend=f"Its labels: {', '.join(labels)}.",
            field="label",
        )
    return label


def _unsupported(field: str, task: str, why: str) -> RequestError:
    return RequestError(
        "unsupported_parameter",
        f"field '{field}': task '{task}' {why}",
        status=422,
        mend="Leave it out.",
        field=field,
    )


def _size(given: Any) -> int:
    return len(given) if isinstance(given, str) else sum(len(one.content) for one in given)


def _run(engine: Engine, encoded: Sequence[Encoded]) -> Sequence[Scored | Failed]:
    try:
        return engine.run(encoded)
    except (ServiceError, RuntimeError) as error:  # RuntimeError: out of memory on the device
        if len(encoded) > 1:
            return [result for one in encoded for result in _run(engine, [one])]
        return [Failed(unanswerable(encoded[0].adapter.digest, error))]
