"""The requests and answers of the server, as in its OpenAPI schema. Unknown fields are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 8
MAX_PARTS = 16  # the states of all are in memory at once
MAX_BIASES = 1024
MAX_TEXTS = 256
MOST_LIKELY = 20
CONTEXT = "context"  # name of a system message that is read as a context


def _whole(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can contain but which is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Unused = Annotated[Any, Field(exclude=True, description="accepted without effect")]
Idle = Annotated[Any, Field(exclude=True, description="accepted only with values that have no effect")]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]


def _only(*harmless: object, why: str) -> AfterValidator:
    """Accept values without effect, and refuse all others with the reason."""

    def checked(value: Any) -> Any:
        if value not in harmless:
            raise PydanticCustomError("not_supported", "{why}", {"why": why})
        return value

    return AfterValidator(checked)


def _form(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


Texts = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS), Tag("list")],
    Discriminator(_form),
]


def _may_be_null(schema: dict[str, Any]) -> None:
    """Say in the schema of a body that its optional fields may be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            kinds = {key: field.pop(key) for key in list(field) if key not in ("title", "description", "default")}
            several = kinds.get("anyOf", [kinds])
            field["anyOf"] = several if {"type": "null"} in several else [*several, {"type": "null"}]


class Request(BaseModel):
    """A request's body. A field that is null counts as missing, whether or not it is known here."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_may_be_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


# Contexts


class CreateContext(Request):
    """A new context, optionally with a label for people and a first text."""

    label: Text = Field("", max_length=200)
    text: Text | None = Field(None, description="read at once, like an append")


class AppendText(Request):
    """More of a context: a text or token ids."""

    text: Text | None = None
    tokens: list[Token] | None = None
    revision: int | None = Field(
        None, ge=0, description="refuse the append unless the context has this revision: for safe retries"
    )


class RenameContext(Request):
    """A new label."""

    label: Text = Field(max_length=200)


class ComposeContexts(Request):
    """A new context from several others."""

    label: Text = Field("", max_length=200)
    contexts: list[Text] = Field(min_length=1, max_length=MAX_PARTS, description="ids; an id given twice counts twice")


class ContextInfo(BaseModel):
    """What is known about a context."""

    id: str = Field(description="also the `model` of requests that use it")
    object: Literal["context"] = "context"
    label: str
    created: int = Field(description="seconds since 1970")
    revision: int = Field(description="number of appends")
    tokens_seen: int
    adapter_bytes: int = Field(description="size of its compact adapter in memory")


class ContextList(BaseModel):
    """The contexts of a user, the oldest first."""

    object: Literal["list"] = "list"
    data: list[ContextInfo]


class Deleted(BaseModel):
    """A context is gone."""

    id: str
    object: Literal["context"] = "context"
    deleted: bool = True


# The OpenAI interface


class ModelCard(BaseModel):
    """The base model, or a context as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gakernels"
    parent: str | None = None


class ModelList(BaseModel):
    """The models of a user."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class StreamOptions(Request):
    """How to stream."""

    include_usage: bool = Field(False, description="send the token counts in a last event")
    include_obfuscation: Unused = None


_NO_TOOLS = "this server has no tools: its answers are text; turn tools off in the client"


class SamplingRequest(Request):
    """The common fields of completions and chat completions."""

    model: Text = Field(min_length=1, max_length=200, description="the base model, or the id of a context")
    temperature: Number = Field(1.0, ge=0, le=100)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31, description="0 for all")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="of the first answer; each further answer adds 1")
    presence_penalty: Penalty = Field(
        0.0, description="subtracted once from the logit of each token in the answer so far"
    )
    frequency_penalty: Penalty = Field(
        0.0, description="subtracted once per occurrence of the token in the answer so far"
    )
    logit_bias: dict[Token, Annotated[Number, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MAX_BIASES, description="numbers added to logits, by token id"
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="the answer ends before any of these texts; they may contain special tokens"
    )
    stop_token_ids: list[Token] | None = Field(None, description="tokens that end the answer, besides the model's own")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, lt=2**31, description="number of answers per prompt")
    context: Texts | None = Field(
        None,
        exclude=True,
        description="texts that the model reads as a context, one after the other, unless it has read them before",
    )
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None

    def texts(self) -> list[str]:
        """The texts of a context that the request itself brings."""
        return [self.context] if isinstance(self.context, str) else list(self.context or ())

    @property
    def most_likely(self) -> int | None:
        """How many of the most likely tokens to return with each token of the answer; None for no log-probabilities."""
        raise NotImplementedError

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingRequest):
    """Continue prompts: texts or token ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: int = Field(16, ge=1, lt=2**31)
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LIKELY, description="log-probabilities of the tokens and of this many most likely ones"
    )
    echo: bool = Field(False, description="begin the text with the prompt")
    best_of: int | None = Field(None, ge=1, exclude=True, description="1, or as many as n")
    suffix: Annotated[Idle, _only("", why="this server continues text, and can't fill gaps")] = None

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise PydanticCustomError(
                "not_supported", "best_of must be 1 or n: this server returns every answer it generates"
            )
        return self

    @property
    def most_likely(self) -> int | None:
        """See `SamplingRequest`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


def _known_role(role: str) -> str:
    """Replace OpenAI's newer name for the system role, which is in no template."""
    return "system" if role == "developer" else role


def _text_only(kind: Any) -> Any:
    if kind != "text":
        raise PydanticCustomError("not_supported", "this server reads text only: a part must be of type 'text'")
    return kind


class TextPart(Request):
    """A part of a turn."""

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: Text


def _joined(content: str | list[TextPart]) -> str:
    """The text of a turn; its parts become lines, as in vLLM."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(_form),
    AfterValidator(_joined),
]


class Message(Request):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(_known_role)]
    content: Content
    name: Text | None = Field(
        None, max_length=200, description="of the speaker, for the template; a system message 'context' is a context"
    )
    tool_calls: Annotated[Idle, _only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Idle, _only(why=_NO_TOOLS)] = None
    annotations: Unused = None

    @property
    def is_context(self) -> bool:
        """Whether it is a context to be read, and no turn."""
        return self.role == "system" and self.name == CONTEXT


def _some_turn(messages: list[Message]) -> list[Message]:
    if all(message.is_context for message in messages):
        raise PydanticCustomError("no_turn", "there must be a message that is not a context")
    return messages


class ChatRequest(SamplingRequest):
    """Continue a conversation."""

    messages: Annotated[list[Message], Field(min_length=1), AfterValidator(_some_turn)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = Field(False, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY, description="and of this many most likely ones")
    reasoning_effort: Unused = None
    verbosity: Unused = None
    prediction: Unused = None
    parallel_tool_calls: Unused = None
    tools: Annotated[Idle, _only([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Idle, _only("none", "auto", why=_NO_TOOLS)] = None
    functions: Annotated[Idle, _only([], why=_NO_TOOLS)] = None
    function_call: Annotated[Idle, _only("none", "auto", why=_NO_TOOLS)] = None
    response_format: Annotated[Idle, _only({"type": "text"}, why="answers are free text: the type must be 'text'")] = (
        None
    )
    modalities: Annotated[Idle, _only([], ["text"], why="this server's answers are text")] = None
    audio: Annotated[Idle, _only(why="this server's answers are text")] = None
    moderation: Annotated[Idle, _only(why="this server has no moderation")] = None
    web_search_options: Annotated[Idle, _only(why="this server has no web search")] = None

    @model_validator(mode="after")
    def _contexts_apart(self) -> ChatRequest:
        """Move the messages that are contexts behind the request's own context."""
        texts = [message.content for message in self.messages if message.is_context]
        if texts:
            self.context = [*self.texts(), *map(str, texts)]
            self.messages = [message for message in self.messages if not message.is_context]
        return self

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("missing", "top_logprobs needs logprobs to be true")
        return self

    @property
    def most_likely(self) -> int | None:
        """See `SamplingRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Usage(BaseModel):
    """Token counts. A prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class UsageWithContext(Usage):
    """The same for a request that brought a context, whose tokens are not part of the total."""

    context_tokens: int = Field(description="tokens of the context")
    context_cached: bool = Field(description="whether the context was cached and not read")


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of the tokens of a text, under the model's own distribution."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(description="where each token begins in the text of all tokens")


class CompletionChoice(BaseModel):
    """A continuation, or a piece of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """The answer to a completion request, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: SerializeAsAny[Usage] | None = None


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="its UTF-8 bytes; null if it is only a part of a character")


class ChatLogprob(TopLogprob):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a turn, under the model's own distribution."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """A whole turn."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: SerializeAsAny[Usage]


class ChatChunkChoice(BaseModel):
    """A piece of a turn."""

    index: int
    delta: dict[str, Any]
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(BaseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: SerializeAsAny[Usage] | None = None


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok"] = "ok"
    model: str
    contexts: int
    damaged_contexts: int = Field(description="files that could not be read at startup and were left alone")
