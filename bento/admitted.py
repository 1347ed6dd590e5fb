"""A request whose texts get labels: the adapter it goes to, its tokens, and what is answered and recorded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from bento.classify import Scored
from bento.engine import Adapter, Encoded, Engine
from bento.protocol import PredictRequest
from bento.request_log import Prediction
from bento.routing import RouteEntry
from ft_resources.errors import RequestError


@dataclass(frozen=True, eq=False)
class Piece:
    """One text of a request, tokenised, with the engine that runs it."""

    engine: Engine
    encoded: Encoded


@dataclass(frozen=True, eq=False)
class Classifier:
    """The adapter that labels the texts of a request."""

    entry: RouteEntry
    engine: Engine
    adapter: Adapter

    def pieces(self, texts: Sequence[str]) -> tuple[Piece, ...]:
        """The texts, tokenised."""
        return tuple(Piece(self.engine, one) for one in self.engine.encode(texts, self.adapter))

    def tokens(self, text: str) -> Sequence[int]:
        """Ids of the tokens the model reads of `text`."""
        return self.engine.encode([text], self.adapter)[0].ids


@dataclass(frozen=True, eq=False)
class Failed:
    """What the engine gives for a text on which it failed."""

    error: RequestError


@dataclass(frozen=True)
class Answers:
    """A prediction or an error for each input of a request."""

    results: Sequence[Prediction | RequestError]

    @property
    def predictions(self) -> list[Prediction]:
        """What is to be recorded."""
        return [one for one in self.results if isinstance(one, Prediction)]


@dataclass(frozen=True)
class Measured:
    """What the engine gave for texts that are only measured, and not recorded."""

    scored: Sequence[Scored | Failed]
    predictions: Sequence[Prediction] = ()

    def whole(self) -> list[Scored]:
        """Raises:
        RequestError: The engine failed on one of the texts.
        """
        for one in self.scored:
            if isinstance(one, Failed):
                raise one.error
        return [one for one in self.scored if isinstance(one, Scored)]


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that has its adapter and its tokens."""

    request: PredictRequest
    classifier: Classifier
    review_below: float
    prediction_ids: tuple[str, ...]
    pieces: tuple[Piece, ...]
    trace_id: str
    arrived: float

    @property
    def entry(self) -> RouteEntry:
        return self.classifier.entry

    @property
    def adapter(self) -> Adapter:
        return self.classifier.adapter

    @property
    def costs(self) -> list[int]:
        """Tokens of each text."""
        return [len(piece.encoded.ids) for piece in self.pieces]

    def answers(self, scored: Sequence[Scored | Failed]) -> Answers:
        """What is answered and recorded, in the order of the inputs."""
        request, entry, now = self.request, self.entry, datetime.now(UTC)
        latency = (time.monotonic() - self.arrived) * 1000
        results: list[Prediction | RequestError] = []
        for prediction_id, text, one in zip(self.prediction_ids, request.inputs, scored, strict=True):
            if isinstance(one, Failed):
                results.append(one.error)
                continue
            assert isinstance(text, str)
            results.append(
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
                    decision="review" if one.confidence < self.review_below else "accept",
                )
            )
        return Answers(results)
