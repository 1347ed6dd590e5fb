"""Refusing pickles: whoever could place one would run code where it is loaded."""

import io
import pickletools
import zipfile
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ft_resources.errors import PluginError

NPY = b"\x93NUMPY"
HEADER = 256
"""Bytes of a NumPy file in which its type stands."""
MEND = "Write JSON, safetensors, or the framework's own format that is no pickle, such as XGBoost's UBJ."


def require_none(folder: Path, who: str) -> None:
    """Check that no file below `folder` is a pickle, an archive with one (torch.save) or a NumPy file of objects.

    Args:
        who: The trainer that wrote them.

    Raises:
        PluginError: One is.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as stream:
            held = _holds_pickle(stream)
        if not held and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    with archive.open(member) as stream:
                        held = held or _holds_pickle(stream)  # type: ignore[arg-type]
        if held:
            raise PluginError(f"trainer {who} wrote a pickle, '{name}'", where=name, mend=MEND)


def _holds_pickle(stream: BinaryIO) -> bool:
    start = stream.read(HEADER)
    return _is_pickle(start) or (start.startswith(NPY) and b"'|O" in start)


def _is_pickle(start: bytes) -> bool:
    """Whether a pickle of protocol 2 or later begins so: its mark, and after it what a pickle may go on with."""
    if start[:1] != b"\x80" or start[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return False
    try:
        return len(list(islice(pickletools.genops(io.BytesIO(start)), 2))) == 2
    except ValueError:
        return False
