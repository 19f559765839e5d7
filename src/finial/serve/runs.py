"""A request on its way through the engine: its sequences, and what their pieces look like to the client.

Knows handles, pieces and the API's structs; nothing of queues or HTTP.  Made by `Service`.

    async for chunks in run.chunks(): send(chunks)
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from msgspec import UNSET

from finial.engine.handle import Handle, Piece
from finial.engine.sampling import TokenLogprobs
from finial.files.text import Text
from finial.serve.engine_thread import Watch
from finial.serve.parse import OutputParser, Part
from finial.serve.prompts import Prepared
from finial.serve.replies import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    Chunk,
    Delta,
    FinishReason,
    PromptDetails,
    Reply,
    TextChoice,
    TextLogprobs,
    TextReply,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)
from finial.serve.wire import ChatRequest, CompletionRequest, UnavailableError

if TYPE_CHECKING:
    from finial.serve.service import Service


class Run(ABC):
    """One request; leave it (`async with`) and what is unfinished is cancelled.

    Attributes:
        handles: one per text, in the order of the reply.
    """

    prefix = "cmpl"

    def __init__(
        self, service: Service, request: ChatRequest | CompletionRequest, prepared: Prepared, watch: Watch
    ) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = service.name
        self.handles: list[Handle] = []
        self.prepared = prepared
        self._service = service
        self._watch = watch
        self._text: Text | None = service.llm.tokenizer if service.llm.info.tokenizer else None
        self._stream = bool(request.stream)
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._usage_so_far = request.stream_options is not None and request.stream_options.continuous_usage_stats

    def submit(self, client: str) -> None:
        """Give all sequences to the engine."""
        thread = self._service.thread
        for ids, params in zip(self.prepared.prompts, self.prepared.params, strict=True):
            for sample in range(params.n):
                detokenizer = None if self._text is None else self._text.detokenizer(continues=self.prepared.continues)
                own = params
                if sample and not self._stream:  # a stream's first chunks each begin with their own
                    own = replace(params, prompt_logprobs=None)
                guide = self.prepared.guide
                self.handles.append(
                    thread.submit(
                        ids,
                        own,
                        watch=self._watch,
                        detokenizer=detokenizer,
                        sample=sample,
                        owner=client,
                        constraint=None if guide is None else guide.copy(),
                    )
                )

    def cancel(self) -> None:
        """End it; the pages of what was unfinished are back after the step that is running now."""
        for handle in self.handles:
            self._service.thread.cancel(handle)
        self._service.forget(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.cancel()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        firsts, at = [], 0
        for params in self.prepared.params:
            firsts.append(self.handles[at])
            at += params.n
        prompt = sum(len(ids) for ids in self.prepared.prompts)
        made = sum(len(handle.tokens) for handle in self.handles)
        cached = sum(handle.sequence.reused for handle in firsts)
        return Usage(prompt, made, prompt + made, PromptDetails(cached))

    def summary(self) -> dict[str, object]:
        """For a log: its name and its numbers, no text."""
        usage = self.usage
        first = min((t for h in self.handles if (t := h.timings.ttft_s) is not None), default=None)
        return {
            "id": self.id,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "ttft_ms": None if first is None else round(1000 * first, 1),
            "finish": [handle.finish_reason for handle in self.handles],
        }

    async def reply(self) -> Reply:
        """Everything at once; raises the error of a sequence that failed."""
        for handle in self.handles:
            while handle.finish_reason is None:
                await self._watch.wait()
            _check(handle)
        return self._reply()

    async def chunks(self) -> AsyncIterator[list[Chunk]]:
        """What is new, each time that something is; the usage at the end when it was asked for."""
        live = list(enumerate(self.handles))
        taken = [0] * len(live)
        usage = None if self._include_usage else UNSET
        while live:
            await self._watch.wait()
            chunks: list[Chunk] = []
            for index, handle in live:
                seen = taken[index]
                if len(handle.pieces) == seen:
                    continue
                pieces = handle.pieces[seen:]
                taken[index] = seen + len(pieces)
                if pieces[-1].finish_reason is not None:
                    _check(handle)
                chunk = self._chunk(index, pieces)
                if chunk is not None:
                    chunk.usage = self.usage if self._usage_so_far else usage
                    chunks.append(chunk)
            live = [
                (index, handle)
                for index, handle in live
                if handle.finish_reason is None or taken[index] < len(handle.pieces)
            ]
            if chunks:
                yield chunks
        if self._include_usage:
            yield [self._usage_chunk()]

    @abstractmethod
    def _reply(self) -> Reply:
        """The whole answer."""

    @abstractmethod
    def _chunk(self, index: int, pieces: list[Piece]) -> Chunk | None:
        """What a sequence's new pieces look like; None when they show nothing yet."""

    @abstractmethod
    def _usage_chunk(self) -> Chunk:
        """The last chunk, which only counts."""


class ChatRun(Run):
    """Answers to a conversation."""

    prefix = "chatcmpl"

    def __init__(self, service: Service, request: ChatRequest, prepared: Prepared, watch: Watch) -> None:
        super().__init__(service, request, prepared, watch)
        self._logprobs = bool(request.logprobs)
        self._answers: dict[int, _Answer] = {}

    def _reply(self) -> ChatReply:
        choices = []
        for index, handle in enumerate(self.handles):
            answer = _Answer(self.prepared)
            parts = answer.read(handle.pieces)
            calls = [
                ToolCall(_call_id(), CalledFunction(part.name, part.text)) for part in parts if part.kind == "call"
            ]
            content = "".join(part.text for part in parts if part.kind == "content")
            reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
            message = AssistantMessage(
                content=None if calls and not content else content,
                reasoning_content=reasoning or UNSET,
                tool_calls=calls or UNSET,
            )
            logprobs = ChatLogprobs(self._token_logprobs(handle.pieces)) if self._logprobs else None
            reason = answer.reason(handle.finish_reason)
            assert reason is not None
            choices.append(ChatChoice(index, message, reason, logprobs))
        return ChatReply(self.id, self.created, self.model, choices, self.usage)

    def _chunk(self, index: int, pieces: list[Piece]) -> ChatChunk | None:
        answer = self._answers.get(index)
        delta = Delta()
        if answer is None:
            answer = self._answers[index] = _Answer(self.prepared)
            delta.role = "assistant"
            delta.content = ""
        calls: list[ToolCallDelta] = []
        content, reasoning = "", ""
        first = answer.calls
        for part in answer.read(pieces):
            if part.kind == "content":
                content += part.text
            elif part.kind == "reasoning":
                reasoning += part.text
            else:
                calls.append(ToolCallDelta(first + len(calls), _call_id(), CalledFunction(part.name, part.text)))
        if calls:
            delta.tool_calls = calls
        if content:
            delta.content = content
        if reasoning:
            delta.reasoning_content = reasoning
        reason = answer.reason(pieces[-1].finish_reason)
        logprobs = ChatLogprobs(self._token_logprobs(pieces)) if self._logprobs else UNSET
        if reason is None and logprobs is UNSET and delta == Delta():
            return None
        return ChatChunk(self.id, self.created, self.model, [ChatDelta(index, delta, logprobs, reason)])

    def _usage_chunk(self) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.model, [], self.usage)

    def _token_logprobs(self, pieces: Sequence[Piece]) -> list[TokenLogprob]:
        made = []
        for piece in pieces:
            if piece.token is None or piece.logprobs is None:
                continue
            text, data = _token(self._text, piece.token)
            top = [
                TopLogprob(name, value, list(raw))
                for (name, raw), value in ((_token(self._text, token), value) for token, value in piece.logprobs.top)
            ]
            made.append(TokenLogprob(text, piece.logprobs.logprob, list(data), top))
        return made


class _Answer:
    """How far one answer has been read."""

    def __init__(self, prepared: Prepared) -> None:
        self.calls = 0
        self._limit = prepared.calls
        self._parser: OutputParser | None = None if prepared.parser is None else prepared.parser()

    def read(self, pieces: Sequence[Piece]) -> list[Part]:
        """The parts that these pieces complete."""
        text = "".join([piece.text for piece in pieces])
        if self._parser is None:
            return [Part("content", text)] if text else []
        parts = self._parser.push(text)
        if pieces[-1].finish_reason is not None:
            parts += self._parser.finish()
        kept = []
        for part in parts:
            if part.kind == "call":
                if self._limit is not None and self.calls >= self._limit:
                    continue
                self.calls += 1
            kept.append(part)
        return kept

    def reason(self, reason: str | None) -> FinishReason | None:
        """The API's word for an end."""
        if reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return None if reason is None else "length"


class TextRun(Run):
    """Continuations of prompts."""

    def __init__(self, service: Service, request: CompletionRequest, prepared: Prepared, watch: Watch) -> None:
        super().__init__(service, request, prepared, watch)
        self._logprobs = request.logprobs
        self._echo = bool(request.echo)
        self._offsets: dict[int, int] = {}  # characters handed out, by choice

    def _reply(self) -> TextReply:
        choices = [self._choice(index, handle.pieces) for index, handle in enumerate(self.handles)]
        return TextReply(self.id, self.created, self.model, choices, self.usage)

    def _chunk(self, index: int, pieces: list[Piece]) -> TextReply | None:
        choice = self._choice(index, pieces)
        if not choice.text and choice.finish_reason is None and choice.logprobs is None:
            return None
        return TextReply(self.id, self.created, self.model, [choice])

    def _usage_chunk(self) -> TextReply:
        return TextReply(self.id, self.created, self.model, [], self.usage)

    def _choice(self, index: int, pieces: list[Piece]) -> TextChoice:
        reason = pieces[-1].finish_reason
        lines = TextLogprobs([], [], [], [])
        text = ""
        if index not in self._offsets:
            self._offsets[index] = 0
            if self._echo:
                text = self._prompt(index, lines)
        text += "".join([piece.text for piece in pieces])
        if self._logprobs is not None:
            for piece in pieces:
                if piece.token is not None and piece.logprobs is not None:
                    self._line(index, lines, piece.token, piece.logprobs)
        finish: FinishReason | None = None if reason is None else "stop" if reason == "stop" else "length"
        return TextChoice(index, text, finish, None if self._logprobs is None else lines)

    def _prompt(self, index: int, lines: TextLogprobs) -> str:
        """The prompt's text, and its log-probabilities when those were asked for."""
        assert self._text is not None
        first = index if self._stream else index - self.handles[index].sample
        handle = self.handles[first]
        ids = handle.sequence.tokens[: handle.sequence.prompt_length]
        if self._logprobs is not None:
            self._line(index, lines, ids[0], None)
            for token, logprobs in zip(ids[1:], handle.prompt_logprobs, strict=True):
                self._line(index, lines, token, logprobs)
        return self._text.decode(ids, skip_special=False)

    def _line(self, index: int, lines: TextLogprobs, token: int, logprobs: TokenLogprobs | None) -> None:
        text, _ = _token(self._text, token)
        lines.tokens.append(text)
        lines.text_offset.append(self._offsets[index])
        self._offsets[index] += len(text)
        lines.token_logprobs.append(None if logprobs is None else logprobs.logprob)
        lines.top_logprobs.append(
            None if logprobs is None else {_token(self._text, other)[0]: value for other, value in logprobs.top}
        )


def _check(handle: Handle) -> None:
    """Raises for a sequence that did not come to its own end."""
    if handle.error is not None:
        raise handle.error
    if handle.finish_reason == "cancel":
        raise UnavailableError("the server ended before the answer did", "ask again")


def _token(text: Text | None, token: int) -> tuple[str, bytes]:
    """A token as text, with U+FFFD for what is no whole character, and its bytes."""
    data = b"" if text is None else text.token_bytes(token)
    return data.decode("utf-8", "replace"), data


def _call_id() -> str:
    return f"call_{secrets.token_hex(8)}"
