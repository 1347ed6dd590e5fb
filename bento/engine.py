"""One base model in memory and many LoRA classifiers on it; the same engine evaluates and serves.

A batch may mix adapters of any rank and any set of target layers. Every answer depends on its own text and adapter
only, up to floating-point rounding.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bento.adapter_files import OTHER_BASE, AdapterFiles, Manifest, check_base, check_updates, read_adapter
from bento.classify import Head, Scored, classify, passes
from bento.devices import PASS_TOKENS, pick_device, pick_precision
from bento.encoder import Encoder
from bento.multi_lora import Update
from bento.preparation import prepare
from ft_resources.base_models import BaseModel
from ft_resources.errors import ServiceError


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter. It is complete when it becomes visible and never changes afterwards."""

    digest: str
    manifest: Manifest
    update: Update
    head_weight: torch.Tensor
    head_bias: torch.Tensor
    tokenizer: Tokenizer

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        return self.update.nbytes + self.head_weight.nbytes + self.head_bias.nbytes


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tokenised text with the adapter that answers it; keeps the adapter alive through an unload."""

    ids: Sequence[int]
    adapter: Adapter


class Engine:
    """Scores texts with any of the loaded adapters.

    Args:
        base: The base model, any encoder that `transformers.AutoModel` loads and that keeps the batch first.
        precision: `int8`, `bf16` or `fp32`, see `Encoder`; heads and softmax are float32 always. `auto` takes bf16
            where the device multiplies it natively (CUDA; CPUs with AVX512-BF16 or AMX) and fp32 elsewhere.
        threads: Threads of one matrix product on the CPU, for the whole process; None leaves torch's choice.
        device: `cuda`, `mps` or `cpu`; empty picks the best one there is.

    Raises:
        ServiceError: The base model cannot be loaded, or the asked device or precision is not there.
    """

    def __init__(self, base: BaseModel, precision: str = "auto", threads: int | None = None, device: str = "") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.base = base
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self._encoder = Encoder(base, self.precision, self.device)
        self._tokenizer = _read_tokenizer(base)
        self._tokenizers: dict[int, Tokenizer] = {}
        self._adapters: dict[str, Adapter] = {}
        self._loading = threading.Lock()
        self._running = threading.Lock()

    @property
    def hidden(self) -> int:
        """Width of the embedding."""
        return self._encoder.hidden

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests of the loaded adapters, oldest first."""
        return tuple(self._adapters)

    def load(self, digest: str, folder: Path) -> Adapter:
        """Read, check and publish the adapter in `folder`; loading a digest again changes nothing.

        Raises:
            ServiceError: The adapter is damaged, belongs to another base model, or cannot be served exactly.
                The engine is as it was before.
        """
        known = self._adapters.get(digest)
        if known is not None:
            return known
        files = read_adapter(folder)
        self._check(files, folder)
        update = self._encoder.update(
            {module: (low.a.t(), low.b.t() * low.scale) for module, low in files.updates.items()}
        )
        if not update.finite:
            raise ServiceError(
                f"the adapter's update is too large for {self.precision}",
                where=str(folder),
                mend="Train it with a smaller learning rate.",
            )
        adapter = Adapter(
            digest=digest,
            manifest=files.manifest,
            update=update,
            head_weight=files.head_weight.to(self.device),
            head_bias=files.head_bias.to(self.device),
            tokenizer=self._tokenizer_for(files.manifest.max_tokens),
        )
        with self._loading:
            self._adapters = {**self._adapters, digest: adapter}
        return adapter

    def unload(self, digest: str) -> None:
        """Forget an adapter. Texts that were encoded for it are still answered by it."""
        with self._loading:
            self._adapters = {key: value for key, value in self._adapters.items() if key != digest}

    def adapter(self, digest: str) -> Adapter:
        """Raises:
        ServiceError: It is not loaded.
        """
        adapter = self._adapters.get(digest)
        if adapter is None:
            raise ServiceError(f"adapter {digest[:12]} is not loaded", mend="Load it first.")
        return adapter

    def score(self, items: Sequence[tuple[str, str]]) -> list[Scored]:
        """Answers to (text, adapter digest), in the order of `items`.

        Raises:
            ServiceError: An adapter is not loaded, or the model's output is not finite.
        """
        adapters = {digest: self.adapter(digest) for digest in {digest for _, digest in items}}
        encoded: list[Encoded | None] = [None] * len(items)
        for digest, adapter in adapters.items():
            places = [place for place, item in enumerate(items) if item[1] == digest]
            for place, one in zip(places, self.encode([items[place][0] for place in places], adapter), strict=True):
                encoded[place] = one
        return self.run([one for one in encoded if one is not None])

    def encode(self, texts: Sequence[str], adapter: Adapter) -> list[Encoded]:
        """Token ids of each text, prepared as the training rows were and cut to `max_tokens`. Safe in any thread."""
        how = adapter.manifest.preparation
        prepared = [prepare(text, how.pii, how.max_chars)[0] for text in texts]
        return [Encoded(one.ids, adapter) for one in adapter.tokenizer.encode_batch_fast(prepared)]

    def run(self, encoded: Sequence[Encoded]) -> list[Scored]:
        """Answers in the order of `encoded`, computed in passes of texts of like length.

        Raises:
            ServiceError: The model's output is not finite.
        """
        answers: dict[int, Scored] = {}
        with self._running, torch.inference_mode():
            lengths = [len(one.ids) for one in encoded]
            for places in passes(lengths, PASS_TOKENS[self.device.type], padded=not self._encoder.packed):
                places = _by_adapter(places, encoded)
                answers.update(zip(places, self._pass([encoded[place] for place in places]), strict=True))
        return [answers[place] for place in range(len(encoded))]

    def _pass(self, batch: Sequence[Encoded]) -> list[Scored]:
        """One pass through the model; rows of one adapter stand together in `batch`."""
        segments = list(_runs([one.adapter for one in batch]))
        pooled = self._encoder.pooled(
            [one.ids for one in batch],
            [(start, stop, adapter.update) for start, stop, adapter in segments],
            [one.adapter.manifest.pooling for one in batch],
        )
        heads = [
            Head(
                start,
                stop,
                adapter.head_weight,
                adapter.head_bias,
                adapter.manifest.labels,
                adapter.manifest.temperature,
            )
            for start, stop, adapter in segments
        ]
        return classify(pooled, heads)

    def _check(self, files: AdapterFiles, folder: Path) -> None:
        check_base(files.manifest.base, self.base, folder)
        if files.head_weight.shape[1] != self.hidden:
            raise ServiceError(
                f"the head takes {files.head_weight.shape[1]} values, the base model gives {self.hidden}",
                where=str(folder),
                mend=OTHER_BASE,
            )
        longest = getattr(self._encoder.config, "max_position_embeddings", None)
        if longest is not None and files.manifest.max_tokens > longest:
            raise ServiceError(
                f"max_tokens is {files.manifest.max_tokens}, the base model reads {longest}",
                where=str(folder),
                mend="Train with a smaller max_tokens.",
            )
        check_updates(files.updates, self._encoder.layers, folder)

    def _tokenizer_for(self, max_tokens: int) -> Tokenizer:
        with self._loading:
            if max_tokens not in self._tokenizers:
                tokenizer = Tokenizer.from_str(self._tokenizer)
                tokenizer.no_padding()
                tokenizer.enable_truncation(max_tokens)
                self._tokenizers[max_tokens] = tokenizer
            return self._tokenizers[max_tokens]


def _read_tokenizer(base: BaseModel) -> str:
    """The serialised tokenizer of `base`."""
    path = base.path / "tokenizer.json"
    if not path.is_file():
        raise ServiceError(
            "the base model has no tokenizer.json",
            where=str(base.path),
            mend="Save a fast tokenizer there with transformers' save_pretrained.",
        )
    return path.read_text(encoding="utf-8")


def _by_adapter(places: Sequence[int], encoded: Sequence[Encoded]) -> list[int]:
    """Texts of one adapter together, beside adapters of the same form and with about as many tokens."""
    tokens: dict[str, int] = {}
    for place in places:
        digest = encoded[place].adapter.digest
        tokens[digest] = tokens.get(digest, 0) + len(encoded[place].ids)

    def order(place: int) -> tuple[int, int, str]:
        adapter = encoded[place].adapter
        return adapter.update.nbytes, -tokens[adapter.digest], adapter.digest

    return sorted(places, key=order)


def _runs(adapters: Sequence[Adapter]) -> Iterator[tuple[int, int, Adapter]]:
    start = 0
    for row in range(1, len(adapters) + 1):
        if row == len(adapters) or adapters[row] is not adapters[start]:
            yield start, row, adapters[start]
            start = row
