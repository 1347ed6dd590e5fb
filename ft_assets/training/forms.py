"""Forms to fill in a recipe: a basic one of few fields, and an advanced one of every setting, as JSON Schema.

What is filled in becomes settings through `from_form`, the same from either form.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ft_assets.specs import Strict
from ft_assets.training.recipes import Merged, known, load, merge
from ft_resources.base_models import resolve
from ft_resources.environments import RECIPES
from ft_resources.errors import SpecError

Level = Literal["basic", "advanced"]
LEVELS: tuple[Level, ...] = ("basic", "advanced")
BASIC = {
    "base_model": "base.model",
    "epochs": "training.epochs",
    "learning_rate": "training.learning_rate",
    "rank": "lora.rank",
    "max_tokens": "base.max_tokens",
}
"""Fields of the basic form -> path of the value they set."""
FORM = "form"
"""Origin of a value that was filled in."""


def from_form(reference: str, values: Mapping[str, Any], folder: Path = RECIPES) -> Merged:
    """A recipe merged with what was filled in.

    Args:
        values: Fields of the basic form by name, or of the advanced form, nested as the trainer's settings.

    Raises:
        SpecError: There is no such recipe, a field that is in neither form, or a value that is not allowed.
    """
    template = load(reference, folder)
    basic = {} if template.plugin else BASIC
    given: dict[str, Any] = {}
    for name, value in values.items():
        *above, leaf = basic[name].split(".") if name in basic else [name]
        nested = {leaf: value}
        for parent in reversed(above):
            nested = {parent: nested}
        given = merge(given, nested)
    try:
        settings = template.model.model_validate(merge(template.recipe.settings, given))
    except ValidationError as error:
        raise _refused(error, template.model, known_fields=[*basic, *template.model.model_fields]) from None
    return template.merged(settings, given, lambda _: FORM)


def form(reference: str, level: Level, folder: Path = RECIPES) -> dict[str, Any]:
    """The form of a recipe as JSON Schema (2020-12); its defaults are what the recipe says.

    A plug-in trainer has one form, of all its settings.

    Raises:
        SpecError: There is no such recipe, or no such level.
    """
    if level not in LEVELS:
        raise SpecError(f"there is no form '{level}'", where="level", mend=f"Choose {' or '.join(LEVELS)}.")
    template = load(reference, folder)
    values = template.settings.model_dump(mode="json")
    whole = template.model.model_json_schema()
    for name, field in whole["properties"].items():
        section = field.get("$ref", "").rpartition("/")[2]
        fields, filled = (whole["$defs"][section], values[name]) if section else (whole, values)
        for leaf in fields["properties"] if section else [name]:
            fields["properties"][leaf]["default"] = filled[leaf]
        if section:
            field.pop("default", None)
            fields.pop("required", None)
    whole.pop("required", None)
    whole |= {"title": reference, "description": template.recipe.description}
    if level == "advanced" or template.plugin:
        return whole
    return {
        "title": reference,
        "description": template.recipe.description,
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
    named = filter(None, (load(reference, folder).recipe.base_model for reference in known(folder)))
    return [reference for reference in sorted({*named, *_cached()}) if _is_here(reference)]


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


def _refused(error: ValidationError, model: type[Strict], known_fields: list[str]) -> SpecError:
    """The first complaint about a form, in the words of `SpecError`."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return SpecError(
            f"field '{path}' is {first['input']!r}: {first['msg']}", where=FORM, mend="Fill in another value."
        )
    names = known_fields
    if len(first["loc"]) > 1:
        section = model.model_fields[str(first["loc"][0])].annotation
        names = sorted(section.model_fields) if isinstance(section, type) and issubclass(section, Strict) else []
    near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return SpecError(f"field '{path}' is not known", where=FORM, mend=f"{hint}Known there: {', '.join(names)}.")
