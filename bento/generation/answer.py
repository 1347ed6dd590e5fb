"""An answer that is being written, token by token, whichever engine computes the tokens."""

import math
from concurrent.futures import Future

from bento.generation.grammar import Matcher
from bento.generation.interface import Completion, OnText, Sampling
from bento.generation.text import TextStream
from ft_resources.errors import FtError, ServiceError


class Answer:
    """What a caller holds of it is `interface.Generation`.

    Args:
        prompt_tokens: Length of what is answered.
        stream: Makes its text of its tokens.
        matcher: Where it stands in its grammar, if it has one.
    """

    def __init__(
        self,
        prompt_tokens: int,
        sampling: Sampling,
        stream: TextStream,
        matcher: Matcher | None,
        on_text: OnText | None,
    ) -> None:
        self.future: Future[Completion] = Future()
        self.sampling = sampling
        self.began: float | None = None
        self.last = -1
        """The token written last."""
        self.matcher = matcher
        self._prompt_tokens, self._stream, self._on_text = prompt_tokens, stream, on_text
        self._written = list[int]()
        self._logprobs = 0.0

    @property
    def over(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """See `interface.Generation`."""
        self.future.cancel()

    def write(self, token: int, logprob: float, ends: frozenset[int]) -> None:
        """Take the next token; the future is done if it was the last one."""
        if not math.isfinite(logprob):
            self.fail(ServiceError("the model's output is not finite", mend="Train the adapter again."))
            return
        self.last = token
        self._written.append(token)
        self._logprobs += logprob
        if token in ends:
            self._finish("stop")
            return
        if self.matcher is not None and not self.matcher.accept(token):
            self.fail(ServiceError("the JSON schema became too complex to follow", mend="Simplify it."))
            return
        self._show(self._stream.add(token))
        if self._stream.stopped or (self.matcher is not None and self.matcher.complete):
            self._finish("stop")
        elif len(self._written) == self.sampling.max_tokens:
            self._finish("length")

    def fail(self, error: FtError) -> None:
        """End it with an error."""
        if not self.over and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def _finish(self, reason: str) -> None:
        self._show(self._stream.end())
        if self.over or not self.future.set_running_or_notify_cancel():
            return
        self.future.set_result(
            Completion(
                text=self._stream.text,
                finish_reason="stop" if reason == "stop" else "length",
                prompt_tokens=self._prompt_tokens,
                completion_tokens=len(self._written),
                mean_logprob=self._logprobs / len(self._written),
                token_ids=tuple(self._written),
            )
        )

    def _show(self, text: str) -> None:
        if not text or self._on_text is None or self.over:
            return
        try:
            self._on_text(text)
        except Exception as error:  # the caller's code: whatever is wrong with it, its neighbours get their answers
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
