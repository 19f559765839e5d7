"""The loop over an executable whose logits betray any wrong page, slot, position or length."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fake_executable import FakeExecutable, expected_logits, new_engine
from finial.engine.generate import Engine
from finial.engine.handle import Handle, StopText
from finial.engine.sampling import SamplingParams, greedy, log_probabilities
from finial.errors import BackendError, ModelError, RequestError


class Letters:
    """A tokenizer of 50 pieces: letters, one of two characters, one that comes in two halves (ids 40, 41)."""

    def __init__(self) -> None:
        self.half = False

    def push(self, token: int) -> str:
        if token == 40:
            self.half = True
            return ""
        whole, self.half = self.half and token == 41, False
        return "é" if whole else "st" if token == 30 else chr(97 + token % 26)

    def finish(self) -> str:
        return "�" if self.half else ""


def solo(tokens: list[int], params: SamplingParams, **options: object) -> Handle:
    engine = new_engine(**options)
    handle = engine.submit(tokens, params)
    engine.finish([handle])
    return handle


def greedy_by_hand(tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(greedy(expected_logits(tokens)))
    return tokens[-count:]


class Scripted(FakeExecutable):
    """Says the tokens it is told to, one after another, whatever the prompt; a prompt has one token."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.script = script

    def run(self, step: object) -> np.ndarray:
        logits = super().run(step)  # type: ignore[arg-type]
        for out, row in enumerate(step.wanted):  # type: ignore[attr-defined]
            logits[out, self.script[step.positions[row]]] = 100  # type: ignore[attr-defined]
        return logits


def say(script: list[int], **options: object) -> Handle:
    options.setdefault("max_tokens", len(script))
    engine = new_engine(Scripted(script), eos_ids=[49])
    handle = engine.submit([0], SamplingParams(**options), detokenizer=Letters())
    engine.finish([handle])
    assert engine.pages_held == 0
    return handle


def ids(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


# --- one sequence -----------------------------------------------------------------------------------------------


def test_greedy_continuation_is_the_one_computed_by_hand() -> None:
    handle = solo([5, 6, 7], SamplingParams(max_tokens=40))
    assert handle.tokens == greedy_by_hand([5, 6, 7], 40)
    assert handle.finish_reason == "length" and [piece.token for piece in handle.pieces] == handle.tokens
    assert [piece.finish_reason for piece in handle.pieces] == [None] * 39 + ["length"]


@pytest.mark.parametrize("cache", [True, False])
def test_work_done_with_and_without_cache(cache: bool) -> None:
    executable = FakeExecutable()
    engine = new_engine(executable, cache=cache)
    handle = engine.submit(list(range(10)), SamplingParams(max_tokens=4))
    engine.finish([handle])
    assert handle.tokens == greedy_by_hand(list(range(10)), 4)
    assert executable.steps == ([10, 1, 1, 1] if cache else [10, 11, 12, 13])
    assert executable.wanted_rows == 4, "logits are computed for the rows that are sampled and no others"


def test_a_second_request_computes_only_what_is_new() -> None:
    executable = FakeExecutable()
    engine = new_engine(executable)
    first = engine.submit(list(range(9)), SamplingParams(max_tokens=1))
    engine.finish([first])
    second = engine.submit([*range(8), 30], SamplingParams(max_tokens=1))
    engine.finish([second])
    assert executable.steps == [9, 1] and second.sequence.reused == 8
    assert second.tokens == greedy_by_hand([*range(8), 30], 1)


def test_end_of_text_and_stop_ids() -> None:
    assert say([3, 49, 5, 6]).tokens == [3, 49]
    assert say([3, 49, 5, 6]).text == "d"
    ignored = say([3, 49, 5, 6], ignore_eos=True)
    assert ignored.tokens == [3, 49, 5, 6] and ignored.finish_reason == "length"
    stopped = say([3, 4, 5, 6], stop_ids=[5], ignore_eos=True)
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == ([3, 4, 5], "de", "stop")


def test_default_length_is_what_the_context_has_room_for() -> None:
    handle = solo([1] * 100, SamplingParams(), max_context=120)
    assert len(handle.tokens) == 20 and handle.finish_reason == "length"


def test_no_new_tokens() -> None:
    handle = solo([1, 2], SamplingParams(max_tokens=0))
    assert (handle.tokens, handle.finish_reason, handle.pieces[-1].token) == ([], "length", None)
    scored = solo([1, 2, 3], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert len(scored.prompt_logprobs) == 2 and scored.tokens == []


def test_log_probabilities_of_output_and_prompt() -> None:
    params = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=2, temperature=1.5, top_k=3, seed=1)
    prompt = list(range(20))
    handle = solo(prompt, params, max_step_tokens=7)
    whole = prompt + handle.tokens
    for i, piece in enumerate(handle.pieces):
        assert piece.logprobs == log_probabilities(expected_logits(whole[: 20 + i]), handle.tokens[i], 3)
    wanted = [log_probabilities(expected_logits(prompt[:i]), prompt[i], 2) for i in range(1, 20)]
    assert handle.prompt_logprobs == wanted


def test_teacher_forced_logits() -> None:
    engine = new_engine(max_step_tokens=4)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    handle = engine.submit(tokens, SamplingParams(max_tokens=0), keep_logits=True)
    engine.finish([handle])
    wanted = np.stack([expected_logits(tokens[: i + 1]) for i in range(len(tokens))])
    np.testing.assert_array_equal(np.concatenate(handle.prompt_logits), wanted)


def test_timings() -> None:
    handle = solo([1], SamplingParams(max_tokens=5))
    timings = handle.timings
    assert timings.tokens == 5
    assert timings.submitted < timings.first_token < timings.last_token
    assert timings.ttft_s == timings.first_token - timings.submitted
    assert timings.decode_tok_s == 4 / (timings.last_token - timings.first_token)
    assert solo([1], SamplingParams(max_tokens=1)).timings.decode_tok_s is None


# --- stop strings -----------------------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_is_not_returned_and_nothing_of_it_leaks() -> None:
    handle = say(ids("helloworldxyz"), stop=["world"])
    assert (handle.text, handle.finish_reason) == ("hello", "stop")
    assert handle.tokens == ids("helloworld")
    assert [piece.text for piece in handle.pieces] == [*"hello", "", "", "", "", ""]


def test_what_only_began_like_a_stop_string_comes_later() -> None:
    handle = say(ids("abworab"), stop=["world"])
    assert handle.text == "abworab"
    assert [piece.text for piece in handle.pieces] == ["a", "b", "", "", "", "wora", "b"]


def test_text_held_back_comes_with_the_end() -> None:
    handle = say(ids("abwor"), stop=["world"])
    assert handle.text == "abwor" and handle.pieces[-1].text == "wor" and handle.finish_reason == "length"


def test_half_a_character_is_held_back_too() -> None:
    assert [piece.text for piece in say([0, 40, 41, 1]).pieces] == ["a", "", "é", "b"]
    assert say([0, 40]).text == "a�"
    assert say([0, 40, 41, 1], stop="é").text == "a"


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_text_equals_a_search_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    stream, got, met = StopText(stops), "", False
    for piece in pieces:
        text, met = stream.push(piece)
        got += text
        if met:
            break
    else:
        got += stream.finish()
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    # a longer stop string that begins earlier may still have been incomplete when a shorter one was met
    assert met == bool(ends)
    assert whole.startswith(got)
    if not met:
        assert got == whole
    else:
        assert got == whole[: len(got)] and any(whole.startswith(stop, len(got)) for stop in stops)
        assert len(got) >= min(ends)


# --- together ---------------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=24),
        st.integers(1, 12),
        st.sampled_from(["greedy", "seeded", "penalised", "scored"]),
        st.integers(0, 10),
    ),
    min_size=1,
    max_size=6,
)
KINDS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 11},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "seed": 3, "logprobs": 2},
    "scored": {"prompt_logprobs": 1, "logprobs": 0},
}


@settings(max_examples=120)
@given(
    requests=REQUESTS,
    page_size=st.integers(1, 9),
    spare=st.integers(0, 20),
    max_batch=st.integers(1, 5),
    extra=st.integers(0, 20),
    reuse=st.booleans(),
    cache=st.booleans(),
    interrupts=st.sets(st.integers(0, 12), max_size=2),
)
def test_tokens_and_logprobs_do_not_depend_on_what_runs_beside(
    requests: list[tuple[list[int], int, str, int]],
    page_size: int,
    spare: int,
    max_batch: int,
    extra: int,
    reuse: bool,
    cache: bool,
    interrupts: set[int],
) -> None:
    """Any chunks, batch, page size, reuse, preemption (few pages) and interruption: as alone, with everything plain."""
    executable = FakeExecutable()
    executable.fail_at = {number: KeyboardInterrupt() for number in interrupts}
    engine = new_engine(
        executable,
        pages=-(-36 // page_size) + spare,
        page_size=page_size,
        max_batch=max_batch,
        max_step_tokens=max_batch + extra,
        prefix_reuse=reuse,
        cache=cache,
    )
    handles: list[Handle] = []
    number = 0
    while len(handles) < len(requests) or any(not handle.finished for handle in handles):
        for tokens, count, kind, arrival in sorted(requests, key=lambda request: request[3])[len(handles) :]:
            if arrival <= number:
                handles.append(engine.submit(tokens, SamplingParams(max_tokens=count, **KINDS[kind])))
        try:
            engine.step()
        except KeyboardInterrupt:
            assert engine.pages_held == 0
        engine._pool.check()
        number += 1
    assert engine.pages_held == 0
    for handle in handles:
        assert handle.error is None
        prompt = handle.sequence.tokens[: handle.sequence.prompt_length]
        alone = solo(prompt, handle.params, pages=200, page_size=1, max_step_tokens=500, prefix_reuse=False)
        assert handle.tokens == alone.tokens
        assert handle.pieces == alone.pieces
        assert handle.prompt_logprobs == alone.prompt_logprobs


def test_pages_run_out_and_everybody_still_gets_the_same() -> None:
    engine = new_engine(pages=8, page_size=2, max_context=16, prefix_reuse=False)
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    handles = [engine.submit(prompt, SamplingParams(max_tokens=10)) for prompt in prompts]
    engine.finish(handles)
    assert sum(handle.sequence.preempted for handle in handles) > 0
    assert [handle.tokens for handle in handles] == [greedy_by_hand(prompt, 10) for prompt in prompts]


def test_samples_of_one_seed_differ_and_repeat() -> None:
    params = SamplingParams(max_tokens=12, temperature=2.0, seed=5)
    engine = new_engine()
    first = [engine.submit([1, 2], params, sample=i) for i in range(3)]
    engine.finish(first)
    texts = [tuple(handle.tokens) for handle in first]
    assert len(set(texts)) == 3
    again = engine.submit([1, 2], params, sample=2)
    engine.finish([again])
    assert tuple(again.tokens) == texts[2]


def test_without_a_seed_texts_differ_and_the_seed_is_told() -> None:
    params = SamplingParams(max_tokens=12, temperature=2.0)
    first, second = solo([1, 2], params), solo([1, 2], params)
    assert first.tokens != second.tokens
    seeded = SamplingParams(max_tokens=12, temperature=2.0, seed=first.seed)
    assert solo([1, 2], seeded).tokens == first.tokens


# --- refusals and failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "params", "said"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 50], {}, "token 50 at position 1 of the prompt is outside the vocabulary of 50"),
        ([-1], {}, "token -1 at position 0"),
        (["a"], {}, "is not a list of token ids"),
        ([1.5], {}, "is not a list of token ids"),
        ([1], {"max_tokens": 128}, "= 129, over the context of 128"),
        ([1] * 128, {}, "over the context of 128"),
        ([1], {"stop_ids": [77]}, "stop_ids names token 77"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused_at_once(tokens: list, params: dict, said: str) -> None:
    engine = new_engine()
    with pytest.raises(RequestError, match=said) as caught:
        engine.submit(tokens, SamplingParams(**params))
    assert caught.value.fix
    assert not engine.step()


def test_a_failing_step_fails_its_requests_and_no_others() -> None:
    executable = FakeExecutable()
    executable.fail_at = {2: BackendError("out of luck")}
    engine = new_engine(executable, max_batch=2)
    handles = [engine.submit([i, i, i, i, i], SamplingParams(max_tokens=6)) for i in range(3)]
    engine.finish(handles)
    assert [handle.finish_reason for handle in handles] == ["error", "error", "length"]
    assert str(handles[0].error) == "out of luck" and len(handles[0].tokens) == 2
    assert handles[2].tokens == greedy_by_hand([2] * 5, 6)
    assert engine.pages_held == 0
    # the pages of the failed ones were half-written: nobody may share them
    again = engine.submit([0] * 5, SamplingParams(max_tokens=6))
    engine.finish([again])
    assert again.sequence.reused == 0 and again.tokens == greedy_by_hand([0] * 5, 6)


def test_logits_that_are_not_numbers_fail_the_request() -> None:
    executable = FakeExecutable()
    executable.nan_at = {1}
    engine = new_engine(executable)
    handle = engine.submit([1, 2], SamplingParams(max_tokens=6))
    engine.finish([handle])
    assert handle.finish_reason == "error" and isinstance(handle.error, ModelError)
    assert handle.pieces[-1].token is None and len(handle.tokens) == 1
    fine = engine.submit([1, 2], SamplingParams(max_tokens=2))
    engine.finish([fine])
    assert fine.finish_reason == "length"


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancel_at_every_stage(steps: int) -> None:
    engine = new_engine(max_step_tokens=8)
    handle = engine.submit(list(range(12)), SamplingParams(max_tokens=50))
    other = engine.submit([7], SamplingParams(max_tokens=5))
    for _ in range(steps):
        engine.step()
    engine.cancel(handle)
    assert handle.finish_reason == "cancel" and handle.pieces[-1].finish_reason == "cancel"
    assert handle.tokens == greedy_by_hand(list(range(12)), 50)[: len(handle.tokens)]
    engine.cancel(handle)
    engine.finish([other])
    engine.cancel(other)
    assert other.finish_reason == "length" and other.tokens == greedy_by_hand([7], 5)
    assert engine.pages_held == 0


def test_ctrl_c_cancels_what_was_waited_for_and_keeps_what_came() -> None:
    executable = FakeExecutable()
    executable.fail_at = {4: KeyboardInterrupt()}
    engine = new_engine(executable)
    handle = engine.submit([1, 2], SamplingParams(max_tokens=20))
    with pytest.raises(KeyboardInterrupt):
        engine.finish([handle])
    assert handle.finish_reason == "cancel" and handle.tokens == greedy_by_hand([1, 2], 4)
    assert engine.pages_held == 0
    after = engine.submit([1, 2], SamplingParams(max_tokens=3))
    engine.finish([after])
    assert after.tokens == greedy_by_hand([1, 2], 3)


def test_a_closed_engine_cancels_and_refuses() -> None:
    executable = FakeExecutable()
    engine = new_engine(executable)
    handle = engine.submit([1], SamplingParams(max_tokens=9))
    engine.step()
    gone = weakref.ref(executable)
    del executable
    engine.close()
    engine.close()
    assert gone() is None and not engine.step()
    assert handle.finish_reason == "cancel" and engine.pages_held == 0
    with pytest.raises(RequestError, match="closed"):
        engine.submit([1])


@pytest.mark.parametrize("options", [{"pages": 0}, {"page_size": True}, {"max_batch": 0}, {"max_batch": 20}])
def test_sizes_are_checked(options: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        new_engine(**options)


# --- threads and tasks ------------------------------------------------------------------------------------------


def test_threads_that_wait_drive_each_other() -> None:
    executable = FakeExecutable()
    engine = new_engine(executable, max_batch=4)
    handles = [engine.submit([i, 1], SamplingParams(max_tokens=30)) for i in range(6)]
    results: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        handle, seen = handles[i], 0
        while not handle.finished:
            engine.wait(handle, seen)
            seen = len(handle.pieces)
        results[i] = handle.tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == {i: greedy_by_hand([i, 1], 30) for i in range(6)}
    assert len(executable.steps) == 60, "four side by side, then the other two"


def test_tasks_share_steps_and_one_that_is_cancelled_leaves_the_others() -> None:
    executable = FakeExecutable()
    engine = new_engine(executable, max_batch=8)

    async def ask(i: int) -> list[int]:
        handle = engine.submit([i, 1], SamplingParams(max_tokens=20))
        await engine.finish_async([handle])
        return handle.tokens

    async def main() -> list[list[int]]:
        doomed = engine.submit([9, 9], SamplingParams(max_tokens=100))
        task = asyncio.create_task(engine.finish_async([doomed]))
        others = [asyncio.create_task(ask(i)) for i in range(6)]
        while len(doomed.tokens) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        results = await asyncio.gather(*others)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert doomed.finish_reason in (None, "cancel")
        return results

    results = asyncio.run(main())
    assert results == [greedy_by_hand([i, 1], 20) for i in range(6)]
    assert len(executable.steps) < 60
    engine.close()
    assert engine.pages_held == 0


def test_cancel_from_a_destructor_in_the_middle_of_a_step() -> None:
    """A garbage collection may run anywhere, also where the engine's lock is held."""
    executable = FakeExecutable()
    engine = new_engine(executable)
    first, second = (engine.submit([i], SamplingParams(max_tokens=10)) for i in range(2))

    class Dropped:
        def __del__(self) -> None:
            engine.cancel(first)

    plain = executable.run

    def run(step: object) -> np.ndarray:
        if len(executable.steps) == 3:
            dropped = Dropped()
            dropped.itself = dropped
            del dropped
            gc.collect()
        return plain(step)  # type: ignore[arg-type]

    executable.run = run  # type: ignore[method-assign]
    engine.finish([second])
    assert first.finish_reason == "cancel" and 3 <= len(first.tokens) <= 5
    assert second.tokens == greedy_by_hand([1], 10)
    with engine._turn:
        Engine.cancel(engine, second)
    assert engine.pages_held == 0
