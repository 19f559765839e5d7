"""Requests as the engine wants them: token ids, sampling, and how the text that comes back is to be read.

Runs chat templates and the tokenizer, so it takes time and belongs off the event loop.  Knows nothing of HTTP, queues
or threads.

    prepared = Preparer(llm).chat(request)
    prepared.prompts, prepared.params
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finial.engine.sampling import SamplingParams
from finial.errors import FileError, RequestError
from finial.llm import LLM
from finial.serve.constraint import Grammars, Guide, calls, json_schema, lark, regex
from finial.serve.parse import CALL, THINK, THINK_END, OutputParser, ToolStyle, tool_style
from finial.serve.wire import (
    MAX_INPUTS,
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GrammarFormat,
    InvalidRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    NamedTool,
    PlainFormat,
    RegexFormat,
    Sampled,
    Tool,
    texts,
)

TEMPLATE_OPTIONS = ("enable_thinking",)  # what a client may set in a template, unless the server says otherwise
MAX_TOKEN = 256  # characters: the longest tokens of published vocabularies, runs of spaces, have about half of that
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Prepared:
    """A request, ready for the engine.

    Attributes:
        prompts: token ids, each to be continued params[i].n times.
        params: of each prompt, with its seed.
        continues: the answer goes on where the prompt ends, inside a text.
        parser: makes the parser of one answer; None: text is text.
        calls: how many tools may be called; None: any number.
        guide: the form of each answer, to be copied; None: free.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    continues: bool
    parser: Callable[[], OutputParser] | None = None
    calls: int | None = None
    guide: Guide | None = None


class Preparer:
    """Reads requests for one model.

    Args:
        template_options: what clients may pass in chat_template_kwargs.
    """

    def __init__(self, llm: LLM, template_options: Iterable[str] = TEMPLATE_OPTIONS) -> None:
        self._llm = llm
        self._options = frozenset(template_options)
        text = llm.tokenizer if llm.info.tokenizer else None
        self._template = None if text is None else text.chat_template
        sources = "" if self._template is None else "\n".join(self._template.sources.values())
        self.tools: ToolStyle | None = tool_style(sources)
        self.reasoning = THINK in sources
        ends = (*llm.info.generation.eos_ids, *(text.eos_ids if text is not None else ()))
        self._grammars = None if text is None else Grammars(text, llm.info.config.vocab_size, ends)
        self.room = min(llm.info.max_context, llm.info.cache_tokens)  # positions of one sequence

    def chat(self, request: ChatRequest) -> Prepared:
        """A conversation through the model's template.

        Raises:
            InvalidRequest: what the model, its template or the server does not support, by field.
            RequestError: what the template or the engine refuses.
        """
        options = self._template_options(request.chat_template_kwargs)
        tools = self._tools(request)
        if self._template is None:
            raise InvalidRequest(
                f"{self._llm.info.model} has no chat template", "use /v1/completions", param="messages"
            )
        try:
            prompt = self._template.render([plain(message) for message in request.messages], tools, **options)
        except FileError as error:  # the template met a limit, or cannot be used at all
            raise InvalidRequest(error.what, "shorten the conversation", param="messages") from None
        ids = self._tokens(prompt, "messages", add_special=False)
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        params = self._params(request, len(ids), limit, "messages")
        if request.logprobs:
            params = replace(params, logprobs=request.top_logprobs or 0)
        thinking = self.reasoning and prompt.rstrip().endswith(THINK)
        style = self.tools if tools else None
        parser = None
        if self.reasoning or style is not None:

            def parser() -> OutputParser:
                return OutputParser(reasoning=self.reasoning, thinking=thinking, tools=style)

        limit_calls = 1 if request.parallel_tool_calls is False else None
        guide = self._form(request, prompt.rstrip().endswith(THINK))
        return Prepared([ids], [params], continues=False, parser=parser, calls=limit_calls, guide=guide)

    def completion(self, request: CompletionRequest) -> Prepared:
        """One prompt or many; raises as `chat`."""
        prompts = [self._encode(text, "prompt") for text in texts(request.prompt, "prompt", MAX_PROMPTS)]
        limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        params = []
        for ids in prompts:
            one = self._params(request, len(ids), limit, "prompt", clip=request.max_tokens is None)
            if request.logprobs is not None:
                one = replace(one, logprobs=request.logprobs)
                if request.echo:
                    one = replace(one, prompt_logprobs=request.logprobs)
            params.append(one)
        return Prepared(prompts, params, continues=True, guide=self._form(request, False))

    def embedding(self, request: EmbeddingRequest) -> list[list[int]]:
        """Token ids of each input; raises as `chat`."""
        prompts = [self._encode(text, "input") for text in texts(request.input, "input", MAX_INPUTS)]
        for ids in prompts:
            self._room(len(ids) - 1, "input")
        return prompts

    def _form(self, request: ChatRequest | CompletionRequest, thinking: bool) -> Guide | None:
        """The form that the answer must have.  When the prompt has opened the reasoning, it begins behind that."""
        after = THINK_END if thinking else None
        form = request.response_format
        tools = request.tools if isinstance(request, ChatRequest) and request.tool_choice != "none" else None
        grammar = None
        match form:
            case None | PlainFormat():
                pass
            case JsonObjectFormat():
                grammar = json_schema({"type": "object"})
            case JsonSchemaFormat():
                grammar = json_schema(form.json_schema.schema)
            case RegexFormat():
                grammar = regex(form.regex)
            case GrammarFormat():
                grammar = lark(form.grammar)
        if tools and isinstance(request, ChatRequest):
            guide = self._called(request, tools, grammar is not None, after)
            if guide is not None:
                return guide
        if grammar is None:
            return None
        return self._compile(grammar, "response_format", after=after)

    def _called(self, request: ChatRequest, tools: list[Tool], formed: bool, after: str | None) -> Guide | None:
        """The form of calls: when there must be some, or when there are some of a strict function."""
        assert self.tools is not None
        choice, many = request.tool_choice, request.parallel_tool_calls is not False
        named = choice.function.name if isinstance(choice, NamedTool) else None
        must = named is not None or choice == "required"
        strict = any(tool.function.strict for tool in tools)
        if formed and (must or strict):
            raise InvalidRequest(
                "response_format beside calls that have a form", "leave one out", param="response_format"
            )
        functions = [
            (tool.function.name, tool.function.parameters or {"type": "object"})
            for tool in tools
            if named in (None, tool.function.name)
        ]
        if must:
            grammar = calls(functions, self.tools, many=many and named is None, opened=False)
            return self._compile(grammar, "tools", after=after)
        if not strict:
            return None
        if self.tools != "tagged":
            raise InvalidRequest(
                "tools: strict is not supported with tool_choice auto for this model's way of calling",
                "leave strict out, or use tool_choice required",
                param="tools",
            )
        grammar = calls(functions, self.tools, many=False, opened=True)
        return self._compile(grammar, "tools", after=CALL, again=True)

    def _compile(self, grammar: str, param: str, *, after: str | None, again: bool = False) -> Guide:
        if self._grammars is None:
            raise InvalidRequest("the model has no tokenizer, so its answers have no form", param=param)
        try:
            return self._grammars.guide(grammar, after=after, again=again)
        except InvalidRequest as error:
            error.param = param
            raise

    def close(self) -> None:
        """End the threads."""
        if self._grammars is not None:
            self._grammars.close()

    def _encode(self, text: str | list[int], param: str) -> list[int]:
        ids = self._tokens(text, param) if isinstance(text, str) else text
        if not ids:
            raise InvalidRequest(f"{param} is empty: 0 tokens", "send some text", param=param)
        size = self._llm.info.config.vocab_size
        if max(ids) >= size:
            raise InvalidRequest(f"{param} holds token {max(ids)}, the vocabulary has {size}", param=param)
        return ids

    def _tokens(self, text: str, param: str, add_special: bool = True) -> list[int]:
        """A text as ids; one that is too long for certain is refused before that work."""
        if len(text) > self.room * MAX_TOKEN:
            raise InvalidRequest(
                f"{param} has {len(text):,} characters, this server's context is {self.room} tokens",
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return self._llm.tokenizer.encode(text, add_special=add_special)

    def _room(self, prompt: int, param: str) -> int:
        room = self.room - prompt
        if room < 1:
            raise InvalidRequest(
                f"{param} has {prompt} tokens, this server's context is {self.room} with the answer",
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return room

    def _params(
        self, request: Sampled, prompt: int, limit: int | None, param: str, clip: bool = False
    ) -> SamplingParams:
        room = self._room(prompt, param) if limit != 0 else self._room(prompt - 1, param)
        if limit is None or (clip and limit > room):
            limit = room
        if limit > room:
            raise InvalidRequest(
                f"{prompt} prompt tokens + {limit} new tokens are over this server's context of {self.room}",
                f"ask for {room} or fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        generation = self._llm.info.generation
        values: dict[str, Any] = {name: getattr(generation, name) for name in RECOMMENDED}
        values |= {
            name: getattr(request, name)
            for name in (*RECOMMENDED, "presence_penalty", "frequency_penalty", "n")
            if getattr(request, name) is not None
        }
        if values["temperature"] is None:
            values["temperature"] = 1.0  # the API's default
        return SamplingParams(
            **{name: value for name, value in values.items() if value is not None},
            max_tokens=limit,
            logit_bias={int(token): bias for token, bias in request.logit_bias.items()} if request.logit_bias else None,
            seed=secrets.randbits(64) if request.seed is None else request.seed & (2**64 - 1),
            stop=request.stop or (),
            stop_ids=request.stop_token_ids or (),
            ignore_eos=bool(request.ignore_eos),
        )

    def _template_options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        for name in given or ():
            if name not in self._options:
                allowed = ", ".join(sorted(self._options)) or "none"
                param = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{param} is not allowed", f"choose from: {allowed}", param=param)
        return dict(given or {})

    def _tools(self, request: ChatRequest) -> list[dict[str, Any]] | None:
        if not request.tools or request.tool_choice == "none":
            return None
        if self.tools is None:
            raise InvalidRequest(
                f"tools: the chat template of {self._llm.info.model} knows none", "leave them out", param="tools"
            )
        listed = []
        for tool in request.tools:
            function: dict[str, Any] = {"name": tool.function.name}
            if tool.function.description is not None:
                function["description"] = tool.function.description
            function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
            listed.append({"type": "function", "function": function})
        return listed


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates read it: text as one string, arguments of calls as objects."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    made: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    for name in ("reasoning_content", "tool_call_id", "name"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise RequestError(
            f"the arguments of a tool call are not JSON: {text!r:.80}", "send what the model sent"
        ) from None
    return value
