"""The public object on the embedded model: what comes back, what is refused, and that nothing depends on batching."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import finial
from finial import LLM, FinialError, SamplingParams
from finial.engine.sampling import greedy, log_softmax
from finial.errors import BackendError, ModelError, RequestError
from finial.loading import size_cache, trim_heap
from finial.roofline import MOST_BYTES, measure_read, step_reads

DEMO = Path(str(files("finial") / "demo"))
PROMPT = "ROMEO:\nBut, soft! what light"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", backend="cpu", threads=1, max_context=256) as model:
        yield model
        assert model._engine.pages_held == 0, "a test left pages behind"


@pytest.fixture(scope="module", params=["reference", "cpu"])
def either(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("demo", backend=request.param, threads=1, max_context=128, kv_format="f32") as model:
        yield model


def held(llm: LLM) -> int:
    return llm._engine.pages_held


# --- what comes back --------------------------------------------------------------------------------------------


def test_a_completion(either: LLM) -> None:
    done = either.generate(PROMPT, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    assert len(done.tokens) == 12 and done.finish_reason == "length"
    assert done.text and done.text == either.tokenizer.decode(done.tokens, continues=True)
    assert done.prompt_tokens == either.tokenizer.encode(PROMPT)
    whole = done.prompt_tokens + done.tokens
    score = either.score(whole)
    assert score.logits.shape == (len(whole), either.info.config.vocab_size) and score.logits.dtype == np.float32
    start = len(done.prompt_tokens)
    assert done.tokens == [greedy(row) for row in score.logits[start - 1 : -1]]
    assert done.prompt_logprobs is not None and done.prompt_logprobs[0] is None and done.logprobs is not None
    got = [entry.logprob for entry in [*done.prompt_logprobs[1:], *done.logprobs] if entry is not None]
    np.testing.assert_allclose(got, score.logprobs, atol=1e-4)
    assert all(
        entry.rank == 0 and entry.top[0][0] == token for entry, token in zip(done.logprobs, done.tokens, strict=True)
    )


def test_scores_are_log_softmax_of_the_logits(llm: LLM) -> None:
    ids = llm.tokenizer.encode("To be, or not to be: that is the question. " * 6)
    assert len(ids) > 64
    score = llm.score(ids)
    wanted = log_softmax(score.logits)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(score.logprobs, wanted, rtol=1e-12)
    assert score.perplexity == pytest.approx(math.exp(-wanted.mean()))
    assert math.isnan(llm.score([5]).perplexity)


def test_one_prompt_gives_one_and_a_list_gives_a_list(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    text = llm.generate(PROMPT, max_tokens=5).text
    assert llm.generate(ids, max_tokens=5).text == text
    assert llm.generate(np.asarray(ids), max_tokens=5).text == text
    several = llm.generate([PROMPT, ids], max_tokens=5)
    assert [done.text for done in several] == [text, text]
    assert isinstance(llm.generate([ids], max_tokens=5), list)


def test_choices(llm: LLM) -> None:
    done = llm.generate(PROMPT, max_tokens=10, n=3, temperature=1.5, prompt_logprobs=0)
    assert len({tuple(choice.tokens) for choice in done.choices}) == 3
    assert len({choice.seed for choice in done.choices}) == 1
    again = llm.generate(PROMPT, max_tokens=10, n=3, temperature=1.5, seed=done.choices[0].seed)
    assert [choice.tokens for choice in again.choices] == [choice.tokens for choice in done.choices]
    assert done.tokens is done.choices[0].tokens and done.text == done.choices[0].text
    assert done.prompt_logprobs is not None and len(done.prompt_logprobs) == len(done.prompt_tokens)


def test_stop_strings_in_real_text(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, ignore_eos=True).text
    stop = whole[10:14]
    done = llm.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop])
    assert done.text == whole[: whole.index(stop)] and done.finish_reason == "stop"


def test_stream_is_generate_in_pieces(llm: LLM) -> None:
    done = llm.generate(PROMPT, max_tokens=20, temperature=1.0, seed=3)
    stream = llm.stream(PROMPT, max_tokens=20, temperature=1.0, seed=3)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == done.tokens
    assert "".join(piece.text for piece in pieces) == done.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    completion = stream.completion
    assert (completion.text, completion.finish_reason) == (done.text, done.finish_reason)
    assert completion.timings.ttft_s is not None and completion.timings.decode_tok_s is not None


def test_chat_is_the_template_continued(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Speak, I charge thee."}]
    answer = llm.chat(messages, max_tokens=12)
    template = llm.tokenizer.chat_template
    assert template is not None
    prompt = llm.tokenizer.encode(template.render(messages), add_special=False)
    assert answer.prompt_tokens == prompt
    assert answer.tokens == llm.generate(prompt, max_tokens=12).tokens
    assert [piece.token for piece in llm.stream_chat(messages, max_tokens=12)] == answer.tokens


def test_cache_off_and_reuse_off_give_the_same(llm: LLM) -> None:
    wanted = llm.generate(PROMPT, max_tokens=15, ignore_eos=True).tokens
    assert llm.generate(PROMPT, max_tokens=15, ignore_eos=True).tokens == wanted
    for options in ({"cache": False}, {"prefix_reuse": False, "page_size": 7, "max_step_tokens": 3, "max_batch": 2}):
        with LLM("demo", backend="cpu", threads=1, max_context=256, **options) as other:
            assert other.generate(PROMPT, max_tokens=15, ignore_eos=True).tokens == wanted
            assert other.generate(PROMPT, max_tokens=1).reused_tokens == 0


def test_the_beginning_of_a_prompt_is_reused(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("If music be the food of love, play on; give me excess of it, " * 4)
    first = llm.generate(prompt, max_tokens=2)
    second = llm.generate(prompt, max_tokens=2)
    assert first.reused_tokens == 0 and second.reused_tokens == (len(prompt) - 1) // 32 * 32 > 0
    assert first.tokens == second.tokens


def test_info(llm: LLM) -> None:
    info = llm.info
    assert (info.backend, info.format, info.max_context, info.tokenizer) == ("cpu", "bf16", 256, True)
    config = info.config
    assert info.kv_bytes_per_token == config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
    assert info.kv_bytes == info.kv_bytes_per_token * info.cache_tokens
    assert 0 < info.weight_bytes < 9e6 and 0 < info.load_s < 60


def test_another_format(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    with LLM("demo", backend="cpu", threads=1, format="q8_0", max_context=64) as small:
        assert small.info.format == "q8_0" and small.info.weight_bytes < 0.6 * llm.info.weight_bytes
        difference = log_softmax(small.score(ids).logits) - log_softmax(llm.score(ids).logits)
        assert 0 < np.abs(difference).max() < 1


# --- batches ----------------------------------------------------------------------------------------------------


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=50), min_size=1, max_size=5),
    page_size=st.sampled_from([1, 5, 16]),
    max_batch=st.integers(1, 4),
    rows=st.integers(4, 40),
    reuse=st.booleans(),
)
def test_tokens_and_logits_on_cpu_do_not_depend_on_what_runs_beside(
    llm: LLM, prompts: list[list[int]], page_size: int, max_batch: int, rows: int, reuse: bool
) -> None:
    options: dict[str, Any] = {"page_size": page_size, "max_batch": max_batch, "max_step_tokens": rows}
    with LLM("demo", backend="cpu", threads=1, max_context=64, prefix_reuse=reuse, **options) as other:
        together = other.generate(prompts, max_tokens=6, ignore_eos=True, logprobs=3)
        sampled = other.generate(prompts, max_tokens=6, temperature=1.0, top_p=0.9, seed=4)
        logits = [other.score(prompt).logits for prompt in prompts]
    for i, prompt in enumerate(prompts):
        alone = llm.generate(prompt, max_tokens=6, ignore_eos=True, logprobs=3)
        assert together[i].tokens == alone.tokens and together[i].logprobs == alone.logprobs
        assert sampled[i].tokens == llm.generate(prompt, max_tokens=6, temperature=1.0, top_p=0.9, seed=4).tokens
        np.testing.assert_array_equal(logits[i], llm.score(prompt).logits)


def test_pages_run_out_on_the_real_thing() -> None:
    prompts = [[10 + i, 20, 30] for i in range(4)]
    with LLM("demo", backend="reference", max_context=24, page_size=4, max_batch=4, kv_format="f32") as other:
        for _ in range(13):  # what is left, 11 pages, is not enough for four times 5
            other._engine._pool.allocate()
        together = other.generate(prompts, max_tokens=16, ignore_eos=True, prompt_logprobs=0, logprobs=0)
        assert [len(done.tokens) for done in together] == [16] * 4
        for done in together:
            score = other.score(done.prompt_tokens + done.tokens)
            assert done.logprobs is not None
            np.testing.assert_allclose([entry.logprob for entry in done.logprobs], score.logprobs[2:], atol=1e-4)


# --- tasks ------------------------------------------------------------------------------------------------------


def test_tasks(llm: LLM) -> None:
    prompts = [f"{name}:\n" for name in ("ROMEO", "JULIET", "HAMLET", "IAGO", "PUCK")]
    wanted = [llm.generate(prompt, max_tokens=16, ignore_eos=True).text for prompt in prompts]
    messages = [{"role": "user", "content": "Speak."}]

    async def streamed(prompt: str) -> str:
        return "".join([piece.text async for piece in llm.astream(prompt, max_tokens=16, ignore_eos=True)])

    async def main() -> None:
        before = llm._engine.steps
        done = await asyncio.gather(*(llm.agenerate(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts))
        assert [each.text for each in done] == wanted
        assert llm._engine.steps - before < 40, "five texts share their steps"
        assert list(await asyncio.gather(*map(streamed, prompts))) == wanted
        assert [each.text for each in await llm.agenerate(prompts, max_tokens=16, ignore_eos=True)] == wanted
        answer = await llm.achat(messages, max_tokens=8)
        assert [piece.token async for piece in llm.astream_chat(messages, max_tokens=8)] == answer.tokens
        async with llm.astream(PROMPT, max_tokens=200, ignore_eos=True) as stream:
            async for _ in stream:
                break
        task = asyncio.create_task(llm.agenerate(PROMPT, max_tokens=200, ignore_eos=True))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    llm.generate(PROMPT, max_tokens=1)
    assert held(llm) == 0


# --- interruptions ----------------------------------------------------------------------------------------------


def test_closing_or_dropping_a_stream_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=100, ignore_eos=True)
    first = next(stream)
    assert held(llm) > 0
    stream.close()
    assert held(llm) == 0
    assert stream.completion.finish_reason == "cancel" and stream.completion.tokens == [first.token]
    for _ in llm.stream(PROMPT, max_tokens=100, ignore_eos=True):
        break
    gc.collect()
    assert held(llm) == 0
    with llm.stream(PROMPT, max_tokens=100) as stream:
        next(stream)
    assert held(llm) == 0


def interrupt(llm: LLM, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
    """An error instead of the step with this number, wherever its tokens are chosen."""
    calls, ahead = itertools.count(), llm._executable.ahead

    def due() -> None:
        if next(calls) == after:
            raise error

    def interrupted(plain: Any) -> Any:
        def one(*args: Any) -> Any:
            due()
            return plain(*args)

        return one

    def steps(*args: Any) -> Any:
        with contextlib.closing(cast(Any, ahead(*args))) as run:
            for tokens in run:
                due()
                yield tokens

    monkeypatch.setattr(llm._executable, "run", interrupted(llm._executable.run))
    monkeypatch.setattr(llm._executable, "sample", interrupted(llm._executable.sample))
    monkeypatch.setattr(llm._executable, "ahead", steps)


def test_ctrl_c_keeps_what_was_streamed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(llm, monkeypatch, KeyboardInterrupt(), 4)
    stream, got = llm.stream(PROMPT, max_tokens=50, ignore_eos=True), []
    with pytest.raises(KeyboardInterrupt):
        for piece in stream:
            got.append(piece.token)
    assert len(got) == 4 and stream.completion.tokens == got and stream.completion.finish_reason == "cancel"
    assert held(llm) == 0
    assert llm.generate(PROMPT, max_tokens=4, ignore_eos=True).tokens == got


def test_ctrl_c_in_generate_gives_all_pages_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(llm, monkeypatch, KeyboardInterrupt(), 4)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, "JULIET:"], max_tokens=50, ignore_eos=True)
    assert held(llm) == 0


def test_an_error_in_a_step_reaches_the_caller_and_the_model_stays_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(llm, monkeypatch, BackendError("the device fell off"), 3)
    stream = llm.stream(PROMPT, max_tokens=9, ignore_eos=True)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(BackendError, match="fell off"):
        next(stream)
    assert held(llm) == 0
    assert len(llm.generate(PROMPT, max_tokens=9, ignore_eos=True).tokens) == 9


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "said", "fix"),
    [
        ("a", {"temprature": 1}, "unknown option temprature=1", "did you mean temperature"),
        ("a", {"zzz": 1}, "unknown option zzz=1", "choose from max_tokens"),
        ("a", {"top_p": 2}, "top_p=2 is out of range", "at most 1"),
        ("", {}, "the prompt is empty", ""),
        ([], {}, "the prompt is empty", ""),
        ([[]], {}, "the prompt is empty", ""),
        ([3, 99999], {}, "token 99999 at position 1 .* vocabulary of 1536", "another model"),
        ([3, -1], {}, "token -1 at position 1", ""),
        ([3, "a"], {}, "a prompt of type int", "pass a string or a list"),
        ([[3, "a"]], {}, "is not a list of token ids", "integers"),
        (3, {}, "a prompt of type int", "pass a string"),
        (b"a", {}, "a prompt of type bytes", "pass a string"),
        (None, {}, "a prompt of type NoneType", "pass a string"),
        ([5] * 250, {"max_tokens": 10}, "250 prompt tokens .* = 260, over the context of 256", "max_tokens=6"),
        ([5] * 300, {}, "over the context of 256", "shorten the prompt"),
        (["a", [5] * 300], {}, "over the context of 256", "shorten the prompt"),
    ],
)
def test_a_request_that_cannot_be_honoured(llm: LLM, prompt: Any, options: dict, said: str, fix: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        llm.generate(prompt, **options)
    assert caught.value.fix and fix in caught.value.fix
    assert held(llm) == 0 and not llm._engine._handles


def test_streams_have_one_continuation(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n=2 in a stream"):
        llm.stream(PROMPT, n=2)
    with pytest.raises(RequestError, match="n=2 in a stream"):
        llm.stream_chat([{"role": "user", "content": "Hi"}], n=2)


def test_a_score_that_does_not_fit_is_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finial.llm.free_memory", lambda: 1_000_000)
    with pytest.raises(RequestError, match=r"logits of 100 positions take 0.00 GB|logits of 100 positions"):
        llm.score([5] * 100)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"max_context": 2000}, RequestError, "max_context=2000 is over the model's own 1024"),
        ({"max_context": 0}, RequestError, "max_context=0"),
        ({"max_batch": 0}, RequestError, "max_batch=0"),
        ({"page_size": 2.5}, RequestError, "page_size=2.5"),
        ({"max_batch": 9, "max_step_tokens": 8}, RequestError, "max_step_tokens=8 is less than max_batch=9"),
        ({"format": "q9_9"}, ModelError, "q9_9"),
        ({"format": "q6_k"}, ModelError, "q6_k can be read, not written"),
        ({"format": "fp8", "backend": "cpu"}, BackendError, r"cpu backend has no kernel for .* in fp8"),
        ({"kv_format": "int3"}, ModelError, "int3"),
        ({"backend": "abacus"}, BackendError, "abacus"),
        ({"model": "no/such/model"}, FinialError, "no/such/model"),
    ],
)
def test_a_model_that_cannot_be_opened_as_asked(options: dict, kind: type[FinialError], said: str) -> None:
    with pytest.raises(kind, match=said):
        LLM(**{"backend": "reference", **options})


def test_cache_memory() -> None:
    sizes: dict[str, Any] = {"max_batch": 4, "page_size": 16}
    assert size_cache(1000, 100, free=None, max_context=None, **sizes) == (1000, 63 * 4)
    assert size_cache(1000, 100, free=10**9, max_context=100, **sizes) == (100, 7 * 4)
    # a quarter of 10 MB holds 25,000 positions of 100 bytes: the model's 40,000 are cut, one sequence fills the cache
    assert size_cache(40_000, 100, free=10**7, max_context=None, **sizes) == (25_000, 1563)
    # asked for, so more than a quarter may go, and the batch shares one sequence's worth
    assert size_cache(40_000, 100, free=10**7, max_context=40_000, **sizes) == (40_000, 2500)
    with pytest.raises(
        RequestError, match=r"50000 tokens needs 5.00 GB .*100,000 bytes a token.* 1.00 GB is free"
    ) as no:
        size_cache(60_000, 100_000, free=10**9, max_context=50_000, **sizes)
    assert "max_context=10000" in no.value.fix
    with pytest.raises(RequestError, match=r"0.00 GB is free"):
        size_cache(60_000, 100_000, free=-5, max_context=None, **sizes)


def test_without_a_tokenizer_ids_go_in_and_out(llm: LLM, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    with LLM(tmp_path, backend="cpu", threads=1, max_context=64) as bare:
        ids = llm.tokenizer.encode(PROMPT)
        done = bare.generate(ids, max_tokens=5, ignore_eos=True)
        assert done.tokens == llm.generate(ids, max_tokens=5, ignore_eos=True).tokens and done.text == ""
        assert not bare.info.tokenizer
        with pytest.raises(ModelError, match="has no tokenizer"):
            bare.generate(PROMPT)
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            bare.generate(ids, stop="x")


def test_without_a_chat_template_chat_says_so(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path)
    with (
        LLM(tmp_path, backend="cpu", threads=1, max_context=64) as plain,
        pytest.raises(RequestError, match="has no chat template") as caught,
    ):
        plain.chat([{"role": "user", "content": "Hi"}])
    assert "generate" in caught.value.fix


def test_a_closed_model_says_so() -> None:
    model = LLM("demo", backend="cpu", threads=1, max_context=64)
    stream = model.stream(PROMPT, max_tokens=30, ignore_eos=True)
    next(stream)
    model.close()
    model.close()
    assert stream.completion.finish_reason == "cancel"
    with pytest.raises(RequestError, match="closed"):
        model.generate(PROMPT)


def test_the_front_door() -> None:
    assert finial.LLM is LLM and finial.SamplingParams is SamplingParams
    assert set(finial.__all__) <= set(dir(finial))
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = finial.LLMM


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_a_reserved_cache_is_resident_before_anything_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with LLM("demo", max_batch=32) as llm:
        assert llm.info.kv_bytes > 20 << 20  # so that it stands out
    before = resident()
    with LLM("demo", max_batch=32) as llm:
        lazy = resident() - before
    before = resident()
    with LLM("demo", max_batch=32, reserve=True) as llm:
        taken = resident() - before
        assert taken - lazy > 0.7 * llm.info.kv_bytes  # a few large pages are taken in any case


@pytest.mark.skipif(not hasattr(os, "confstr_names") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's")
def test_memory_that_was_freed_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    held = [bytes(4096) for _ in range(16384)]  # 64 MiB in pieces of the C library's heap
    del held[:-1]  # the last one keeps the heap from shrinking by itself
    before = resident()
    trim_heap()
    assert before - resident() > 32 << 20
    assert len(held) == 1


_NEW_MODULES = """
import sys
from finial import LLM
with LLM("demo", backend="cpu", max_batch=1) as llm:
    before = set(sys.modules)
    llm.generate("ROMEO:", max_tokens=8, temperature=0.8, top_p=0.95, seed=1)
    print(*sorted(set(sys.modules) - before))
"""


def test_the_first_request_loads_no_module() -> None:
    done = subprocess.run([sys.executable, "-c", _NEW_MODULES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []  # somebody waits for its first token


def test_the_bandwidth_of_a_loaded_model_is_of_what_its_step_reads() -> None:
    with LLM("demo", backend="cpu") as llm:
        reads = step_reads(llm, rows=1, length=50)
        small, large = (measure_read(llm, n, seconds=0.01) for n in (reads, 4 * MOST_BYTES))
    assert small is not None and small.over_bytes == reads and small.gb_s > 0.1
    assert large is not None and large.over_bytes <= MOST_BYTES and not large.in_cache
