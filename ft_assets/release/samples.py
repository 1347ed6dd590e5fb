"""Sample requests of a task file: what the built service is asked before a release, and what it must answer."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from bento.conversation import Fields, answer_json
from ft_assets.evaluation.generation.fields import same_value
from ft_assets.specs import Misplaced, Strict
from ft_resources.errors import DataError

EXPECTATIONS = {
    "label": ("text-classification",),
    "contains": ("text-generation", "extraction"),
    "fields": ("extraction",),
}
"""The ways to say what is expected, and the types of task that each is for."""


class SampleRequest(Strict):
    """One request and what its answer must be; one of `label`, `contains` and `fields` says it."""

    text: str = Field(min_length=1, max_length=100_000, description="What the service is asked.")
    label: str | None = Field(None, description="text-classification: the label it must answer.")
    contains: str | None = Field(
        None,
        min_length=1,
        description="text-generation, extraction: what must stand in the answer; upper and lower case are the same.",
    )
    fields: dict[str, Any] | None = Field(
        None, min_length=1, description="extraction: values that fields of the answer must have; others may have any."
    )

    def problem(self, kind: str, labels: Sequence[str], fields: Fields) -> Misplaced | None:
        """What keeps a task from being asked this, or None.

        Args:
            kind: Type of the task.
            labels: Those of the task; `fields` likewise.
        """
        given = [name for name in EXPECTATIONS if getattr(self, name) is not None]
        if not self.text.strip():
            return Misplaced("it is blank: write what the service is asked", "text")
        if not given:
            names = " or ".join(name for name, kinds in EXPECTATIONS.items() if kind in kinds)
            return Misplaced(f"nothing says what the answer must be: add {names}")
        if len(given) > 1:
            return Misplaced(f"`{given[0]}` says already what the answer must be: keep one of them", given[1])
        kinds = EXPECTATIONS[given[0]]
        if kind not in kinds:
            return Misplaced(f"it is for tasks of type {' or '.join(kinds)}, this one's is {kind}", given[0])
        if self.label is not None and self.label not in labels:
            near = difflib.get_close_matches(self.label, labels, n=1, cutoff=0.5)
            meant = f", did you mean '{near[0]}'?" if near else ""
            return Misplaced(f"`labels` does not list '{self.label}'{meant}", "label")
        for name, value in (self.fields or {}).items():
            if name not in fields:
                return Misplaced(f"the task has no such field, it has {', '.join(fields)}", "fields", name)
            try:
                answer_json({name: value}, {name: fields[name]})
            except DataError as error:
                return Misplaced(f"{error.what}. {error.mend}", "fields", name)
        return None

    @property
    def expected(self) -> str:
        """What the answer must be, for people."""
        if self.contains is not None:
            return f"a text with {self.contains!r}"
        return self.label if self.label is not None else json.dumps(self.fields, ensure_ascii=False)

    def met_by(self, answer: str) -> bool:
        """Whether `answer`, a label or the written text, is what is expected."""
        if self.label is not None:
            return answer == self.label
        if self.contains is not None:
            return self.contains.casefold() in answer.casefold()
        try:
            values = json.loads(answer)
        except ValueError:
            return False
        wanted = self.fields or {}
        return isinstance(values, Mapping) and all(
            name in values and same_value(value, values[name]) for name, value in wanted.items()
        )
