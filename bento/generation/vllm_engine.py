"""The same requests answered by vLLM, on a CUDA GPU or by its CPU build; chosen by `FT_GENERATION_ENGINE=vllm`.

vLLM computes tokens in processes of its own, and constrains them with the same grammars; their text, stop strings and
ends are those of `bento.generation.answer`, as with the torch engine. An adapter is handed over as the folder it is
stored in, under a number of its own: vLLM reads plain peft folders.
"""

import asyncio
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from bento.adapter_files import check_base, read_low_rank
from bento.devices import pick_dtype
from bento.generation.answer import Answer
from bento.generation.grammar import Grammars, guided
from bento.generation.interface import OnText, Sampling
from bento.generation.limits import check
from bento.generation.manifest import GenerationManifest, read_generation_manifest
from bento.generation.model import ends_of
from bento.generation.prompts import Prompting
from bento.generation.text import TextStream
from bento.generation.vllm_host import MEND, Warden, vllm_device
from bento.limits import InFlight
from ft_resources.base_models import BaseModel
from ft_resources.errors import FtError, RequestError, ServiceError

HIGHEST_RANK = 64
"""Of an adapter; vLLM reserves memory for it."""
ON_DEVICE = 16
"""Adapters that one batch can mix."""
IN_MEMORY = 1 << 16
"""More than are ever loaded: one that vLLM put away by itself it would read again in the middle of a pass, for all."""
CACHE_BYTES = 2 << 30
"""For keys and values, on a CPU; `VLLM_CPU_KVCACHE_SPACE` (GiB) overrides. vLLM's default is all memory there is."""
FIT = -1
"""As the longest request: what the base model reads, or the memory for keys and values holds."""
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


class VllmGeneration(Answer):
    """See `interface.Generation`.

    Args:
        ids: The prompt.
    """

    def __init__(
        self, ids: Sequence[int], adapter: HandedOver | None, sampling: Sampling, stream: TextStream, **more: Any
    ) -> None:
        super().__init__(len(ids), sampling, stream, **more)
        self.prompt, self.adapter = list(ids), adapter
        self.began = time.monotonic()  # vLLM does not tell how long it lets a request wait
        self.computing: Future[None] | None = None
        """In the loop; cancelled, vLLM gives the request up."""

    def cancel(self) -> None:
        """See `interface.Generation`."""
        super().cancel()
        if self.computing is not None:
            self.computing.cancel()

    def take(self, output: Any) -> None:
        """What vLLM computed since the last time."""
        part = output.outputs[0]
        for place, token in enumerate(part.token_ids):
            last = output.finished and place == len(part.token_ids) - 1
            ends = frozenset({token}) if last and part.finish_reason == "stop" else frozenset[int]()
            self.write(token, part.logprobs[place][token].logprob, ends)
            if self.over:
                return
        if output.finished:
            self.fail(_failed(f"it ended the answer: {part.finish_reason}"))


class VllmGenerator(Prompting):
    """See `interface.TextGenerator`, and `engine.Generator` for the arguments.

    The mean log-probability of an answer that follows a schema is one under the schema: vLLM tells no other.

    Args:
        threads: Of vLLM's process on a CPU; None: as many as there are cores.
        device: `cuda` or `cpu`, which is for the vLLM that is installed to say; empty takes what it computes on.

    Raises:
        ServiceError: vLLM is not installed, finds no device here, does not start, or cannot compute the base model.
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
        kind = vllm_device(device)
        super().__init__(base)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that vLLM starts
        self._adapters: dict[str, HandedOver] = {}
        self._users: dict[int, int] = {}
        """Requests in flight by the number of their adapter, of all adapters vLLM holds. Only the loop uses it."""
        self._answering: set[asyncio.Task[Any]] = set()
        """Only the loop uses it."""
        self._numbers = itertools.count(1)
        self._loading, self._submitting = threading.Lock(), threading.Lock()
        self._closing = False
        self._in_flight = InFlight(most_waiting)
        self._engine: Any = None
        self._warden = Warden()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._wait(self._start(kind, pick_dtype(precision, torch.device(kind))))
            engine: Any = self._engine
            config = engine.model_config
            self.context = int(config.max_model_len)
            ends = ends_of(config.hf_text_config) | ({self._prompts.end} if self._prompts.end is not None else set())
            self._ends = sorted(ends)
            self._grammars = Grammars(self._prompts.tokenizer, config.get_vocab_size(), ends)
            self.submit([0], None, Sampling(max_tokens=1)).future.result()
        except FtError as error:
            self.close()
            raise ServiceError(
                f"vLLM cannot serve it: {error.what}", where=str(base.path), mend=f"See the log. {MEND}"
            ) from error

    @property
    def alive(self) -> bool:
        """See `interface.TextGenerator`."""
        engine = self._engine
        return engine is not None and not engine.errored

    def load(self, digest: str, folder: Path) -> HandedOver:
        """See `interface.TextGenerator`."""
        with self._loading:
            if digest not in self._adapters:
                adapter = hand_over(digest, folder, self.base, next(self._numbers))
                self._wait(self._hold(adapter))
                self._adapters[digest] = adapter
            return self._adapters[digest]

    def unload(self, digest: str) -> None:
        """See `interface.TextGenerator`."""
        with self._loading:
            adapter = self._adapters.pop(digest, None)
        if adapter is not None:
            self._run(self._forget(adapter))

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
        """See `interface.TextGenerator`. vLLM compiles the schema once more, with the same library."""
        if sampling.json_schema is not None:
            self._grammars.matcher(sampling.json_schema)

    def submit(
        self, ids: Sequence[int], adapter: HandedOver | None, sampling: Sampling, on_text: OnText | None = None
    ) -> VllmGeneration:
        """See `interface.TextGenerator`. What vLLM refuses fails the answer."""
        check(ids, sampling, self.context)
        matcher = None if sampling.json_schema is None else self._grammars.matcher(sampling.json_schema)
        stream = TextStream(self._prompts.tokenizer, sampling.stop)
        answer = VllmGeneration(ids, adapter, sampling, stream, matcher=matcher, on_text=on_text)
        self._in_flight.enter()
        answer.future.add_done_callback(self._in_flight.leave)
        try:
            answer.computing = self._run(self._answer(answer))
        except ServiceError as error:
            answer.fail(error)
            raise
        return answer

    def close(self) -> None:
        """See `interface.TextGenerator`."""
        with self._submitting:
            if self._closing:
                return
            ended = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._closing = True
        ended.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Result]) -> "Future[Result]":
        """Raises:
        ServiceError: The engine is closed.
        """
        with self._submitting:
            if self._closing:
                work.close()
                raise ServiceError("the engine is closed", mend="Send the request to a running service.")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Raises:
        ServiceError: vLLM could not do it.
        """
        try:
            return self._run(work).result()
        except FtError:
            raise
        except Exception as error:  # vLLM raises what it likes
            raise _failed(str(error)) from error

    async def _start(self, kind: str, dtype: torch.dtype) -> None:
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: dict[str, Any] = {
            "model": str(self.base.path),
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": FIT,
            "kv_cache_memory_bytes": CACHE_BYTES if kind == "cpu" else None,
            "enable_lora": True,
            "max_lora_rank": HIGHEST_RANK,
            "max_loras": ON_DEVICE,
            "max_cpu_loras": IN_MEMORY,
            "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
            "disable_log_stats": True,  # they would be metrics of this process
        }
        with self._warden.watching():
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def _end(self) -> None:
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()
            self._warden.dismiss()

    async def _answer(self, answer: VllmGeneration) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._answering.add(me)
        try:
            await self._compute(answer)
        except asyncio.CancelledError:  # by who asked, who does not wait any more, or by `close`
            answer.fail(ServiceError("the engine was closed", mend="Try again."))
        except Exception as error:  # whatever it is, it is of this answer alone
            failure = _failed(str(error.__cause__ or error))
            failure.__cause__ = error
            answer.fail(failure)
        finally:
            self._answering.discard(me)

    async def _compute(self, answer: VllmGeneration) -> None:
        adapter = answer.adapter
        lora = None
        if adapter is not None:
            await self._hold(adapter)
            self._users[adapter.number] += 1
            lora = _request(adapter)
        try:
            asked = {"type": "token", "prompt_token_ids": answer.prompt}
            how = _parameters(answer.sampling, self._ends)
            async with aclosing(self._engine.generate(asked, how, uuid.uuid4().hex, lora_request=lora)) as outputs:
                async for output in outputs:
                    answer.take(output)
                    if answer.over:
                        return
        finally:
            if adapter is not None:
                self._users[adapter.number] -= 1
                await self._forget(adapter)

    async def _hold(self, adapter: HandedOver) -> None:
        """Let vLLM read it now: one that it refuses in the middle of a pass ends its process."""
        if adapter.number not in self._users:
            await self._engine.add_lora(_request(adapter))
            self._users.setdefault(adapter.number, 0)

    async def _forget(self, adapter: HandedOver) -> None:
        """Let vLLM free it, if it was unloaded and nobody uses it."""
        if self._adapters.get(adapter.digest) is not adapter and self._users.get(adapter.number) == 0:
            del self._users[adapter.number]
            await self._engine.remove_lora(adapter.number)


def _request(adapter: HandedOver) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.digest, adapter.number, str(adapter.folder))


def _parameters(sampling: Sampling, ends: Sequence[int]) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    structured = None
    if sampling.json_schema is not None:
        structured = StructuredOutputsParams(json=json.dumps(guided(sampling.json_schema)))
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_token_ids=list(ends),
        detokenize=False,
        logprobs=0,  # of the chosen tokens alone
        structured_outputs=structured,
        output_kind=RequestOutputKind.DELTA,
    )


def _failed(why: str) -> ServiceError:
    return ServiceError(f"vLLM failed: {why}", mend="Try again; see the log.")


def _no_embeddings() -> RequestError:
    return RequestError(
        "invalid_request",
        "the vLLM engine gives no embeddings",
        mend="Ask a service with FT_GENERATION_ENGINE=torch.",
    )
