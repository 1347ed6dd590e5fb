"""Export as ONNX: the file answers as the service does, and one that does not is refused and leaves nothing."""

import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ft_assets.cli import app
from ft_assets.data.assembly import split_rows
from ft_assets.exporting import export as exporting
from ft_assets.exporting.forms import Exported
from ft_assets.exporting.reading import ExportedModel
from ft_assets.platform import Platform
from ft_resources.environments import REPOSITORY
from ft_resources.errors import ArtefactError, FtError, RequestError, ServiceError, SpecError
from tests.graph.small_task import TASK, TASK_FILE, Built, open_home, write_task

GENERATION = """
name: small-chat
type: text-generation
recipe: chat-lora@1
sources:
  - {kind: files, url: rows.jsonl}
"""


@pytest.fixture(scope="module")
def platform(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """On a copy of the built home."""
    home = tmp_path_factory.mktemp("export") / "home"
    shutil.copytree(built.copy, home, symlinks=True)
    opened = open_home(home)
    yield opened
    opened.ledger.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def exported(platform: Platform, folder: Path) -> Exported:
    """The live release in fp32, beside what an export that was killed had left."""
    left = folder / ".fp32.incomplete"
    left.mkdir()
    (left / "model.onnx.data").write_bytes(b"half")
    return platform.export(TASK, folder / "fp32")


@pytest.fixture(scope="module")
def validation(platform: Platform) -> list[str]:
    adapter = platform.lake.require(TASK, "adapter")
    return split_rows(platform.lake, adapter.made_from["validation_split"])["text"].tolist()


@pytest.fixture
def gates(platform: Platform) -> Iterator[None]:
    """Puts the task's gates back."""
    path = platform.tasks.get(TASK).path
    before = path.read_text()
    yield
    path.write_text(before)


def set_gates(platform: Platform, **limits: float) -> None:
    path = platform.tasks.get(TASK).path
    lines = "".join(f"  {name}: {limit:f}\n" for name, limit in limits.items())
    path.write_text(path.read_text().replace("gates:\n", f"gates:\n{lines}"))


def test_the_file_answers_validation_rows_as_the_service_does(
    platform: Platform, exported: Exported, validation: list[str]
) -> None:
    answers = platform.predict(TASK, validation)
    given = ExportedModel(exported.folder)(validation)
    assert given.dtype == np.float32 and np.allclose(given.sum(1), 1, atol=1e-5)
    assert np.allclose(given.max(1), [one.confidence for one in answers], atol=0.1)  # it may serve in int8
    alike = [exported.about.labels[row.argmax()] == one.label for row, one in zip(given, answers, strict=True)]
    assert np.mean(alike) >= 0.99
    assert len({one.label for one in answers}) == 2


def test_what_is_written_says_where_it_comes_from_and_how_alike_it_is(platform: Platform, exported: Exported) -> None:
    live, adapter = platform.live(TASK), platform.lake.require(TASK, "adapter")
    assert live is not None
    about = json.loads((exported.folder / "export.json").read_text())
    manifest = adapter.json("adapter.json")
    assert about["labels"] == manifest["labels"] == ["ham", "spam"]
    assert (about["adapter"], about["model_version"], about["release_id"]) == (adapter.digest, "1", live["id"])
    assert (about["pooling"], about["max_tokens"], about["temperature"]) == ("mean", 48, manifest["temperature"])
    assert about["preparation"] == manifest["preparation"]
    parity = json.loads((exported.folder / "parity.json").read_text())
    assert parity["agreement"]["agreement"] == 1.0 and parity["agreement"]["precision"] == "fp32"
    assert 0 < parity["agreement"]["mean_probability_difference"] < parity["agreement"]["max_probability_difference"]
    assert parity["agreement"]["max_probability_difference"] < 1e-4
    assert parity["exported_mb"] == pytest.approx(parity["plain_mb"], rel=0.05)
    assert all(parity[name][how] > 0 for name in ("exported_ms", "plain_ms") for how in ("batched", "alone"))
    assert "at least 0.99" in (exported.folder / "parity.md").read_text()
    assert sorted(path.name for path in exported.folder.parent.glob(".*")) == []
    assert not (exported.folder / "model.onnx.data").exists()


def test_onnxruntime_and_the_tokenizer_alone_answer_empty_long_and_padded_texts(
    platform: Platform, exported: Exported
) -> None:
    import onnxruntime
    from tokenizers import Tokenizer

    from ft_assets.evaluation.precision import Plain
    from ft_resources.base_models import resolve

    session = onnxruntime.InferenceSession(exported.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape) for one in session.get_inputs()] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("probabilities", ["batch", 2])]
    tokenizer = Tokenizer.from_file(str(exported.folder / "tokenizer.json"))

    def ask(texts: list[str]) -> np.ndarray:
        batch = tokenizer.encode_batch(texts)
        ids, mask = (np.array([getattr(one, name) for one in batch]) for name in ("ids", "attention_mask"))
        return session.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    texts = ["", "ok", "WIN a FREE cruise now, click here!", "The kernel patch builds on Thursday. " * 400]
    together = ask(texts)
    assert len(tokenizer.encode(texts[-1]).ids) == 48
    assert np.allclose(together, np.concatenate([ask([text]) for text in texts]), atol=1e-5)
    adapter = platform.lake.require(TASK, "adapter")
    about = adapter.json("adapter.json")
    plain = Plain(resolve(about["base"]["model"]), adapter.folder, about)
    assert np.allclose(together, plain(texts), atol=1e-4)


@pytest.mark.slow
def test_int8_is_a_quarter_of_the_size_and_within_its_limits(
    platform: Platform, exported: Exported, folder: Path, gates: None
) -> None:
    set_gates(platform, min_serving_agreement=0.85, max_probability_shift=0.15)
    (folder / "int8").mkdir()
    small = platform.export(TASK, folder / "int8", version="1", int8=True)
    assert small.about.precision == small.parity.agreement.precision == "int8"
    assert small.parity.exported_mb < 0.3 * exported.parity.exported_mb
    assert 1e-4 < small.parity.agreement.probability_shift <= 0.15
    assert sorted(path.name for path in small.folder.glob("*.onnx*")) == ["model.onnx"]


def test_what_answers_otherwise_than_the_gates_allow_is_refused_and_leaves_nothing(
    platform: Platform, folder: Path, gates: None
) -> None:
    set_gates(platform, max_probability_shift=0.0001)  # 8 bits cannot keep it
    out, home = folder / "refused", platform.environment.home
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, ["export", TASK, "--out", str(out), "--int8", "--home", str(home)])
    assert done.exit_code == 1
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_is_not_empty_is_left_alone(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ArtefactError, match="no empty folder"):
            platform.export(TASK, out)
    with pytest.raises(ArtefactError, match="folder above exists"):
        platform.export(TASK, tmp_path / "missing" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_exports_do_not_write_one_folder(platform: Platform, tmp_path: Path) -> None:
    aside = tmp_path / ".out.incomplete"
    aside.mkdir()
    (aside / "model.onnx").write_bytes(b"another's")
    held = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match="another export"):
            platform.export(TASK, tmp_path / "out")
    finally:
        os.close(held)
    assert (aside / "model.onnx").read_bytes() == b"another's"


def test_what_cannot_be_exported_says_why(platform: Platform, tmp_path: Path) -> None:
    home = open_home(tmp_path / "home")
    home.add_task(write_task(tmp_path / "mine", TASK_FILE))
    (tmp_path / "mine" / "chat.yaml").write_text(GENERATION)
    home.add_task(tmp_path / "mine" / "chat.yaml")
    refusals: list[tuple[Platform, str, str | None, type[FtError], str]] = [
        (platform, "smal-mail", None, SpecError, "Did you mean 'small-mail'"),
        (platform, TASK, "7", RequestError, "no released model version '7'"),
        (home, TASK, None, ArtefactError, "no live release"),
        (home, "small-chat", None, SpecError, "only text-classification is exported"),
    ]
    for opened, task, version, kind, why in refusals:
        with pytest.raises(kind, match=why):
            opened.export(task, tmp_path / "out", version=version)
    assert not (tmp_path / "out").exists()
    home.ledger.close()


def test_missing_packages_are_named_with_the_command(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.PACKAGES, "no_such_package", "1.0")
    with pytest.raises(ServiceError, match=r"needs no_such_package.*pip install onnx==.* no_such_package==1\.0"):
        platform.export(TASK, tmp_path / "out")


def test_the_named_packages_are_those_of_the_project() -> None:
    pins = [f"{name}=={number}" for name, number in exporting.PACKAGES.items()]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["export"] == pins
    assert set(pins) <= set((REPOSITORY / "requirements.txt").read_text().splitlines())
