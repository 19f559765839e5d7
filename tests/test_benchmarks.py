"""The CPU benchmark without a model: its statistics, protocol, record, table and run, with a fake engine and probe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cpu.table import best_rival, ratio, render, share

from finial.files.checkpoint import open_checkpoint
from finial.files.convert import convert
from finial.lab import runner
from finial.lab.engines.setup import SetupError, install, make_file, missing
from finial.lab.engines.table import ENGINES, Engine, Places, make_command
from finial.lab.estimate import estimate
from finial.lab.record import Record
from finial.lab.roofline import Floor, peak_for
from finial.lab.runner import Runner
from finial.lab.statistics import paired_ratio, spread
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import FORMATS, LOAD, MEMORY, Group, Workload, check, plan, prompts, value
from finial.machine import describe

DECODE = Workload("decode", "decode", depth=4, new=5, rounds=3)
PROMPT = Workload("prompt", "prompt", depth=8, new=1, rounds=3)

# A fake engine: every token takes `pace` seconds of a clock of its own; knows how to misbehave.
FAKE = """
import os, sys, time
import numpy as np
sys.path.insert(0, {adapters!r})
from serve import serve

class Session:
    precision = "none at all"
    def __init__(self, model, format, threads, context, sequences=8, cache=True, options=None):
        from finial.files.checkpoint import open_checkpoint
        self.vocab = open_checkpoint(model).config.vocab_size if model != "m" else 9
        print("noise on stdout")
        if {fault!r} == "load": raise RuntimeError("no such kernel")
    def run(self, prompts, new, keep):
        if {fault!r} == "die": print("out of everything", file=sys.stderr, flush=True); os._exit(3)
        if {fault!r} == "hang": time.sleep(60)
        if {fault!r} == "short": new -= 1
        times = [{pace} * (i + 1) for i in range(new)]
        return {{"first": [times[0]] * len(prompts), "last": [times[-1]] * len(prompts),
                "tokens": [[1] * new for _ in prompts], "times": [times] * len(prompts)}}
    def score(self, ids, path):
        logits = np.zeros((len(ids), self.vocab), np.float32); logits[:, 1] = 1
        np.save(path, logits)
        return {{"kind": "logits"}}

serve(Session, "fake", "fake 1")
"""


class FakeProbe:
    """A machine that reads 50 GB/s and computes 100 G bf16 operations a second."""

    def now(self, threads: int) -> dict[str, Any]:
        return {"read_gb_s": 50.0, "core_to_core_ns": 55.0, "at": 0.0}

    def peaks(self, threads: int) -> dict[str, float]:
        return {"bf16": 100.0}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes engines whose adapter is a fake; `places` has a file for each."""
    from finial.lab.engines import table as engines

    adapters = str(engines.ADAPTERS)
    monkeypatch.setattr(engines, "ADAPTERS", tmp_path)
    places = Places(tmp_path / "engines", tmp_path / "models")
    places.models.mkdir()
    convert(places.checkpoint("demo"), places.models / "demo-stored.gguf")

    def make(name: str, pace: float = 0.01, fault: str = "") -> Engine:
        (tmp_path / f"fake_{name}.py").write_text(FAKE.format(adapters=adapters, pace=pace, fault=fault))
        return Engine(name, f"fake_{name}.py", "json", "", {"stored": "-stored.gguf"})

    make.places = places  # type: ignore[attr-defined]
    yield make


def run(fake: Any, engines: list[Engine], workloads: tuple[Workload, ...], starts: int = 1) -> Record:
    record = Record.create(
        fake.places.models / "record.json",
        plan={},
        started="now",
        commit="abc",
        busy=0.5,
        machine=describe().to_dict(),
    )
    group = Group("demo", "stored", 2, workloads, starts)
    measuring = Runner(record, fake.places, engines, FakeProbe(), lambda text: None)
    measuring.group(group)
    measuring.verdict(group)
    return record


# --- statistics --------------------------------------------------------------------------------------------------


def test_paired_ratio_follows_the_pairs_not_the_levels() -> None:
    machine = np.array([1, 2, 1, 2, 1, 2, 1, 2, 1, 2], float)  # the state flips between rounds
    found = paired_ratio(list(1.2 * machine), list(machine))
    assert found.median == pytest.approx(1.2)
    assert found.low == pytest.approx(1.2) and found.high == pytest.approx(1.2) and found.shown


def test_interval_that_holds_one_shows_nothing() -> None:
    noise = np.random.default_rng(0).normal(1, 0.1, 20)
    found = paired_ratio(list(noise), list(noise[::-1]))
    assert found.low < 1 < found.high and not found.shown


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(100):
        found = paired_ratio(list(1.1 * rng.lognormal(0, 0.1, 15)), [1.0] * 15, seed)
        hits += found.low <= 1.1 <= found.high
    assert 88 <= hits <= 100


def test_spread_is_relative() -> None:
    assert spread([90, 95, 100, 105, 110]) == pytest.approx(0.05)


# --- workloads ---------------------------------------------------------------------------------------------------


def test_prompts_are_fresh_unless_the_cache_is_kept() -> None:
    assert prompts(DECODE, 1000, 0) == prompts(DECODE, 1000, 5)
    assert prompts(PROMPT, 1000, 0) != prompts(PROMPT, 1000, 1)
    assert prompts(PROMPT, 1000, 1) == prompts(PROMPT, 1000, 1)
    batch = prompts(replace(DECODE, sequences=3), 1000, 0)
    assert len({tuple(p) for p in batch}) == 3 and all(len(p) == 4 and max(p) < 900 for p in batch)


def test_values() -> None:
    reply = {"first": [0.5], "last": [0.9], "tokens": [[1] * 5]}
    assert value(DECODE, reply) == pytest.approx(10)  # four steps in 0.4 s
    assert value(replace(DECODE, kind="first"), reply) == pytest.approx(5)  # 0.5 s over 0.1 s
    assert value(PROMPT, {"first": [0.5], "last": [0.5], "tokens": [[1]]}) == pytest.approx(16)
    both = {"first": [0.5, 0.6], "last": [0.9, 1.0], "tokens": [[1] * 5] * 2}
    assert value(replace(DECODE, sequences=2), both) == pytest.approx(16)  # eight tokens from 0.5 to 1.0 s


def test_unequal_work_is_named() -> None:
    assert check(DECODE, {"first": [0.1], "last": [0.2], "tokens": [[1] * 5]}) == ""
    assert "4" in check(DECODE, {"first": [0.1], "last": [0.2], "tokens": [[1] * 4]})
    assert "backwards" in check(DECODE, {"first": [0.3], "last": [0.2], "tokens": [[1] * 5]})


def test_plans_cover_what_they_promise() -> None:
    full, quick = plan(False, 2), plan(True, 2)
    assert {group.format for group in full} == {*FORMATS, "stored"}
    names = {w.name for group in full for w in group.workloads}
    assert {"decode at depth 32", "decode at depth 4,096", "prompt of 2,048", "8 sequences at once"} <= names
    assert any(group.threads == 1 for group in full) and all(group.threads == 1 for group in plan(False, 1))
    engines = list(ENGINES.values())
    assert 0 < estimate(quick, engines) < estimate(full, engines) / 2


# --- protocol ----------------------------------------------------------------------------------------------------


def test_noise_on_stdout_does_not_reach_the_protocol(fake: Any) -> None:
    worker = Worker(fake("calm").command(fake.places), {})
    assert worker.ask("load", 20, model="m", format="f", threads=1, context=8)["version"] == "fake 1"
    reply = worker.ask("run", 20, prompts=[[1, 2]], new=3, keep=False)
    assert reply["tokens"] == [[1, 1, 1]]
    with pytest.raises(WorkerError, match="nonsense"):
        worker.ask("nonsense", 20)
    assert worker.alive
    worker.close()
    assert not worker.alive


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc for the process's state")
def test_a_worker_is_stopped_between_questions(fake: Any) -> None:
    worker = Worker(fake("calm").command(fake.places), {})
    worker.ask("load", 20, model="m", format="f", threads=1, context=8)
    stat = Path(f"/proc/{worker._process.pid}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stat.read_text().rsplit(")", 1)[1].split()[0] == "T"
    worker.close()


def test_a_dead_and_a_hanging_engine_say_so(fake: Any) -> None:
    for fault, message in (("die", "status 3: out of everything"), ("hang", "within 1 s")):
        worker = Worker(fake("bad", fault=fault).command(fake.places), {})
        worker.ask("load", 20, model="m", format="f", threads=1, context=8)
        with pytest.raises(WorkerError, match=message):
            worker.ask("run", 1, prompts=[[1]], new=1, keep=False)
        assert not worker.alive


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_interleaves_probes_and_saves(fake: Any) -> None:
    record = run(fake, [fake("finial", 0.01), fake("slow", 0.02)], (DECODE, PROMPT))
    data = json.loads(record.path.read_text())
    cell = data["cells"]["demo/stored/2/decode"]
    assert [s["value"] for s in cell["engines"]["finial"]["samples"]] == pytest.approx([100] * 3)
    assert all(s["before"]["read_gb_s"] == 50 for s in cell["engines"]["slow"]["samples"])
    orders = [(s["round"], s["order"]) for row in cell["engines"].values() for s in row["samples"]]
    assert sorted(orders) == [(r, o) for r in range(3) for o in range(2)]
    assert best_rival(cell) == "slow"
    found = ratio(cell, "slow")
    assert found is not None and found.median == pytest.approx(2)
    assert data["verdicts"]["demo/stored"]["top1"] == 1.0
    assert cell["native"]
    page = render(data)
    assert "changed under the run" not in page
    cell["native"] = "another"
    assert "changed under the run" in render({**data, "cells": {**data["cells"], "demo/stored/2/decode": cell}})
    assert "**2.00 × [2.00, 2.00] slow**" in page and "The machine was busy: 50%" in page and "KL mean 0.0e+00" in page


def test_failures_are_rows_with_their_reason(fake: Any) -> None:
    engines = [
        fake("finial"),
        fake("unloadable", fault="load"),
        fake("dying", fault="die"),
        fake("short", fault="short"),
    ]
    absent = replace(fake("absent"), environment="nowhere")
    record = run(fake, [*engines, absent], (DECODE,))
    rows = record.cells["demo/stored/2/decode"]["engines"]
    assert rows["finial"]["status"] == "ok" and len(rows["finial"]["samples"]) == 3
    reasons = {name: row["reason"] for name, row in rows.items() if row["status"] == "failed"}
    assert "no such kernel" in reasons["unloadable"] and "out of everything" in reasons["dying"]
    assert "unequal work" in reasons["short"] and "not installed" in reasons["absent"]
    page = render(record.data)
    assert all(reason in page for reason in reasons.values()) and "failed (4)" in page


def test_starts_give_load_time_and_memory(fake: Any) -> None:
    record = run(fake, [fake("finial"), fake("other")], (DECODE,), starts=2)
    for name in (LOAD.name, MEMORY.name):
        samples = record.cells[f"demo/stored/2/{name}"]["engines"]["other"]["samples"]
        assert len(samples) == 2 and all(s["value"] > 0 for s in samples)


def test_a_run_resumes_where_it_stopped(fake: Any) -> None:
    engine = fake("finial")
    record = run(fake, [engine], (DECODE,))
    before = record.cells["demo/stored/2/decode"]
    again = Record.open(record.path)
    group = Group("demo", "stored", 2, (DECODE, PROMPT))
    Runner(again, fake.places, [engine], FakeProbe(), lambda text: None).group(group)
    assert set(again.cells) == {"demo/stored/2/decode", "demo/stored/2/prompt"}
    assert again.cells["demo/stored/2/decode"]["at"] == before["at"]


def test_a_failed_save_leaves_the_old_record(tmp_path: Path) -> None:
    record = Record.create(tmp_path / "r.json", plan={})
    record.save()
    record.data["cells"]["bad"] = object()
    with pytest.raises(TypeError):
        record.save()
    assert Record.open(record.path).cells == {} and list(tmp_path.iterdir()) == [record.path]


def test_a_foreign_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="99"):
        Record.open(tmp_path / "r.json")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads processor times from /proc")
def test_a_disturbed_sample_is_measured_again(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(
        [0.9, 0.9, 0.0, 0.9, 0.0]
    )  # the warm-up; a first round that is tried again; no tries left for the second
    monkeypatch.setattr(runner, "_others", lambda start, end: next(readings))
    record = run(fake, [fake("finial")], (replace(DECODE, rounds=2),))
    samples = record.cells["demo/stored/2/decode"]["engines"]["finial"]["samples"]
    assert [(s["round"], s["others"]) for s in samples] == [(0, 0.0), (1, 0.9)]
    assert "During 1 of 2 samples" in render(record.data)


def test_others_are_what_the_engine_did_not_take() -> None:
    cores = os.cpu_count() or 1
    assert runner._others((0.0, 10.0, 5.0), (1.0, 10.5, 5.25)) == pytest.approx(0.25 / cores)
    assert runner._others((0.0, None, 5.0), (1.0, None, 5.25)) is None


# --- limits ------------------------------------------------------------------------------------------------------


def test_floor_of_a_decode_step_is_weights_and_cache(tmp_path: Path) -> None:
    path = convert(Places(tmp_path, tmp_path).checkpoint("demo"), tmp_path / "demo.gguf")
    config = open_checkpoint(path).config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2  # keys and values in bf16
    shallow, deep = (Floor.of(path, replace(DECODE, depth=depth)) for depth in (4, 104))
    assert deep.bytes - shallow.bytes == 100 * row
    assert deep.kv_bytes == (104 + 5) * row
    four = Floor.of(path, replace(DECODE, sequences=4))
    assert four.tokens == 4 and four.bytes < 1.5 * shallow.bytes and four.operations == 4 * shallow.operations
    assert Floor.of(path, PROMPT).tokens == 8


def test_share_takes_the_better_probe_and_the_nearer_limit() -> None:
    floor = {"bytes": 10**9, "operations": 10**10, "tokens": 1, "weight_bytes": 1, "kv_bytes": 1}
    sample = {"value": 25.0, "before": {"read_gb_s": 50.0}, "after": {"read_gb_s": 20.0}}
    cell = {
        "floor": floor,
        "workload": {"kind": "decode"},
        "format": "bf16",
        "threads": 2,
        "engines": {"finial": {"samples": [sample]}},
    }
    assert share(cell, "finial", {}) == pytest.approx(0.5)  # 20 ms allowed, 40 ms taken
    assert share(cell, "finial", {"2": {"bf16": 333.3}}) == pytest.approx(0.75, rel=1e-3)  # 30 ms of arithmetic
    assert peak_for("q8_0", {"bf16": 1.0, "int8": 2.0}) == 2.0
    assert peak_for("bf16", {"bf16": 1.0, "int8": 2.0}) == 1.0 and peak_for("bf16", {}) is None


# --- setup -------------------------------------------------------------------------------------------------------


def test_setup_says_what_is_missing(tmp_path: Path) -> None:
    places = Places(tmp_path / "engines", tmp_path / "models")
    assert "install llama.cpp" in missing(ENGINES["llama.cpp"], places) and not missing(ENGINES["finial"], places)
    there = Places(tmp_path, tmp_path, {"llama.cpp": Path(sys.executable)})
    assert missing(replace(ENGINES["llama.cpp"], module="json"), there) == ""
    assert "no_such_module" in missing(replace(ENGINES["llama.cpp"], module="no_such_module"), there)
    with pytest.raises(SetupError, match="llama"):
        install("lama", places)
    with pytest.raises(SetupError, match="optimum-cli"):
        make_file(places, "demo", "-openvino-int8")
    assert not list((tmp_path / "models").iterdir())


def test_files_are_made_once_and_by_the_right_tool(tmp_path: Path) -> None:
    places = Places(tmp_path / "engines", tmp_path / "models")
    made = make_file(places, "demo", "-stored.gguf")
    stamp = made.stat().st_mtime_ns
    assert make_file(places, "demo", "-stored.gguf").stat().st_mtime_ns == stamp
    out = tmp_path / "out"
    assert "quantize" in make_command(places, "qwen3-0.6b", "-q4_k_m.gguf", out)
    assert make_command(places, "qwen3-0.6b", "-q8_0.gguf", out)[-2:] == ["--format", "q8_0"]
    assert "int4" in make_command(places, "qwen3-0.6b", "-openvino-int4", out)
    assert make_command(places, "qwen3-0.6b", "", out)[-3:] == ["synth", "qwen3-0.6b", str(out)]


def test_the_command_line_estimates_and_shows(fake: Any, tmp_path: Path) -> None:
    record = run(fake, [fake("finial")], (DECODE,))
    root = Path(__file__).parent.parent
    base = [sys.executable, "-m", "benchmarks.cpu"]
    environment = {"PYTHONPATH": str(root / "src"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    dry = subprocess.run([*base, "--quick", "--dry-run"], cwd=root, env=environment, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "minutes" in dry.stderr and "llama.cpp: not installed" in dry.stdout
    shown = subprocess.run(
        [*base, "table", str(record.path)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0 and textwrap.dedent(render(record.data)).strip() == shown.stdout.strip()
