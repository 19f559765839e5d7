"""`finial serve` as its clients see it: the official openai package against a live server with the demo model."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pydantic
import pytest

import finial
from finial import LLM
from serving import Live, live

HELLO = [{"role": "user", "content": "What says the king?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live("demo", "--max-batch", "8") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo") as llm:
        yield llm


def test_a_chat_is_what_the_library_answers(client: openai.OpenAI, demo: LLM) -> None:
    reply = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, max_completion_tokens=40)  # type: ignore[arg-type]
    expected = demo.chat(HELLO, temperature=0, max_tokens=40)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(expected.prompt_tokens)
    assert reply.usage.completion_tokens == len(expected.tokens)


def test_a_stream_joined_is_the_reply(client: openai.OpenAI) -> None:
    how = {"model": "demo", "messages": HELLO, "seed": 5, "temperature": 0.9, "max_tokens": 40, "n": 2}
    whole = client.chat.completions.create(**how)  # type: ignore[call-overload]
    texts = {0: "", 1: ""}
    ends = {}
    usage = None
    for chunk in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert texts[0] != texts[1]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_concurrent_greedy_texts_equal_their_solo_runs(server: Live, demo: LLM) -> None:
    prompts = [
        f"{name}:\n" + "Speak, " * (i % 7) for i, name in enumerate(["ROMEO", "JULIET", "KING", "First Citizen"] * 8)
    ]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            replies = await asyncio.gather(
                *(
                    client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=24 + i)
                    for i, prompt in enumerate(prompts)
                )
            )
        return [reply.choices[0].text for reply in replies]

    expected = [demo.generate(prompt, temperature=0, max_tokens=24 + i).text for i, prompt in enumerate(prompts)]
    assert asyncio.run(ask()) == expected


def test_an_unsupported_field_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="audio") as caught:
        client.chat.completions.create(model="demo", messages=HELLO, extra_body={"audio": {"voice": "x"}})  # type: ignore[arg-type]
    assert caught.value.body["param"] == "audio"  # type: ignore[index]


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="a")
    assert [model.id for model in client.models.list()] == ["demo"]


# --- log-probabilities, sampling -----------------------------------------------------------------------------------


def test_log_probabilities_are_the_models(client: openai.OpenAI, demo: LLM) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,  # type: ignore[arg-type]
    )
    expected = demo.chat(HELLO, temperature=0, max_tokens=8, logprobs=3)
    entries = reply.choices[0].logprobs.content  # type: ignore[union-attr]
    assert entries is not None and expected.logprobs is not None
    for entry, token, wanted in zip(entries, expected.tokens, expected.logprobs, strict=True):
        assert bytes(entry.bytes or []) == demo.tokenizer.token_bytes(token)
        assert math.isclose(entry.logprob, wanted.logprob)
        assert [top.logprob for top in entry.top_logprobs] == [value for _, value in wanted.top]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(client: openai.OpenAI, demo: LLM, stream: bool) -> None:
    how: dict[str, Any] = {"prompt": "To be, or not", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}
    expected = demo.generate(how["prompt"], max_tokens=3, temperature=0, prompt_logprobs=2, logprobs=2)
    reply = client.completions.create(model="demo", **how, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    assert "".join(choice.text for choice in choices) == how["prompt"] + expected.text
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert expected.prompt_logprobs is not None and expected.logprobs is not None
    wanted = [*expected.prompt_logprobs, *expected.logprobs]
    assert values[0] is None and values[1:] == pytest.approx([entry.logprob for entry in wanted[1:]])  # type: ignore[union-attr]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]


def test_a_prompt_alone_is_scored(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="demo", prompt="To be", max_tokens=0, echo=True, logprobs=0)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("To be", "length")
    assert choice.logprobs is not None and len(choice.logprobs.token_logprobs or []) == 2


def test_sampling_options_reach_the_sampler(client: openai.OpenAI, demo: LLM) -> None:
    token = demo.tokenizer.encode("x")[0]
    forced = client.completions.create(model="demo", prompt="a", max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].text == "xxxx"
    punished = client.completions.create(
        model="demo", prompt="a", max_tokens=40, temperature=0, frequency_penalty=2, presence_penalty=2
    )
    how = {"max_tokens": 40, "temperature": 0, "frequency_penalty": 2, "presence_penalty": 2}
    assert punished.choices[0].text == demo.generate("a", **how).text
    plain = demo.generate("ROMEO:", max_tokens=40, temperature=0).text
    word = plain.split()[5]
    stopped = client.completions.create(model="demo", prompt="ROMEO:", max_tokens=40, temperature=0, stop=[word])
    assert stopped.choices[0].text == plain[: plain.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_prompts_are_texts_or_ids_one_or_many(client: openai.OpenAI, demo: LLM) -> None:
    ids = demo.tokenizer.encode("ROMEO:")
    reply = client.completions.create(model="demo", prompt=[ids, ids], n=2, temperature=0, max_tokens=5)  # type: ignore[list-item]
    expected = demo.generate("ROMEO:", temperature=0, max_tokens=5).text
    assert [(choice.index, choice.text) for choice in reply.choices] == [(i, expected) for i in range(4)]


# --- forms ---------------------------------------------------------------------------------------------------------


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=10)
    age: int = pydantic.Field(ge=0, le=99)


def test_structured_output_has_its_structure(client: openai.OpenAI) -> None:
    for seed in range(5):
        reply = client.chat.completions.parse(
            model="demo",
            messages=HELLO,
            response_format=Person,
            seed=seed,
            temperature=1.5,
            max_tokens=120,  # type: ignore[arg-type]
        )
        assert reply.choices[0].finish_reason == "stop"
        assert isinstance(reply.choices[0].message.parsed, Person)


def test_a_form_in_a_stream_and_in_n_texts(client: openai.OpenAI) -> None:
    form = {"type": "regex", "regex": "(yes|no), [0-9]{4}"}
    stream = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        n=3,
        stream=True,
        max_tokens=30,
        extra_body={"response_format": form},  # type: ignore[arg-type]
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    for text in texts:
        answer, _, number = text.partition(", ")
        assert answer in ("yes", "no") and len(number) == 4 and number.isdecimal()


def test_a_grammar_and_any_object(client: openai.OpenAI) -> None:
    form = {"type": "grammar", "grammar": 'start: "Romeo" | "Juliet"'}
    reply = client.completions.create(model="demo", prompt="O ", max_tokens=9, extra_body={"response_format": form})
    assert reply.choices[0].text in ("Romeo", "Juliet")
    chat = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        temperature=0,
        max_tokens=200,
        response_format={"type": "json_object"},  # type: ignore[arg-type]
    )
    if chat.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(chat.choices[0].message.content or ""), dict)
    else:
        assert (chat.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("form", [{"type": "grammar", "grammar": "start: no_such"}, {"type": "regex", "regex": "("}])
def test_a_form_that_is_none_is_refused(client: openai.OpenAI, form: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError, match="form of the answer") as caught:
        client.chat.completions.create(model="demo", messages=HELLO, extra_body={"response_format": form})  # type: ignore[arg-type]
    assert caught.value.body["param"] == "response_format"  # type: ignore[index]


# --- embeddings ----------------------------------------------------------------------------------------------------


def test_embeddings_are_the_librarys(client: openai.OpenAI) -> None:
    texts = ["To be, or not to be", "A horse!", "My kingdom for a horse!"] * 4
    with LLM("demo", hidden=True) as llm:
        last, mean = llm.embed(texts), llm.embed(texts, "mean")
    got = client.embeddings.create(model="demo", input=texts)  # base64, as the client asks by itself
    np.testing.assert_allclose([entry.embedding for entry in got.data], last, atol=1e-6)
    got = client.embeddings.create(model="demo", input=texts, encoding_format="float", extra_body={"pooling": "mean"})
    np.testing.assert_allclose([entry.embedding for entry in got.data], mean, atol=1e-6)
    assert [entry.index for entry in got.data] == list(range(12))
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="demo", input="a", dimensions=7)


# --- tools and reasoning -------------------------------------------------------------------------------------------

QWEN = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}Answer as <tool_call>{"name": ..., "arguments": ...}</tool_call>
<|im_end|>{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}"""
LLAMA = '{% for message in messages %}{{ message.content }}{% endfor %}{{ tools | tojson }} "parameters": '


def model_with(template: str, folder: Path) -> Path:
    shutil.copytree(Path(finial.__file__).parent / "demo", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a server whose model has Qwen's way of calling tools and of reasoning."""
    with live(str(model_with(QWEN, tmp_path_factory.mktemp("qwen") / "model")), "--name", "demo") as running:
        yield openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Verona"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]


def check_weather(arguments: str) -> None:
    read = json.loads(arguments)
    assert read["city"] in ("Rome", "Verona") and 1 <= read["days"] <= 9 and len(read) == 2


@pytest.mark.parametrize("style", ["tagged", "bare"])
def test_a_named_tool_is_called(caller: openai.OpenAI, style: str, tmp_path: Path) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    how: Any = {"model": "demo", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "max_tokens": 120, "seed": 3}
    if style == "bare":
        with live(str(model_with(LLAMA, tmp_path / "model")), "--name", "demo") as running:
            whole = openai.OpenAI(base_url=running.url + "/v1", api_key="none").chat.completions.create(**how)
    else:
        whole = caller.chat.completions.create(**how)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls" and message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather"] and message.content is None
    check_weather(message.tool_calls[0].function.arguments)


def test_tool_calls_in_a_stream(caller: openai.OpenAI) -> None:
    stream = caller.chat.completions.create(
        model="demo", messages=HELLO, tools=TOOLS, tool_choice="required", stream=True, seed=1, max_tokens=200,  # type: ignore[arg-type]
        parallel_tool_calls=False,
    )  # fmt: skip
    calls, ends, content = [], [], ""
    for chunk in stream:
        for choice in chunk.choices:
            calls += choice.delta.tool_calls or []
            content += choice.delta.content or ""
            ends.append(choice.finish_reason)
    assert ends[-1] == "tool_calls" and content == "" and len(calls) == 1
    assert calls[0].index == 0 and calls[0].id and calls[0].function is not None
    assert calls[0].function.name in ("weather", "time")
    json.loads(calls[0].function.arguments or "")


def test_a_conversation_with_calls_goes_on(caller: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    reply = caller.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=5)
    assert reply.choices[0].finish_reason in ("length", "stop", "tool_calls")
    with pytest.raises(openai.BadRequestError, match="JSON"):
        call["function"]["arguments"] = "{"  # type: ignore[index]
        caller.chat.completions.create(model="demo", messages=messages, tools=TOOLS)


def test_tools_that_the_template_does_not_know_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="knows none"):
        client.chat.completions.create(model="demo", messages=HELLO, tools=TOOLS)  # type: ignore[arg-type]


def test_reasoning_is_apart_from_the_answer(caller: openai.OpenAI) -> None:
    form = {"type": "grammar", "grammar": 'start: "<think>\\nhm, " ("ay"|"nay") "\\n</think>\\n\\n" ("Yes."|"No.")'}
    how: Any = {"model": "demo", "messages": HELLO, "extra_body": {"response_format": form}, "max_tokens": 60}
    message: Any = caller.chat.completions.create(**how).choices[0].message
    assert message.content in ("Yes.", "No.") and message.reasoning_content in ("hm, ay", "hm, nay")
    content, reasoning = "", ""
    for chunk in caller.chat.completions.create(**how, stream=True):
        delta: Any = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
    assert content in ("Yes.", "No.") and reasoning in ("hm, ay", "hm, nay")


def test_template_options_are_on_a_list(caller: openai.OpenAI) -> None:
    def tokens(**options: Any) -> int:
        reply = caller.chat.completions.create(
            model="demo",
            messages=HELLO,
            max_tokens=1,
            extra_body={"chat_template_kwargs": options},  # type: ignore[arg-type]
        )
        assert reply.usage is not None
        return reply.usage.prompt_tokens

    assert tokens(enable_thinking=False) > tokens(enable_thinking=True) == tokens()
    with pytest.raises(openai.BadRequestError, match="evil"):
        tokens(evil=1)
