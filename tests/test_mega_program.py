"""The megakernel as a user meets it, through a whole LLM on the twin: texts, seeds, ends, choice, refusals, failure."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmarks.gpu import mega

import models
from cuda_twin import CXX, TwinDevice
from finial.backends.cuda import driver, run_feeds, ways
from finial.backends.cuda.device import Launch
from finial.backends.cuda.mega import layout, table
from finial.backends.cuda.mega import program as megakernel
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.program import VARIANTS
from finial.backends.cuda.program import CudaProgram, headroom
from finial.backends.cuda.ways import VARIABLE, Trial, TryOut
from finial.cli import look
from finial.engine import runs
from finial.errors import BackendError
from finial.llm import LLM
from test_mega_table import SMALL

if CXX is None:
    assert os.environ.get("CI") != "true", "no g++: see .ci/run"
    pytest.skip("no g++ here; install it to run the CUDA kernels on the CPU", allow_module_level=True)

ROW = np.zeros((1, 1), np.int32)
PROMPTS = [[5, 6, 7], [9, 3, 30, 31, 8]]  # eight rows in all: more would be rounded to bf16 in the graph's tiles


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        if not (root / name).exists():
            models.save(name, root / name)
        return root / name

    return of


Load = Callable[..., tuple[LLM, TwinDevice]]


@pytest.fixture
def load(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    """An LLM on a twin whose blocks are at work at once, and that twin."""

    def of(
        way: str, name: str = "qwen3", *, refuses: str = "", limit_s: float = 300.0, **options: Any
    ) -> tuple[LLM, TwinDevice]:
        monkeypatch.setattr(megakernel, "LIMIT_NS", int(limit_s * 1e9))  # a busy machine may stand still for long
        device = TwinDevice(multiprocessors=3, refuses_waiting=refuses)
        monkeypatch.setattr(driver, "open_device", lambda index=0: device)
        monkeypatch.setenv(VARIABLE, way)
        monkeypatch.setattr(runs, "AHEAD_S", 1e6)  # a step takes long here
        monkeypatch.setattr(run_feeds, "TRIAL_STEPS", 4)
        options = {"max_context": 96, "max_batch": 4, "kv_format": "f32"} | options
        return LLM(str(saved(name)), backend="cuda", **options), device

    return of


def texts(llm: LLM, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    """The tokens of prompts side by side."""
    return [completion.tokens for completion in llm.generate(prompts, **sampling)]


@pytest.fixture
def reference(saved: Callable[[str], Path]) -> Callable[..., list[list[int]]]:
    def of(name: str, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        with LLM(str(saved(name)), backend="reference", max_context=96, max_batch=4, kv_format="f32") as llm:
            return texts(llm, prompts, **sampling)

    return of


@pytest.mark.parametrize(
    "way, name", [("mega", "qwen3"), ("mega", "qwen2"), ("mega-fused", "qwen3"), ("mega-heads", "qwen3")]
)
def test_greedy_text_is_the_references(
    way: str, name: str, load: Load, reference: Callable[..., list[list[int]]]
) -> None:
    """More tokens than a launch has steps, one row and two."""
    llm, device = load(way, name)
    sampling = {"max_tokens": 21, "temperature": 0.0, "ignore_eos": True}
    assert texts(llm, PROMPTS[:1], **sampling) == reference(name, PROMPTS[:1], **sampling)
    notes = [f"decoding 1 row by {way}, as FINIAL_CUDA says"]
    if (way, name) == ("mega", "qwen3"):
        assert texts(llm, PROMPTS, **sampling) == reference(name, PROMPTS, **sampling)
        notes.append("decoding up to 2 rows by mega, as FINIAL_CUDA says")
    assert "mega" in device.templates and llm.notes == notes


def test_seeds_and_stop_tokens_mean_the_same(load: Load, reference: Callable[..., list[list[int]]]) -> None:
    """Three rows, so that the bucket of four has one that does nothing; of which one ends in the middle of a launch."""
    llm, device = load("mega")
    prompts = [[5, 6, 7], [9, 3, 30], [31, 8]]
    sampling = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 11, "ignore_eos": True}
    expected = reference("qwen3", prompts, **sampling)
    assert texts(llm, prompts, **sampling) == expected
    assert "decoding up to 4 rows by mega, as FINIAL_CUDA says" in llm.notes
    ended = {**sampling, "stop_ids": [expected[0][5]]}
    assert texts(llm, prompts, **ended) == reference("qwen3", prompts, **ended)
    assert "mega" in device.templates


def test_a_run_that_is_left_changes_nothing_for_the_next(load: Load, reference: Callable[..., list[list[int]]]) -> None:
    """Launches are under way when the reader goes; what they wrote is written again."""
    llm, device = load("mega")
    sampling = {"max_tokens": 21, "temperature": 0.0, "ignore_eos": True}
    (expected,) = reference("qwen3", PROMPTS[:1], **sampling)
    stream = llm.stream(PROMPTS[0], **sampling)
    for taken, _ in enumerate(stream):
        if taken == 4:
            break
    stream.close()
    assert "mega" in device.templates
    assert texts(llm, [PROMPTS[0], PROMPTS[0] + expected[:4]], **sampling | {"max_tokens": 9}) == [
        expected[:9],
        expected[4:13],
    ]


def test_a_table_that_is_wrong_does_not_run(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any, **options: Any) -> Plan:
        made = make_plan(*given, **options)
        made.table[:, :, layout.WAIT][made.table[:, :, layout.KIND] == layout.TOKEN] = -1
        return made

    monkeypatch.setattr(megakernel, "make_plan", wrong)
    llm, _ = load("auto")
    for name, note in zip(VARIANTS, llm.notes, strict=True):
        assert note.startswith(f"not by {name}: its table for this shape and GPU is wrong") and "no order" in note


def test_a_launch_that_gives_up_changes_no_token(
    load: Load,
    reference: Callable[..., list[list[int]]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block's wait is made longer than any arrival: the steps before are kept, the graph does the others."""
    llm, device = load("mega", limit_s=2.0)
    sampling = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
    expected = reference("qwen3", PROMPTS, **sampling)
    launched = device.launch
    launches: list[int] = []

    def spoilt(launch: Any) -> None:
        launches.append(1)
        if len(launches) == 3:  # a counter behind: its waits end in vain
            (session,) = sessions(llm)
            device.upload(session.addresses["counters"], np.full(1, -1000, np.int32).view(np.uint32))
        launched(launch)

    monkeypatch.setattr(device, "launch", spoilt)
    with caplog.at_level(logging.WARNING):
        assert texts(llm, PROMPTS, **sampling) == expected
    said = [record.getMessage() for record in caplog.records if record.name == "finial.cuda"]
    assert len(said) == 1 and "of the megakernel waited in vain at entry" in said[0]
    assert llm.notes[-1].startswith("decoding by graph from now on: block ")
    before = len(launches)
    assert texts(llm, PROMPTS, **sampling) == expected  # by graph, without another word
    assert len(launches) == before and len(caplog.records) == 1


def sessions(llm: LLM) -> list[megakernel.Session]:
    return list(llm._executable._states[0].sessions.values())


Timed = Callable[..., None]
TIMES = "graph 1000.000 ms a step, mega 500.000 ms, mega-heads {} ms, mega-fused {} ms"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """All ways run, over a cache of their own; only their times are made up, and where asked their tokens spoilt."""
    real = CudaProgram._try_out

    def of(seconds: dict[str, float], spoilt: str = "") -> None:
        def made_up(self: CudaProgram, page_size: int) -> TryOut:
            run = real(self, page_size)

            def one(rows: int, by_mega: bool) -> Trial:
                found, name = run(rows, by_mega), self.ways.name if by_mega else "graph"
                assert found.step_s > 0 and found.tokens.shape == (4, rows)
                return Trial(seconds.get(name, 1.0), found.tokens + (by_mega and name == spoilt))

            return one

        monkeypatch.setattr(CudaProgram, "_try_out", made_up)

    return of


@pytest.mark.parametrize(
    "heads_s, fused_s, chosen",
    [(0.4, 0.45, "mega-heads"), (0.49, 0.48, "mega-fused"), (0.49, 0.499, "mega")],
)
def test_the_fastest_way_is_found_by_trying_all(
    heads_s: float, fused_s: float, chosen: str, load: Load, timed: Timed, reference: Callable[..., list[list[int]]]
) -> None:
    """What adds in the order of arrival must be clearly faster; who loses gives its memory back."""
    timed({"mega": 0.5, "mega-heads": heads_s, "mega-fused": fused_s})
    llm, device = load("auto")
    note = f"decoding 1 row by {chosen}: " + TIMES.format(f"{1e3 * heads_s:.3f}", f"{1e3 * fused_s:.3f}")
    assert llm.notes == [note]  # at load
    program = llm._executable._programs[0]
    assert program.ways.mega is not None and program.ways.mega.variant == VARIANTS[chosen]
    held = sum(device._sizes.values())
    program.ways.mega.close()
    assert held - sum(device._sizes.values()) >= program.ways.mega.nbytes > held / 5  # one copy, not three
    assert held < 2.5 * program.ways.mega.nbytes + llm.info.kv_bytes + (8 << 20)


def test_graph_stays_where_it_is_faster(load: Load, timed: Timed, reference: Callable[..., list[list[int]]]) -> None:
    timed(dict.fromkeys(VARIANTS, 2.0))
    llm, device = load("auto")
    assert llm.notes[0].startswith("decoding 1 row by graph: graph 1000.000 ms a step, mega 2000.000 ms")
    device.templates.clear()
    sampling = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    assert texts(llm, PROMPTS[:1], **sampling) == reference("qwen3", PROMPTS[:1], **sampling)
    assert "mega" not in device.templates


def test_a_variant_with_other_tokens_is_not_taken(load: Load, timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that there is no time for."""
    timed({"mega": 0.4, "mega-heads": 0.3}, spoilt="mega")
    clock = iter([0.0, 1.0, 50.0, 61.0, 70.0, 83.0])  # 49 seconds of the first 61 are the graph's
    monkeypatch.setattr(ways, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    llm, _ = load("auto")
    assert llm.notes == [
        "decoding 1 row by mega-heads: graph 1000.000 ms a step, mega-heads 300.000 ms",
        "not by mega: its tokens differ from the graph's (400.000 ms a step)",
        "not by mega-fused: not tried, the others took 25 s of the load",
    ]


def test_further_rows_are_compared_once(load: Load, timed: Timed, reference: Callable[..., list[list[int]]]) -> None:
    timed({"mega": 0.4})
    llm, device = load("auto")
    sampling = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    assert texts(llm, PROMPTS, **sampling) == reference("qwen3", PROMPTS, **sampling)
    assert llm.notes[-1] == "decoding up to 2 rows by mega: graph 1000.000 ms a step, mega 400.000 ms"
    assert len(llm.notes) == 2 and "mega" in device.templates


def test_a_run_goes_on_where_blocks_no_longer_attend_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch, reference: Callable[..., list[list[int]]]
) -> None:
    """Over the bound the same streams run with attention split, in the middle of a text."""
    monkeypatch.setattr(table, "whole_positions", lambda shape, rows: 16)
    llm, _ = load("mega-heads")
    sampling = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
    assert texts(llm, PROMPTS[:1], **sampling) == reference("qwen3", PROMPTS[:1], **sampling)
    assert {(1, False, True), (1, False, False)} == set(llm._executable._states[0].sessions)


def test_why_the_megakernel_does_not_run_is_said(load: Load) -> None:
    reason = "the GPU is shared by way of MPS (CUDA_MPS_PIPE_DIRECTORY)"
    llm, device = load("auto", refuses=reason)
    assert llm.notes == [f"decoding by graph, not by megakernel: {reason}"]
    texts(llm, PROMPTS, max_tokens=4, temperature=0.0)
    assert "mega" not in device.templates
    with pytest.raises(BackendError, match="the megakernel does not run this model here: the GPU is shared") as caught:
        load("mega", refuses=reason)
    assert "leave FINIAL_CUDA away" in caught.value.fix
    llm, _ = load("auto", format="f32")
    assert llm.notes == ["decoding by graph, not by megakernel: weights in f32 are not streamed, only bf16, fp8, q8_0"]
    llm, _ = load("graph")
    assert llm.notes == ["decoding by graph, as FINIAL_CUDA says"]
    assert look._load(llm.info.path, "cuda")["notes"] == llm.notes  # `finial info --backend cuda`
    with pytest.raises(BackendError, match="FINIAL_CUDA is 'fast'"):
        load("fast")


@pytest.mark.parametrize(
    "cooperative, mps, environment, expected",
    [
        (True, False, {}, ""),
        (False, False, {}, "this GPU and driver have no cooperative launch"),
        (True, True, {}, "the GPU is shared by way of MPS (says the driver)"),
        (True, False, {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"}, "the GPU is shared by way of MPS (CUDA_MPS_ACTIVE"),
    ],
)
def test_blocks_do_not_wait_where_others_may_take_their_place(
    cooperative: bool, mps: bool, environment: dict[str, str], expected: str
) -> None:
    said = driver._refuses_waiting(cooperative=cooperative, mps=mps, environment=environment)
    assert said.startswith(expected) and bool(said) == bool(expected)


def test_streams_make_room_for_the_cache(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that fits only without them is given their room, and that is said."""
    monkeypatch.setattr(
        CudaProgram, "_try_out", lambda self, page_size: lambda rows, by_mega: Trial(1.0 - by_mega, ROW)
    )
    llm, device = load("auto")
    streams = llm._executable._programs[0].ways.mega
    free, total = device.memory()
    assert streams is not None
    device.allocate(free - headroom(total) - 1024)
    before, positions = llm.info.kv_bytes, llm.info.cache_tokens
    more = streams.nbytes // 2 // (before // positions)
    llm._executable.reserve((positions + more) // 16, 16)
    assert "bytes are wanted for the cache" in llm.notes[-1]


def test_a_trial_that_fails_leaves_the_graph(
    load: Load, monkeypatch: pytest.MonkeyPatch, reference: Callable[..., list[list[int]]]
) -> None:
    def refused(self: TwinDevice, launch: Launch) -> None:
        raise BackendError("NVIDIA's driver reports CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")

    monkeypatch.setattr(TwinDevice, "launch", refused)
    llm, _ = load("auto")
    sampling = {"max_tokens": 5, "temperature": 0.0, "ignore_eos": True}
    assert texts(llm, PROMPTS, **sampling) == reference("qwen3", PROMPTS, **sampling)
    why = "a trial of it failed, NVIDIA's driver reports CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"
    assert llm.notes == [f"decoding by graph, not by megakernel: {why}"]


def test_blocks_that_cannot_all_be_at_work_are_said(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwinDevice, "resident", lambda self, kernel: 2)
    llm, _ = load("auto")
    assert llm.notes == ["decoding by graph, not by megakernel: 2 of its 3 blocks can be at work at once"]


def test_the_comparison_of_make_gpu_runs(load: Load) -> None:
    llm, _ = load("mega")
    row = mega.compare(llm._executable._programs[0], cases=((1, 40),), steps=10, pairs=2)["batch 1, depth 40"]
    assert row["same_first_tokens"] == row["of"] == 10 and row["mega_ms"] > 0 and row["graph_over_mega"] > 0


def test_the_bound_of_attending_alone_can_be_measured(load: Load) -> None:
    llm, _ = load("mega-heads")
    found = mega.alone_or_split(llm._executable._programs[0], cases=((1, 40),), steps=4, pairs=1)
    assert set(found["batch 1, depth 40"]) == {"alone_ms", "split_ms"}


def test_a_recording_that_is_let_go_is_destroyed() -> None:
    """A shape of step that is recorded anew leaves nothing of the old recording in the driver."""
    destroyed: list[int] = []

    class Driver:
        CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
        made = 0

        def __getattr__(self, name: str) -> Callable[..., tuple[int, ...]]:
            values = {"cuStreamEndCapture": (7,), "cuGraphInstantiate": (100 + self.made,)}

            def called(*given: Any) -> tuple[int, ...]:
                if name == "cuGraphExecDestroy":
                    destroyed.append(given[0])
                if name == "cuGraphInstantiate":
                    self.made += 1
                return (0, *values.get(name, ()))

            return called

    device = object.__new__(driver.CudaDevice)
    device._cu, device._context, device._stream, device._functions, device._cache = Driver(), 0, 0, {}, None
    device.arch, device.dependent = "sm_90a", True
    first, second = device.record([]), device.record([])
    device.replay(first)
    assert not destroyed
    first = device.record([])
    assert destroyed == [100]
    del first, second
    assert sorted(destroyed) == [100, 101, 102]


def test_the_driver_is_asked_for_all_blocks_at_once() -> None:
    """What NVIDIA's own bindings are given: no GPU is needed to fill their structs."""
    cu = pytest.importorskip("cuda.bindings.driver", reason='pip install "finial[cuda]"')
    given: list[Any] = []

    class Driver:
        def __getattr__(self, name: str) -> Any:
            return getattr(cu, name)

        def cuCtxSetCurrent(self, context: int) -> tuple[int]:
            return (0,)

        def cuLaunchKernelEx(self, config: Any, *rest: Any) -> tuple[int]:
            given.append((config, *rest))
            return (0,)

        def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, *asked: Any) -> tuple[int, int]:
            assert asked == (77, kernel.threads, kernel.shared)
            return 0, 1

    kernel = make_plan(SMALL, rows=1, multiprocessors=4, shared=99 << 10).kernel(16)
    device = object.__new__(driver.CudaDevice)
    device._cu, device._context, device._stream, device._cache = Driver(), 0, 0, None
    device.multiprocessors, device.arch, device._functions = 4, "sm_90a", {kernel: 77}
    assert device.resident(kernel) == 4
    device.launch(Launch(kernel, (4, 1, 1), kernel.pack(steps=8)))
    config, function, _, _ = given[0]
    assert function == 77 and (config.gridDimX, config.blockDimX) == (4, 9 * 32)
    assert config.sharedMemBytes == kernel.shared and config.numAttrs == 1
    assert config.attrs[0].id == cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    assert config.attrs[0].value.cooperative == 1
