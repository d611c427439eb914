"""The requests and answers of the server, as in its OpenAPI schema. Unknown fields are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 8
MAX_PARTS = 16  # the states of all are in memory at once


def _whole(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can contain but which is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]
Number = Annotated[float, Field(allow_inf_nan=False)]


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
    text: Text | None = Field(None, description="read at once, as an append would")


class AppendText(Request):
    """More of a context: a text or token ids."""

    text: Text | None = None
    tokens: list[Token] | None = None
    revision: int | None = Field(
        None, ge=0, description="refuse the append if the context is not of this revision: for a retry without harm"
    )


class RenameContext(Request):
    """Another label."""

    label: Text = Field(max_length=200)


class ComposeContexts(Request):
    """A new context from several others."""

    label: Text = Field("", max_length=200)
    contexts: list[Text] = Field(
        min_length=1, max_length=MAX_PARTS, description="ids; one that is given twice counts twice"
    )


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

    include_usage: bool = Field(False, description="send the numbers of tokens in a last event")


class SamplingRequest(Request):
    """The common fields of completions and chat completions."""

    model: Text = Field(min_length=1, max_length=200, description="the base model, or the id of a context")
    temperature: Number = Field(1.0, ge=0, le=100)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31, description="0 for all")
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="texts in front of which the answer ends; special tokens may be part of them"
    )
    stop_token_ids: list[Token] | None = Field(None, description="tokens that end the answer, besides the model's own")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: Text | None = Field(None, max_length=200, description="not used")

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
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

    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        return [tokens] if tokens else [item for item in self.prompt if not isinstance(item, int)]


def _known_role(role: str) -> str:
    """Replace OpenAI's newer name for the system role, which is in no template."""
    return "system" if role == "developer" else role


class TextPart(Request):
    """A part of a turn."""

    type: Literal["text"]
    text: Text


def _joined(content: str | list[TextPart]) -> str:
    """The text of a turn; its parts become lines, as in vLLM."""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Message(Request):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], AfterValidator(_known_role)]
    content: Annotated[Text | Annotated[list[TextPart], Field(min_length=1)], AfterValidator(_joined)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_lists(cls, given: Any) -> Any:
        """Accept a turn that is sent back unchanged, with empty lists of tool calls or annotations."""
        return {name: value for name, value in given.items() if value != []} if isinstance(given, dict) else given


class ChatRequest(SamplingRequest):
    """Continue a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        """The usage with its total."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """A continuation, or a piece of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: None = None


class Completion(BaseModel):
    """The answer to a completion request, or an event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """A whole turn."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason | None
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """A piece of a turn."""

    index: int
    delta: dict[str, Any]
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok"] = "ok"
    model: str
    contexts: int
    damaged_contexts: int = Field(description="files that could not be read at the start, and were left alone")
