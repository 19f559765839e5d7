"""`finial serve` as its clients see it: the official openai package against a live server with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

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
