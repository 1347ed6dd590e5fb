"""Reading a YAML file into a pydantic model, with errors that name file, line, field and the nearest valid name."""

import difflib
import io
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ft_resources.errors import SpecError

Path_ = tuple[int | str, ...]


class Strict(pydantic.BaseModel):
    """A model a person writes: unknown keys are refused, values never change after reading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Strict)


class YamlFile:
    """A parsed YAML mapping that remembers the line of every key.

    Raises:
        SpecError: The file is missing, not UTF-8, not YAML, or not a mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SpecError("there is no such file", where=str(path), mend="Check the path.") from None
        except IsADirectoryError:
            raise SpecError("this is a folder", where=str(path), mend="Name the YAML file inside it.") from None
        except UnicodeDecodeError as error:
            raise SpecError(
                f"byte {error.start} is not UTF-8", where=str(path), mend="Save the file with UTF-8 encoding."
            ) from None
        try:
            self.root = YAML(typ="rt", pure=True).load(io.StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise SpecError(
                f"not valid YAML: {error.problem or error.context}",
                where=f"{path}:{mark.line + 1}" if mark else str(path),
                mend="Check indentation, colons and quotes on that line and the one above.",
            ) from None
        except (YAMLError, ValueError) as error:
            raise SpecError(f"not valid YAML: {error}", where=str(path), mend="Remove control characters.") from None
        if not hasattr(self.root, "lc") or not hasattr(self.root, "keys"):
            raise SpecError(
                "the file holds no mapping", where=str(path), mend="Write 'name: ...' style keys at the top level."
            )

    def line(self, loc: Path_) -> int:
        """The 1-based line of the deepest part of `loc` that stands in the file."""
        node, line = self.root, 1
        for part in loc:
            try:
                if isinstance(part, str) and part in node:
                    line = node.lc.key(part)[0] + 1
                elif isinstance(part, int):
                    line = node.lc.item(part)[0] + 1
                else:
                    continue  # a discriminator tag that pydantic adds to the location
                node = node[part]
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return line

    def where(self, loc: Path_) -> str:
        return f"{self.path}:{self.line(loc)}"

    def parse(self, model: type[Model]) -> Model:
        """Validate the mapping as `model`.

        Raises:
            SpecError: Every problem of the file, one a line.
        """
        return self.validate(model, plain(self.root))

    def validate(self, model: type[Model], values: dict[str, Any], below: Path_ = ()) -> Model:
        """Validate `values`, which stand at `below` in this file, as `model`; errors as of `parse`."""
        try:
            return model.model_validate(values)
        except pydantic.ValidationError as error:
            problems = [self._explain(model, item, below) for item in error.errors()]
            first = problems[0]
            if len(problems) == 1:
                raise SpecError(first[1], where=first[0], mend=first[2]) from None
            lines = "\n".join(f"  {where}: {what}. {mend}" for where, what, mend in problems)
            raise SpecError(f"{len(problems)} problems:\n{lines}", where=str(self.path)) from None

    def _explain(self, model: type[pydantic.BaseModel], item: Any, below: Path_) -> tuple[str, str, str]:
        loc: Path_ = item["loc"]
        field = ".".join(str(part) for part in (*below, *loc)) or "(top level)"
        where, kind = self.where((*below, *loc)), item["type"]
        if kind == "extra_forbidden":
            names = _valid_names(model, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            return where, f"field '{field}' is not known", f"{hint}Valid here: {', '.join(names)}"
        if kind == "missing":
            return where, f"field '{field}' is missing", "Add it"
        expected = item["msg"].removeprefix("Value error, ")
        got = repr(item.get("input"))
        got = got if len(got) <= 80 else got[:77] + "..."
        choices = [part.strip(" '") for part in str(item.get("ctx", {}).get("expected", "")).replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(item.get("input")), choices, n=1, cutoff=0.5)
        return where, f"field '{field}' is {got}", f"Expected: {expected}" + (f". Did you mean '{near[0]}'?" if near else "")


def plain(node: Any) -> Any:
    """The built-in dict, list and scalars behind ruamel's round-trip types."""
    if hasattr(node, "items"):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _valid_names(model: Any, loc: Path_) -> list[str]:
    """Field names of the model that stands at `loc` below `model`."""
    current = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        following: list[Any] = []
        for candidate in current:
            field = candidate.model_fields.get(part)
            if field is not None:
                following += _models_in(field.annotation)
            elif part in _tags(candidate):
                following.append(candidate)
        current = following or current
    return sorted({name for candidate in current for name in candidate.model_fields})


def _tags(model: Any) -> set[str]:
    kind = model.model_fields.get("kind")
    return set(getattr(kind.annotation, "__args__", ())) if kind is not None else set()


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
