"""Chat templates: the Jinja programs that come with a model, run as the untrusted code that they are.

A template turns a list of messages into the text a model was trained on.  It runs in `sandbox`, under limits on time
and output.  Output equals transformers' `apply_chat_template` on the same template.  Knows nothing of tokens: the text
still has to be encoded (without adding special tokens again).

    ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render([{"role": "user", "content": "Hi"}])
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from finial.errors import FileError, RequestError
from finial.files.sandbox import Budget, LimitError, RefusedError, Sandbox, current_budget

MAX_SOURCE = 1 << 17  # characters of template: published ones stay under 40 thousand, compiling this takes a second
MAX_TEXT = 4 << 20  # characters of output, and of any string made on the way
MAX_SECONDS = 2.0
MAX_DEPTH = 64  # nesting of messages and tools


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of JSON types only, so that the template meets no other object; names what is not."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{where} has the key {key!r}, expected a string")
        return {key: _plain(part, f"{where}[{key!r}]", depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
    raise RequestError(f"{where} is of type {type(value).__name__}, expected what JSON can hold")


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain dicts; a `RequestError` names the first thing that no chat API allows."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages is of type {type(messages).__name__}, expected a list",
            fix='pass a list such as [{"role": "user", "content": "Hi"}]',
        )
    if not messages:
        raise RequestError("messages is empty", fix='pass a list such as [{"role": "user", "content": "Hi"}]')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{i}] is of type {type(message).__name__}, expected a dict with a role")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"messages[{i}]['role'] is {role!r}, expected 'system', 'user', 'assistant' or 'tool'")
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls") and role != "assistant":
                raise RequestError(f"messages[{i}] has no content", fix="give it a 'content' string")
        elif isinstance(content, (list, tuple)):
            for j, part in enumerate(content):
                if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                    raise RequestError(f"messages[{i}]['content'][{j}] is no dict with a 'type'")
        elif not isinstance(content, str):
            raise RequestError(
                f"messages[{i}]['content'] is of type {type(content).__name__}, expected a string or a list of parts"
            )
    plain: list[dict[str, Any]] = _plain(messages, "messages")
    return plain


class ChatTemplate:
    """One model's chat template, or its several by name ("default", "tool_use", …).

    Args:
        source: the template's text, or texts by name.
        variables: special tokens the template may print (`bos_token`, `eos_token`, …).
        origin: where it came from, for error messages.
        max_seconds, max_text: limits of one rendering.

    Compiled at the first rendering: a damaged template does not keep a model from being used without it.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        variables: Mapping[str, Any] | None = None,
        origin: str = "chat template",
        *,
        max_seconds: float = MAX_SECONDS,
        max_text: int = MAX_TEXT,
    ) -> None:
        self.sources = {"default": source} if isinstance(source, str) else dict(source)
        for name, text in self.sources.items():
            if not isinstance(text, str):
                raise FileError(f"{origin}: the template {name!r} is of type {type(text).__name__}, expected text")
            if len(text) > MAX_SOURCE:
                raise FileError(f"{origin}: the template {name!r} has {len(text):,} characters, limit {MAX_SOURCE:,}")
        self.variables = dict(variables or {})
        self.origin = origin
        self.max_seconds = max_seconds
        self.max_text = max_text
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        **options: Any,
    ) -> str:
        """The text of a conversation, ready for `Text.encode(…, add_special=False)`.

        Args:
            messages: dicts with role and content.
            tools: JSON schemas of functions; a template named "tool_use" is preferred when there are any.
            add_generation_prompt: end with the opening of the assistant's answer.
            template: the name of the template to use, when there are several.
            options: further variables of the template (`enable_thinking=False`, `documents=[…]`).

        Raises:
            RequestError: messages, tools or options do not fit, or the template refuses them.
            FileError: the template is damaged, breaks out of the sandbox, or hits a limit.
        """
        plain_tools = None
        if tools is not None:
            plain_tools = _plain(tools, "tools")
            if not isinstance(plain_tools, list) or not all(isinstance(tool, dict) for tool in plain_tools):
                raise RequestError("tools is no list of JSON schemas", fix="pass a list of dicts")
        values = {
            **self.variables,
            "documents": None,
            **{name: _plain(value, name) for name, value in options.items()},
            "messages": check_messages(messages),
            "tools": plain_tools,
            "add_generation_prompt": bool(add_generation_prompt),
        }
        name = self._choose(template, bool(tools))
        compiled = self._compile(name)
        budget = Budget(self.max_seconds, self.max_text)
        token = current_budget.set(budget)
        pieces: list[str] = []
        size = 0
        try:
            for piece in compiled.generate(values):
                size += len(piece)
                if size > self.max_text:
                    raise LimitError(f"its output is over {self.max_text:,} characters")
                budget.tick()
                pieces.append(piece)
        except RefusedError as error:
            raise RequestError(f"{self.origin}: the template refuses these messages: {error.message}") from None
        except (LimitError, SecurityError, RecursionError, MemoryError) as error:
            what = "it calls itself too deeply" if isinstance(error, RecursionError) else str(error) or "out of memory"
            raise FileError(f"{self._at(name, error)}: {what}", fix="use another chat template") from None
        except Exception as error:  # whatever template code can raise: it is a program of somebody else
            raise RequestError(
                f"{self._at(name, error)}: {type(error).__name__}: {error}",
                fix="compare the messages with what the template expects",
            ) from None
        finally:
            current_budget.reset(token)
        return "".join(pieces)

    def _choose(self, name: str | None, with_tools: bool) -> str:
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise RequestError(
                f"{self.origin}: no chat template named {name!r}", fix=f"choose one of {sorted(self.sources)}"
            )
        return name

    def _compile(self, name: str) -> jinja2.Template:
        compiled = self._compiled.get(name)
        if compiled is None:
            try:
                compiled = _environment().from_string(self.sources[name])
            except TemplateSyntaxError as error:
                raise FileError(
                    f"{self.origin}: line {error.lineno} of the chat template {name!r}: {error.message}",
                    fix="repair the template, or use the model without chat",
                ) from None
            except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
                raise FileError(
                    f"{self.origin}: the chat template {name!r} cannot be compiled: {type(error).__name__}",
                    fix="use another chat template",
                ) from None
            self._compiled[name] = compiled
        return compiled

    def _at(self, name: str, error: BaseException) -> str:
        line = _template_line(error.__traceback__)
        return f"{self.origin}: {f'line {line} of ' if line else ''}the chat template {name!r}"


@functools.cache
def _environment() -> Sandbox:
    return Sandbox()


def _template_line(traceback: TracebackType | None) -> int | None:
    """The last line of the template on the way to an error; jinja rewrites its frames to the template's own lines."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
