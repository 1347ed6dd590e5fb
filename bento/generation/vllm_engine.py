"""The same requests answered by vLLM, on machines with a CUDA GPU; chosen by `FT_GENERATION_ENGINE=vllm`.

An adapter is handed over as the folder it is stored in, under a number of its own: vLLM reads plain peft folders.
"""

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bento.adapter_files import check_base, read_low_rank
from bento.generation.grammar import written_schema
from bento.generation.interface import Completion, OnText, Sampling
from bento.generation.limits import check
from bento.generation.manifest import GenerationManifest, read_generation_manifest
from bento.generation.prompts import Prompting
from bento.limits import InFlight
from ft_resources.base_models import BaseModel
from ft_resources.errors import RequestError, ServiceError

HIGHEST_RANK = 64
"""Of an adapter; vLLM reserves memory for it."""
ON_DEVICE, IN_MEMORY = 16, 256
"""Adapters that one batch can mix, and that are kept beside them."""
DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class HandedOver:
    """An adapter as vLLM is told of it."""

    digest: str
    manifest: GenerationManifest
    folder: Path
    number: int
    """vLLM knows it by this; a digest that is loaded again gets a new one."""
    nbytes: int


def hand_over(digest: str, folder: Path, base: BaseModel, number: int) -> HandedOver:
    """Check the adapter in `folder`; it stays where it is.

    Raises:
        ServiceError: It is damaged, belongs to another base model, or vLLM cannot serve it exactly.
    """
    manifest, updates = read_generation_manifest(folder), read_low_rank(folder)
    check_base(manifest.base, base, folder)
    rank = max(len(low.a) for low in updates.values())
    if rank > HIGHEST_RANK:
        raise ServiceError(
            f"its rank is {rank}, and vLLM serves up to {HIGHEST_RANK}",
            where=str(folder),
            mend="Set FT_GENERATION_ENGINE=torch, or train with a lower rank.",
        )
    size = sum(low.a.nbytes + low.b.nbytes for low in updates.values()) // 2  # kept in 16 bits
    return HandedOver(digest, manifest, folder.absolute(), number, size)


class VllmGeneration:
    """See `interface.Generation`."""

    def __init__(self, future: "Future[Completion]") -> None:
        self.future = future
        self.began = time.monotonic()  # vLLM does not tell how long it lets a request wait

    def cancel(self) -> None:
        """See `interface.Generation`."""
        self.future.cancel()  # cancels the coroutine, upon which vLLM aborts the request


class VllmGenerator(Prompting):
    """See `interface.TextGenerator`, and `engine.Generator` for the arguments. `threads` means nothing here.

    Raises:
        ServiceError: vLLM is not installed, there is no CUDA GPU, or vLLM does not start.
    """

    def __init__(
        self,
        base: BaseModel,
        precision: str = "auto",
        threads: int | None = None,
        device: str = "",
        *,
        most_waiting: int = 256,
    ) -> None:
        vllm = _vllm(device)
        super().__init__(base)
        self._adapters: dict[str, HandedOver] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._in_flight = InFlight(most_waiting)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._engine: Any = self._wait(self._start(vllm, str(base.path), DTYPES[precision]))
        self.context = int(self._engine.model_config.max_model_len)

    @property
    def alive(self) -> bool:
        """See `interface.TextGenerator`."""
        return self._thread.is_alive() and not self._engine.errored

    def load(self, digest: str, folder: Path) -> HandedOver:
        """See `interface.TextGenerator`."""
        with self._lock:
            if digest not in self._adapters:
                self._adapters[digest] = hand_over(digest, folder, self.base, next(self._numbers))
            return self._adapters[digest]

    def unload(self, digest: str) -> None:
        """See `interface.TextGenerator`. vLLM lets go of what it holds of it when others need the room."""
        with self._lock:
            self._adapters.pop(digest, None)

    def adapter(self, digest: str) -> HandedOver:
        """See `interface.TextGenerator`."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            raise ServiceError(f"adapter {digest[:12]} is not loaded", mend="Load it first.")
        return adapter

    def prompt_embedding(self, text: str, adapter: HandedOver | None) -> list[int]:
        """Raises:
        RequestError: Always: an engine of vLLM generates or embeds, not both.
        """
        raise _no_embeddings()

    def embed(self, ids: Sequence[int], adapter: HandedOver | None) -> npt.NDArray[np.float32]:
        """Raises:
        RequestError: Always.
        """
        raise _no_embeddings()

    def prepare(self, sampling: Sampling) -> None:
        """See `interface.TextGenerator`. vLLM compiles the schema itself; here its size is bounded."""
        if sampling.json_schema is not None:
            written_schema(sampling.json_schema)

    def submit(
        self, ids: Sequence[int], adapter: HandedOver | None, sampling: Sampling, on_text: OnText | None = None
    ) -> VllmGeneration:
        """See `interface.TextGenerator`. What vLLM refuses fails the answer."""
        check(ids, sampling, self.context)
        self._in_flight.enter()
        answer = self._answer(list(ids), adapter, sampling, on_text)
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        future.add_done_callback(self._in_flight.leave)
        return VllmGeneration(future)

    def close(self) -> None:
        """See `interface.TextGenerator`."""
        self._loop.call_soon_threadsafe(self._engine.shutdown)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _wait(self, started: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(started, self._loop).result()

    async def _start(self, vllm: Any, path: str, dtype: str) -> Any:
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = vllm.AsyncEngineArgs(
            model=path,
            dtype=dtype,
            enable_lora=True,
            max_lora_rank=HIGHEST_RANK,
            max_loras=ON_DEVICE,
            max_cpu_loras=IN_MEMORY,
        )
        try:
            return AsyncLLM.from_engine_args(arguments)
        except (RuntimeError, ValueError) as error:
            raise ServiceError(
                f"vLLM does not start: {error}", where=path, mend="Set FT_GENERATION_ENGINE=torch, or see its log."
            ) from error

    async def _answer(
        self, ids: list[int], adapter: HandedOver | None, sampling: Sampling, on_text: OnText | None
    ) -> Completion:
        from vllm.lora.request import LoRARequest

        lora = None if adapter is None else LoRARequest(adapter.digest, adapter.number, str(adapter.folder))
        pieces: list[str] = []
        tokens, logprob, reason = list[int](), 0.0, "stop"
        async for output in self._engine.generate(
            {"prompt_token_ids": ids}, _parameters(sampling), uuid.uuid4().hex, lora_request=lora
        ):
            part = output.outputs[0]
            tokens += part.token_ids
            logprob = part.cumulative_logprob or logprob
            reason = part.finish_reason or reason
            if part.text:
                pieces.append(part.text)
                if on_text is not None:
                    on_text(part.text)
        ended: Any = "length" if reason == "length" else "stop"
        mean = logprob / max(len(tokens), 1)
        return Completion("".join(pieces), ended, len(ids), len(tokens), mean, tuple(tokens))


def _parameters(sampling: Sampling) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    structured = None
    if sampling.json_schema is not None:
        plain = {key: value for key, value in sampling.json_schema.items() if key != "x-guidance"}
        structured = StructuredOutputsParams(json=plain, disable_any_whitespace=len(plain) < len(sampling.json_schema))
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logprobs=0,  # of the chosen tokens alone
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def _no_embeddings() -> RequestError:
    return RequestError(
        "invalid_request",
        "the vLLM engine gives no embeddings",
        mend="Ask a service with FT_GENERATION_ENGINE=torch.",
    )


def _vllm(device: str) -> Any:
    mend = "Set FT_GENERATION_ENGINE=torch, which serves on any machine."
    if device not in ("", "cuda") or not torch.cuda.is_available():
        raise ServiceError("vLLM needs a CUDA GPU, and there is none", where="FT_GENERATION_ENGINE", mend=mend)
    try:
        import vllm
    except ImportError as error:
        raise ServiceError(
            f"vLLM is not installed ({error})", where="FT_GENERATION_ENGINE", mend=f"pip install vllm. {mend}"
        ) from None
    return vllm
