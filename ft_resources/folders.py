"""A folder on the local disk or in an object store, by its fsspec URL."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import fsspec

BLOCK = 1 << 20


class Folder:
    """Reads and writes the files below a folder. In an object store only the bucket has to exist.

    Args:
        url: A local folder or an fsspec URL such as `s3://bucket/backups`.

    Raises:
        ValueError: The URL's protocol is not known.
        ImportError: The package that speaks its protocol is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url).rstrip("/")
        self.fs, root = fsspec.core.url_to_fs(str(url))
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    @property
    def uri(self) -> str:
        """Its URL with the protocol, also where it was given as a path."""
        return Path(self.root).as_uri() if self.is_local else str(self.fs.unstrip_protocol(self.root))

    def names(self) -> list[str]:
        """Paths of all files below it, relative to it, sorted; none where it does not exist."""
        self.fs.invalidate_cache()
        return sorted(str(path)[len(self.root) + 1 :] for path in self.fs.find(self.root))

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted; none where it does not exist."""
        self.fs.invalidate_cache()
        entries = self.fs.ls(self.root, detail=True) if self.fs.exists(self.root) else []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def below(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    def holds(self, other: "Folder") -> bool:
        """Whether `other` is this folder or lies in it."""
        return bool(self.fs == other.fs) and f"{other.root}/".startswith(f"{self.root}/")

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        self._prepare(name)
        self.fs.pipe_file(self._path(name), content)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, in hexadecimal."""
        total = hashlib.sha256()
        with self.fs.open(self._path(name), "rb") as stream:
            while block := stream.read(BLOCK):
                total.update(block)
        return total.hexdigest()

    def take(self, name: str, origin: "Folder", original: str) -> dict[str, Any]:
        """Copy the file `original` of `origin` to `name`.

        Returns:
            `sha256` (hexadecimal) and `size` (bytes) of what was copied.
        """
        total, size = hashlib.sha256(), 0
        self._prepare(name)
        with origin.fs.open(origin._path(original), "rb") as source, self.fs.open(self._path(name), "wb") as sink:
            while block := source.read(BLOCK):
                total.update(block)
                size += len(block)
                sink.write(block)
        return {"sha256": total.hexdigest(), "size": size}

    def remove(self) -> None:
        """Remove it with everything below it."""
        self.fs.rm(self.root, recursive=True)

    def versioned(self) -> bool | None:
        """Whether the store keeps what is overwritten or deleted; None where it does not tell."""
        ask = getattr(self.fs, "is_bucket_versioned", None)
        try:
            return None if ask is None else bool(ask(self.root.lstrip("/").partition("/")[0]))
        except PermissionError:
            return None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _prepare(self, name: str) -> None:
        if self.is_local:  # an object store has no folders, and s3fs would create a bucket that was misspelt
            Path(self._path(name)).parent.mkdir(parents=True, exist_ok=True)


def read_errors() -> tuple[type[Exception], ...]:
    """What fsspec raises on use: it lets errors of the clients of HTTP and S3 through once these are in use."""
    http, s3 = sys.modules.get("aiohttp"), sys.modules.get("botocore.exceptions")
    clients = (*((http.ClientError,) if http else ()), *((s3.BotoCoreError, s3.ClientError) if s3 else ()))
    return (OSError, ValueError, *clients)
