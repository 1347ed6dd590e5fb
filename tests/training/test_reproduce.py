"""`ft reproduce`: an adapter trained again has the same bytes, and what differs is found at its first step."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from ft_assets.training.engine.runs import TRACE, TaskRows, fit, publish_trace, task_rows, tokenise
from ft_assets.training.identity import TRAINER, environment_of_training
from ft_assets.training.reproduce import reproduce
from ft_resources.base_models import resolve
from ft_resources.environments import Environment
from ft_resources.errors import ArtefactError
from ft_resources.lake import Artefact, Lake
from tests.training.small import settings

Tiny = Callable[[str], str]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment.read({}, home=tmp_path / "home")


def published(frame: pd.DataFrame, lake: Lake, kind: str) -> str:
    """A split artefact of all rows of `frame`."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = frame.assign(row_id=[f"{kind}-{number}" for number in range(len(frame))])
        rows.to_parquet(Path(scratch) / "kept.parquet", index=False)
        clean = lake.publish("clean_dataset", Path(scratch), {"rows": kind})
    with tempfile.TemporaryDirectory() as scratch:
        rows[["row_id"]].to_parquet(Path(scratch) / "rows.parquet", index=False)
        return lake.publish(kind, Path(scratch), {"clean_dataset": clean.digest}).digest


@pytest.fixture
def adapter(tiny: Tiny, classes: TaskRows, environment: Environment) -> tuple[Lake, Artefact]:
    lake = Lake(environment.lake)
    chosen, base = settings(tiny("bert"), training={"precision": "bf16"}), resolve(tiny("bert"))
    made = {
        "train_split": published(classes.training, lake, "train_split"),
        "validation_split": published(classes.validation, lake, "validation_split"),
        "task": "small",
        "type": "text-classification",
        "labels": list(classes.labels),
        "fields": {},
        "instruction": "",
        "settings": chosen.model_dump(mode="json"),
        "base": base.digest,
        "trainer": TRAINER,
        "environment": environment_of_training(environment),
    }
    about = {"task": "small", "template": "x@1", "origins": {}, "preparation": {}, "exactness": "bit-exact"}
    with tempfile.TemporaryDirectory() as scratch:
        rows = task_rows(lake, made)
        data = tokenise(rows, base, chosen.base.max_tokens)
        trained = fit(rows, data, base, chosen, Path(scratch), describe=about)
        artefact = lake.publish("adapter", Path(scratch), made)
    publish_trace(lake, artefact.digest, trained)
    return lake, artefact


def changed(lake: Lake, artefact: Artefact, tmp_path: Path, change: Callable[[Path], None]) -> Artefact:
    folder = tmp_path / "changed"
    shutil.copytree(artefact.folder, folder)
    for name in ("manifest.json", *(path.name for path in folder.iterdir() if path.name not in artefact.files)):
        (folder / name).unlink(missing_ok=True)
    change(folder)
    return lake.publish("adapter", folder, artefact.made_from)


def test_the_same_inputs_give_the_same_bytes(adapter: tuple[Lake, Artefact], environment: Environment) -> None:
    lake, artefact = adapter
    lines = list[str]()
    found = reproduce(lake, environment, artefact.digest, lines.append)
    assert found.identical and found.acceptable and not found.tensors and not found.changed
    assert found.verdict.startswith("Reproduced: all ") and len(lines) == 12


def test_the_first_step_and_tensor_that_diverged_are_named(
    adapter: tuple[Lake, Artefact], environment: Environment, tmp_path: Path
) -> None:
    """The trace of a run whose fourth step went otherwise in one tensor."""
    lake, artefact = adapter
    kept = lake.find(TRACE, {"adapter": artefact.digest})
    assert kept is not None
    names = kept.json("names.json")

    def other(folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        weights[next(iter(weights))][0, 0] += 1
        save_file(weights, folder / "adapter_model.safetensors")

    forged = changed(lake, artefact, tmp_path, other)
    checksums = load_file(kept.path("trace.safetensors"))["checksums"].clone()
    checksums[3:, 2] += 1
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"checksums": checksums}, Path(scratch) / "trace.safetensors")
        (Path(scratch) / "names.json").write_text(json.dumps(names))
        lake.publish(TRACE, Path(scratch), {"adapter": forged.digest})
    found = reproduce(lake, environment, forged.digest)
    assert not found.identical and not found.acceptable
    assert (found.first_step, found.first_tensors) == (4, (names[2],))
    assert len(found.tensors) == 1
    assert f"first diverged at step 4, in {names[2]}" in found.verdict


def test_another_trainer_or_library_is_named(adapter: tuple[Lake, Artefact], environment: Environment) -> None:
    lake, artefact = adapter
    made = {**artefact.made_from, "environment": {**artefact.made_from["environment"], "torch": "1.0"}}
    older = lake.publish("adapter", _copy(artefact), made)
    found = reproduce(lake, environment, older.digest)
    assert found.identical
    assert set(found.changed) == {"torch"} and found.changed["torch"][0] == "1.0"


def _copy(artefact: Artefact) -> Path:
    folder = Path(tempfile.mkdtemp())
    for name in artefact.files:
        shutil.copyfile(artefact.path(name), folder / name)
    return folder


def test_a_tolerance_is_held_to_where_it_is_declared(
    adapter: tuple[Lake, Artefact], environment: Environment, tmp_path: Path
) -> None:
    lake, artefact = adapter

    def loosely(shift: float) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            about = json.loads((folder / "adapter.json").read_text())
            (folder / "adapter.json").write_text(json.dumps({**about, "exactness": "every loss within 1e-3"}))
            history = json.loads((folder / "training.json").read_text())
            history["loss"] = [loss + shift for loss in history["loss"]]
            (folder / "training.json").write_text(json.dumps(history))
            head = load_file(folder / "head.safetensors")
            save_file({name: tensor + 1e-6 for name, tensor in head.items()}, folder / "head.safetensors")

        return change

    near = reproduce(lake, environment, changed(lake, artefact, tmp_path / "near", loosely(5e-4)).digest)
    far = reproduce(lake, environment, changed(lake, artefact, tmp_path / "far", loosely(5e-3)).digest)
    assert not near.identical and near.acceptable and "within what" in near.verdict
    assert not far.acceptable and "outside what" in far.verdict


def test_another_base_model_is_refused(
    adapter: tuple[Lake, Artefact], environment: Environment, tiny: Tiny, tmp_path: Path
) -> None:
    lake, artefact = adapter
    weights = Path(tiny("bert")) / "model.safetensors"
    before = weights.read_bytes()
    changed_weights = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    try:
        save_file(changed_weights, weights, {"format": "pt"})
        with pytest.raises(ArtefactError, match="not the one the adapter was trained on"):
            reproduce(lake, environment, artefact.digest)
    finally:
        weights.write_bytes(before)
    with pytest.raises(ArtefactError, match="is not an adapter"):
        reproduce(lake, environment, artefact.made_from["train_split"])
