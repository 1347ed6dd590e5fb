from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.tasks import Task
from ft_assets.training.engine.batching import length_grouped
from ft_assets.training.recipes import Settings, load, resolve, with_values
from ft_assets.training.reporting import flat
from ft_resources.environments import RECIPES
from ft_resources.errors import SpecError

TASK = """\
name: triage
type: text-classification
labels: [ham, spam]
recipe: small@2
overrides:
{overrides}
sources:
  - kind: feedback
"""
RECIPE = """\
# a template
name: small
version: 2
types: [text-classification]
settings:
  base:
    model: package:base/model
    pooling: cls
  lora:
    rank: 4
    target_modules: [query, value]
  training:
    epochs: 3
    learning_rate: 1.0e-3
"""
WriteTask = Callable[..., Task]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A folder with one recipe."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "small@2.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes a task with the given lines below `overrides`."""

    def write(overrides: str = "", recipe: str = "small@2") -> Task:
        path = tmp_path / "triage.yaml"
        text = TASK.format(overrides=overrides).replace("small@2", recipe)
        path.write_text(text if overrides else text.replace("overrides:\n\n", ""), encoding="utf-8")
        return Task(path)

    return write


def test_each_value_comes_from_the_task_or_the_recipe_or_is_the_default(recipes: Path, write_task: WriteTask) -> None:
    task = write_task("  lora:\n    rank: 8\n    target_modules: all-linear\n  training:\n    epochs: 1")
    resolved = resolve(task, recipes)
    assert resolved.template == "small@2"
    told = {
        "base": {"model": "package:base/model", "pooling": "cls"},
        "lora": {"rank": 8, "target_modules": "all-linear"},
        "training": {"epochs": 1, "learning_rate": 1e-3},
    }
    assert resolved.settings == Settings.model_validate(told)
    of_recipe = ("base.model", "base.pooling", "training.learning_rate")
    of_task = {"lora.rank": 7, "lora.target_modules": 8, "training.epochs": 10}
    assert resolved.origins == {
        **dict.fromkeys(flat(resolved.settings.model_dump()), "default"),
        **dict.fromkeys(of_recipe, "recipe small@2"),
        **{name: f"task {task.path.name}:{line}" for name, line in of_task.items()},
    }


def test_the_same_template_has_the_same_digest(recipes: Path, write_task: WriteTask) -> None:
    before = resolve(write_task(), recipes)
    other = resolve(write_task("  lora: {rank: 8}"), recipes)
    assert other.template_digest == before.template_digest
    file = recipes / "small@2.yaml"
    # another order, style and comment: the same template
    file.write_text(
        "version: 2\nname: 'small'\nsettings:\n  training: {learning_rate: 0.001, epochs: 3}  # short\n"
        "  lora: {target_modules: [query, value], rank: 4}\n  base: {pooling: cls, model: 'package:base/model'}\n"
        "types:\n- text-classification\n",
        encoding="utf-8",
    )
    assert resolve(write_task(), recipes) == before
    file.write_text(RECIPE.replace("rank: 4", "rank: 5"), encoding="utf-8")
    assert resolve(write_task(), recipes).template_digest != before.template_digest


@pytest.mark.parametrize(
    ("overrides", "line", "says"),
    [
        ("  lora:\n    rnak: 8", 7, ["field 'overrides.lora.rnak' is not known", "Did you mean 'rank'?", "use_rslora"]),
        ("  traning: {}", 6, ["field 'overrides.traning' is not known", "Did you mean 'training'?"]),
        (
            "  training:\n    epochs: 2\n    seed: -1",
            8,
            ["field 'overrides.training.seed' is -1", "greater than or equal"],
        ),
        ("  training: {precision: bf61}", 6, ["field 'overrides.training.precision'", "Did you mean 'bf16'?"]),
        ("  training:\n    learning_rate: .inf", 7, ["field 'overrides.training.learning_rate'", "finite number"]),
        ("  lora: 8", 6, ["field 'overrides.lora' is 8", "dictionary"]),
        ("  base:\n    model:", 7, ["field 'overrides.base.model' is None", "a valid string"]),
        ("  lora:\n    target_modules:\n      - query\n      - 7", 9, ["field 'overrides.lora.target_modules.1' is 7"]),
    ],
)
def test_a_wrong_override_is_named_with_its_line(
    recipes: Path, write_task: WriteTask, overrides: str, line: int, says: list[str]
) -> None:
    task = write_task(overrides)
    with pytest.raises(SpecError) as caught:
        resolve(task, recipes)
    message = str(caught.value)
    assert f"triage.yaml:{line}: {says[0]}" in message
    for expected in says:
        assert expected in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smal@2", "Did you mean 'small@2'?"),
        ("small@1", "Did you mean 'small@2'?"),
        ("small", "Did you mean 'small@2'?"),
        ("../recipes/small@2", "there is no recipe"),
        ("zzz", "Known: small@2."),
    ],
)
def test_an_unknown_recipe_names_the_nearest(recipes: Path, write_task: WriteTask, name: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(write_task(recipe=name), recipes)
    assert caught.value.where.endswith("triage.yaml:4")
    assert f"there is no recipe '{name}'" in str(caught.value)
    assert says in str(caught.value)


def test_a_recipe_that_is_named_otherwise_or_wrong_inside(recipes: Path, write_task: WriteTask) -> None:
    file = recipes / "small@2.yaml"
    file.write_text(RECIPE.replace("version: 2", "version: 3"), encoding="utf-8")
    with pytest.raises(SpecError, match="the file declares small@3"):
        resolve(write_task(), recipes)
    file.write_text(RECIPE.replace("rank: 4", "rank: many"), encoding="utf-8")
    with pytest.raises(SpecError, match=r"field 'settings\.lora\.rank' is 'many'") as caught:
        resolve(write_task(), recipes)
    assert caught.value.where == f"{file}:10"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_come_with_the_platform_are_valid_and_named_as_they_say(path: Path) -> None:
    recipe = load(path.stem).recipe
    assert f"{recipe.name}@{recipe.version}" == path.stem


def test_a_trial_replaces_values_and_says_so(recipes: Path, write_task: WriteTask) -> None:
    resolved = resolve(write_task("  lora: {rank: 8}"), recipes)
    trial = with_values(resolved, {"lora.rank": 2, "training.learning_rate": 0.5}, "search trial 3")
    assert (trial.settings.lora.rank, trial.settings.training.learning_rate) == (2, 0.5)
    assert trial.origins["lora.rank"] == trial.origins["training.learning_rate"] == "search trial 3"
    assert trial.origins["training.epochs"] == "recipe small@2"
    assert resolved.settings.lora.rank == 8
    with pytest.raises(SpecError, match=r"'lora\.rank' is 9999"):
        with_values(resolved, {"lora.rank": 9999}, "search trial 3")


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 1_000])
def test_every_row_is_in_one_batch(rows: int) -> None:
    batches = length_grouped([1 + n * 37 % 100 for n in range(rows)], 8, seed=1)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert all(1 <= len(batch) <= 8 for batch in batches)


def test_batches_are_seeded_and_of_similar_length() -> None:
    lengths = [1 + n * 37 % 100 for n in range(2_000)]
    batches = length_grouped(lengths, 16, seed=1)
    assert batches == length_grouped(lengths, 16, seed=1) != length_grouped(lengths, 16, seed=2)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    # rows of a batch that are drawn at random are padded to nearly twice their length
    assert padded < 1.1 * sum(lengths)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


def test_a_shorter_first_epoch_is_for_classification_alone(write_task: WriteTask) -> None:
    task = write_task("  training: {first_epoch_tokens: 32}", recipe="chat-lora@1")
    text = task.path.read_text().replace("text-classification", "text-generation").replace("labels: [ham, spam]\n", "")
    task.path.write_text(text)
    with pytest.raises(SpecError, match="their answers stand at the end") as refused:
        resolve(Task(task.path), RECIPES)
    assert f"{task.path}:5" in str(refused.value)
