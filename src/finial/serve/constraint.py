"""Answers in a given form: a JSON schema, a regular expression, a grammar, calls of tools.

The only module that knows llguidance.  Which tokens may come next is computed while the model computes their logits,
in threads of its own when that takes longer than handing it over.

    grammars = Grammars(text, vocab_size, eos_ids)
    guide = grammars.guide(json_schema({"type": "integer"}))       # a `Constraint` of the engine, for one sequence
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from finial.errors import RequestError
from finial.files.text import Text
from finial.serve.parse import CALL, CALL_END, ToolStyle
from finial.serve.wire import InvalidRequest

HANDOVER_S = 100e-6  # about what giving work to a thread and taking its result costs: below it, the work is done here
STEP_FUEL = 50_000  # of a lexer in one mask: some 4 ms (the same), which all sequences of a step may have to wait
MAX_STATES = 20_000  # of a lexer, 1 to 2 kB each (llguidance's documentation of its limits)
JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Allowed = NDArray[np.bool_]


def json_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of what a JSON schema describes, written as Python's json.dumps does, so that it ends."""
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_FORM))


def regex(pattern: str) -> str:
    """The grammar of what a regular expression matches as a whole."""
    return str(LLMatcher.grammar_from_regex(pattern))


def lark(grammar: str) -> str:
    """A grammar in llguidance's form of Lark."""
    return str(LLMatcher.grammar_from_lark(grammar))


def calls(functions: Sequence[tuple[str, Mapping[str, Any]]], style: ToolStyle, *, many: bool, opened: bool) -> str:
    """The grammar of calls.

    Args:
        functions: (name, JSON schema of the arguments).
        many: one or more calls; False: one.
        opened: the mark before the first call is written already, and one call follows.
    """
    key = "arguments" if style == "tagged" else "parameters"
    forms = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, key: dict(schema)},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for name, schema in functions
    ]
    schema = {**(forms[0] if len(forms) == 1 else {"anyOf": forms}), "x-guidance": JSON_FORM}
    begin = f'"{"" if opened else CALL}\\n" ' if style == "tagged" else ""
    end = f' "\\n{CALL_END}"' if style == "tagged" else ""
    between = '"\\n" ' if style == "tagged" else '"; " '
    start = f"call ({between}call)*" if many and not opened else "call"
    return lark(f"start: {start}\ncall: {begin}json{end}\njson: %json {json.dumps(schema)}\n")


class Grammars:
    """Compiles grammars for one vocabulary.

    Args:
        vocab_size: width of the logits.
        eos_ids: tokens that end a text.
    """

    def __init__(self, text: Text, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._text = text
        self._size = vocab_size
        self._eos = sorted(set(eos_ids))
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finial-grammar", initializer=_anywhere())

    def guide(self, grammar: str, *, after: str | None = None, again: bool = False) -> Guide:
        """A constraint for one sequence; `copy` it for another.

        Args:
            after: text that must have come before the grammar begins; everything is allowed until then.
            again: when the grammar is fulfilled everything is allowed until `after` comes once more.
        Raises:
            InvalidRequest: the grammar is none, or too large.
        """
        limits = LLParserLimits(max_lexer_states=MAX_STATES, step_lexer_fuel=STEP_FUEL, verbose_errors=False)
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher)
        first = _mask(matcher, self._size)  # the dearest one, so not in the thread that drives the engine
        return Guide(matcher, self._size, self._pool, self._text, after, again, first)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:  # a vocabulary of 150 k takes about a second, once
            if self._tokenizer is None:
                if not self._eos:
                    raise RequestError("the model has no token that ends a text, so no form of an answer can end")
                wrapped = TokenizerWrapper(_Vocabulary(self._text, self._size, self._eos[0]))
                self._tokenizer = LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._eos)
            return self._tokenizer


def _anywhere() -> Callable[[], None]:
    """Lets a thread use all cores of this one: started by the engine's thread, it would inherit that one's core."""
    if not hasattr(os, "sched_setaffinity"):
        return lambda: None
    cores = os.sched_getaffinity(0)

    def set_cores() -> None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)

    return set_cores


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, text: Text, size: int, eos: int) -> None:
        self._text = text
        self.eos_token_id = eos
        self.bos_token_id = text.bos_id
        self.special_token_ids = [token for token in range(size) if text.is_special(token)]
        self.tokens = [text.token_bytes(token) for token in range(size)]

    def __call__(self, data: bytes) -> list[int]:
        return self._text.encode(data.decode("utf-8", "replace"), add_special=False, parse_special=False)


class Guide:
    """The engine's `Constraint`: what one sequence may still say."""

    def __init__(
        self,
        matcher: LLMatcher,
        size: int,
        pool: ThreadPoolExecutor,
        text: Text,
        after: str | None,
        again: bool,
        first: Allowed,
    ) -> None:
        self._matcher = matcher
        self._size = size
        self._pool = pool
        self._text = text
        self._after = None if after is None else after.encode()
        self._again = again
        self._free = after is not None
        self._tail = b""
        self._cost_s = 0.0  # of the last mask
        self._first = first
        self._ready: Allowed | None = None if self._free else first
        self._next: Future[Allowed] | None = None

    def copy(self) -> Guide:
        """The same constraint from its beginning, for another sequence; only before the first token."""
        matcher = self._matcher.deep_copy()
        after = None if self._after is None else self._after.decode()
        return Guide(matcher, self._size, self._pool, self._text, after, self._again, self._first)

    def allowed(self) -> Allowed | None:
        """Which tokens may come next, bool [V]; None: all."""
        if self._free:
            return None
        if self._ready is not None:
            found, self._ready = self._ready, None
            return found
        if self._next is not None:
            found, self._next = self._next.result(), None
            return found
        return self._mask()

    def advance(self, token: int) -> bool:
        """The next token is this one; True when the text is complete with it."""
        if self._free:
            self._look_for_beginning(token)
            return False
        if not self._matcher.consume_token(token):
            raise _refused(self._matcher)
        if self._matcher.is_stopped():
            if not self._again:
                return True
            self._matcher.reset()
            self._free, self._tail = True, b""
        elif self._cost_s > HANDOVER_S:
            self._next = self._pool.submit(self._mask)
        return False

    def restart(self, tokens: Sequence[int]) -> None:
        """Begin anew, with these tokens said."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        self._matcher.reset()
        self._free, self._tail = self._after is not None, b""
        self._ready = None if self._free else self._first
        for token in tokens:
            self.advance(token)

    def _mask(self) -> Allowed:
        started = time.perf_counter()
        mask = _mask(self._matcher, self._size)
        self._cost_s = time.perf_counter() - started
        return mask

    def _look_for_beginning(self, token: int) -> None:
        assert self._after is not None
        self._tail += self._text.token_bytes(token)
        at = self._tail.find(self._after)
        if at < 0:
            self._tail = self._tail[-len(self._after) :]
            return
        # What came in the same token behind the mark is part of the answer already; the grammar may not know it.
        rest = self._tail[at + len(self._after) :]
        self._free = bool(rest.strip())
        self._tail = b""
        self._ready = None if self._free else self._first


def _mask(matcher: LLMatcher, size: int) -> Allowed:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    if matcher.is_error():
        raise _refused(matcher)
    return np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)


def _refused(matcher: LLMatcher) -> InvalidRequest:
    reason = matcher.get_error().replace("<non-verbose/>", "").strip()[:400]
    return InvalidRequest(f"the form of the answer cannot be used: {reason}", "use a simpler one")
