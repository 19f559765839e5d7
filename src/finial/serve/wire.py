"""What a client may ask: the OpenAI API's requests as typed structs, checked before anything is computed.

A field that is not here is an error that names it; a value out of its limits is an error that names both.  Knows
nothing of models, tokens or HTTP.

    request = decode(ChatRequest, b'{"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}')
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from finial.errors import RequestError

MAX_BODY = 4 << 20  # bytes of a request
MAX_MESSAGES = 1024
MAX_PARTS = 256  # of one message's content
MAX_TOOLS = 128
MAX_PROMPTS = 256  # of one completion request
MAX_INPUTS = 2048  # of one embedding request, as at OpenAI
MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_BIAS = 1024  # entries of logit_bias
MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_NAME = 64

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, pattern=r"^[a-zA-Z0-9_.-]+$")]
Short = Annotated[str, Meta(max_length=512)]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[Token], Meta(min_length=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
JsonObject = dict[str, Any]


class InvalidRequest(RequestError):
    """A request that cannot be honoured, and the field that is why."""

    def __init__(self, what: str, fix: str = "", *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(what, fix)
        self.param = param
        self.code = code


class BusyError(RequestError):
    """The queue is full: later it will have room.  `retry_s` is when it is worth asking again."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__(f"{waiting} sequences are computed or wait, the queue is full", f"ask again in {retry_s} s")
        self.retry_s = retry_s


class UnavailableError(RequestError):
    """The model is loading, or the server is about to end."""


class _Strict(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


# --- messages ------------------------------------------------------------------------------------------------------


class TextPart(_Strict, kw_only=True):
    """A part of a message's content; text is the only kind that these models read."""

    type: Literal["text"]
    text: str


class FunctionCall(_Strict, kw_only=True):
    """What an assistant called; `arguments` is JSON."""

    name: Name
    arguments: str


class ToolCallIn(_Strict, kw_only=True):
    """A call in the history of a conversation."""

    id: Short
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(_Strict, kw_only=True):
    """One turn.  `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_PARTS)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCallIn], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Short | None = None
    name: Short | None = None
    refusal: None = None


class FunctionSpec(_Strict, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(_Strict, kw_only=True):
    """The only kind of tool is a function."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(_Strict, kw_only=True):
    """A function by name."""

    name: Name


class NamedTool(_Strict, kw_only=True):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


# --- the form of an answer -----------------------------------------------------------------------------------------


class JsonSchema(_Strict, kw_only=True):
    """A named schema, as OpenAI's structured outputs have it."""

    name: Name
    schema: JsonObject
    description: str | None = None
    strict: bool | None = None


class PlainFormat(_Strict, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(_Strict, tag_field="type", tag="json_object"):
    """Some JSON object."""


class JsonSchemaFormat(_Strict, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: JsonSchema


class RegexFormat(_Strict, tag_field="type", tag="regex"):
    """Text that a regular expression matches as a whole (beyond OpenAI's API)."""

    regex: Annotated[str, Meta(min_length=1, max_length=MAX_SCHEMA_BYTES)]


class GrammarFormat(_Strict, tag_field="type", tag="grammar"):
    """Text of a context-free grammar in llguidance's form of Lark (beyond OpenAI's API)."""

    grammar: Annotated[str, Meta(min_length=1, max_length=MAX_SCHEMA_BYTES)]


ResponseFormat = PlainFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat


class StreamOptions(_Strict, kw_only=True):
    """`include_usage`: one more chunk before the end, with the number of tokens; `continuous_usage_stats`: every chunk
    has it, so far (beyond OpenAI's API).
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


# --- requests ------------------------------------------------------------------------------------------------------


class Sampled(_Strict, kw_only=True):
    """What requests for text have in common.  None is the same as leaving a field out.

    Beyond OpenAI's API: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids.
    """

    model: Short | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIAS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: Annotated[list[Token], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    user: Short | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(Sampled, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None


class CompletionRequest(Sampled, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | Token | Tokens], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class EmbeddingRequest(_Strict, kw_only=True):
    """POST /v1/embeddings.  Beyond OpenAI's API: pooling."""

    input: str | Annotated[list[str | Token | Tokens], Meta(min_length=1)]
    model: Short | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    pooling: Literal["last", "mean"] | None = None
    user: Short | None = None


Request = TypeVar("Request", bound=ChatRequest | CompletionRequest | EmbeddingRequest)

_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*?)`")
_MISSING = re.compile(r"^Object missing required field `(.*?)`")


def decode(kind: type[Request], body: bytes) -> Request:
    """A request from JSON.

    Raises:
        InvalidRequest: not JSON, an unknown field, a wrong type, a value out of its limits; names the field.
    """
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _named(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(f"the body is not valid JSON: {what}", "send one JSON object in UTF-8") from None
    return checked(request)


def checked(request: Request) -> Request:
    """The request, after the limits that no type can say."""
    if isinstance(request, ChatRequest):
        _check_chat(request)
    if isinstance(request, Sampled):
        _check_sampled(request)
    return request


def texts(value: str | list[str | int | list[int]], param: str, limit: int) -> list[str | list[int]]:
    """A prompt or a list of prompts, each a text or token ids, as a list of such.

    Raises:
        InvalidRequest: a mixed list, or one over the limit.
    """
    if isinstance(value, str):
        return [value]
    if all(isinstance(part, int) for part in value):
        return [value]  # type: ignore[list-item]
    parts = [part for part in value if not isinstance(part, int)]
    if len(parts) != len(value):
        raise InvalidRequest(f"{param} mixes token ids and texts", "send a text, ids, or a list of those", param=param)
    if len(parts) > limit:
        raise InvalidRequest(f"{param} has {len(parts)} entries, at most {limit}", "send several requests", param=param)
    return parts


def _named(message: str) -> InvalidRequest:
    path = _PATH.search(message)
    at = path[1] if path else ""
    what = message[: path.start()] if path else message
    unknown, missing = _UNKNOWN.match(message), _MISSING.match(message)
    field = unknown or missing
    param = ".".join(filter(None, (at, field[1] if field else ""))) or None
    if unknown:
        return InvalidRequest(
            f"{param} is not supported", "leave it out; the server's API document lists every field", param=param
        )
    if missing:
        return InvalidRequest(f"{param} is missing", "send it", param=param)
    return InvalidRequest(f"{param}: {what}" if param else what, "send what the API describes", param=param)


def _check_chat(request: ChatRequest) -> None:
    for i, message in enumerate(request.messages):
        at = f"messages[{i}]"
        if message.content is None and not message.tool_calls and message.role != "assistant":
            raise InvalidRequest(f"{at}.content is missing", "send a text", param=f"{at}.content")
        if message.role != "assistant":
            for name in ("tool_calls", "reasoning_content"):
                if getattr(message, name) is not None:
                    raise InvalidRequest(f"{at}.{name} in a message of role {message.role}", param=f"{at}.{name}")
        if message.role != "tool":
            for name in ("tool_call_id", "name"):
                if getattr(message, name) is not None:
                    raise InvalidRequest(
                        f"{at}.{name} is not supported for role {message.role}", "leave it out", param=f"{at}.{name}"
                    )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs without logprobs", "send logprobs: true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens and max_completion_tokens", "send one of them", param="max_tokens")
    for i, tool in enumerate(request.tools or ()):
        _check_schema(tool.function.parameters, f"tools[{i}].function.parameters")
    for name in ("tool_choice", "parallel_tool_calls"):
        if getattr(request, name) not in (None, "none", "auto", True) and not request.tools:
            raise InvalidRequest(f"{name} without tools", "send tools", param=name)
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        if name not in {tool.function.name for tool in request.tools or ()}:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not among tools", param="tool_choice")


def _check_sampled(request: Sampled) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options without stream", "send stream: true", param="stream_options")
    for token in request.logit_bias or ():
        if not token.isascii() or not token.isdecimal() or len(token) > 10:
            raise InvalidRequest(f"logit_bias has the key {token!r:.40}", "use token ids", param="logit_bias")
    if isinstance(request.response_format, JsonSchemaFormat):
        _check_schema(request.response_format.json_schema.schema, "response_format.json_schema.schema")


def _check_schema(schema: JsonObject | None, param: str) -> None:
    if schema is None:
        return
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        below: list[Any] = []
        for value in level:
            below.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        level = below
        if not level:
            break
    if level:
        raise InvalidRequest(f"{param} is nested more than {MAX_SCHEMA_DEPTH} deep", "use a flatter one", param=param)
    size = len(msgspec.json.encode(schema))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"{param} has {size:,} bytes, at most {MAX_SCHEMA_BYTES:,}", "use a smaller one", param=param
        )
