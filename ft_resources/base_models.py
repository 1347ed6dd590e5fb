"""Resolving a base model's reference to a folder and its digest.

A reference is one of

- `package:MODULE/FOLDER` or `package:MODULE/FILE.gguf`: weights that an installed Python package carries;
- the path of a folder as transformers writes it, or of a `.gguf` file;
- `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`: a repository of the Hugging Face hub, or what its cache has of it.

A GGUF file is converted once, when its folder is first asked for; until then only its bytes are read.
"""

import functools
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ft_resources.convert_gguf import CONVERTER_VERSION
from ft_resources.environments import REPOSITORY, Environment
from ft_resources.errors import SpecError

WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CONVERTED = "converted.json"
"""In a folder made from a GGUF file: the digest it goes by, and that of its own files."""
_LAST_LINES = 5


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    reference: str
    digest: str
    """SHA-256 over names and bytes of weights, configuration and tokenizer, or over a GGUF file and its converter."""
    source: Path
    """Its folder, or its GGUF file."""
    revision: str = ""
    """Commit of the hub's repository; empty for what does not come from there."""

    @property
    def path(self) -> Path:
        """Its folder. A GGUF file is converted first, unless that was done before; it takes about half a minute.

        Raises:
            SpecError: The file could not be converted.
        """
        return _converted(self.source, self.digest) if self.source.is_file() else self.source


def resolve(reference: str) -> BaseModel:
    """The base model behind `reference`.

    Raises:
        SpecError: The package is not installed, the folder, file or repository is not there, or it is not whole.
    """
    if reference.startswith("hub:"):
        path = _snapshot(reference)
        return BaseModel(reference, digest_of(path), path, revision=path.name)
    path = _place(reference)
    if path.suffix == ".gguf":
        return BaseModel(reference, _gguf_digest(path, reference), path)
    if _lacks(path):
        raise SpecError(
            f"base model '{reference}' has no {_lacks(path)}",
            where=str(path),
            mend="Name a folder in the format that transformers' save_pretrained writes.",
        )
    return BaseModel(reference, _folder_digest(path, reference), path)


def _place(reference: str) -> Path:
    if reference.startswith("package:"):
        module, _, inside = reference.removeprefix("package:").partition("/")
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):  # no parent package, or no module name at all
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise SpecError(
                f"base model '{reference}' needs the Python package that provides '{module}'",
                mend=f"Install it, for example: pip install {module.replace('_', '-')}",
            )
        return Path(next(iter(spec.submodule_search_locations))) / inside
    path = Path(reference).expanduser().resolve()
    if path.suffix != ".gguf" and not path.is_dir():
        raise SpecError(
            f"base model '{reference}' is not a folder on this machine",
            mend="Write package:MODULE/FOLDER, hub:ORG/NAME, or the path of a model folder or .gguf file.",
        )
    return path


def _lacks(path: Path) -> str:
    """What is missing in a model's folder; empty: nothing."""
    weights = {file.name for file in path.glob("*.safetensors")}
    if not (path / "config.json").is_file() or not weights:
        return "config.json and safetensors weights"
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return ", ".join(sorted(shards - weights))
    return ""


def _snapshot(reference: str) -> Path:
    """The snapshot's folder: from the cache if it is whole there, else downloaded, unless HF_HUB_OFFLINE forbids."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = reference.removeprefix("hub:").partition("@")
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    for cached in (True, False):
        try:
            path = Path(
                snapshot_download(
                    name, revision=revision or None, allow_patterns=list(WEIGHTS), local_files_only=cached
                )
            )
        except HFValidationError as error:
            raise SpecError(
                f"base model '{reference}' names no repository: {error}", mend="Write hub:ORG/NAME@REVISION."
            ) from None
        except (HfHubHTTPError, OSError, ValueError) as error:
            if not cached:
                raise SpecError(
                    f"base model '{reference}' is neither in the hub's cache nor can it be fetched "
                    f"({type(error).__name__})",
                    mend=f"Check the name, and download it where there is a network: {command}",
                ) from error
            continue
        if not _lacks(path):
            return path
    raise SpecError(
        f"base model '{reference}' has no {_lacks(path)}",
        where=str(path),
        mend=f"Name a repository with safetensors weights; if its download broke off: {command}",
    )


def digest_of(path: Path) -> str:
    """SHA-256 over the sorted names and bytes of the model files in `path` (not of its subfolders)."""
    files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern) if file.name != CONVERTED})
    return _digest(tuple(_stamp(file) for file in files))


def _folder_digest(path: Path, reference: str) -> str:
    """A converted folder, wherever it was copied to, goes by the digest of the GGUF file it was made from."""
    own, mark = digest_of(path), path / CONVERTED
    if not mark.is_file():
        return own
    converted = json.loads(mark.read_text(encoding="utf-8"))
    if converted["files"] != own:
        raise SpecError(
            f"base model '{reference}' is not what was converted: its files have changed",
            where=str(path),
            mend="Delete the folder; it is made again from the GGUF file.",
        )
    return str(converted["digest"])


def _gguf_digest(file: Path, reference: str) -> str:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise SpecError(
            f"base model '{reference}' cannot be read: {error.strerror}", where=str(file), mend="Check the file's path."
        ) from None
    if magic != b"GGUF":
        raise SpecError(f"base model '{reference}' is no GGUF file", where=str(file), mend="Download it again.")
    return hashlib.sha256(f"gguf {_digest((_stamp(file),))} converter {CONVERTER_VERSION}".encode()).hexdigest()


def _converted(file: Path, digest: str) -> Path:
    from filelock import FileLock

    folder = Environment.read().home / "bases" / digest
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(folder.with_suffix(".lock")),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch,
        ):
            if folder.is_dir():  # by whoever held the lock
                return folder
            print(f"converting {file.name} to {folder}, once; about half a minute", file=sys.stderr, flush=True)
            made = Path(scratch, "model")
            made.mkdir()
            _convert(file, made)
            mark = {"digest": digest, "files": digest_of(made), "converter": CONVERTER_VERSION, "source": file.name}
            (made / CONVERTED).write_text(json.dumps(mark), encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise SpecError(
            f"the converted model could not be stored: {error}",
            where=str(folder),
            mend="Make FT_HOME writable, with room for the model.",
        ) from error
    return folder


def _convert(file: Path, target: Path) -> None:
    # in a process of its own: whoever only asks for a model's folder does not load torch
    command = [sys.executable, "-m", "ft_resources.convert_gguf", str(file.absolute()), str(target)]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()][-_LAST_LINES:]
        raise SpecError(
            f"the GGUF file could not be converted (status {done.returncode}): " + " / ".join(lines),
            where=str(file),
            mend="Use a model whose architecture transformers reads from GGUF, or a folder of safetensors.",
        )


def _stamp(file: Path) -> tuple[Path, int, int]:
    status = file.stat()
    return file, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for file, _size, _modified in files:
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
