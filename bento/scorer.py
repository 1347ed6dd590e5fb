"""The whole path from a text to a recorded answer, without HTTP: route, adapter, engine, log."""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pydantic
from sqlalchemy.exc import SQLAlchemyError

from bento.adapters import AdapterStore, BakedAdapter, BasePool, LakeAdapters
from bento.classify import Scored
from bento.engine import Adapter, Encoded, Engine
from bento.protocol import FeedbackRequest, PredictRequest, explain
from bento.request_log import Prediction, RequestLog
from bento.route_watcher import Routes
from bento.routing import RouteEntry, RouteTable, read_baked
from ft_resources.errors import FtError, RequestError, ServiceError
from ft_resources.lake import Lake
from ft_resources.ledger import Ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Piece:
    """One text of a request, tokenised, with the engine that runs it."""

    engine: Engine
    encoded: Encoded


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that has its adapter and its tokens."""

    request: PredictRequest
    entry: RouteEntry
    prediction_ids: tuple[str, ...]
    pieces: tuple[Piece, ...]
    trace_id: str
    arrived: float

    @property
    def costs(self) -> list[int]:
        """Tokens of each text."""
        return [len(piece.encoded.ids) for piece in self.pieces]

    def answers(self, scored: Sequence[Scored]) -> list[Prediction]:
        """The predictions, in the order of the inputs."""
        request, entry, now = self.request, self.entry, datetime.now(UTC)
        latency = (time.monotonic() - self.arrived) * 1000
        return [
            Prediction(
                prediction_id=prediction_id,
                task=request.task,
                release_id=entry.release_id,
                model_version=entry.model_version,
                adapter=entry.adapter,
                input=text,
                label=one.label,
                confidence=one.confidence,
                probabilities=dict(zip(one.labels, one.probabilities.tolist(), strict=True)),
                embedding=one.embedding,
                user=request.user,
                trace_id=self.trace_id,
                latency_ms=latency,
                event_time=request.event_time or now,
            )
            for prediction_id, text, one in zip(self.prediction_ids, request.inputs, scored, strict=True)
        ]


class Scorer:
    """Answers requests of any task that has a route, and records every answer before it is given.

    Use `open`; with a running `RouteWatcher` on `routes` set `follow=False`.
    """

    def __init__(
        self, routes: Routes, store: AdapterStore, bases: BasePool, ledger: Ledger, *, follow: bool = True
    ) -> None:
        self.routes, self.store, self._bases = routes, store, bases
        self._ledger, self._log, self._follow = ledger, RequestLog(ledger), follow

    @classmethod
    def open(
        cls,
        lake: Lake,
        ledger: Ledger,
        *,
        baked: Path | None = None,
        max_adapters: int = 64,
        precision: str = "auto",
        threads: int | None = None,
        device: str = "",
        follow: bool = True,
    ) -> "Scorer":
        """A scorer over the routes of `ledger` and the adapters of `lake`.

        Args:
            baked: Folder with a `release.json` to fall back on for a task without a route.
            follow: Look for a changed route before every request; else a `RouteWatcher` does.

        Raises:
            ServiceError: The baked release is not whole.
        """
        release = read_baked(baked) if baked is not None else None
        source = LakeAdapters(lake)
        bases = BasePool([release.base] if release else [], precision=precision, threads=threads, device=device)
        store = AdapterStore(
            BakedAdapter(release.adapter, release.folder, source) if release else source, bases, max_adapters
        )
        return cls(Routes(ledger, store, release.route if release else None), store, bases, ledger, follow=follow)

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
        admitted = self.admit(request, trace_id or uuid.uuid4().hex)
        scored = self.compute(admitted.pieces)
        for one in scored:
            if isinstance(one, RequestError):
                raise one
        predictions = admitted.answers([one for one in scored if isinstance(one, Scored)])
        self.record([predictions])
        return predictions

    def admit(self, request: PredictRequest, trace_id: str, arrived: float | None = None) -> Admitted:
        """Choose the adapter, load it if need be, and tokenise.

        Args:
            arrived: `time.monotonic()` when the request came in; default now.

        Raises:
            RequestError: `unknown_task`, `unknown_version`, `not_ready`.
        """
        arrived = time.monotonic() if arrived is None else arrived
        if self._follow:
            self.routes.refresh()
        ids = tuple(uuid.uuid4().hex for _ in request.inputs)
        entry = self.table.choose(request.task, request.user, ids[0], request.model_version)
        engine, adapter = self._adapter(entry)
        pieces = tuple(Piece(engine, one) for one in engine.encode(request.inputs, adapter))
        return Admitted(request, entry, ids, pieces, trace_id, arrived)

    def is_quick(self, request: PredictRequest) -> bool:
        """Whether `admit` neither loads an adapter nor tokenises much, so that it may run on an event loop."""
        if sum(map(len, request.inputs)) > 4096:
            return False
        try:
            entry = self.table.choose(request.task, request.user, "", request.model_version)
        except RequestError:
            return True
        live = self.table.route(request.task).entries
        return all(self.store.peek(one.adapter) is not None for one in (entry, *live) if one is entry or one.share > 0)

    def compute(self, pieces: Sequence[Piece]) -> list[Scored | RequestError]:
        """An answer or an error for each piece; a piece that fails does not fail the others."""
        results: list[Scored | RequestError | None] = [None] * len(pieces)
        for engine in {piece.engine for piece in pieces}:
            places = [place for place, piece in enumerate(pieces) if piece.engine is engine]
            encoded = [pieces[place].encoded for place in places]
            for place, result in zip(places, _run(engine, encoded), strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    def record(self, answers: Sequence[list[Prediction]]) -> None:
        """Store the predictions of several requests in one transaction.

        Raises:
            RequestError: `log_unavailable`.
        """
        self._log.write([prediction for predictions in answers for prediction in predictions])

    def feedback(self, request: FeedbackRequest) -> bool:
        """Store what a person says of an answer; False when exactly that was known.

        Raises:
            RequestError: `unknown_prediction`, `unknown_label`, `log_unavailable`.
        """
        try:
            prediction = self._ledger.prediction(request.prediction_id)
            labels = list(prediction["probabilities"])
            if request.label is not None and request.label not in labels:
                raise RequestError(
                    "unknown_label",
                    f"task '{prediction['task']}' has no label '{request.label}'",
                    status=422,
                    mend=f"Its labels: {', '.join(labels)}.",
                )
            return self._ledger.add_feedback(
                prediction_id=request.prediction_id, label=request.label, rating=request.rating, author=request.author
            )
        except SQLAlchemyError as error:
            raise RequestError(
                "log_unavailable", "the feedback could not be stored", status=503, mend="Try again later."
            ) from error

    @property
    def table(self) -> RouteTable:
        """The routes in force."""
        return self.routes.table

    def _adapter(self, entry: RouteEntry) -> tuple[Engine, Adapter]:
        try:
            return self.store.get(entry.adapter)
        except FtError as error:
            logger.error("adapter %s cannot be loaded: %s", entry.adapter[:12], error)
            raise RequestError(
                "not_ready",
                f"adapter {entry.adapter[:12]} of release {entry.release_id} cannot be loaded",
                status=503,
                mend="Ask for another model version; the operator finds the cause in the service's log.",
            ) from error


def _run(engine: Engine, encoded: Sequence[Encoded]) -> Sequence[Scored | RequestError]:
    try:
        return engine.run(encoded)
    except (ServiceError, RuntimeError) as error:  # RuntimeError: out of memory on the device
        if len(encoded) > 1:
            return [result for one in encoded for result in _run(engine, [one])]
        logger.error("adapter %s failed on a text: %s", encoded[0].adapter.digest[:12], error)
        return [
            RequestError(
                "internal",
                f"adapter {encoded[0].adapter.digest[:12]} cannot answer this text",
                status=500,
                mend="The operator finds the cause in the service's log.",
            )
        ]
