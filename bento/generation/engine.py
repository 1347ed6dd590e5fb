"""The torch engine: continuous batching of answers by many adapters on one base model.

Every pass through the model holds one token of each answer that is being written, and a share of the prompts that are
still to be read; answers join and leave between two passes (iteration-level scheduling as in Orca, OSDI 2022; prompts
in chunks as in Sarathi-Serve, arXiv:2403.02310). Every answer depends on its own prompt, adapter and seed only, up to
floating-point rounding.
"""

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bento.adapter_files import check_base, read_low_rank
from bento.generation.adapters import GenerationAdapter
from bento.generation.attention import Plan, Rows, Run
from bento.generation.grammar import Grammars
from bento.generation.interface import OnText, Sampling
from bento.generation.limits import check
from bento.generation.lora import Mixture
from bento.generation.manifest import read_generation_manifest
from bento.generation.model import Decoder
from bento.generation.prompts import Prompting
from bento.generation.sampling import choose
from bento.generation.scheduling import Request, Waiting, shares
from bento.generation.text import TextStream
from bento.preparation import prepare_content
from ft_resources.base_models import BaseModel
from ft_resources.errors import RequestError, ServiceError

logger = logging.getLogger(__name__)
READ_TOKENS = {"cpu": 128, "mps": 256, "cuda": 1024}
"""Prompt tokens of a pass while answers are being written: how long those wait for a prompt at most."""
READ_ALONE = 4
"""So many times as many while none are."""
MOST_ROWS = {"cpu": 32, "mps": 64, "cuda": 256}
"""Answers written at the same time."""
CACHE_BYTES = 2 << 30
"""For keys and values, on a CPU."""
CACHE_SHARE = 0.8
"""For keys and values, of what is free on a GPU beside the weights."""


class Generator(Prompting):
    """See `interface.TextGenerator`.

    Args:
        base: The base model, any decoder of `transformers` with plain softmax attention and rotary embeddings.
        precision: Of weights, updates, keys and values; sampling is float32. `auto` takes bf16 where the device
            multiplies it natively and fp32 elsewhere.
        threads: Threads of one matrix product on the CPU, for the whole process; None leaves torch's choice.
        device: `cuda`, `mps` or `cpu`; empty picks the best one there is.
        cache_bytes: Memory for keys and values; None: 2 GiB on a CPU, what is free on a GPU.
        most_rows: Answers written at the same time; None: as the device can do.
        most_waiting: Further ones that wait; more are refused.

    Raises:
        ServiceError: The base model cannot be loaded or served, or the asked device does not exist.
    """

    def __init__(
        self,
        base: BaseModel,
        precision: str = "auto",
        threads: int | None = None,
        device: str = "",
        *,
        cache_bytes: int | None = None,
        most_rows: int | None = None,
        most_waiting: int = 256,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        super().__init__(base)
        self._model = Decoder(base, precision, device)
        kind = self._model.device.type
        self._cache = self._model.cache(_cache_bytes(kind) if cache_bytes is None else cache_bytes)
        self._ends = self._model.ends | ({self._prompts.end} if self._prompts.end is not None else frozenset())
        self._grammars = Grammars(self._prompts.tokenizer, self._model.vocabulary, self._ends)
        self._read_tokens = READ_TOKENS[kind]
        self._most_rows, self._most_waiting = most_rows or MOST_ROWS[kind], most_waiting
        self._adapters: dict[str, GenerationAdapter] = {}
        self._loading = threading.Lock()
        self._computing = threading.Lock()
        self._changed = threading.Condition()
        self._waiting = Waiting()
        self._running: list[Request] = []
        """In the order they came. Only the engine's thread uses it."""
        self._closing = False
        self._mixed: tuple[GenerationAdapter, ...] = ()
        self._mixture = Mixture((), ())
        self._mixed_for: list[GenerationAdapter | None] | None = None
        """Whose updates the rows of the last pass got."""
        self._thread = threading.Thread(target=self._serve, name="generation", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """See `interface.TextGenerator`."""
        return self._thread.is_alive()

    @property
    def precision(self) -> str:
        """Of weights, updates, keys and values."""
        return "bf16" if self._model.dtype == torch.bfloat16 else "fp32"

    @property
    def hidden(self) -> int:
        """Width of an embedding."""
        return self._model.hidden

    @property
    def context(self) -> int:
        """Most tokens of a request, prompt and answer together."""
        return min(self._model.context, self._cache.most_tokens)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests of the loaded adapters, oldest first."""
        return tuple(self._adapters)

    @property
    def waiting(self) -> int:
        """Requests that no pass has touched yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values now."""
        return self._cache.nbytes

    def load(self, digest: str, folder: Path) -> GenerationAdapter:
        """See `interface.TextGenerator`."""
        known = self._adapters.get(digest)
        if known is not None:
            return known
        manifest = read_generation_manifest(folder)
        check_base(manifest.base, self.base, folder)
        alone = Mixture([self._model.place(read_low_rank(folder), folder)], self._model.groups)
        adapter = GenerationAdapter(digest, manifest, alone, alone.pairs())
        with self._loading:
            self._adapters = {**self._adapters, digest: adapter}
        return adapter

    def unload(self, digest: str) -> None:
        """See `interface.TextGenerator`."""
        with self._loading:
            self._adapters = {key: value for key, value in self._adapters.items() if key != digest}

    def adapter(self, digest: str) -> GenerationAdapter:
        """See `interface.TextGenerator`."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            raise ServiceError(f"adapter {digest[:12]} is not loaded", mend="Load it first.")
        return adapter

    def prompt_embedding(self, text: str, adapter: GenerationAdapter | None) -> list[int]:
        """See `interface.TextGenerator`. The text is prepared as the adapter's contents are, and cut to the context."""
        if adapter is not None:
            how = adapter.manifest.preparation
            text = prepare_content(text, how.pii, how.max_chars)[0]
        return self._prompts.tokens(text)[: self._model.context]

    def embed(self, ids: Sequence[int], adapter: GenerationAdapter | None) -> npt.NDArray[np.float32]:
        """See `interface.TextGenerator`."""
        if not ids:
            return np.zeros(self.hidden, dtype=np.float32)
        with self._computing:
            self._mix(())
            self._model.updates.runs = [(0, len(ids), adapter.alone)] if adapter else []
            states = self._model.states(ids, range(len(ids)), Plan(runs=[Run(0, len(ids), None)]))
        mean: npt.NDArray[np.float32] = states.mean(0).float().cpu().numpy()
        return mean

    def prepare(self, sampling: Sampling) -> None:
        """See `interface.TextGenerator`."""
        if sampling.json_schema is not None:
            self._grammars.matcher(sampling.json_schema)

    def submit(
        self,
        ids: Sequence[int],
        adapter: GenerationAdapter | None,
        sampling: Sampling,
        on_text: OnText | None = None,
    ) -> Request:
        """See `interface.TextGenerator`."""
        check(ids, sampling, self.context)
        matcher = None if sampling.json_schema is None else self._grammars.matcher(sampling.json_schema)
        stream = TextStream(self._prompts.tokenizer, sampling.stop)
        request = Request(ids, adapter, sampling, stream, matcher, on_text, self._wake)
        with self._changed:
            if self._closing:
                raise ServiceError("the engine is closed", mend="Send the request to a running service.")
            if len(self._waiting) >= self._most_waiting:
                self._waiting.drop_over()
            if len(self._waiting) >= self._most_waiting:
                raise RequestError(
                    "overloaded",
                    f"{len(self._waiting)} requests wait already",
                    status=503,
                    mend="Try again later, with fewer requests at a time.",
                )
            self._waiting.add(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """See `interface.TextGenerator`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _serve(self) -> None:
        """The engine's thread."""
        try:
            while True:
                with self._changed:
                    while not (self._closing or self._waiting or self._running):
                        self._changed.wait()
                    if self._closing:
                        return
                try:
                    self._leave()
                    self._join()
                    if self._running:
                        self._pass()
                except Exception as error:  # whatever it is, out of memory among them: those who come next are answered
                    logger.error("a pass failed", exc_info=error)
                    self._abandon(_not_computed(error))
        finally:
            with self._changed:
                self._closing = True
                self._running += self._waiting.clear()
            self._abandon(ServiceError("the engine was closed", mend="Try again."))

    def _leave(self) -> None:
        """Free the slots of those that are answered, failed or given up."""
        for request in [one for one in self._running if one.over]:
            failed = not request.future.cancelled() and request.future.exception() is not None
            self._cache.release(request.at, wipe=failed)
            self._running.remove(request)

    def _join(self) -> None:
        """Slots for those that wait, tasks by turns, while there are any."""
        while len(self._running) < self._most_rows:
            with self._changed:
                request = self._waiting.first()
            if request is None:
                return
            try:
                request.place = self._cache.take(request.most)
            except Exception as error:  # no memory for another slot: those that have one keep it
                logger.error("a request got no slot", exc_info=error)
                request.fail(_not_computed(error))
                continue
            if request.place is None:
                return
            request.place.owner = request
            request.began = time.monotonic()
            self._running.append(request)
            with self._changed:
                self._waiting.remove(request)

    def _pass(self) -> None:
        """One pass through the model: a token more for everyone that writes, a share of the prompts for who reads."""
        writing, rows, ids, positions = self._rows()
        reading = [request for request in self._running if request.unread]
        shared = shares(reading, self._read_tokens * (1 if writing else READ_ALONE))
        runs, mixed_runs, wanted, choosing = [], [], list(range(len(writing))), list(writing)
        for request, count in shared:
            place = request.at
            start, past = len(ids), place.kept
            ids += request.prompt[past : past + count]
            positions += range(past, past + count)
            hidden = self._model.hidden_from(count, past)
            runs.append(Run(start, len(ids), place.lane, place.slot, past, hidden))
            if request.adapter is not None:
                mixed_runs.append((start, len(ids), request.adapter.alone))
            if count == request.unread:
                wanted.append(len(ids) - 1)
                choosing.append(request)
        with self._computing:
            self._mix(writing)
            self._model.updates.runs = mixed_runs
            if not wanted:
                self._model.states(ids, positions, Plan(rows, runs))
            else:
                logits = self._model.logits(ids, positions, Plan(rows, runs), wanted)
                allowed = self._allowed(choosing, logits)
                chosen, logprobs = choose(logits, [one.choice() for one in choosing], allowed)
        for request in writing:
            request.at.kept += 1
        for request, count in shared:
            request.at.kept += count
        for request in choosing[len(writing) :]:
            request.at.lane.start_writing(request.at)
        if wanted:
            for request, token, logprob in zip(choosing, chosen, logprobs, strict=True):
                request.write(token, logprob, self._ends)

    def _rows(self) -> tuple[list[Request], list[Rows], list[int], list[int]]:
        """Who writes, lane by lane; what attention needs of them; their last tokens and the places of these."""
        writing: list[Request] = []
        rows: list[Rows] = []
        for lane in self._cache.lanes.values():
            if not lane.writing:
                continue
            kept = torch.tensor([place.kept for place in lane.places[: lane.writing]], device=self._model.device)
            longest = int(max(place.kept for place in lane.places[: lane.writing])) + 1
            hidden = None
            if int(min(place.kept for place in lane.places[: lane.writing])) + 1 < longest:
                later = torch.arange(longest, device=self._model.device) > kept[:, None]
                hidden = torch.zeros(later.shape, dtype=self._model.dtype, device=self._model.device)
                hidden = hidden.masked_fill_(later, float("-inf"))[:, None, None]
            rows.append(Rows(len(writing), lane, kept, longest, hidden))
            writing += [place.owner for place in lane.places[: lane.writing]]
        return writing, rows, [one.last for one in writing], [one.at.kept for one in writing]

    def _mix(self, writing: Sequence[Request]) -> None:
        """The updates of the rows that write. What is side by side stays so while it is not much too much."""
        updates = self._model.updates
        adapters = [one.adapter for one in writing]
        if adapters == self._mixed_for:
            updates.rows = len(writing)
            return
        self._mixed_for = None  # until all of it is there
        wanted = tuple({one: None for one in adapters if one is not None})
        updates.rows, updates.mixture, updates.foreign = len(writing), None, None
        if wanted:
            if not (set(wanted) <= set(self._mixed) and len(self._mixed) <= 2 * len(wanted)):
                self._mixed = ()
                self._mixture = wanted[0].alone
                if len(wanted) > 1:
                    self._mixture = Mixture([adapter.updates for adapter in wanted], self._model.groups)
                self._mixed = wanted
            updates.mixture = self._mixture
            if len(self._mixed) > 1 or None in adapters:
                numbers = {adapter: number for number, adapter in enumerate(self._mixed)}
                owners = [-1 if one is None else numbers[one] for one in adapters]
                updates.foreign = self._mixture.foreign(torch.tensor(owners, device=self._model.device))
        self._mixed_for = adapters

    def _allowed(self, choosing: Sequence[Request], logits: torch.Tensor) -> torch.Tensor | None:
        if all(request.matcher is None for request in choosing):
            return None
        allowed = torch.ones(logits.shape, dtype=torch.bool)
        for row, request in enumerate(choosing):
            if request.matcher is not None:
                allowed[row] = request.matcher.allowed()
        return allowed.to(logits.device)

    def _abandon(self, error: ServiceError) -> None:
        """Fail all that run, and forget what they may have left half done."""
        running, self._running = self._running, []
        self._cache.clear()
        self._mixed_for = None
        for request in running:
            request.fail(error)


def _not_computed(error: Exception) -> ServiceError:
    return ServiceError(f"the model could not be computed: {error}", mend="Try again.")


def _cache_bytes(kind: str) -> int:
    if kind != "cuda":
        return CACHE_BYTES
    free, _total = torch.cuda.mem_get_info()
    return int(CACHE_SHARE * free)
