"""Resolving a base model's reference to a folder and its digest.

A reference is `package:MODULE/FOLDER` (weights that an installed Python package carries), or a local folder.
"""

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ft_resources.errors import SpecError

WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine."""

    reference: str
    path: Path
    digest: str
    """SHA-256 over names and bytes of weights, configuration and tokenizer."""


def resolve(reference: str) -> BaseModel:
    """The folder behind `reference`.

    Raises:
        SpecError: The package is not installed, the folder is missing, or it holds no `config.json` and safetensors.
    """
    path = _folder(reference)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise SpecError(
            f"base model '{reference}' has no config.json and safetensors weights",
            where=str(path),
            mend="Name a folder in the format that transformers' save_pretrained writes.",
        )
    return BaseModel(reference, path, digest_of(path))


def _folder(reference: str) -> Path:
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
    if not path.is_dir():
        raise SpecError(
            f"base model '{reference}' is not a folder on this machine",
            mend="Write package:MODULE/FOLDER or the path of a downloaded model folder.",
        )
    return path


def digest_of(path: Path) -> str:
    """SHA-256 over the sorted names and bytes of the model files in `path` (not of its subfolders)."""
    files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for file, _size, _modified in files:
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
