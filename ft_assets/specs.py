"""Reading a YAML file into a pydantic model, with errors that name file, line, field and the nearest valid name."""

import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from ft_resources.errors import SpecError

Path_ = tuple[int | str, ...]


class Strict(pydantic.BaseModel):
    """A model a person writes: unknown keys are refused, values never change after reading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Misplaced(ValueError):
    """A validator's complaint about one field below the model it sees; `loc` is where that field stands."""

    def __init__(self, message: str, *loc: int | str) -> None:
        super().__init__(message)
        self.loc = loc


Model = TypeVar("Model", bound=Strict)


class YamlFile:
    """A parsed YAML mapping that remembers the line of every key.

    Raises:
        SpecError: The file is missing, not UTF-8, not YAML, or not a mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = b""
        try:
            content = path.read_bytes()
            text = content.decode("utf-8-sig")
        except FileNotFoundError:
            raise SpecError("there is no such file", where=str(path), mend="Check the path.") from None
        except IsADirectoryError:
            raise SpecError("this is a folder", where=str(path), mend="Name the YAML file inside it.") from None
        except OSError as error:
            raise SpecError(
                f"the file cannot be read: {error.strerror or error}", where=str(path), mend="Check its permissions."
            ) from None
        except UnicodeDecodeError as error:
            # the codec drops a byte order mark before it counts
            start = error.start + len(content) - len(error.object)
            line = content.count(b"\n", 0, start) + 1
            raise SpecError(
                f"byte {start} (0x{content[start]:02x}) is not UTF-8",
                where=f"{path}:{line}",
                mend="Save the file with UTF-8 encoding.",
            ) from None
        try:
            self.root = _reader().load(io.StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise SpecError(
                f"not valid YAML: {error.problem or error.context}",
                where=f"{path}:{mark.line + 1}" if mark else str(path),
                mend="Check indentation, colons and quotes on that line and the one above.",
            ) from None
        except ReaderError as error:
            raise SpecError(
                f"not valid YAML: the character U+{error.character:04X} is not allowed",
                where=f"{path}:{text.count(chr(10), 0, error.position) + 1}",
                mend="Remove control characters.",
            ) from None
        except (YAMLError, ValueError) as error:
            raise SpecError(f"not valid YAML: {error}", where=str(path), mend="Check its numbers.") from None
        except RecursionError:
            raise SpecError("not valid YAML: nested too deeply", where=f"{path}:1", mend="Nest less.") from None
        if not hasattr(self.root, "lc") or not hasattr(self.root, "keys"):
            raise SpecError(
                "the file is empty" if self.root is None else "the file holds no mapping",
                where=f"{path}:1",
                mend="Write 'name: ...' style keys at the top level.",
            )
        self.values: dict[str, Any] = plain(self.root)

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
        return self.validate(model, self.values)

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
        kind, context = item["type"], item.get("ctx", {})
        misplaced = context.get("error")
        loc: Path_ = (*item["loc"], *(misplaced.loc if isinstance(misplaced, Misplaced) else ()))
        if kind.startswith("union_tag"):
            loc = (*loc, str(context["discriminator"]).strip("'"))
            kind = "missing" if kind == "union_tag_not_found" else kind
        full = (*below, *loc)
        where = self.where(full)
        keep_last = kind in ("missing", "extra_forbidden") or bool(isinstance(misplaced, Misplaced) and misplaced.loc)
        field = ".".join(map(str, self._named(full, keep_last=keep_last))) or "(top level)"
        if kind == "extra_forbidden":
            names = _valid_names(model, loc[:-1])
            return where, f"field '{field}' is not known", f"{_meant(loc[-1], names)}Valid here: {', '.join(names)}"
        if kind == "missing":
            tags = (
                sorted({tag for one in _models_at(model, loc[:-1]) for tag in _tags(one)})
                if "discriminator" in context
                else []
            )
            return where, f"field '{field}' is missing", f"Add it{': ' if tags else ''}{', '.join(tags)}"
        value: Any = item.get("input")
        if isinstance(misplaced, Misplaced):
            return where, f"field '{field}': {misplaced}", "Correct it"
        if kind == "union_tag_invalid":
            value, expected = context["tag"], f"one of {context['expected_tags']}"
        else:
            expected = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        options = str(context.get("expected") or context.get("expected_tags") or "").replace(" or ", ",").split(",")
        got = repr(value)
        got = got if len(got) <= 80 else got[:77] + "..."
        meant = _meant(value, [option.strip(" '") for option in options]).rstrip()
        return where, f"field '{field}' is {got}", f"Expected: {expected}" + (f". {meant}" if meant else "")

    def _named(self, loc: Path_, *, keep_last: bool) -> Path_:
        """`loc` without what pydantic adds to it: the tags and members of unions, which no file shows."""
        node, named = self.root, []
        for at, part in enumerate(loc):
            inside = isinstance(part, int) if isinstance(node, list) else hasattr(node, "keys") and part in node
            if inside:
                node = node[part]
            if inside or (keep_last and at == len(loc) - 1):
                named.append(part)
        return tuple(named)


class _Constructor(RoundTripConstructor):
    """Leaves dates as they are written: the model knows their line when one is wrong."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", RoundTripConstructor.construct_scalar)


def _reader() -> YAML:
    reader = YAML(typ="rt", pure=True)
    reader.Constructor = _Constructor
    return reader


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


def _meant(name: Any, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'? " if near else ""


def _valid_names(model: Any, loc: Path_) -> list[str]:
    return sorted({name for candidate in _models_at(model, loc) for name in candidate.model_fields})


def _models_at(model: Any, loc: Path_) -> list[Any]:
    """The models of which one stands at `loc` below `model`."""
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
    return current


def _tags(model: Any) -> set[str]:
    kind = model.model_fields.get("kind")
    return set(getattr(kind.annotation, "__args__", ())) if kind is not None else set()


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
