"""Chat templates: equal to transformers' rendering, and bounded whatever the template does."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from finial.errors import FileError, FinialError, RequestError
from finial.files.chat import MAX_SOURCE, ChatTemplate

# Shortened from the shapes of published templates: ChatML with tools (Qwen2.5), with thinking (Qwen3), Llama 3 headers.
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
            (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+
            message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Features that published templates use here and there.
FEATURES = """{% set ns = namespace(parts=[], n=0) %}
{% macro show(x, sep=', ') %}{{ x.role|upper }}{{ sep }}
{% if caller is defined %}{{ caller() }}{% endif %}{% endmacro %}
{% for m in messages if m.content is string and m.content|length > 0 %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% if m.role == 'tool' %}{% continue %}{% endif %}
    {% set ns.parts = ns.parts + [m.content|trim|replace('o', '0')] %}
    {% set ns.n = ns.n + 2 ** 3 % 5 %}
    {{ show(m) }}{% call show(m, sep='-') %}inner{% endcall %}
    {% generation %}{{ m.content.split()[:2]|join('+') }}{% endgeneration %}
{% else %}nothing{% endfor %}
{{ ns.parts|join(' | ') }} {{ ns.n }} {{ (ns.parts * 2)|length }} {{ '-' * 5 }}
{{ '%s=%03d' % ('x', 7) }} {{ '{} {x:>4}'.format(1, x='y') }}
{{ messages|map(attribute='role')|unique|list }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ {'a': [1, 2.5, none, true, '<é>']}|tojson }} {{ {'b': 1, 'a': {}}|tojson(indent=2, sort_keys=true) }}
{{ {'a': 1}.items()|list }}
{% for key, value in {'k': 1, 'j': 2}|dictsort %}{{ key }}{{ value }}{{ loop.cycle('!', '?') }}{% endfor %}
{% filter indent(3) %}a
b{% endfilter %} {{ dict(a=1).get('b', 'none') }} {{ 'aXb'.partition('X') }} {{ [3, 1, 2]|sort(reverse=true)|first }}
{% set block %}{{ 1 ~ 'é' ~ none }}{% endset %}{{ block|title|e }} {{ undefined_name }}
{{ range(2, 9, 3)|list }} {{ (1, 2) + (3,) }}
{{ messages[0]['content'][1:3] }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -3|abs }}
{{ 'x' in 'xyz' }} {{ messages|groupby('role')|length }}
{{ "{:.2f}".format(3.14159) }} {{ 'a,b'.split(',')|map('upper')|join }} {{ 3.7|int }} {{ '42'|int + 1 }} {{ bos_token }}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather> & 'more' in 東京",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": [1, 2.5, None]}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": "  <b>Hé \U0001f469\u200d\U0001f4bb</b>\n\n"},
    ],
    [
        {"role": "user", "content": "a & b"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfoo too"},
        {"role": "user", "content": "again"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sun.", "reasoning_content": "easy\n"},
    ],
]


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("source", [QWEN25, QWEN3, LLAMA3, FEATURES], ids=["qwen2.5", "qwen3", "llama3", "features"])
def test_equal_to_transformers(theirs: PreTrainedTokenizerFast, source: str, tools: Any, prompt: bool) -> None:
    own = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    for messages in CONVERSATIONS:
        for options in ({}, {"enable_thinking": False}, {"date_string": "1 Jan 2025"}):
            expected = theirs.apply_chat_template(
                messages, tools, chat_template=source, add_generation_prompt=prompt, tokenize=False, **options
            )
            assert own.render(messages, tools, prompt, **options) == expected


def test_named_templates() -> None:
    several = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    messages = [{"role": "user", "content": "Hi"}]
    assert several.render(messages) == "plain"
    assert several.render(messages, TOOLS) == "tools"
    assert several.render(messages, template="rag") == "rag"
    with pytest.raises(RequestError, match=r"(?s)no chat template named 'x'.*'rag'"):
        several.render(messages, template="x")


GROW = "{%% set ns = namespace(x='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
BOMBS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested test": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "lazy filters": "{% for i in range(9999) %}{{ range(99999)|map('string')|map('upper')|list|last }}{% endfor %}",
    "eager filters": "{% set l = range(99999)|list %}{% for i in l %}{% set z = l|sort|reverse|list %}{% endfor %}",
    "recursion": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "endless": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "times": "{{ 'a' * 10**10 }}",
    "times list": "{{ ([0] * 10**9)|length }}",
    "power": "{{ (10 ** 1000) ** 1000 }}",
    "squares": "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%1000000000s' % 'x' }}",
    "percent star": "{{ '%*s' % (10**9, 'x') }}",
    "percent many": "{{ ('%s' * 1000000) % 1 }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format nested": "{{ '{:>{}}'.format(1, 10**9) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "indent": "{{ ('\n' * 10**6)|indent(10**6) }}",
    "tojson indent": "{{ messages|tojson(indent=10**9) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "replace filter": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join(['a'] * 10**5) }}",
    "join filter": "{{ (['a'] * 10**5)|join('b' * 10**6) }}",
    "sum": "{{ ([[1]] * 10**5)|sum(start=[]) }}",
    "tabs": "{{ ('\t' * 10**5).expandtabs(10**6) }}",
    "round": "{{ 2.5|round(10**9, 'ceil') }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "concat": GROW % "{% set ns.x = ns.x ~ ns.x %}",
    "add": GROW % "{% set ns.x = ns.x + ns.x %}",
    "block": GROW % "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}",
    "lists": GROW % "{% set ns.x = [ns.x, ns.x] %}",
    "dicts": GROW % "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
    "dict calls": GROW % "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
    "tuple keys": GROW % "{% set ns.x = (ns.x, ns.x) %}" + "{{ {ns.x: 1} }}",
    "garbage": "{% for k in range(90000) %}{% set a = 'a' * 4000000 %}{% endfor %}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "mutation": "{{ messages.append(1) }}",
    "integers": "{{ (5).to_bytes(10**10) }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "size": "x" * (MAX_SOURCE + 1),
    "syntax": "{% if %}",
    "filter": "{{ 1|nothing }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(FileError):
        ChatTemplate(BOMBS[name], max_seconds=0.2).render(CONVERSATIONS[0])
    assert time.process_time() - start < 3  # the limit, compiling, and a slow machine; a busy one does not count
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1024 if sys.platform != "darwin" else 1 << 20) < 100, "MB"


def test_printing_a_namespace_in_itself_ends() -> None:
    assert ChatTemplate(GROW % "{% set ns.x = namespace(a=ns.x, b=ns.x) %}").render(CONVERSATIONS[0]) == "namespace"


def test_errors_name_the_line() -> None:
    with pytest.raises(FileError, match=r"model: line 3 of the chat template 'default': Expected an expression"):
        ChatTemplate("\n\n{% if %}", origin="model").render(CONVERSATIONS[0])
    with pytest.raises(RequestError, match=r"model: line 2 of the chat template 'default': .*'nope' is undefined"):
        ChatTemplate("{{ 1 }}\n{{ nope.x }}", origin="model").render(CONVERSATIONS[0])
    with pytest.raises(FileError, match=r"line 4 of .* time limit"):
        ChatTemplate(
            "\n\n\n{% for i in range(99999) %}{% for j in range(99999) %}\n{% endfor %}{% endfor %}", max_seconds=0.1
        ).render(CONVERSATIONS[0])
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(CONVERSATIONS[0])


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("Hi", "messages is of type str"),
        ([], "messages is empty"),
        ([1], r"messages\[0\] is of type int"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] is None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\['role'\] is 3"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] is of type int"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"messages\[0\]\['content'\]\[0\] is no dict with a 'type'"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\['extra'\] is of type object"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], r"messages\[0\]\['extra'\] has the key 1"),
    ],
)
def test_messages_are_checked(messages: Any, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        ChatTemplate("x").render(messages)


def test_tools_and_options_are_checked() -> None:
    with pytest.raises(RequestError, match="tools is no list"):
        ChatTemplate("x").render(CONVERSATIONS[0], {"a": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"option is of type"):
        ChatTemplate("x").render(CONVERSATIONS[0], option=Path("x"))
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(RequestError, match="nested more than"):
        ChatTemplate("x").render(CONVERSATIONS[0], deep=deep)


def test_messages_are_not_changed_and_content_is_data() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for %}"}]
    copy = json.loads(json.dumps(messages))
    assert ChatTemplate("{{ messages[0].content }}").render(messages) == "{{ 7 * 7 }}{% for %}"
    assert messages == copy


def test_long_conversation_is_fast() -> None:
    messages = [{"role": role, "content": "word " * 100} for _ in range(500) for role in ("user", "assistant")]
    start = time.process_time()
    text = ChatTemplate(QWEN3).render(messages)
    assert len(text) > 500_000
    assert time.process_time() - start < 1.5


def test_threads_share_a_template() -> None:
    shared = ChatTemplate(LLAMA3, {"bos_token": "<s>"})
    expected = [shared.render(messages, date_string="x") for messages in CONVERSATIONS]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(50):
            try:
                if shared.render(CONVERSATIONS[i], date_string="x") != expected[i]:
                    wrong.append(i)
            except FinialError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(CONVERSATIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
