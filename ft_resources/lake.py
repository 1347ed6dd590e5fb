"""The artefact store: immutable, content-addressed folders on a local disk or any fsspec URL.

An object is a folder with a `manifest.json` that lists kind, what it was made from, and the SHA-256 of every file.
Its digest is the SHA-256 of that manifest. Publishing is atomic: locally a folder is written aside, flushed and
renamed; on an object store the manifest is written last, and an object without one does not exist. Every opening
and every read verifies. Two kinds of small pointers make objects findable: keys (what it was made from -> digest) and
heads (task and asset -> digest).
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd

from ft_resources.errors import ArtefactError
from ft_resources.files import flush, flush_folder, sha256, walk

MANIFEST = "manifest.json"
DIGEST = re.compile("[0-9a-f]{64}")


def canonical(value: Any) -> bytes:
    """The one JSON form of `value` that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def short(digest: str) -> str:
    """The first 12 digits, as people see them."""
    return digest[:12]


@dataclass(frozen=True)
class Artefact:
    """A verified object of the lake, as a local folder."""

    digest: str
    kind: str
    made_from: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    folder: Path
    uri: str

    def path(self, name: str) -> Path:
        if name not in self.files:
            raise ArtefactError(
                f"{self.kind} {short(self.digest)} has no file '{name}'",
                where=self.uri,
                mend=f"It has: {list(self.files)}",
            )
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The bytes of a file, verified once more: an artefact may be held for long.

        Raises:
            ArtefactError: There is no such file, or it is not what the digest promises.
        """
        path = self.path(name)
        try:
            content = path.read_bytes()
        except OSError:
            raise _damaged(self.digest, self.folder, name) from None
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise _damaged(self.digest, self.folder, name)
        return content

    def json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def parquet(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(io.BytesIO(self.read(name)))


class Lake:
    """Publishes, finds and opens artefacts.

    Args:
        url: A local folder or an fsspec URL such as `s3://bucket/lake`.
        cache: Where objects of a remote lake are kept once fetched; default a folder under the system's temp.
    """

    def __init__(self, url: str | Path, *, cache: Path | None = None) -> None:
        self.url = str(url) if str(url).endswith("://") else str(url).rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(self.url)
        self.is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        name = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        self._cache = cache or Path(tempfile.gettempdir()) / f"ft-lake-{os.getuid()}" / name

    # -- publishing ---------------------------------------------------------------------------------------------

    def publish(self, kind: str, folder: Path, made_from: Mapping[str, Any]) -> Artefact:
        """Store a copy of `folder`; the same content made from the same things is stored once.

        Raises:
            ArtefactError: The disk is full or not writable. Nothing half-written is ever visible.
        """
        files = {name: {"sha256": sha256(path), "size": path.stat().st_size} for name, path in walk(folder)}
        if not files:
            raise ArtefactError(
                f"refusing to publish an empty {kind}", where=str(folder), mend="Write its files first."
            )
        if MANIFEST in files:
            raise ArtefactError(
                f"refusing to publish a {kind} with a file '{MANIFEST}'",
                where=str(folder),
                mend="Name that file otherwise.",
            )
        manifest = {"kind": kind, "made_from": dict(made_from), "files": files}
        content = canonical(manifest)
        digest = hashlib.sha256(content).hexdigest()
        with self._writing(kind, digest):
            artefact = self._intact(digest)
            if artefact is None:
                if self.is_local:
                    self._publish_local(folder, list(files), content, digest)
                else:
                    self._publish_remote(folder, list(files), content, digest)
                artefact = self.open(digest)
            self._write(self._key(kind, made_from), digest.encode())
        return artefact

    def _intact(self, digest: str) -> Artefact | None:
        try:
            return self.open(digest)
        except ArtefactError:
            return None

    def _publish_local(self, folder: Path, names: list[str], manifest: bytes, digest: str) -> None:
        final = Path(self._object(digest))
        aside = Path(self._root) / "incoming" / uuid.uuid4().hex
        try:
            for name in names:
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with (folder / name).open("rb") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                    flush(sink)
            with (aside / MANIFEST).open("wb") as sink:
                sink.write(manifest)
                flush(sink)
            for inside in (aside, *(path for path in aside.rglob("*") if path.is_dir())):
                flush_folder(inside)
            final.parent.mkdir(parents=True, exist_ok=True)
            if final.exists() and self._intact(digest) is None:  # set it aside rather than mix two
                with suppress(FileNotFoundError):  # someone else just did
                    final.rename(aside.with_name(aside.name + "-damaged"))
            try:
                aside.rename(final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # someone else just published the same
                    raise
            flush_folder(final.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _publish_remote(self, folder: Path, names: list[str], manifest: bytes, digest: str) -> None:
        for name in names:
            target = self._object(digest, name)
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(folder / name), target)
        self._fs.pipe_file(self._object(digest, MANIFEST), manifest)

    @contextmanager
    def _writing(self, kind: str, digest: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise ArtefactError(
                f"{kind} {short(digest)} could not be written: {error.strerror or error}",
                where=self.url,
                mend="Free space there and run again; nothing was damaged."
                if full
                else "Check the path and its permissions and run again; nothing was damaged.",
            ) from error

    # -- reading ------------------------------------------------------------------------------------------------

    def open(self, digest: str) -> Artefact:
        """The object with this digest, verified file by file.

        Raises:
            ArtefactError: No such object, or its bytes are not those its digest promises.
        """
        if not DIGEST.fullmatch(digest):
            raise ArtefactError(
                f"'{short(digest)}' is no digest", where=self.url, mend="Give all of its 64 hex digits."
            )
        if self.is_local:
            return self._opened(digest, Path(self._object(digest)))
        cached = self._cache / digest
        if cached.is_dir():
            try:
                return self._opened(digest, cached)
            except ArtefactError:  # the copy here was damaged: fetch another
                shutil.rmtree(cached, ignore_errors=True)
        self._fetch(digest, cached)
        return self._opened(digest, cached)

    def _opened(self, digest: str, folder: Path) -> Artefact:
        try:
            content = (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_dir():
                raise _damaged(digest, folder, MANIFEST) from None
            raise self._absent(digest) from None
        except OSError as error:
            raise _unreadable(digest, folder, MANIFEST, error) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(digest, folder, MANIFEST)
        manifest = json.loads(content)
        for name, entry in manifest["files"].items():
            try:
                intact = sha256(folder / name) == entry["sha256"]
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                intact = False
            except OSError as error:
                raise _unreadable(digest, folder, name, error) from error
            if not intact:
                raise _damaged(digest, folder, name)
        return Artefact(
            digest,
            manifest["kind"],
            manifest["made_from"],
            manifest["files"],
            folder,
            self.uri(digest),
        )

    def _absent(self, digest: str) -> ArtefactError:
        return ArtefactError(
            f"there is no artefact {short(digest)}", where=self.url, mend="Materialise the asset that makes it."
        )

    def _fetch(self, digest: str, folder: Path) -> None:
        origin = self.uri(digest)
        manifest = self._read(self._object(digest, MANIFEST))
        if manifest is None:
            raise self._absent(digest)
        if hashlib.sha256(manifest).hexdigest() != digest:  # before any name in it is trusted
            raise _damaged(digest, origin, MANIFEST)
        aside = self._cache / f"incoming-{uuid.uuid4().hex}"
        try:
            for name in json.loads(manifest)["files"]:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._fs.get_file(self._object(digest, name), str(aside / name))
                except FileNotFoundError:
                    raise _damaged(digest, origin, name) from None
            (aside / MANIFEST).write_bytes(manifest)
            self._opened(digest, aside)  # damaged on the far side: keep no copy of it
            try:
                aside.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # someone else just fetched the same
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def find(self, kind: str, made_from: Mapping[str, Any]) -> Artefact | None:
        """The object of this kind that was made from exactly these things, if it was made before and is intact."""
        digest = self._read(self._key(kind, made_from))
        artefact = self._intact(digest.decode("ascii", "replace")) if digest else None
        # damaged or lost it has to be made again, and so it has if the pointer was
        return artefact if artefact and artefact.kind == kind and artefact.made_from == _stored(made_from) else None

    def discard(self, digest: str) -> None:
        """Remove an object that nothing refers to any more, such as an outlived checkpoint; gone already is fine."""
        content = self._read(self._object(digest, MANIFEST))
        if content is None:
            return
        manifest = json.loads(content)
        key = self._key(manifest["kind"], manifest["made_from"])
        shutil.rmtree(self._cache / digest, ignore_errors=True)
        with suppress(FileNotFoundError):
            self._fs.rm_file(key)
        if self.is_local:  # by a rename first, so that nobody finds half of it
            aside = Path(self._root) / "incoming" / uuid.uuid4().hex
            aside.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                Path(self._object(digest)).rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            self._fs.rm(self._object(digest), recursive=True)

    # -- pointers -----------------------------------------------------------------------------------------------

    def set_head(self, task: str, asset: str, digest: str, run_id: str) -> None:
        """Point `asset` of `task` at `digest`; `run_id` says which run did."""
        head = {"digest": digest, "run_id": run_id, "at": datetime.now(UTC).isoformat()}
        with self._writing("pointer", digest):
            self._write(self._head(task, asset), canonical(head))

    def head(self, task: str, asset: str) -> Artefact | None:
        """The artefact that `asset` of `task` points at, verified; None before its first materialisation."""
        head = self._pointer(task, asset)
        return self.open(head["digest"]) if head else None

    def head_time(self, task: str, asset: str) -> datetime | None:
        """When `asset` of `task` was last materialised."""
        head = self._pointer(task, asset)
        return datetime.fromisoformat(head["at"]) if head else None

    def _pointer(self, task: str, asset: str) -> dict[str, str] | None:
        content = self._read(self._head(task, asset))
        if content is None:
            return None
        try:
            head = json.loads(content)
            return {"digest": str(head["digest"]), "at": str(datetime.fromisoformat(head["at"]))}
        except (ValueError, KeyError, TypeError):
            raise ArtefactError(
                f"the pointer to '{asset}' of task '{task}' is damaged",
                where=self._head(task, asset),
                mend=f"Materialise {asset} again.",
            ) from None

    def require(self, task: str, asset: str) -> Artefact:
        """Like `head`, but an asset that was never materialised is an error that names it."""
        artefact = self.head(task, asset)
        if artefact is None:
            raise ArtefactError(
                f"'{asset}' of task '{task}' was never materialised",
                where=self.url,
                mend=f"Materialise {asset} first: ft run {task}",
            )
        return artefact

    def heads(self, task: str, asset: str) -> list[str]:
        """Names directly below a head such as `drift_report`, sorted: the days that have one."""
        folder = self._head(task, asset).removesuffix(".json")
        if not self._fs.exists(folder):
            return []
        return sorted(Path(name).stem for name in self._fs.ls(folder, detail=False) if str(name).endswith(".json"))

    # -- paths --------------------------------------------------------------------------------------------------

    def uri(self, digest: str) -> str:
        """Where the object with this digest lies, or would lie."""
        return f"{self.url}/{self._relative(digest)}"

    def _relative(self, digest: str, name: str = "") -> str:
        return f"objects/{digest[:2]}/{digest}" + (f"/{name}" if name else "")

    def _object(self, digest: str, name: str = "") -> str:
        return f"{self._root}/{self._relative(digest, name)}"

    def _key(self, kind: str, made_from: Mapping[str, Any]) -> str:
        return f"{self._root}/keys/{kind}/{digest_of(dict(made_from))}"

    def _head(self, task: str, asset: str) -> str:
        return f"{self._root}/heads/{task}/{asset}.json"

    def _write(self, path: str, content: bytes) -> None:
        if not self.is_local:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(path, content)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with aside.open("wb") as sink:
                sink.write(content)
                flush(sink)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def _read(self, path: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None


def _damaged(digest: str, place: Path | str, name: str) -> ArtefactError:
    return ArtefactError(
        f"artefact {short(digest)} is damaged: '{name}' is not what its digest promises",
        where=str(place),
        mend="Remove that folder and materialise the asset again, or restore it from a backup.",
    )


def _unreadable(digest: str, folder: Path, name: str, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"'{name}' of artefact {short(digest)} cannot be read: {error.strerror or error}",
        where=str(folder),
        mend="Check its permissions and the disk.",
    )


def _stored(value: Mapping[str, Any]) -> Any:
    """`value` as a manifest gives it back: tuples are lists there."""
    return json.loads(canonical(dict(value)))
