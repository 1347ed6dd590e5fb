"""No module of the service can load a pickle: whoever could place one would run code in it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
FILES = sorted([*(ROOT / "bento").rglob("*.py"), *(ROOT / "ft_resources").rglob("*.py")])


def offences(source: str) -> list[str]:
    """What in `source` could load a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module)] if str(node.module).partition(".")[0] in FORBIDDEN else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and words.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if words.get("allow_pickle", "False") != "False":
                found.append(f"{called} with allow_pickle")
            if called.rpartition(".")[2] in ("read_pickle", "to_pickle"):
                found.append(called)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_of_the_service_loads_no_pickle(file: Path) -> None:
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "pd.read_pickle('x')",
    ],
)
def test_an_offence_would_be_found(source: str) -> None:
    assert offences(source)
