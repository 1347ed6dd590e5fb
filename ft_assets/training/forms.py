"""Forms to fill in a recipe: a basic one of few fields, and an advanced one of every setting, as JSON Schema.

What is filled in becomes settings through `recipes.from_form`, the same from either form.
"""

from pathlib import Path
from typing import Any, Literal

from ft_assets.training.recipes import BASIC, Settings, from_form, known, load
from ft_resources.base_models import resolve
from ft_resources.environments import RECIPES
from ft_resources.errors import SpecError

Level = Literal["basic", "advanced"]
LEVELS: tuple[Level, ...] = ("basic", "advanced")


def form(reference: str, level: Level, folder: Path = RECIPES) -> dict[str, Any]:
    """The form of a recipe as JSON Schema (2020-12); its defaults are what the recipe says.

    Raises:
        SpecError: There is no such recipe, or no such level.
    """
    if level not in LEVELS:
        raise SpecError(f"there is no form '{level}'", where="level", mend=f"Choose {' or '.join(LEVELS)}.")
    _, recipe = load(reference, folder)
    values = from_form(reference, {}, folder).settings.model_dump(mode="json")
    whole = Settings.model_json_schema()
    for name, field in whole["properties"].items():
        section = field.get("$ref", "").rpartition("/")[2]
        fields, filled = (whole["$defs"][section], values[name]) if section else (whole, values)
        for leaf in fields["properties"] if section else [name]:
            fields["properties"][leaf]["default"] = filled[leaf]
        if section:
            field.pop("default", None)
            fields.pop("required", None)
    whole.pop("required", None)
    whole |= {"title": reference, "description": recipe.description}
    if level == "advanced":
        return whole
    return {
        "title": reference,
        "description": recipe.description,
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _field(whole, name, path, folder) for name, path in BASIC.items()},
    }


def _field(whole: dict[str, Any], name: str, path: str, folder: Path) -> dict[str, Any]:
    section, leaf = path.split(".")
    reference = whole["properties"][section]["$ref"].rpartition("/")[2]
    field = {**whole["$defs"][reference]["properties"][leaf], "title": name.replace("_", " ").capitalize()}
    if name == "base_model":
        field["enum"] = bases_here(folder)
        if field["default"] not in field["enum"]:
            del field["default"]
    return field


def bases_here(folder: Path = RECIPES) -> list[str]:
    """References of the base models on this machine: those that recipes name, and those in the hub's cache."""
    named = {load(reference, folder)[1].settings.base.model for reference in known(folder)}
    return [reference for reference in sorted(named | _cached()) if _is_here(reference)]


def _cached() -> set[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return {f"hub:{repo.repo_id}" for repo in scan_cache_dir().repos if repo.repo_type == "model"}
    except CacheNotFound:
        return set()


def _is_here(reference: str) -> bool:
    try:
        resolve(reference)
    except SpecError:
        return False
    return True
