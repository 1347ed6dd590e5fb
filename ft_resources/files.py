"""Files of a local folder: what they hold, as digests, and getting them to the disk."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def walk(folder: Path) -> list[tuple[str, Path]]:
    """Every file below `folder`, sorted by its path in it."""
    return sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, in hexadecimal, by its path in it."""
    return {name: sha256(path) for name, path in walk(folder)}


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON. Readers find all of it, or what was there before."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.rename(file)


def flush(stream: Any) -> None:
    """Get what was written to an open file onto the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Get the names in `folder` onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
