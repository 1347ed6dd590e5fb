"""What the rows of each type of task are: how they are cleaned, compared and dealt out, and what must hold of them.

A row is a text and an answer, whatever the type. Classification: any text and one of the task's labels. Generation: a
conversation and what the assistant says next. Extraction: a document and a JSON object of the declared fields.
"""

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import pandas as pd

from bento import conversation
from bento.preparation import normalise, prepare, prepare_content, tidy
from ft_assets.tasks import CleaningSpec, TaskSpec
from ft_resources.errors import DataError

IMBALANCE_LIMIT = 3.0
SAME_ANSWER_LIMIT = 0.2
NULL_LIMIT = 0.95
ENOUGH_TO_DEAL = 10
"""Rows with one value of an enum from which every split should have it."""
NEIGHBOURS = 10
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SHOWN = 20


@dataclass(frozen=True)
class Verdict:
    """Whether a demand holds, in a sentence with the figures; `rows` are examples for a table."""

    passed: bool
    reason: str
    rows: list[dict[str, Any]] = field(default_factory=list)


class Unfit(Exception):
    """A row cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Prepared:
    """A row as a model is trained on it."""

    text: str
    answer: str
    masked: Mapping[str, int]
    cut: bool
    """Something of the text was longer than `max_chars`."""


class Form(Protocol):
    """What is particular to the rows of one type of task. Answers are the column `label`."""

    conflict: ClassVar[str]
    """Why rows are rejected whose text is that of another row, with another answer."""
    keeps_one: ClassVar[bool]
    """Of such rows the earliest stays; otherwise none does, for one of them must be wrong."""

    def prepared(self, text: str, answer: str | None, spec: CleaningSpec) -> Prepared:
        """The row, ready for a model.

        Raises:
            Unfit: It cannot be used; says why.
        """

    def compared(self, text: str) -> str:
        """What of a prepared text tells whether two rows are alike."""

    def contents(self, text: str, answer: str) -> list[str]:
        """The pieces of a prepared row in which personal data could stand."""

    def strata(self, answers: Sequence[str]) -> list[str]:
        """For each row what every split should have its share of."""

    def overview(self, answers: pd.Series) -> list[dict[str, Any]]:
        """How answers are distributed, as rows of a table."""

    def known(self, rows: pd.DataFrame) -> Verdict:
        """Raw rows (text, label, source) have the answers that the task declares."""

    def balance(self, answers: pd.Series) -> Verdict:
        """No answer crowds out the others."""

    def noise(self, kept: pd.DataFrame, rejected: pd.DataFrame) -> Verdict:
        """Few rows contradict others."""

    def present(self, every: pd.Series, part: pd.Series, split: str) -> Verdict:
        """The answers of one split, of all that there are, cover what a model has to learn."""


def form_of(task: TaskSpec) -> Form:
    """The form of the rows of `task`."""
    if task.type == "text-generation":
        return Generation()
    if task.type == "extraction":
        return Extraction(task.fields)
    return Classification(task.labels)


@dataclass(frozen=True)
class Classification:
    """Texts with one of `labels`."""

    labels: Sequence[str]
    conflict: ClassVar[str] = "conflicting_labels"
    keeps_one: ClassVar[bool] = False

    def prepared(self, text: str, answer: str | None, spec: CleaningSpec) -> Prepared:
        if answer is None:
            raise Unfit("no_label")
        if answer not in self.labels:
            raise Unfit("unknown_label", f"'{answer}' is not one of the task's labels")
        text, masked, cut = _document(text, spec)
        return Prepared(text, answer, masked, cut)

    def compared(self, text: str) -> str:
        return text

    def contents(self, text: str, answer: str) -> list[str]:
        return [text]

    def strata(self, answers: Sequence[str]) -> list[str]:
        return list(answers)

    def overview(self, answers: pd.Series) -> list[dict[str, Any]]:
        return counted(answers, "label")

    def known(self, rows: pd.DataFrame) -> Verdict:
        unknown = rows.loc[rows["label"].notna() & ~rows["label"].isin(self.labels), ["label", "source"]]
        found = [
            {
                "label": label,
                "rows": len(group),
                "first": group["source"].iloc[0],
                "nearest": next(iter(difflib.get_close_matches(str(label), self.labels, n=1)), "-"),
            }
            for label, group in unknown.groupby("label")
        ]
        first = f"; '{found[0]['label']}' at {found[0]['first']}" if found else ""
        return Verdict(
            not found,
            f"{len(unknown)} rows carry a label that the task's `labels` do not list{first}"
            + (". Correct those rows or add the label to the task" if found else ""),
            found,
        )

    def balance(self, answers: pd.Series) -> Verdict:
        counts = answers.value_counts().reindex(list(self.labels), fill_value=0)
        ratio = float(counts.max() / counts.min()) if counts.min() else float("inf")
        return Verdict(
            ratio <= IMBALANCE_LIMIT,
            f"the most frequent label has {ratio:.1f} times the rows of the rarest "
            f"({IMBALANCE_LIMIT:.0f} is the limit)",
            [{"label": label, "rows": int(rows)} for label, rows in counts.items()],
        )

    def noise(self, kept: pd.DataFrame, rejected: pd.DataFrame) -> Verdict:
        suspects = _outvoted(kept["text"].tolist(), kept["label"].tolist())
        rate = len(suspects) / max(1, len(kept))
        return Verdict(
            rate <= 0.05,
            f"{len(suspects)} of {len(kept)} labels ({rate:.1%}) disagree with nearly all of their nearest rows",
            [{"row_id": kept["row_id"].iloc[at], "label": kept["label"].iloc[at]} for at in suspects[:SHOWN]],
        )

    def present(self, every: pd.Series, part: pd.Series, split: str) -> Verdict:
        counts = part.value_counts().reindex(list(self.labels), fill_value=0)
        missing = [label for label, rows in counts.items() if rows == 0]
        return Verdict(
            not missing,
            f"no rows of {missing} in the {split} split. Add rows of these labels"
            if missing
            else f"every label has at least {counts.min()} rows",
            [{"label": label, "rows": int(rows)} for label, rows in counts.items()],
        )


class Generation:
    """Conversations with what the assistant says next."""

    conflict: ClassVar[str] = "other_answer"
    keeps_one: ClassVar[bool] = True

    def prepared(self, text: str, answer: str | None, spec: CleaningSpec) -> Prepared:
        try:
            messages = conversation.load(text)
            prepared, masked = conversation.prepare_conversation(text, spec.pii, spec.max_chars)
        except DataError as error:
            raise Unfit("bad_conversation", str(error)) from None
        wanted, hidden = prepare_content(answer or "", spec.pii)
        _answer_fits(wanted, spec)
        cut = any(len(tidy(message["content"]).strip()) > spec.max_chars for message in messages)
        return Prepared(prepared, wanted, _added(masked, hidden), cut)

    def compared(self, text: str) -> str:
        return "\n".join(message["content"] for message in conversation.load(text) if message["role"] != "system")

    def contents(self, text: str, answer: str) -> list[str]:
        return [*(message["content"] for message in conversation.load(text)), answer]

    def strata(self, answers: Sequence[str]) -> list[str]:
        return [""] * len(answers)

    def overview(self, answers: pd.Series) -> list[dict[str, Any]]:
        lengths = answers.dropna().str.len()
        return [
            {"answer length": f"{at:.0%}", "characters": int(lengths.quantile(at))} for at in QUANTILES if len(lengths)
        ]

    def known(self, rows: pd.DataFrame) -> Verdict:
        blank = rows[rows["label"].isna()]
        # a row that is no conversation at all has no answer either: cleaning rejects it
        lacking = blank[blank["text"].map(_is_conversation).astype(bool)]
        first = (
            f", the first at {lacking['source'].iloc[0]}. Add their answers or leave them out" if len(lacking) else ""
        )
        return Verdict(
            lacking.empty,
            f"{len(lacking)} of {len(rows)} rows have no answer{first}",
            [{"row_id": key, "source": source} for key, source in _columns(lacking, "row_id", "source")],
        )

    def balance(self, answers: pd.Series) -> Verdict:
        counts = answers.value_counts()
        share = float(counts.iloc[0] / len(answers)) if len(counts) else 0.0
        return Verdict(
            share <= SAME_ANSWER_LIMIT,
            f"the most frequent answer is that of {share:.1%} of the rows ({SAME_ANSWER_LIMIT:.0%} is the limit)",
            self.overview(answers),
        )

    def noise(self, kept: pd.DataFrame, rejected: pd.DataFrame) -> Verdict:
        return _contradictions(kept, rejected, self.conflict)

    def present(self, every: pd.Series, part: pd.Series, split: str) -> Verdict:
        return Verdict(
            len(part) > 0,
            f"{len(part)} rows in the {split} split" + ("" if len(part) else ". Add rows"),
            self.overview(part),
        )


@dataclass(frozen=True)
class Extraction:
    """Documents with the values of `fields`, as canonical JSON."""

    fields: conversation.Fields
    conflict: ClassVar[str] = "conflicting_answers"
    keeps_one: ClassVar[bool] = False

    def prepared(self, text: str, answer: str | None, spec: CleaningSpec) -> Prepared:
        if answer is None:
            raise Unfit("no_answer")
        try:
            values = conversation.parse_answer(answer, self.fields)
            wanted, hidden = conversation.prepare_values(values, self.fields, spec.pii)
        except DataError as error:
            raise Unfit("answer_does_not_fit", str(error)) from None
        _answer_fits(wanted, spec)
        text, masked, cut = _document(text, spec)
        return Prepared(text, wanted, _added(masked, hidden), cut)

    def compared(self, text: str) -> str:
        return text

    def contents(self, text: str, answer: str) -> list[str]:
        values = json.loads(answer)
        free = [name for name, declared in self.fields.items() if declared.enum is None]
        return [text, *(values[name] for name in free if isinstance(values[name], str))]

    def strata(self, answers: Sequence[str]) -> list[str]:
        """The rarest value of an enum in each row: common ones are in every split anyway."""
        chosen = [self._enum_values(answer) for answer in answers]
        counts = Counter(value for values in chosen for value in values)
        return [min(values, key=lambda value: (counts[value], value), default="") for values in chosen]

    def overview(self, answers: pd.Series) -> list[dict[str, Any]]:
        shares = self._null_shares(answers)
        return [{"field": name, "rows": len(answers), "null": f"{share:.1%}"} for name, share in shares.items()]

    def known(self, rows: pd.DataFrame) -> Verdict:
        wrong = []
        answered = rows[rows["label"].notna()]
        for answer, source in _columns(answered, "label", "source"):
            try:
                conversation.parse_answer(answer, self.fields)
            except DataError as error:
                wrong.append({"source": source, "problem": str(error)})
        first = f"; {wrong[0]['source']}: {wrong[0]['problem']}" if wrong else ""
        return Verdict(not wrong, f"{len(wrong)} answers do not fit the declared fields{first}", wrong[:SHOWN])

    def balance(self, answers: pd.Series) -> Verdict:
        shares = self._null_shares(answers)
        name = max(shares, key=lambda one: shares[one])
        return Verdict(
            shares[name] <= NULL_LIMIT,
            f"the field that is null most often, '{name}', is so in {shares[name]:.1%} of the rows "
            f"({NULL_LIMIT:.0%} is the limit)",
            self.overview(answers),
        )

    def noise(self, kept: pd.DataFrame, rejected: pd.DataFrame) -> Verdict:
        return _contradictions(kept, rejected, self.conflict)

    def present(self, every: pd.Series, part: pd.Series, split: str) -> Verdict:
        have = Counter(value for answer in part for value in self._enum_values(answer))
        wanted = Counter(value for answer in every for value in self._enum_values(answer))
        missing = [value for value, rows in sorted(wanted.items()) if rows >= ENOUGH_TO_DEAL and not have[value]]
        said = Counter(name for answer in part for name, value in json.loads(answer).items() if value is not None)
        missing += [name for name, declared in self.fields.items() if declared.required and not said[name]]
        return Verdict(
            not missing,
            f"no rows with {', '.join(missing)} in the {split} split. Add rows with them"
            if missing
            else f"every required field and frequent value is in {len(part)} rows",
            [{"field": name, "rows": said[name]} for name in self.fields]
            + [{"field": value, "rows": have[value]} for value in sorted(wanted)],
        )

    def _enum_values(self, answer: str) -> list[str]:
        values = json.loads(answer)
        named = {name: values[name] for name, declared in self.fields.items() if declared.enum is not None}
        return [f"{name} = {value}" for name, value in named.items() if value is not None]

    def _null_shares(self, answers: pd.Series) -> dict[str, float]:
        """Share of rows whose answer has no value of a field; an answer that is no JSON object has none at all."""
        nulls: Counter[str] = Counter()
        for answer in answers:
            try:
                values = json.loads(answer)
            except (TypeError, ValueError, RecursionError):
                values = None
            nulls.update(name for name in self.fields if not isinstance(values, dict) or values.get(name) is None)
        return {name: nulls[name] / max(1, len(answers)) for name in self.fields}


def counted(values: pd.Series, column: str) -> list[dict[str, Any]]:
    """Each value with its rows and share, as rows of a table."""
    counts = values.value_counts(dropna=False)
    return [
        {column: str(name), "rows": int(n), "share": f"{n / max(len(values), 1):.1%}"} for name, n in counts.items()
    ]


def _document(text: str, spec: CleaningSpec) -> tuple[str, dict[str, int], bool]:
    prepared, masked = prepare(text, spec.pii, spec.max_chars)
    return prepared, masked, len(text) > spec.max_chars and len(normalise(text)) > spec.max_chars


def _answer_fits(answer: str, spec: CleaningSpec) -> None:
    if not answer:
        raise Unfit("no_answer")
    if len(answer) > spec.max_answer_chars:
        raise Unfit("answer_too_long", f"{len(answer)} characters, {spec.max_answer_chars} are allowed")


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {kind: one.get(kind, 0) + other.get(kind, 0) for kind in (*one, *other)}


def _is_conversation(text: str) -> bool:
    try:
        conversation.load(text)
    except DataError:
        return False
    return True


def _columns(frame: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(frame[name] for name in names), strict=True))


def _contradictions(kept: pd.DataFrame, rejected: pd.DataFrame, reason: str) -> Verdict:
    found = rejected[rejected["reason"] == reason]
    rate = len(found) / max(1, len(kept) + len(found))
    return Verdict(
        rate <= 0.05,
        f"{len(found)} rows ({rate:.1%}) answer the text of another row differently; cleaning rejected them",
        [
            {"row_id": key, "source": source, "detail": detail}
            for key, source, detail in _columns(found.head(SHOWN), "row_id", "source", "detail")
        ],
    )


def _outvoted(texts: list[str], labels: list[str]) -> list[int]:
    """Rows whose label at most one of their ten nearest TF-IDF neighbours shares, while the others agree on another."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    if len(texts) <= NEIGHBOURS + 1:
        return []
    try:
        vectors = TfidfVectorizer(sublinear_tf=True, max_features=20_000).fit_transform(texts)
    except ValueError:  # only stop words or empty texts: nothing to compare
        return []
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine").fit(vectors)
    suspects = []
    for row, neighbours in enumerate(nearest.kneighbors(vectors, return_distance=False)):
        others = [labels[n] for n in neighbours if n != row][:NEIGHBOURS]
        top = max(set(others), key=others.count)
        if top != labels[row] and others.count(labels[row]) <= 1 and others.count(top) >= NEIGHBOURS - 1:
            suspects.append(row)
    return suspects
