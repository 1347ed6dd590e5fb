"""Adapters by digest: loaded from the lake when first asked for, the least recently used ones forgotten."""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bento.adapter_files import Reference, read_reference
from bento.devices import pick_device, served_in
from bento.engine import Engine
from bento.generation.interface import TextGenerator
from bento.routing import BakedRelease
from ft_resources.base_models import BaseModel, resolve
from ft_resources.environments import ADAPTER_MEMORY_MB
from ft_resources.errors import ArtefactError, ServiceError
from ft_resources.files import file_hashes
from ft_resources.lake import Lake

logger = logging.getLogger(__name__)
MEGABYTE = 1 << 20
ADAPTER_MEMORY = ADAPTER_MEMORY_MB * MEGABYTE
"""Bytes, by default."""


class Loaded(Protocol):
    """An adapter in memory, of whichever engine."""

    @property
    def digest(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class AdapterSource(Protocol):
    """Where adapter folders come from."""

    def folder(self, digest: str) -> Path:
        """A verified local folder.

        Raises:
            ArtefactError: There is none, or it is damaged.
        """


class LakeAdapters:
    """Adapters of the lake, verified file by file."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake

    def folder(self, digest: str) -> Path:
        return self._lake.open(digest).folder


class BakedAdapter:
    """The adapter that lies beside the service; every other digest is asked of `following`."""

    def __init__(self, release: BakedRelease, following: AdapterSource) -> None:
        self._release, self._following = release, following

    def folder(self, digest: str) -> Path:
        """See `AdapterSource`.

        Raises:
            ServiceError: A file of the adapter is missing or changed, or there is one that was not built in.
        """
        if digest != self._release.adapter:
            return self._following.folder(digest)
        found, wanted = file_hashes(self._release.folder), self._release.files
        wrong = sorted({name for name, _ in found.items() ^ wanted.items()})
        if wrong:
            raise ServiceError(
                f"the adapter beside the service is not the one that was built in: {', '.join(wrong[:5])}",
                where=str(self._release.folder),
                mend="Build the Bento again.",
            )
        return self._release.folder


class BasePool:
    """One engine per base model, kind of task and precision, made when the first adapter needs it.

    Args:
        known: Base models that lie on this machine, asked for by digest before the adapter's own reference.
        precision: Of adapters whose release says `auto`.
        threads, device: See `Engine`.
        generation: Engine of tasks that write texts: `torch` or `vllm`.
    """

    def __init__(
        self,
        known: Iterable[BaseModel] = (),
        *,
        precision: str = "auto",
        threads: int | None = None,
        device: str = "",
        generation: str = "torch",
    ) -> None:
        self._known = {base.digest: base for base in known}
        self._precision, self._threads, self._device, self._generation = precision, threads, device, generation
        self._engines: dict[tuple[str, bool, str], Engine | TextGenerator] = {}
        self._lock = threading.Lock()

    def engine(self, wanted: Reference, precision: str = "auto") -> Engine | TextGenerator:
        """The engine that runs adapters of this type on the base model with this digest.

        Args:
            precision: `auto`, `int8`, `bf16` or `fp32`; see `served_in`.

        Raises:
            ServiceError: The base model is not on this machine, or it is not the one the adapter was trained on.
            SpecError: The reference names nothing here.
        """
        writes = wanted.type != "text-classification"
        precision = served_in(self._precision if precision == "auto" else precision, pick_device(self._device))
        key = (wanted.base.digest, writes, precision)
        with self._lock:
            engine = self._engines.get(key)
            if engine is None:
                make = self._writer if writes else Engine
                engine = self._engines[key] = make(self._base(wanted), precision, self._threads, self._device)
            return engine

    @property
    def alive(self) -> bool:
        """Whether every engine that writes texts still computes."""
        return all(isinstance(engine, Engine) or engine.alive for engine in list(self._engines.values()))

    def close(self) -> None:
        """End the engines that write texts; what they have not answered fails."""
        with self._lock:
            for engine in self._engines.values():
                if not isinstance(engine, Engine):
                    engine.close()
            self._engines = {}

    def _base(self, wanted: Reference) -> BaseModel:
        base = self._known.get(wanted.base.digest) or resolve(wanted.base.model)
        if base.digest != wanted.base.digest:
            raise ServiceError(
                f"base model '{wanted.base.model}' is {base.digest[:12]} here, "
                f"the adapter was trained on {wanted.base.digest[:12]}",
                where=str(base.path),
                mend="Install the version it was trained on.",
            )
        return base

    def _writer(self, base: BaseModel, precision: str, threads: int | None, device: str) -> TextGenerator:
        if self._generation == "vllm":
            from bento.generation.vllm_engine import VllmGenerator

            return VllmGenerator(base, precision, threads, device)
        from bento.generation.engine import Generator

        return Generator(base, precision, threads, device)


@dataclass(frozen=True)
class _Place:
    engine: Engine | TextGenerator
    adapter: Loaded
    nbytes: int


class AdapterStore:
    """Loaded adapters, in bounded memory. Safe in any number of threads.

    Args:
        source: Where folders come from.
        bases: Engines by base model.
        memory: Bytes the adapters may take together; the least recently used ones go, the one just asked for stays.
            Texts in flight keep theirs until they are answered.
    """

    def __init__(self, source: AdapterSource, bases: BasePool, memory: int = ADAPTER_MEMORY) -> None:
        self._source, self._bases, self._memory = source, bases, memory
        self._places: OrderedDict[tuple[str, str], _Place] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[tuple[str, str], threading.Lock] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests in memory, least recently used first."""
        with self._lock:
            return tuple(dict.fromkeys(digest for digest, _ in self._places))

    @property
    def nbytes(self) -> int:
        """Memory the adapters take."""
        with self._lock:
            return sum(place.nbytes for place in self._places.values())

    def peek(self, digest: str, precision: str = "auto") -> tuple[Any, Any] | None:
        """The adapter if it is in memory; never loads."""
        key = (digest, precision)
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            self._places.move_to_end(key)
            return place.engine, place.adapter

    def get(self, digest: str, precision: str = "auto") -> tuple[Any, Any]:
        """The engine and its adapter, loaded if need be; threads that want the same one load it once.

        Returns:
            `Engine` and its `Adapter`, or `TextGenerator` and its.

        Raises:
            ArtefactError: It is missing or damaged.
            ServiceError: It cannot be served exactly.
            SpecError: Its base model is not on this machine.
        """
        there = self.peek(digest, precision)
        if there is not None:
            return there
        key = (digest, precision)
        with self._lock:
            turn = self._loading.setdefault(key, threading.Lock())
        with turn:
            try:
                there = self.peek(digest, precision)
                while there is None:
                    engine, adapter = self._load(digest, precision)
                    with self._lock:
                        if _holds(engine, adapter):
                            self._places[key] = _Place(engine, adapter, adapter.nbytes)
                            self._make_room()
                            there = engine, adapter
                return there
            finally:
                with self._lock:
                    self._loading.pop(key, None)

    def _make_room(self) -> None:
        taken = sum(place.nbytes for place in self._places.values())
        while taken > self._memory and len(self._places) > 1:
            (old, _), place = self._places.popitem(last=False)
            taken -= place.nbytes
            # `auto` may share an engine with the precision it stands for
            if not any(digest == old and other.engine is place.engine for (digest, _), other in self._places.items()):
                place.engine.unload(old)

    def _load(self, digest: str, precision: str) -> tuple[Engine | TextGenerator, Loaded]:
        try:
            folder = self._source.folder(digest)
        except (OSError, json.JSONDecodeError) as error:
            raise ArtefactError(
                f"adapter {digest[:12]} cannot be read: {error}", mend="Check the lake and its permissions."
            ) from error
        engine = self._bases.engine(read_reference(folder), precision)
        return engine, engine.load(digest, folder)


def _holds(engine: Engine | TextGenerator, adapter: Loaded) -> bool:
    """False when `adapter` was unloaded since: it lost the place of another precision, which shares the engine."""
    try:
        return engine.adapter(adapter.digest) is adapter
    except ServiceError:
        return False
