"""A jinja2 sandbox with limits that hold before memory is taken: for programs of strangers, such as chat templates.

Every loop, call, operator, filter and literal is checked against the `Budget` of the rendering: its deadline, the size
of any string, list and integer before it is made, and the work done in all.  Methods are on a white list.  Results are
those of jinja2 with the globals that transformers gives to chat templates.  Knows nothing of messages.

    current_budget.set(Budget(seconds=2.0, text=1 << 20)); Sandbox().from_string(source).render(messages=[])
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_WEIGHT = 8 << 20  # characters and elements of any list or dict, counted as a tree
MAX_RANGE = 100_000  # numbers, as in jinja2's sandbox
MAX_WORK = 1 << 27  # characters and elements made during one rendering
MAX_DIGITS_BITS = 4096  # size of an integer
MAX_DEPTH = 128  # nesting of values


class LimitError(TemplateError):
    """A limit was hit: the template is at fault, not the messages."""


class RefusedError(TemplateError):
    """The template itself refused the messages, through `raise_exception`."""


class Budget:
    """What one rendering may still use.  Strings and containers are weighed once, when they are made."""

    def __init__(self, seconds: float, text: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.text = text
        self.work = MAX_WORK
        # Containers are immutable in the sandbox, so a weight stays true; the reference keeps the id from being reused.
        self.weights: dict[int, tuple[object, int]] = {}

    def tick(self) -> None:
        """Raises when the time is over."""
        if time.monotonic() > self.deadline:
            raise LimitError("it runs longer than its time limit")

    def charge(self, amount: int) -> None:
        """Takes from the work that is left, and ticks."""
        self.work -= amount
        if self.work < 0:
            raise LimitError(f"it makes more than {MAX_WORK:,} characters and elements")
        self.tick()

    def string(self, size: int) -> None:
        """Asks for a string of `size` characters, before it is made."""
        if size > self.text:
            raise LimitError(f"it makes a string of {size:,} characters, over the limit of {self.text:,}")
        self.charge(size)

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Characters plus elements of a value printed as a tree: shared parts count each time they would be printed."""
        if isinstance(value, str):
            return len(value) + 2
        if isinstance(value, int):
            return 2 + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict)):
            return 32
        known = self.weights.get(id(value))
        if known is not None:
            return known[1]
        if depth > MAX_DEPTH:
            raise LimitError("it nests values too deeply")
        self.charge(len(value))
        children: Iterable[Any] = value
        if isinstance(value, dict):
            children = (part for pair in value.items() for part in pair)
        weight = 2 + sum(self.weigh(child, depth + 1) for child in children)
        if weight > MAX_WEIGHT:
            raise LimitError(f"it makes a value of more than {MAX_WEIGHT:,} characters and elements")
        self.weights[id(value)] = (value, weight)
        return weight

    def checked(self, value: Any) -> Any:
        """A fresh value: weighed, or watched while it is drawn from when it is an iterator."""
        if isinstance(value, str):
            self.string(len(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_DIGITS_BITS:
                raise LimitError(f"it makes an integer of more than {MAX_DIGITS_BITS} bits")
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
        elif hasattr(value, "__next__") and not isinstance(value, _OPEN_TYPES):
            return self.watched(value)
        return value

    def watched(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with a tick for each."""
        for item in items:
            self.tick()
            yield item


# One rendering per context, so that threads and tasks share the compiled template.  Unset while a template is compiled:
# jinja folds constants then, and the LookupError tells it to leave the work for the rendering.
current_budget: ContextVar[Budget] = ContextVar("finial_chat_budget")


# Guards of operators, string methods and filters: each knows the size of a result before it is made.


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _guard_binop(symbol: str, left: Any, right: Any) -> None:
    budget = current_budget.get()
    sized = (str, list, tuple)
    if symbol == "+" and isinstance(left, sized) and isinstance(right, sized):
        budget.string(len(left) + len(right)) if isinstance(left, str) else budget.charge(len(left) + len(right))
    elif symbol == "*":
        if isinstance(right, sized):
            left, right = right, left
        if isinstance(left, sized) and isinstance(right, int):
            count = max(0, right)
            if isinstance(left, str):
                budget.string(len(left) * count)
            elif count * max(1, len(left)) > MAX_WEIGHT:
                raise LimitError(f"it repeats a list {count:,} times")
        elif _bits(left) + _bits(right) > MAX_DIGITS_BITS:
            raise LimitError(f"it makes an integer of more than {MAX_DIGITS_BITS} bits")
    elif symbol == "**" and isinstance(right, int) and _bits(left) * abs(right) > MAX_DIGITS_BITS:
        raise LimitError(f"it makes an integer of more than {MAX_DIGITS_BITS} bits")
    elif symbol == "%" and isinstance(left, str):
        _guard_format(left, [right], _PERCENT_WIDE)


_PERCENT_WIDE = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
_BRACE_WIDE = re.compile(r"\{[^{}]*[:!](?:[^{}]*\{|[^{}]*\d{4})")
_STRFTIME_WIDE = re.compile(r"%[^a-zA-Z%]*\d{3}")


def _guard_format(pattern: str, arguments: Iterable[Any], wide: re.Pattern[str]) -> None:
    """Bounds `%` and `str.format`: no wide field, and every field at most all arguments."""
    if wide.search(pattern):
        raise LimitError("it formats with a field of 1,000 characters or more")
    budget = current_budget.get()
    each = 1000 + sum(budget.weigh(argument) for argument in arguments)
    fields = pattern.count("%") + pattern.count("{")
    if fields * each > MAX_WEIGHT:
        raise LimitError(f"it formats {fields:,} fields of up to {each:,} characters")


def _guard_replace(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    current_budget.get().string(len(text) + text.count(old) * max(0, len(new) - len(old)))


def _guard_width(text: Any, width: Any = 80, *_: Any, **__: Any) -> None:
    current_budget.get().string(max(len(str(text)), int(width)))


def _guard_indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    step = len(width) if isinstance(width, str) else max(0, int(width))
    current_budget.get().string(len(str(text)) + step * (str(text).count("\n") + 1))


def _guard_tabs(text: str, tabsize: Any = 8) -> None:
    current_budget.get().string(len(text) + text.count("\t") * max(0, int(tabsize)))


def _guard_round(_: Any, precision: Any = 0, *__: Any, **___: Any) -> None:
    if abs(int(precision)) > 300:
        raise LimitError(f"it rounds to {precision} digits")


def _guard_sum(_: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):  # sums of lists copy quadratically
        raise LimitError("it sums something other than numbers")


def _join(parts: Iterable[Any], separator: str) -> list[Any]:
    budget = current_budget.get()
    kept = list(budget.watched(parts))
    budget.string(sum(budget.weigh(part) for part in kept) + len(separator) * len(kept))
    return kept


_METHOD_GUARDS: dict[str, Callable[..., None]] = {
    "replace": _guard_replace,
    "ljust": _guard_width,
    "rjust": _guard_width,
    "center": _guard_width,
    "zfill": _guard_width,
    "expandtabs": _guard_tabs,
}
_FILTER_GUARDS: dict[str, Callable[..., None]] = {
    "replace": _guard_replace,
    "center": _guard_width,
    "indent": _guard_indent,
    "round": _guard_round,
    "sum": _guard_sum,
}
# Unbounded in ways that no published template needs.
_NO_FILTERS = frozenset(
    re.findall(r"\w+", "batch format pprint random slice striptags urlize wordcount wordwrap xmlattr")
)
_STR_METHODS = frozenset(
    re.findall(
        r"\w+",
        "capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal "
        "isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix "
        "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase "
        "title upper zfill",
    )
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (float, frozenset({"is_integer"})),
)
_OPEN_TYPES = (LoopContext, Namespace, Cycler, Joiner, Macro, Undefined)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # printing what it holds could print itself
        return "namespace"


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; here it only delimits."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it without ClassVar

    def parse(self, parser: Any) -> nodes.Node:
        """The block as if its tags were not there, in its own scope."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Guards(NodeTransformer):
    """Puts a check into every loop, and around every list, dict and `~`."""

    def _call(self, name: str, arguments: list[Any], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)
        call.set_lineno(line)
        return call

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """A tick in every iteration, also in those that the test leaves out."""
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick", [], node.lineno)).set_lineno(node.lineno))
        if node.test is not None:
            node.test = nodes.And(self._call("tick", [], node.lineno), node.test).set_lineno(node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`~` as a call that knows the size first."""
        self.generic_visit(node)
        return self._call("concat_values", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        """A literal as the argument of a call, whose result is weighed."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("checked", [node], node.lineno)

    visit_Dict = visit_List
    visit_Tuple = visit_List


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with the checks.  Renders under the `current_budget` only."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters = {name: _guarded(name, fn) for name, fn in self.filters.items() if name not in _NO_FILTERS}
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals["range"] = _range
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Guards().visit(tree)
        return tree

    @staticmethod
    def tick() -> bool:
        """Time check; true, so that it can stand in a condition."""
        current_budget.get().tick()
        return True

    @staticmethod
    def checked(value: Any) -> Any:
        """The value itself: `call` weighs every result."""
        return value

    @staticmethod
    def concat_values(*values: Any) -> str:
        """The `~` operator."""
        return "".join(map(str, _join(values, "")))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins what a `{% set %}` block or a macro collected."""
        kept = list(parts)
        current_budget.get().string(sum(map(len, kept)))
        return "".join(kept)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """A white list by type, within what jinja2 allows."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, _OPEN_TYPES)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with a bound on its result."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern: str = value.__self__
        if value.__name__ != "format":
            raise SecurityError("str.format_map is not available to chat templates")

        def guarded(*args: Any, **kwargs: Any) -> str:
            _guard_format(pattern, [*args, *kwargs.values()], _BRACE_WIDE)
            return wrapped(*args, **kwargs)

        return guarded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, checked before and weighed after."""
        _guard_binop(operator, left, right)
        return current_budget.get().checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call, with string methods checked before and the result weighed after."""
        budget = current_budget.get()
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            budget.charge(len(owner))
            if __obj.__name__ == "join" and args:
                args = (_join(args[0], owner), *args[1:])
            elif __obj.__name__ in _METHOD_GUARDS:
                _METHOD_GUARDS[__obj.__name__](owner, *args, **kwargs)
        return budget.checked(super().call(__context, __obj, *args, **kwargs))


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja's with its guard before and the weighing after; the wraps keeps jinja's marks on it."""
    at = 1 if hasattr(function, "jinja_pass_arg") else 0  # context, environment or eval context comes first
    guard = _FILTER_GUARDS.get(name)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        budget.tick()
        value = args[at]
        if isinstance(value, (str, list, tuple, dict)):
            budget.charge(len(value))
        if guard is not None:
            guard(*args[at:], **kwargs)
        if name == "join":
            separator = args[at + 1] if len(args) > at + 1 else kwargs.get("d", "")
            args = (*args[:at], _join(value, str(separator)), *args[at + 1 :])
        return budget.checked(function(*args, **kwargs))

    return wrapper


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as transformers gives it: jinja's own filter escapes HTML."""
    budget = current_budget.get()
    if (len(indent) if isinstance(indent, str) else indent or 0) > 16 or len("".join(separators or ())) > 16:
        raise LimitError("it writes JSON with an indent or separators of more than 16 characters")
    budget.charge(budget.weigh(x))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, check_circular=False
    )
    parts: list[str] = []
    size = 0
    for part in encoder.iterencode(x):
        size += len(part)
        if size > budget.text:
            budget.string(size)
        parts.append(part)
    return "".join(parts)


def _range(*bounds: int) -> range:
    made = range(*bounds)
    if len(made) > MAX_RANGE:
        raise LimitError(f"it counts to {len(made):,}, over the limit of {MAX_RANGE:,}")
    return made


def _raise_exception(message: Any) -> None:
    raise RefusedError(str(message))


def _strftime_now(format: str) -> str:  # the name templates may use
    if len(format) > 1000 or _STRFTIME_WIDE.search(format):
        raise LimitError("it formats the date with a field that is too wide")
    return datetime.now().strftime(format)
