"""What a client gets: the OpenAI API's replies and stream chunks as typed structs.

None is written as null, UNSET is left out.  Knows nothing of models, tokens or HTTP.

    msgspec.json.encode(ChatChunk(id=…, created=…, model=…, choices=[ChatDelta(0, Delta(content="Hi"))]))
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(Struct):
    """How much of the prompt was found in the cache."""

    cached_tokens: int = 0


class Usage(Struct):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | UnsetType = UNSET


class ErrorBody(Struct):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(Struct):
    """Every reply that is not a success."""

    error: ErrorBody


# --- log-probabilities ---------------------------------------------------------------------------------------------


class TopLogprob(Struct):
    """One of the likeliest tokens of a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    """The token that was chosen, and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """One entry per token."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    """Lists of equal length, one entry per token; None where nothing predicts a token, the first of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


# --- chat ----------------------------------------------------------------------------------------------------------


class CalledFunction(Struct):
    """`arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A function that the model wants called."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ToolCallDelta(Struct):
    """The same in a stream: one chunk for each call, complete."""

    index: int
    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class AssistantMessage(Struct):
    """The answer."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer of `n`."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatReply(Struct, tag_field="object", tag="chat.completion"):
    """Reply of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Struct):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatDelta(Struct):
    """A chunk's part of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | UnsetType | None = UNSET
    finish_reason: FinishReason | None = None


class ChatChunk(Struct, tag_field="object", tag="chat.completion.chunk"):
    """One event of a stream; `usage` only when asked for, null before the last one."""

    id: str
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | UnsetType | None = UNSET


# --- completions ---------------------------------------------------------------------------------------------------


class TextChoice(Struct):
    """One continuation; in a stream, what a chunk adds to it."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None


class TextReply(Struct, tag_field="object", tag="text_completion"):
    """Reply of /v1/completions, and one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


# --- embeddings, models --------------------------------------------------------------------------------------------


class Embedding(Struct, tag_field="object", tag="embedding"):
    """A vector of length 1, as numbers or as base64 of little-endian float32."""

    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct):
    """Tokens of an embedding request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Struct, tag_field="object", tag="list"):
    """Reply of /v1/embeddings."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Facts(Struct):
    """How a model is run, and what its speed is to be compared with; beyond OpenAI's API.

    `step_bytes` are what a step must read before any cache, `kv_bytes_per_token` what it reads more for each cached
    position; `read_gb_s` was measured when the server started (1e9 bytes per second), null where it is unknown.
    """

    format: str
    backend: str
    thinking: bool
    step_bytes: int
    kv_bytes_per_token: int
    read_gb_s: float | None


class Model(Struct, tag_field="object", tag="model"):
    """A model that is served."""

    id: str
    created: int
    owned_by: str
    max_context: int
    finial: Facts | UnsetType = UNSET


class ModelList(Struct, tag_field="object", tag="list"):
    """Reply of /v1/models."""

    data: list[Model]


class Health(Struct):
    """Reply of /health and /ready."""

    status: Literal["ok", "loading", "draining", "failed"]


Chunk = ChatChunk | TextReply
Reply = ChatReply | TextReply
