"""Plug-in trainers: found by name, held to their interface, and what goes wrong in one is a typed error."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ft_assets.tasks import Task
from ft_assets.training.continuing import check_incremental
from ft_assets.training.forms import form, from_form
from ft_assets.training.plugins.boosted_trees import BoostedTrees, TreeSettings
from ft_assets.training.plugins.interface import Plugin, Rows, Split, find
from ft_assets.training.plugins.running import MODEL, Model, fit
from ft_assets.training.recipes import Plugged, of_transformers, resolve, with_values
from ft_assets.training.searching.trials import check_space
from ft_resources.errors import PluginError, SpecError
from ft_resources.files import file_hashes
from tests.training.small import LABELS, texts

TREES = "ft_assets.training.plugins.boosted_trees:BoostedTrees"
MODULE = '''
import numpy as np
from pydantic import Field
from ft_assets.specs import Strict


class Limits(Strict):
    share: float = Field(1.0, gt=0, le=1, description="Of the rows.")


class Commonest:
    """Answers with the shares of the labels."""

    version = "1"
    packages = ["numpy"]
    settings = Limits

    def train(self, rows, settings, folder, progress):
        {train}
        np.savetxt(folder / "shares.txt", np.bincount(rows.training.targets) / len(rows.training.targets))

    def load(self, folder):
        shares = np.loadtxt(folder / "shares.txt")
        return lambda texts: {answer}
'''
WriteModule = Callable[..., str]
TASK = """\
name: weather
type: text-classification
labels: [cold, warm]
recipe: boosted-trees@1
{more}
sources:
  - kind: feedback
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Writes a module with a trainer and returns the module's name."""
    monkeypatch.syspath_prepend(tmp_path)
    # a later text of equal size, written in the same second, would be taken for what was compiled before
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"plugged_{tmp_path.name}"

    def write(train: str = "pass", answer: str = "np.tile(shares, (len(texts), 1))", text: str = MODULE) -> str:
        (tmp_path / f"{name}.py").write_text(text.replace("{train}", train).replace("{answer}", answer))
        sys.modules.pop(name, None)
        return name

    return write


def rows(training: int = 60, validation: int = 20) -> Rows:
    splits = []
    for count, seed in ((training, 1), (validation, 2)):
        frame = texts(count, seed) if count else texts(1, seed).head(0)
        splits.append(Split(frame["text"].tolist(), [LABELS.index(label) for label in frame["label"]]))
    return Rows(LABELS, *splits)


def trained(plugin: Plugin, folder: Path, given: Rows | None = None, **settings: object) -> dict[str, object]:
    return fit(plugin, given or rows(), plugin.trainer.settings(**settings), folder, describe={"task": "weather"})


# -- finding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (TREES.replace("boosted_trees", "boosted_tree"), "no module 'boosted_tree' in 'ft_assets.training.plugins'"),
        (TREES.replace("boosted_trees", "boosted_tree"), "Did you mean 'boosted_trees'?"),
        (TREES.replace("BoostedTrees", "BoostedTree"), "has no class 'BoostedTree'. Did you mean 'BoostedTrees'?"),
        (TREES.replace("ft_assets.", "ft_asset."), "no module 'ft_asset'. Did you mean 'ft_assets'?"),
        ("ft_assets.training.plugins.boosted_trees.deeper:Trees", "no module 'deeper'"),
        ("BoostedTrees", "Write package.module:Class"),
        ("os:system; x", "Write package.module:Class"),
        (TREES.replace("BoostedTrees", "json"), "has no class 'json'"),
    ],
)
def test_a_trainer_that_is_not_there_names_the_nearest(reference: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        find(reference, where="recipe.yaml:5")
    assert caught.value.where == "recipe.yaml:5"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('    version = "1"\n', "    version = 1\n", "it has no `version`, a text"),
        ('    packages = ["numpy"]\n', "    packages = 'numpy'\n", "it has no `packages`"),
        ("settings = Limits", "settings = dict", "it has no `settings`, a class below ft_assets.specs.Strict"),
        ("def load(self, folder)", "def open(self, folder)", "it has no method load(folder)"),
        ("settings, folder, progress)", "folder)", "cannot be called as train(rows, settings, folder, progress)"),
        ("import numpy as np", "import numpi", "cannot be loaded: ModuleNotFoundError: No module named 'numpi'"),
        ("class Commonest:", "class Commonest:\n    def __init__(self):\n        1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_class_with_another_interface_is_refused(module: WriteModule, before: str, after: str, says: str) -> None:
    assert before in MODULE
    name = module(text=MODULE.replace(before, after))
    with pytest.raises(SpecError) as caught:
        find(f"{name}:Commonest", where="recipe.yaml:5")
    assert says in str(caught.value)


def test_what_decides_the_bytes_is_known_of_a_trainer(module: WriteModule) -> None:
    first = find(f"{module()}:Commonest", where="here").identity
    again = find(f"{module()}:Commonest", where="here").identity
    other = find(f"{module('x = 1')}:Commonest", where="here").identity
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"source"}
    assert set(find(TREES, where="here").packages()) == {"xgboost-cpu", "scikit-learn", "scipy"}
    needing = module(text=MODULE.replace('"numpy"', '"no-such-one"'))
    absent = find(f"{needing}:Commonest", where="here")
    with pytest.raises(SpecError, match="needs the package no-such-one"):
        absent.packages()


# -- training -----------------------------------------------------------------------------------------------------


def test_a_trainer_of_a_few_lines_is_measured_as_any_training(module: WriteModule, tmp_path: Path) -> None:
    plugin = find(f"{module()}:Commonest", where="here")
    history = trained(plugin, tmp_path / "made")
    assert history == {
        "loss": [pytest.approx(np.log(2))],  # it told of no step, so there is one: what came of it
        "validation": [{"loss": pytest.approx(np.log(2)), "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}],
        "best_epoch": 1,
    }
    assert {path.name for path in (tmp_path / "made").iterdir()} == {MODEL, "adapter.json", "training.json"}


@pytest.mark.parametrize(
    ("train", "answer", "says"),
    [
        ("progress(1, 3, 0.5); [][3]", "", "failed in training: IndexError: list index out of range"),
        ("raise MemoryError('too much')", "", "failed in training: MemoryError: too much"),
        ("return", "", "wrote no file"),
        ("import joblib; joblib.dump([1, {'a': 2}], folder / 'model.bin')", "", "wrote a pickle, 'model.bin'"),
        ("import pickle; (folder / 'm').write_bytes(pickle.dumps(rows.labels, 2))", "", "wrote a pickle, 'm'"),
        ("import torch; torch.save({'a': 1}, folder / 'm.pt')", "", "wrote a pickle, 'm.pt'"),
        ("np.save(folder / 'm.npy', np.array([{}, 'a'], object))", "", "wrote a pickle, 'm.npy'"),
        ("np.savez(folder / 'm.npz', a=np.array([{}, 'a'], object))", "", "wrote a pickle, 'm.npz'"),
        ("pass", "np.ones((len(texts), 3)) / 3", "gave an array of shape (60, 3) where (60, 2) was due"),
        ("pass", "np.ones((len(texts), 2))", "gave numbers that are no probabilities"),
        ("pass", "np.full((len(texts), 2), np.nan)", "gave numbers that are no probabilities"),
        ("pass", "shares[99]", "failed in answering: IndexError"),
        ("pass", "'many'", "failed in answering: ValueError"),
    ],
)
def test_what_goes_wrong_in_a_trainer_is_a_typed_error(
    module: WriteModule, tmp_path: Path, train: str, answer: str, says: str
) -> None:
    plugin = find(f"{module(train, answer or 'texts')}:Commonest", where="here")
    with pytest.raises(PluginError) as caught:
        trained(plugin, tmp_path / "made")
    assert says in str(caught.value)


def test_the_line_of_the_trainer_that_failed_is_named(module: WriteModule, tmp_path: Path) -> None:
    plugin = find(f"{module('np.linalg.inv(np.zeros((2, 2)))')}:Commonest", where="here")
    with pytest.raises(PluginError) as caught:
        trained(plugin, tmp_path / "made")
    file, line = caught.value.where.rsplit(":", 1)
    assert "inv(" in Path(file).read_text().splitlines()[int(line) - 1]


def test_safetensors_whose_size_looks_like_the_mark_of_a_pickle_are_none(module: WriteModule, tmp_path: Path) -> None:
    write = "from safetensors.numpy import save_file; save_file({'w': np.zeros(1)}, folder / 'w', {'a': 'x' * %d})"
    for size in range(520, 600):  # of a header of 640 bytes, the file begins with 80 02
        folder = tmp_path / str(size)
        trained(find(f"{module(write % size)}:Commonest", where="here"), folder)
        if (folder / MODEL / "w").read_bytes().startswith(b"\x80\x02"):
            return
    raise AssertionError("none of these files begins so")


# -- boosted trees ------------------------------------------------------------------------------------------------


def test_boosted_trees_learn_and_give_the_same_bytes_again(tmp_path: Path) -> None:
    plugin, told = find(TREES, where="here"), list[tuple[int, int]]()
    settings = TreeSettings(rounds=40, early_stopping=5, row_share=0.8)
    for name in ("once", "again"):
        history = fit(
            plugin,
            rows(),
            settings,
            tmp_path / name,
            describe={},
            on_step=lambda step, steps, _: told.append((step, steps)),
        )
    assert history["validation"][0]["accuracy"] > 0.9
    assert told[: len(history["loss"])] == [(step, 40) for step in range(1, len(history["loss"]) + 1)]
    assert len(history["loss"]) < 40  # it stopped early
    assert file_hashes(tmp_path / "once") == file_hashes(tmp_path / "again")
    model = Model(plugin, tmp_path / "once" / MODEL, LABELS)
    assert model.probabilities(["ice and frost", "beach"]).argmax(axis=1).tolist() == [0, 1]
    assert model.probabilities([]).shape == (0, 2)
    other = settings.model_copy(update={"seed": 1})
    fit(plugin, rows(), other, tmp_path / "other", describe={})
    assert file_hashes(tmp_path / "other" / MODEL) != file_hashes(tmp_path / "once" / MODEL)


def test_boosted_trees_without_validation_rows_grow_to_the_end(tmp_path: Path) -> None:
    history = trained(find(TREES, where="here"), tmp_path / "made", rows(validation=0), rounds=7)
    assert len(history["loss"]) == 7  # type: ignore[arg-type]
    assert history["validation"] == [{"loss": 0.0}]


def test_terms_that_no_row_has_are_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="failed in training: ValueError"):
        trained(find(TREES, where="here"), tmp_path / "made", rows(training=2), min_rows=50)


# -- recipes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Task]:
    def write(more: str = "") -> Task:
        (tmp_path / "weather.yaml").write_text(TASK.format(more=more))
        return Task(tmp_path / "weather.yaml")

    return write


def test_a_task_overrides_what_a_trainer_is_told(write_task: Callable[..., Task]) -> None:
    merged = resolve(write_task("overrides: {rounds: 12}"))
    assert isinstance(merged, Plugged)
    assert isinstance(merged.plugin.trainer, BoostedTrees)
    assert merged.settings == TreeSettings(rounds=12, seed=20021001)
    assert merged.origins["rounds"] == "task weather.yaml:5"
    assert (merged.origins["seed"], merged.origins["l2"]) == ("recipe boosted-trees@1", "default")
    assert with_values(merged, {"rounds": 3}, "elsewhere").settings == TreeSettings(rounds=3, seed=20021001)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("overrides: {ronuds: 12}", ["weather.yaml:5", "'overrides.ronuds' is not known", "Did you mean 'rounds'?"]),
        ("overrides: {rounds: 0}", ["weather.yaml:5", "'overrides.rounds' is 0"]),
        ("overrides: {trainer: 'os:abort'}", ["'overrides.trainer' is not known"]),
    ],
)
def test_a_wrong_override_is_named_with_its_line(write_task: Callable[..., Task], more: str, says: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(write_task(more))
    assert all(each in str(caught.value) for each in says)


def test_what_is_for_adapters_alone_is_refused(write_task: Callable[..., Task]) -> None:
    searching = write_task("search: {trials: 3, space: {max_depth: [3, 6]}}")
    with pytest.raises(SpecError, match=r"weather.yaml:5: a search trains adapters"):
        check_space(searching, resolve(searching))
    continued = write_task("retraining: incremental")
    with pytest.raises(SpecError, match="method of a plug-in trainer makes none"):
        check_incremental(continued, resolve(continued))
    with pytest.raises(SpecError, match="this is for adapters on a base model"):
        of_transformers(resolve(write_task()))


def test_a_recipe_names_its_trainer_with_its_line(write_task: Callable[..., Task], tmp_path: Path) -> None:
    recipe = "name: boosted-trees\nversion: 1\ntypes: [text-classification]\ntrainer: {}\nsettings: {{rounds: 5}}\n"
    file = tmp_path / "boosted-trees@1.yaml"
    file.write_text(recipe.format("xgbost.sklearn:Trees"))
    with pytest.raises(SpecError, match="Did you mean 'xgboost'") as caught:
        resolve(write_task(), tmp_path)
    assert caught.value.where == f"{file}:4"
    file.write_text(recipe.format(TREES).replace("[text-classification]", "[text-generation]"))
    with pytest.raises(SpecError, match="a plug-in trainer trains text-classification, not text-generation"):
        resolve(write_task(), tmp_path)
    file.write_text(recipe.format(TREES).replace("rounds", "round"))
    with pytest.raises(SpecError, match="Did you mean 'rounds'"):
        resolve(write_task(), tmp_path)


def test_a_plug_in_has_one_form_of_all_its_settings() -> None:
    basic = form("boosted-trees@1", "basic")
    assert basic == form("boosted-trees@1", "advanced")
    assert set(basic["properties"]) == set(TreeSettings.model_fields)
    assert basic["properties"]["learning_rate"]["default"] == 0.2
    assert from_form("boosted-trees@1", {"learning_rate": 0.5}).settings == TreeSettings(
        learning_rate=0.5, seed=20021001
    )
    with pytest.raises(SpecError, match="Did you mean 'rounds'"):
        from_form("boosted-trees@1", {"ronds": 5})
