"""The HTTP protocol: what requests and answers look like, and the names of errors."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import pydantic

from ft_resources.errors import RequestError

MAX_INPUTS = 256
MAX_CHARS = 100_000

ErrorCode = Literal[
    "invalid_request",
    "unknown_task",
    "unknown_version",
    "input_too_large",
    "unknown_prediction",
    "unknown_label",
    "overloaded",
    "log_unavailable",
    "unauthorized",
    "not_ready",
    "internal",
]


def storable(value: str) -> str:
    """`value`, if every database can hold it.

    Raises:
        ValueError: It has NUL characters or lone surrogates.
    """
    if "\0" in value:
        raise ValueError("text must not hold NUL characters")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("text must not hold lone surrogates")
    return value


def not_blank(value: str) -> str:
    """Raises:
    ValueError: Nothing but white space.
    """
    if not value.strip():
        raise ValueError("text must not be empty")
    return value


Text = Annotated[str, pydantic.AfterValidator(storable)]
Name = Annotated[Text, pydantic.Field(min_length=1, max_length=128)]
Input = Annotated[Text, pydantic.AfterValidator(not_blank), pydantic.Field(min_length=1, max_length=MAX_CHARS)]


class Request(pydantic.BaseModel):
    """What a caller writes: unknown fields are refused, nothing is converted silently."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PredictRequest(Request):
    """Texts for one task."""

    task: Name = pydantic.Field(description="Full name of a released task.", examples=["mail-triage"])
    inputs: list[Input] = pydantic.Field(
        min_length=1, max_length=MAX_INPUTS, description="Texts to classify, each up to 100,000 characters."
    )
    model_version: Name | None = pydantic.Field(
        None,
        description="`champion` or nothing: the live route decides. Else a model version such as `3`, or at least "
        "8 hex digits of the digest of an adapter that was released for the task.",
    )
    user: Name | None = pydantic.Field(None, description="Who asks: the same user gets the same adapter.")
    event_time: datetime | None = pydantic.Field(
        None, description="When the inputs came into being (ISO 8601, UTC without an offset); default: now."
    )

    @pydantic.field_validator("event_time")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        if value is None or value.tzinfo is None:
            return value if value is None else value.replace(tzinfo=UTC)
        try:
            return value.astimezone(UTC)
        except OverflowError:
            raise ValueError("a time between the years 1 and 9999 in UTC") from None


class PredictResult(pydantic.BaseModel):
    """The answer to one input."""

    prediction_id: str = pydantic.Field(description="Name it in /feedback.")
    label: str
    confidence: float = pydantic.Field(description="Calibrated probability of the label.")
    probabilities: dict[str, float] = pydantic.Field(description="Probability of every label.")


class PredictResponse(pydantic.BaseModel):
    """Answers in the order of the inputs. Each is recorded before it is sent."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    status: Literal["ok"] = "ok"
    results: list[PredictResult]
    task: str
    model: str = pydantic.Field(description="`task@model_version`.")
    model_version: str
    release: str = pydantic.Field(description="The release that put the adapter in force.")
    adapter: str = pydantic.Field(description="Digest of the adapter.")
    trace_id: str
    latency_ms: float
    error_code: None = None


class FeedbackRequest(Request):
    """What a person says of an answer: the true label, or whether it was right."""

    prediction_id: Annotated[Text, pydantic.Field(min_length=1, max_length=64)]
    label: Annotated[Text, pydantic.Field(min_length=1, max_length=256)] | None = pydantic.Field(
        None, description="The true label, one of the task's."
    )
    rating: Literal[-1, 1] | None = pydantic.Field(None, description="1: the answer was right; -1: it was wrong.")
    author: Name = pydantic.Field("anonymous", description="Who says so.")

    @pydantic.model_validator(mode="after")
    def _something(self) -> "FeedbackRequest":
        if self.label is None and self.rating is None:
            raise ValueError("give a label or a rating")
        return self


class FeedbackResponse(pydantic.BaseModel):
    """What became of the feedback."""

    status: Literal["ok"] = "ok"
    prediction_id: str
    stored: bool = pydantic.Field(description="False: exactly this was known already.")
    trace_id: str
    error_code: None = None


class LiveShare(pydantic.BaseModel):
    """An adapter that answers a share of a task's traffic."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    adapter: str
    model_version: str
    release: str
    share: float


class TaskModels(pydantic.BaseModel):
    """The models of one task."""

    id: str = pydantic.Field(description="Full name of the task.")
    live: list[LiveShare]
    versions: list[str] = pydantic.Field(description="Model versions that may be asked for, oldest first.")


class ModelsResponse(pydantic.BaseModel):
    """Every released task."""

    status: Literal["ok"] = "ok"
    object: Literal["list"] = "list"
    data: list[TaskModels]
    error_code: None = None


class ErrorResponse(pydantic.BaseModel):
    """Why there is no answer, and what to do about it."""

    status: Literal["error"] = "error"
    error_code: ErrorCode
    message: str
    mend: str
    trace_id: str
    results: None = None


def explain(problems: Sequence[Mapping[str, Any]]) -> RequestError:
    """The one error that stands for the problems pydantic found; callers' values are not repeated in it."""
    first = problems[0]
    loc = first["loc"][1:] if first["loc"][:1] == ("body",) else first["loc"]
    where = ".".join(map(str, loc)) or "body"
    kind = first["type"]
    if kind == "json_invalid":
        return RequestError("invalid_request", "the body is not JSON", status=400, mend="Send a JSON object as UTF-8.")
    if where == "body" and kind != "value_error":
        return RequestError(
            "invalid_request",
            "the body is not a JSON object",
            status=422,
            mend="Send a JSON object with the header 'content-type: application/json'.",
        )
    if where.startswith("inputs") and kind in ("too_long", "string_too_long"):
        return RequestError(
            "input_too_large",
            f"field '{where[:100]}' is too long",
            status=413,
            mend=f"Send at most {MAX_INPUTS} inputs of at most {MAX_CHARS:,} characters.",
        )
    subject = "the body" if where == "body" else f"field '{where[:100]}'"
    what = str(first["msg"]).removeprefix("Value error, ")
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return RequestError(
        "invalid_request",
        f"{subject}: {what[:300]}{more}",
        status=422,
        mend="The protocol is described at /docs.",
    )
