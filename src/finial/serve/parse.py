"""A model's text, as it comes, in its parts: reasoning, answer, calls of tools.

Knows the marks that models put around them; nothing of tokens or requests.

    parser = OutputParser(reasoning=True, tools="tagged")
    for part in parser.push("<think>hm</think>Hello"): part.kind, part.text

What does not follow its form (a call that is no JSON, a tag that never closes) is handed out as it was written.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"

ToolStyle = Literal["tagged", "bare"]


class Part(NamedTuple):
    """A piece of reasoning, of the answer, or a whole call: then `text` is its arguments as JSON."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    name: str = ""


def tool_style(template: str) -> ToolStyle | None:
    """How a model with this chat template writes calls; None: its template knows no tools.

    "tagged": JSON between <tool_call> and </tool_call> (Qwen).  "bare": the answer itself is JSON with `name` and
    `parameters` (Llama 3).
    """
    if "tools" not in template:
        return None
    if CALL in template:
        return "tagged"
    return "bare" if "parameters" in template else None


class OutputParser:
    """Parts out of pieces of text.

    Args:
        reasoning: what stands between <think> and </think> at the beginning is reasoning.
        thinking: the prompt has opened the reasoning already.
        tools: the style of calls; None: none are looked for.
    """

    def __init__(self, *, reasoning: bool = False, thinking: bool = False, tools: ToolStyle | None = None) -> None:
        self._tools = tools
        self._held = ""
        self._state = "think" if thinking else "start" if reasoning else "answer"
        self._fresh = True  # nothing but white space has come in this state
        self._scan = _Braces()

    def push(self, text: str) -> list[Part]:
        """What has become certain with this text."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back."""
        held, self._held = self._held, ""
        if self._state == "call":
            held = CALL + held
        if not held or (self._fresh and not held.strip()):
            return []
        return [Part("reasoning" if self._state == "think" else "content", held)]

    def _advance(self, parts: list[Part]) -> bool:
        """One move; False when more text is needed."""
        if self._state == "start":
            bare = self._held.lstrip()
            if bare.startswith(THINK):
                self._enter("think", bare[len(THINK) :])
            elif THINK.startswith(bare):
                return False
            else:
                self._enter("answer", self._held, fresh=False)
            return True
        if self._state == "think":
            return self._until(THINK_END, "reasoning", "answer", parts)
        if self._state == "call":
            body, end, rest = self._held.partition(CALL_END)
            if not end:
                return False
            self._enter("answer", rest)
            self._call(body, CALL + body + CALL_END, parts)
            return True
        if self._tools == "tagged":
            return self._until(CALL, "content", "call", parts)
        if self._tools == "bare" and self._fresh:
            return self._bare(parts)
        self._emit("content", self._held, parts)
        self._held = ""
        return False

    def _until(self, mark: str, kind: Literal["reasoning", "content"], state: str, parts: list[Part]) -> bool:
        """Hand out text up to a mark; what might be the mark's beginning, or white space before it, waits."""
        before, found, rest = self._held.partition(mark)
        if found:
            self._emit(kind, before.rstrip(), parts)
            self._enter(state, rest)
            return True
        keep = len(before)
        for size in range(min(len(mark) - 1, len(before)), 0, -1):
            if before.endswith(mark[:size]):
                keep -= size
                break
        keep = len(before[:keep].rstrip())
        self._emit(kind, before[:keep], parts)
        self._held = before[keep:]
        return False

    def _bare(self, parts: list[Part]) -> bool:
        text = self._held.lstrip(" \t\r\n;")
        if not text:
            return False
        if not text.startswith("{"):
            self._fresh = False
            return True
        end = self._scan.end(text)
        if end is None:
            return False
        self._enter("answer", text[end:])
        if not self._call(text[:end], text[:end], parts):
            self._fresh = False
        return True

    def _call(self, body: str, written: str, parts: list[Part]) -> bool:
        call = _read_call(body)
        if call is None:
            self._emit("content", written, parts)
            return False
        parts.append(call)
        return True

    def _emit(self, kind: Literal["reasoning", "content"], text: str, parts: list[Part]) -> None:
        if self._fresh and self._state != "start":
            text = text.lstrip("\n")
        if text:
            self._fresh = False
            parts.append(Part(kind, text))

    def _enter(self, state: str, rest: str, fresh: bool = True) -> None:
        self._state = state
        self._held = rest
        self._fresh = fresh
        self._scan = _Braces()


class _Braces:
    """Finds where a JSON object ends, reading each character once however often it is asked."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._quoted = self._escaped = False

    def end(self, text: str) -> int | None:
        for i in range(self._at, len(text)):
            letter = text[i]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = letter == "\\"
                self._quoted = letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter == "{":
                self._depth += 1
            elif letter == "}":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        self._at = len(text)
        return None


def _read_call(body: str) -> Part | None:
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return Part("call", json.dumps(arguments, ensure_ascii=False), value["name"])
