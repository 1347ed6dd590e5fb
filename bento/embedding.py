"""Embeddings by models that write texts: one request at a time in a thread of its own, and a few that wait."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bento.limits import InFlight, check_tokens
from bento.texts import Writer, unanswerable
from ft_resources.errors import RequestError

MOST_WAITING = 64
"""Requests, the one that is computed included."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a request for embeddings gets."""

    vectors: npt.NDArray[np.float32]
    """[texts, hidden]"""
    tokens: int
    """Read by the model."""


class Embedder:
    """Safe in any thread.

    Args:
        most_tokens: Of one request.
        most_waiting: Requests on their way; more are refused.
    """

    def __init__(self, most_tokens: int, most_waiting: int = MOST_WAITING) -> None:
        self._most_tokens, self._in_flight = most_tokens, InFlight(most_waiting, "requests for embeddings")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")

    def submit(self, writer: Writer, texts: Sequence[str]) -> "Future[Embedded]":
        """Embed `texts` with the writer's adapter. Cancelling the future ends the work after the text it is at.

        The future fails with `RequestError`: `input_too_large`, there are more tokens than a request may have;
        `invalid_request`, the engine gives no embeddings; `internal`, the model could not be computed.

        Raises:
            RequestError: `overloaded` (503).
        """
        self._in_flight.enter()
        future: Future[Embedded] = Future()
        future.add_done_callback(self._in_flight.leave)
        self._thread.submit(self._embed, future, writer, texts)
        return future

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._thread.shutdown()

    def _embed(self, future: "Future[Embedded]", writer: Writer, texts: Sequence[str]) -> None:
        engine, adapter = writer.engine, writer.adapter
        found: Embedded | RequestError
        try:
            ids: list[list[int]] = []
            tokens = 0
            for text in texts:
                if future.cancelled():
                    return
                ids.append(engine.prompt_embedding(text, adapter))
                tokens += len(ids[-1])
                check_tokens(tokens, self._most_tokens)
            vectors = []
            for one in ids:
                if future.cancelled():
                    return
                vectors.append(engine.embed(one, adapter))
            found = Embedded(np.stack(vectors), tokens)
        except Exception as error:  # whatever it is: who asked is told, and the next request is served
            found = unanswerable(writer.entry.adapter, error)
        if future.set_running_or_notify_cancel():
            if isinstance(found, RequestError):
                future.set_exception(found)
            else:
                future.set_result(found)
