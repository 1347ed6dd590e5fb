"""The HTTP protocol: what requests and answers look like, and the names of errors."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import pydantic

from ft_resources.errors import RequestError

MAX_INPUTS = 256
MAX_CHARS = 100_000
MAX_PASSAGES = 64
MAX_NAME = 128
MAX_TOKENS = 32_768
DEFAULT_TOKENS = 256
TAGS = ("<text>", "<conversation>")
"""Forms of an input; pydantic puts them into the place of a problem."""
PLACES = ("body", "query", "path", "header")
"""Where a field may stand; FastAPI puts them first into the place of a problem."""
LEAVE_OUT = "Leave it out; what is supported is described at /docs."

ErrorCode = Literal[
    "invalid_request",
    "unknown_task",
    "unknown_version",
    "input_too_large",
    "unknown_prediction",
    "unknown_label",
    "wrong_task_type",
    "unsupported_parameter",
    "invalid_input",
    "overloaded",
    "log_unavailable",
    "unauthorized",
    "forbidden",
    "rate_limited",
    "content_filtered",
    "deadline_exceeded",
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


def in_utc(value: datetime) -> datetime:
    """`value` in UTC; without an offset it is taken to be that.

    Raises:
        ValueError: There is no such time in UTC.
    """
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time between the years 1 and 9999 in UTC") from None


Text = Annotated[str, pydantic.AfterValidator(storable)]
Name = Annotated[Text, pydantic.Field(min_length=1, max_length=MAX_NAME)]
Input = Annotated[
    Text,
    pydantic.AfterValidator(not_blank),
    pydantic.Field(min_length=1, max_length=MAX_CHARS, json_schema_extra={"pattern": r"\S"}),
]
Stop = Annotated[Text, pydantic.Field(min_length=1, max_length=64)]


TIME: pydantic.TypeAdapter[datetime] = pydantic.TypeAdapter(Annotated[datetime, pydantic.Field(strict=False)])


class Request(pydantic.BaseModel):
    """What a caller writes: unknown fields are refused, nothing is converted silently."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Message(Request):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Input


Conversation = Annotated[list[Message], pydantic.Field(min_length=1, max_length=MAX_INPUTS)]
AnyInput = Annotated[
    Annotated[Input, pydantic.Tag(TAGS[0])] | Annotated[Conversation, pydantic.Tag(TAGS[1])],
    pydantic.Discriminator(lambda value: TAGS[isinstance(value, list)]),
]


class Parameters(Request):
    """How a text is generated."""

    max_tokens: Annotated[int, pydantic.Field(ge=1, le=MAX_TOKENS)] | None = pydantic.Field(
        None, description=f"Most tokens of an answer; default {DEFAULT_TOKENS}."
    )
    temperature: float = pydantic.Field(0.0, ge=0, le=2, description="0: always the most probable token.")
    top_p: float = pydantic.Field(1.0, gt=0, le=1, description="Draw from the fewest tokens that reach this share.")
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = pydantic.Field(
        None, description="The same seed, input and adapter give the same text."
    )
    stop: list[Stop] = pydantic.Field([], max_length=4, description="The text ends before the first of these.")


class PredictRequest(Request):
    """Inputs for one task."""

    task: Name = pydantic.Field(description="Full name of a released task.", examples=["mail-triage"])
    inputs: list[AnyInput] = pydantic.Field(
        min_length=1,
        max_length=MAX_INPUTS,
        description="Texts, each up to 100,000 characters. A text-generation task also takes conversations, which end "
        "with what the user says; a text alone is what the user says.",
    )
    model_version: Name | None = pydantic.Field(
        None,
        description="`champion` or nothing: the live route decides. Else a model version such as `3`, or at least "
        "8 hex digits of the digest of an adapter that was released for the task.",
    )
    user: Name | None = pydantic.Field(None, description="Who asks: the same user gets the same adapter.")
    context: Annotated[list[Input], pydantic.Field(min_length=1, max_length=MAX_PASSAGES)] | None = pydantic.Field(
        None,
        description="text-generation only: passages that the answers are to rest on, as a search of your own found "
        "them. They stand, numbered, before what the user says last, and are recorded with it.",
    )
    parameters: Parameters | None = pydantic.Field(None, description="text-generation and extraction only.")
    event_time: datetime | None = pydantic.Field(
        None, description="When the inputs came into being (ISO 8601, UTC without an offset); default: now."
    )

    @pydantic.field_validator("event_time", mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        return TIME.validate_python(value) if isinstance(value, str) else value

    @pydantic.field_validator("event_time")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        return None if value is None else in_utc(value)


class PredictResult(pydantic.BaseModel):
    """The label of one input."""

    prediction_id: str = pydantic.Field(description="Name it in /feedback.")
    label: str
    confidence: float = pydantic.Field(description="Calibrated probability of the label.")
    probabilities: dict[str, float] = pydantic.Field(description="Probability of every label.")
    decision: Literal["accept", "review"] = pydantic.Field(
        description="review: less confident than the task's `serving.review_below`; a person should look at it."
    )


class TextResult(pydantic.BaseModel):
    """The text that answers one input of a text-generation or extraction task."""

    prediction_id: str = pydantic.Field(description="Name it in /feedback.")
    text: str
    fields: dict[str, str | int | float | bool | None] | None = pydantic.Field(
        None, description="What was extracted; null for other tasks, and where the text does not hold every field."
    )
    confidence: float = pydantic.Field(description="Geometric mean of the tokens' probabilities; not calibrated.")
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class FailedResult(pydantic.BaseModel):
    """One input that could not be answered while others could."""

    status: Literal["error"] = "error"
    error_code: ErrorCode
    message: str
    mend: str


class PredictResponse(pydantic.BaseModel):
    """Answers in the order of the inputs. Each is recorded before it is sent.

    A malformed input refuses the request. One that only shows to be unanswerable while it is worked on fails alone: its
    result says so, and `status` is `partial`; when none can be answered, the first one's error answers the request.
    """

    model_config = pydantic.ConfigDict(protected_namespaces=())

    status: Literal["ok", "partial"] = "ok"
    results: list[PredictResult | TextResult | FailedResult]
    task: str
    model: str = pydantic.Field(description="`task@model_version`.")
    model_version: str
    release: str = pydantic.Field(description="The release that put the adapter in force.")
    adapter: str = pydantic.Field(description="Digest of the adapter.")
    base_model: str = pydantic.Field(description="What the adapter was trained on.")
    trace_id: str
    latency_ms: float
    error_code: None = None


class FeedbackRequest(Request):
    """What a person says of an answer: the true label or text, or whether it was right."""

    prediction_id: Annotated[Text, pydantic.Field(min_length=1, max_length=64)]
    label: Annotated[Text, pydantic.Field(min_length=1, max_length=256)] | None = pydantic.Field(
        None, description="The true label, one of the task's."
    )
    text: Input | None = pydantic.Field(
        None, description="What a text-generation or extraction task should have answered; of an extraction as JSON."
    )
    rating: Literal[-1, 1] | None = pydantic.Field(None, description="1: the answer was right; -1: it was wrong.")
    author: Name = pydantic.Field("anonymous", description="Who says so.")

    @pydantic.model_validator(mode="after")
    def _something(self) -> "FeedbackRequest":
        if self.label is None and self.text is None and self.rating is None:
            raise ValueError("give a label or a rating, or a text for a task that writes texts")
        return self


class FeedbackResponse(pydantic.BaseModel):
    """What became of the feedback."""

    status: Literal["ok"] = "ok"
    prediction_id: str
    stored: bool = pydantic.Field(description="False: exactly this was known already.")
    trace_id: str
    error_code: None = None


class ExplainRequest(Request):
    """A text whose label is to be explained."""

    task: Name = pydantic.Field(description="Full name of a released classification task.", examples=["mail-triage"])
    input: Input
    label: Name | None = pydantic.Field(None, description="Whose probability is explained; default: the label given.")
    model_version: Name | None = pydantic.Field(None, description="As in /predict.")


class Attribution(pydantic.BaseModel):
    """What a part of the text adds to the probability."""

    text: str
    start: int = pydantic.Field(description="First character in the input.")
    end: int = pydantic.Field(description="Character after the last.")
    weight: float = pydantic.Field(description="Negative: the part speaks against the label.")


class ExplainResponse(pydantic.BaseModel):
    """Shapley values of the parts of a text: `base` and all weights add up to `probability`."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    status: Literal["ok"] = "ok"
    task: str
    label: str
    probability: float = pydantic.Field(description="Of the label, for the whole text.")
    base: float = pydantic.Field(description="Of the label, for no text at all.")
    attributions: list[Attribution]
    evaluations: int = pydantic.Field(description="Texts that were scored for it.")
    model: str
    model_version: str
    release: str
    adapter: str
    trace_id: str
    latency_ms: float
    error_code: None = None


class LiveShare(pydantic.BaseModel):
    """An adapter that answers a share of a task's traffic."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    adapter: str
    model_version: str
    release: str
    share: float


class Model(pydantic.BaseModel):
    """The models of one task."""

    id: str = pydantic.Field(description="Full name of the task, or `task@model_version`.")
    object: Literal["model"] = "model"
    created: int = pydantic.Field(description="When the release was put in force, in seconds since 1970.")
    owned_by: str = pydantic.Field(description="The tenant of the task.")
    live: list[LiveShare]
    versions: list[str] = pydantic.Field(description="Model versions that may be asked for, oldest first.")


class ModelsResponse(pydantic.BaseModel):
    """Every released task."""

    status: Literal["ok"] = "ok"
    object: Literal["list"] = "list"
    data: list[Model]
    error_code: None = None


class OpenAIError(pydantic.BaseModel):
    """An error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(pydantic.BaseModel):
    """Why there is no answer, and what to do about it."""

    status: Literal["error"] = "error"
    error_code: ErrorCode
    message: str
    mend: str
    trace_id: str
    results: None = None
    error: OpenAIError | None = pydantic.Field(None, description="The same in OpenAI's form; at /v1/ only.")


def explain(problems: Sequence[Mapping[str, Any]], unknown: ErrorCode = "invalid_request") -> RequestError:
    """The one error that stands for the problems pydantic found; callers' values are not repeated in it.

    Args:
        unknown: Code of the error for a field that there is not.
    """
    first = problems[0]
    loc = [part for part in first["loc"] if part not in TAGS]
    loc = loc[1:] if loc[:1] and loc[0] in PLACES else loc
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
    if where.startswith(("inputs", "input", "prompt", "messages")) and kind in (
        "too_long",
        "string_too_long",
    ):
        return RequestError(
            "input_too_large",
            f"field '{where[:100]}' is too long",
            status=413,
            mend=f"Send at most {MAX_INPUTS} inputs of at most {MAX_CHARS:,} characters.",
            field=where[:100],
        )
    if kind == "unsupported_parameter":
        return RequestError(
            "unsupported_parameter", f"field '{where[:100]}': {first['msg']}", status=422, mend=LEAVE_OUT, field=where
        )
    subject = "the body" if where == "body" else f"field '{where[:100]}'"
    what = str(first["msg"]).removeprefix("Value error, ")
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return RequestError(
        unknown if kind == "extra_forbidden" else "invalid_request",
        f"{subject}: {what[:300]}{more}",
        status=422,
        mend="The protocol is described at /docs.",
        field="" if where == "body" else where[:100],
    )


CODES = {
    "unauthorized": "invalid_api_key",
    "unknown_task": "model_not_found",
    "unknown_version": "model_not_found",
    "input_too_large": "context_length_exceeded",
    "rate_limited": "rate_limit_exceeded",
    "content_filtered": "content_filter",
}
"""Names of errors that OpenAI's clients know; the others keep ours."""
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_content(error: RequestError, trace_id: str, path: str) -> tuple[dict[str, Any], int]:
    """Body and HTTP status of a refused request; below /v1/ also in OpenAI's form, with the statuses it uses."""
    what, mend = _printable(error.what), _printable(error.mend)
    answer = ErrorResponse(error_code=error.error_code, message=what, mend=mend, trace_id=trace_id)
    if not path.startswith("/v1/"):
        return answer.model_dump(exclude={"error"}), error.status
    status = 400 if error.status in (413, 422) else error.status
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    answer.error = OpenAIError(
        message=f"{what}. {mend}" if mend else what,
        type=kind,
        param=_printable(error.field) or None,
        code=CODES.get(error.error_code, error.error_code),
    )
    return answer.model_dump(), status


def _printable(text: str) -> str:
    """`text` without what UTF-8 cannot carry: callers' own words stand in it."""
    return text.encode("utf-8", "replace").decode()
