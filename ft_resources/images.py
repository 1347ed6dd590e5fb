"""What the image of a Bento installs: the packages of this machine, pinned, and what they weigh.

The Bento was asked its golden requests with these very versions, dependencies of dependencies included, so the image
gets them. The report names those of torch, transformers, tokenizers and peft that it was made with.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ft_resources.errors import ServiceError

TORCH_INDEX = "https://download.pytorch.org/whl"
VARIABLES = {
    "FT_HOME": "/home/bentoml/ft",  # the image's user owns /home/bentoml
    "FT_AUTH": "always",  # a sidecar that forwards requests looks like the machine itself
    "HF_HUB_OFFLINE": "1",
    "BENTOML_DO_NOT_TRACK": "true",
    "UV_INDEX_STRATEGY": "unsafe-best-match",  # torch's index also holds old versions of other packages
}
"""Environment of the image."""


def packages(requirements: Path) -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that `requirements` ask for and those they need, by name.

    Raises:
        ServiceError: One of them is not installed here.
    """
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    waiting = [Requirement(line) for line in lines if line]
    seen: set[tuple[str, frozenset[str]]] = set()
    found: dict[str, importlib.metadata.Distribution] = {}
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ServiceError(
                f"the service needs '{name}', which is not installed here",
                where=str(requirements),
                mend="pip install -r bento/requirements.txt, then build again.",
            ) from None
        for text in found[name].requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(needed)
    return dict(sorted(found.items()))


def pinned(found: Mapping[str, importlib.metadata.Distribution]) -> str:
    """A requirements file with exactly these packages; torch comes from the index of its build (`+cpu`, `+cu130`)."""
    lines = [f"{name}=={package.version}" for name, package in found.items()]
    build = found["torch"].version.partition("+")[2] if "torch" in found else ""
    return "\n".join([*([f"--extra-index-url {TORCH_INDEX}/{build}"] if build else []), *lines]) + "\n"


def installed_bytes(found: Mapping[str, importlib.metadata.Distribution]) -> int:
    """Size of the packages' files as they are installed here."""
    paths = (Path(str(file.locate())) for package in found.values() for file in package.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def folder_bytes(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
