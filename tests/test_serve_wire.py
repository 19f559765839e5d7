"""What a request may be, and how a model's text is read: without a server and without a model."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from finial.serve.openapi import document
from finial.serve.parse import OutputParser, Part, tool_style
from finial.serve.wire import (
    MAX_SCHEMA_DEPTH,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    InvalidRequest,
    decode,
    texts,
)

HELLO = [{"role": "user", "content": "Hi"}]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def tool(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"functions": []}, "functions"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [tool(deep(MAX_SCHEMA_DEPTH + 1))]}, "tools[0].function.parameters"),
        ({"tools": [tool({"enum": ["x" * 70_000]})]}, "tools[0].function.parameters"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 1025}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(ChatRequest, msgspec.json.encode({"messages": HELLO, **fields}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b'"x"', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"prompt":' + b"[" * 100_000],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(CompletionRequest, body)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_a_request_or_an_error(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest, EmbeddingRequest):
        with contextlib.suppress(InvalidRequest):
            assert isinstance(decode(kind, body), kind)


def test_prompts_come_in_four_shapes() -> None:
    assert texts("ab", "prompt", 9) == ["ab"]
    assert texts([1, 2], "prompt", 9) == [[1, 2]]
    assert texts(["a", [1]], "prompt", 9) == ["a", [1]]
    with pytest.raises(InvalidRequest, match="mixes"):
        texts(["a", 1], "prompt", 9)
    with pytest.raises(InvalidRequest, match="at most 2"):
        texts(["a"] * 3, "prompt", 2)


def test_the_document_lists_every_field_and_no_other() -> None:
    schema = document()["components"]["schemas"]
    for kind in (ChatRequest, CompletionRequest, EmbeddingRequest):
        assert set(schema[kind.__name__]["properties"]) == set(kind.__struct_fields__)
        assert schema[kind.__name__]["additionalProperties"] is False
    assert document()["paths"]["/health"]["get"]["security"] == []


# --- the parser ----------------------------------------------------------------------------------------------------


def merged(parts: list[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        if out and part.kind != "call" and out[-1].kind == part.kind:
            out[-1] = Part(part.kind, out[-1].text + part.text)
        else:
            out.append(part)
    return out


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}<"}}\n</tool_call>'
F = Part("call", '{"a": "}<"}', "f")
TEXTS: list[tuple[str, dict[str, Any], list[Part]]] = [
    ("Hello <b>", {}, [Part("content", "Hello <b>")]),
    ("<think>\nhm\n</think>\n\nYes", {"reasoning": True}, [Part("reasoning", "hm"), Part("content", "Yes")]),
    ("hm\n</think>\n\nYes", {"thinking": True}, [Part("reasoning", "hm"), Part("content", "Yes")]),
    ("<think>\nhm", {"reasoning": True}, [Part("reasoning", "hm")]),
    ("<thin air", {"reasoning": True}, [Part("content", "<thin air")]),
    ("Yes", {"reasoning": True}, [Part("content", "Yes")]),
    (CALL, {"tools": "tagged"}, [F]),
    (f"So:\n{CALL}\n{CALL}", {"tools": "tagged"}, [Part("content", "So:"), F, F]),
    (f"<think>\na\n</think>\n\n{CALL}", {"reasoning": True, "tools": "tagged"}, [Part("reasoning", "a"), F]),
    ("<tool_call>\nno\n</tool_call>", {"tools": "tagged"}, [Part("content", "<tool_call>\nno\n</tool_call>")]),
    ("<tool_call>\n{", {"tools": "tagged"}, [Part("content", "<tool_call>\n{")]),
    (CALL, {}, [Part("content", CALL)]),
    ('{"name": "f", "parameters": {"a": "}<"}}', {"tools": "bare"}, [F]),
    ('{"name": "f", "parameters": {"a": "}<"}}; {"name": "f", "parameters": {"a": "}<"}}', {"tools": "bare"}, [F, F]),
    ('{"a": 1} is JSON', {"tools": "bare"}, [Part("content", '{"a": 1} is JSON')]),
    ("It is {", {"tools": "bare"}, [Part("content", "It is {")]),
]


@pytest.mark.parametrize("text, how, parts", TEXTS)
def test_text_is_read_in_its_parts(text: str, how: dict[str, Any], parts: list[Part]) -> None:
    parser = OutputParser(**how)
    assert merged(parser.push(text) + parser.finish()) == parts


@given(st.sampled_from(TEXTS), st.data())
def test_parts_do_not_depend_on_the_pieces(case: tuple[str, dict[str, Any], list[Part]], data: st.DataObject) -> None:
    text, how, parts = case
    parser, got, at = OutputParser(**how), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, 7))
        got += parser.push(text[at : at + size])
        at += size
    assert merged(got + parser.finish()) == parts


def test_a_plain_answer_is_not_held_back() -> None:
    parser = OutputParser(reasoning=True, tools="tagged")
    assert [parser.push(piece) for piece in ("He", "llo <", "b> you")] == [
        [Part("content", "He")],
        [Part("content", "llo")],  # white space and what may begin a mark wait
        [Part("content", " <b> you")],
    ]


def test_templates_say_how_tools_are_called() -> None:
    assert tool_style("{% if tools %}<tool_call>{% endif %}") == "tagged"
    assert tool_style('{% if tools %}{"name": x, "parameters": y}{% endif %}') == "bare"
    assert tool_style("{{ messages }}") is None
