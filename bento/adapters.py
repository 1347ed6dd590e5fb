"""Adapters by digest: loaded from the lake when first asked for, the least recently used ones forgotten."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from bento.adapter_files import BaseReference, read_manifest
from bento.engine import Adapter, Engine
from ft_resources.base_models import BaseModel, resolve
from ft_resources.errors import ArtefactError, ServiceError
from ft_resources.lake import Lake


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
    """One adapter that lies beside the service; every other digest is asked of `following`."""

    def __init__(self, digest: str, folder: Path, following: AdapterSource) -> None:
        self._digest, self._folder, self._following = digest, folder, following

    def folder(self, digest: str) -> Path:
        return self._folder if digest == self._digest else self._following.folder(digest)


class BasePool:
    """One engine per base model, made when the first adapter needs it.

    Args:
        known: Base models that lie on this machine, asked for by digest before the adapter's own reference.
        precision, threads, device: See `Engine`.
    """

    def __init__(
        self, known: Iterable[BaseModel] = (), *, precision: str = "auto", threads: int | None = None, device: str = ""
    ) -> None:
        self._known = {base.digest: base for base in known}
        self._settings = (precision, threads, device)
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def engine(self, wanted: BaseReference) -> Engine:
        """The engine over the base model with this digest.

        Raises:
            ServiceError: It is not on this machine, or it is not the one the adapter was trained on.
            SpecError: The reference names nothing here.
        """
        with self._lock:
            engine = self._engines.get(wanted.digest)
            if engine is None:
                base = self._known.get(wanted.digest) or resolve(wanted.model)
                if base.digest != wanted.digest:
                    raise ServiceError(
                        f"base model '{wanted.model}' is {base.digest[:12]} here, "
                        f"the adapter was trained on {wanted.digest[:12]}",
                        where=str(base.path),
                        mend="Install the version it was trained on.",
                    )
                precision, threads, device = self._settings
                engine = self._engines[wanted.digest] = Engine(base, precision, threads, device)
            return engine


class AdapterStore:
    """Loaded adapters, at most `limit` of them. Safe in any number of threads.

    Args:
        source: Where folders come from.
        bases: Engines by base model.
        limit: Adapters kept; the least recently used one goes. Texts in flight keep theirs until they are answered.
    """

    def __init__(self, source: AdapterSource, bases: BasePool, limit: int = 64) -> None:
        if limit < 1:
            raise ServiceError(
                f"at most {limit} adapters is no adapter", where="FT_MAX_ADAPTERS", mend="Set at least 1."
            )
        self._source, self._bases, self._limit = source, bases, limit
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests in memory, least recently used first."""
        with self._lock:
            return tuple(self._engines)

    def peek(self, digest: str) -> tuple[Engine, Adapter] | None:
        """The adapter if it is in memory; never loads."""
        with self._lock:
            engine = self._engines.get(digest)
            if engine is None:
                return None
            self._engines.move_to_end(digest)
            return engine, engine.adapter(digest)

    def get(self, digest: str) -> tuple[Engine, Adapter]:
        """The adapter and the engine that runs it, loaded if need be; threads that want the same one load it once.

        Raises:
            ArtefactError: It is missing or damaged.
            ServiceError: It cannot be served exactly.
            SpecError: Its base model is not on this machine.
        """
        there = self.peek(digest)
        if there is not None:
            return there
        with self._lock:
            turn = self._loading.setdefault(digest, threading.Lock())
        with turn:
            there = self.peek(digest)
            if there is not None:
                return there
            engine, adapter = self._load(digest)
            with self._lock:
                self._engines[digest] = engine
                self._loading.pop(digest, None)
                while len(self._engines) > self._limit:
                    old, its_engine = self._engines.popitem(last=False)
                    its_engine.unload(old)
            return engine, adapter

    def _load(self, digest: str) -> tuple[Engine, Adapter]:
        try:
            folder = self._source.folder(digest)
        except (OSError, json.JSONDecodeError) as error:
            raise ArtefactError(
                f"adapter {digest[:12]} cannot be read: {error}", mend="Check the lake and its permissions."
            ) from error
        engine = self._bases.engine(read_manifest(folder).base)
        return engine, engine.load(digest, folder)
