"""What an engine for text generation is asked and what it answers, whichever engine it is.

`bento.generation.engine.Generator` computes with torch on any machine, `bento.generation.vllm_engine.VllmGenerator`
hands the same requests to vLLM, on GPU machines or in its CPU build.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bento.conversation import Message
from bento.generation.manifest import GenerationManifest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, and where it ends."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0: always the most probable token."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv:1904.09751): the smallest set of tokens whose probabilities reach it."""
    seed: int | None = None
    """The same seed, prompt and adapter give the same text; None: another one every time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these."""
    json_schema: Mapping[str, Any] | None = None
    """A JSON schema the answer fits; `{}`: any JSON value; None: no constraint."""


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    """Generated tokens, the one that ended the answer included."""
    mean_logprob: float
    """Mean log-probability of the generated tokens at temperature 1 without any constraint; 0 without tokens."""
    token_ids: tuple[int, ...]
    """The generated tokens."""


class Adapter(Protocol):
    """A loaded adapter. It is complete when it becomes visible and never changes afterwards."""

    @property
    def digest(self) -> str: ...

    @property
    def manifest(self) -> GenerationManifest: ...

    @property
    def nbytes(self) -> int:
        """Memory it takes on the device, in bytes."""
        ...


class Generation(Protocol):
    """A request on its way."""

    @property
    def future(self) -> Future[Completion]:
        """The answer, or its error; cancelled after `cancel`."""
        ...

    @property
    def began(self) -> float | None:
        """`time.monotonic()` when the engine took it from its queue; None: it waits."""
        ...

    def cancel(self) -> None:
        """Give it up; its slot is free at the next step. Without effect once it is finished."""
        ...


class TextGenerator(Protocol):
    """An engine over one base model. Every method is safe in any thread."""

    @property
    def alive(self) -> bool:
        """Whether it computes; it does until it is closed, or lost its thread."""
        ...

    def load(self, digest: str, folder: Path) -> Adapter:
        """Read, check and publish the adapter in `folder`; loading a digest again changes nothing.

        Raises:
            ServiceError: It is damaged, belongs to another base model, or cannot be served exactly. The engine is as
                it was before.
        """
        ...

    def unload(self, digest: str) -> None:
        """Forget an adapter. Requests that were submitted with it are still answered by it."""
        ...

    def adapter(self, digest: str) -> Adapter:
        """Raises:
        ServiceError: It is not loaded.
        """
        ...

    def prompt(self, messages: Sequence[Message], adapter: Any) -> list[int]:
        """Token ids of a conversation as the training rows were written, up to where the answer starts.

        Args:
            adapter: Its task's system prompt stands before messages that have none, and its preparation masks them;
                None: the conversation as it is, for the base model itself.

        Raises:
            RequestError: `invalid_request`, it is no conversation or nothing is left of it.
        """
        ...

    def prompt_extraction(self, document: str, adapter: Any) -> list[int]:
        """Token ids of what an adapter of type `extraction` is asked about `document`.

        Raises:
            RequestError: `invalid_request`, the adapter extracts nothing, or nothing is left of the document.
        """
        ...

    def tokens(self, text: str) -> list[int]:
        """Token ids of a raw text, for completion without a chat template."""
        ...

    def prompt_embedding(self, text: str, adapter: Any) -> list[int]:
        """Token ids of a text that is to be embedded, at most as many as the model reads at once.

        Raises:
            RequestError: `invalid_request`, the engine gives no embeddings.
        """
        ...

    def embed(self, ids: Sequence[int], adapter: Any) -> "npt.NDArray[np.float32]":
        """Mean over the tokens `ids` of the model's last hidden state: float32 [hidden]; zeros without tokens."""
        ...

    def prepare(self, sampling: Sampling) -> None:
        """Do what `submit` would take long to do: compile the JSON schema.

        Raises:
            RequestError: `invalid_request`, the schema cannot be followed.
        """
        ...

    def submit(self, ids: Sequence[int], adapter: Any, sampling: Sampling, on_text: OnText | None = None) -> Generation:
        """Start an answer to the prompt `ids`.

        Args:
            adapter: From `load` or `adapter`; None: the base model itself.
            on_text: Called in the engine's thread with each new piece of text; it must return at once. Never half a
                character, never part of a stop string; the pieces make up `Completion.text`.

        Raises:
            RequestError: `input_too_large`, prompt and `max_tokens` exceed the context; `invalid_request`, the prompt
                is empty or the JSON schema cannot be followed; `overloaded` (503), the queue is full.
        """
        ...

    def close(self) -> None:
        """Stop; whatever was not answered fails with `ServiceError`."""
        ...
