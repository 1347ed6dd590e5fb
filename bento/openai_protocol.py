"""OpenAI's protocol as far as it is supported: what its clients send, and what they are answered.

A parameter that would change the answer but is not supported is refused; one that clients send by habit, or with a
value that changes nothing, is taken. Source of the forms: https://platform.openai.com/docs/api-reference
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic_core import PydanticCustomError

from bento.protocol import MAX_CHARS, MAX_INPUTS, MAX_TOKENS, Input, Name, Parameters, Request, Stop, Text
from bento.texts import Turn


def _only(*values: Any) -> Any:
    """Refuses every value but these and none at all."""

    def check(value: Any) -> Any:  # 0 and False are equal in Python, and not in JSON
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            return value
        raise PydanticCustomError("unsupported_parameter", "it is not supported")

    return pydantic.AfterValidator(check)


def _listed(*values: Any) -> Any:
    return pydantic.WithJsonSchema({"enum": [None, *values]})


Nothing = Annotated[Any, _only([], {}), _listed([], {})]
One = Annotated[Any, _only(1), _listed(1)]
Zero = Annotated[Any, _only(0), _listed(0)]
No = Annotated[Any, _only(False), _listed(False)]
Seed = Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)]
Tokens = Annotated[int, pydantic.Field(ge=1, le=MAX_TOKENS)]


class Common(Request):
    """What every request has."""

    model: Annotated[Text, pydantic.Field(min_length=1, max_length=161)] = pydantic.Field(
        description="Full name of a released task: its route decides. Or `task@model_version`.",
        examples=["support-answers", "support-answers@2"],
    )
    user: Name | None = pydantic.Field(None, description="Who asks: the same user gets the same adapter.")

    @property
    def task(self) -> str:
        return self.model.rpartition("@")[0] or self.model

    @property
    def model_version(self) -> str | None:
        task, _, version = self.model.rpartition("@")
        return version if task else None


class StreamOptions(Request):
    """What a stream holds beside the text."""

    include_usage: bool | None = pydantic.Field(None, description="One more event before the end, with the tokens.")
    include_obfuscation: No = None


class Generating(Common):
    """What chats and completions have in common."""

    max_tokens: Tokens | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = pydantic.Field(
        None, description="Default 0, as the adapter was evaluated: always the most probable token."
    )
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    seed: Seed | None = pydantic.Field(None, description="The same seed, input and adapter give the same text.")
    stop: Stop | Annotated[list[Stop], pydantic.Field(max_length=4)] | None = None
    stream: bool | None = pydantic.Field(None, description="Server-sent events, one for each new piece of text.")
    stream_options: StreamOptions | None = None
    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None
    metadata: dict[str, Any] | None = pydantic.Field(None, description="Not used.")
    service_tier: str | None = pydantic.Field(None, description="Not used.")
    safety_identifier: str | None = pydantic.Field(None, description="Not used.")
    prompt_cache_key: str | None = pydantic.Field(None, description="Not used.")

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def parameters(self) -> Parameters:
        """The same in the platform's own form."""
        return Parameters(
            max_tokens=self.most_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) else list(self.stop or []),
        )

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @pydantic.model_validator(mode="after")
    def _options_of_a_stream(self) -> "Generating":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self


class TextPart(Request):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Input


class ChatMessage(Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Input | Annotated[list[TextPart], pydantic.Field(min_length=1, max_length=MAX_INPUTS)]
    name: Nothing = None
    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    tool_calls: Nothing = None
    function_call: Nothing = None

    @property
    def turn(self) -> Turn:
        """The message as the engine reads it."""
        role = "system" if self.role == "developer" else self.role
        return Turn(role, self.content if isinstance(self.content, str) else "".join(one.text for one in self.content))


class JsonSchema(Request):
    """A schema that the answer fits."""

    name: Annotated[Text, pydantic.Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] = pydantic.Field(alias="schema")
    strict: bool | None = None


class PlainFormat(Request):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Request):
    """JSON of a given schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(Generating):
    """A conversation to continue."""

    messages: list[ChatMessage] = pydantic.Field(
        min_length=1,
        max_length=MAX_INPUTS,
        description="Ends with what the user says. An extraction task takes one message of the user: the document.",
    )
    max_completion_tokens: Tokens | None = pydantic.Field(None, description="The newer name of max_tokens.")
    response_format: Annotated[PlainFormat | SchemaFormat, pydantic.Discriminator("type")] | None = None
    logprobs: No = None
    top_logprobs: Zero = None
    tools: Nothing = None
    functions: Nothing = None
    tool_choice: Annotated[Any, _only("none", "auto"), _listed("none", "auto")] = None
    parallel_tool_calls: bool | None = pydantic.Field(None, description="Not used: there are no tools.")
    modalities: Annotated[Any, _only(["text"]), _listed(["text"])] = None
    store: bool | None = pydantic.Field(None, description="Not used: every answer is recorded.")

    @pydantic.model_validator(mode="after")
    def _one_bound(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        if isinstance(self.response_format, SchemaFormat):
            return self.response_format.json_schema.schema_
        wanted = self.response_format is not None and self.response_format.type == "json_object"
        return {"type": "object"} if wanted else None


class CompletionRequest(Generating):
    """A text to continue as it is, without a chat template."""

    prompt: Input | Annotated[list[Input], pydantic.Field(min_length=1, max_length=MAX_INPUTS)]
    best_of: One = None
    echo: No = None
    suffix: Annotated[Any, _only(""), _listed("")] = None
    logprobs: Nothing = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @pydantic.model_validator(mode="after")
    def _one_stream(self) -> "CompletionRequest":
        if self.stream and len(self.prompts) > 1:
            raise ValueError("a stream has one prompt")
        return self


class EmbeddingRequest(Common):
    """Texts to embed."""

    input: Input | Annotated[list[Input], pydantic.Field(min_length=1, max_length=MAX_INPUTS)] = pydantic.Field(
        description=f"Texts of up to {MAX_CHARS:,} characters; token numbers are not taken."
    )
    encoding_format: Literal["float", "base64"] | None = pydantic.Field(
        None, description="base64: of the bytes of little-endian float32."
    )
    dimensions: Nothing = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


class Usage(pydantic.BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Origin(pydantic.BaseModel):
    """Beyond OpenAI's form: what answered."""

    release: str = pydantic.Field(description="The release that put the adapter in force.")
    adapter: str = pydantic.Field(description="Digest of the adapter.")
    trace_id: str


class AnswerMessage(pydantic.BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(pydantic.BaseModel):
    """The answer to a conversation."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Origin):
    """The answer to a chat. It is recorded before it is sent."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = pydantic.Field(description="`task@model_version`.")
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str = pydantic.Field(description="Start of the adapter's digest.")
    prediction_id: str = pydantic.Field(description="Name it in /feedback.")


class CompletionChoice(pydantic.BaseModel):
    """The continuation of one prompt."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    prediction_id: str = pydantic.Field(description="Name it in /feedback.")


class CompletionResponse(Origin):
    """Continued texts. They are recorded before they are sent."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Embedding(pydantic.BaseModel):
    """The embedding of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = pydantic.Field(description="Of length 1; base64 where that was asked for.")


class EmbeddingUsage(pydantic.BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Origin):
    """Embeddings in the order of the texts. They are no predictions, and are not recorded."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
