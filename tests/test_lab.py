"""The lab without a large model: its protocol, record and runs, with engines that are honest or are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from finial.errors import FileError
from finial.files.checkpoint import open_checkpoint
from finial.lab import checks, samples
from finial.lab.analysis import best_rival, rank, ratio
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import ADAPTERS, ENGINES, Engine, Places, make_command
from finial.lab.probes.memory import MemoryProbe, held
from finial.lab.record import SCHEMA, Record, schema
from finial.lab.report.markdown import render
from finial.lab.runner import Runner
from finial.lab.samples import _others
from finial.lab.verdicts import Judge
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import (
    LOAD,
    MEMORY,
    Group,
    Workload,
    prompts,
)
from finial.machine import describe
from waiting import HUNG_S, until

DECODE = Workload("decode", "decode", depth=4, new=5, rounds=3)
PROMPT = Workload("prompt", "prompt", depth=8, new=1, rounds=3)

# An engine without a model: every token takes `pace` seconds, and so it says, however long it slept; knows how to
# misbehave.
FAKE = """
import os, sys, time
sys.path.insert(0, {adapters!r})
from serve import serve

FAULT, SINCE = {fault!r}, {since}
class Session:
    precision = "none at all"
    def __init__(self, model, format, threads, context, sequences=8, cache=True, options=None):
        print("noise on stdout")
        self.runs = 0
        if FAULT == "load": raise RuntimeError("no such kernel")
    def run(self, prompts, new, keep):
        self.runs += 1
        fault = FAULT if self.runs > SINCE else ""
        if fault == "die": print("out of everything", file=sys.stderr, flush=True); os._exit(3)
        if fault == "hang": time.sleep(60)
        if fault == "leak":
            held = []
            while True: held.append(b"x" * (16 << 20)); time.sleep(0.01)
        if fault == "leak in a child":
            import subprocess
            subprocess.run([sys.executable, "-c", "x = b'x' * (400 << 20); import time; time.sleep(60)"])
        if fault == "flood":
            while True: os.write(2, b"x" * (1 << 20))
        if fault == "endless answer":
            os.write(ANSWERS, b"x" * (20 << 20))
        if fault == "no answer": os.write(ANSWERS, b"what?\\n"); time.sleep(60)
        time.sleep({pace} * new)
        times = [{pace} * (i + 1) for i in range(new)]
        reply = dict(tokens=[[1] * new for _ in prompts], times=[times for _ in prompts])
        reply.update(first=[times[0] for _ in prompts], last=[times[-1] for _ in prompts])
        if fault == "short": reply["tokens"] = [ids[:-1] for ids in reply["tokens"]]; reply["times"] = None
        if fault == "no tokens": reply["tokens"] = [[1 << 30] * new for _ in prompts]
        if fault == "echo": reply["tokens"] = [ids[:1] * new for ids in prompts]
        if fault == "fast":
            reply.update(times=None, first=[t / 50 for t in reply["first"]], last=[t / 50 for t in reply["last"]])
            time.sleep(1.2)
        if fault == "late": reply.update(times=None, last=[t + 5 for t in reply["last"]])
        if fault == "backwards": reply.update(times=None, first=[t + 1 for t in reply["last"]])
        if fault == "stolen times": reply["times"] = [[0.0] * new for _ in prompts]
        return reply

ANSWERS = os.dup(1)
serve(Session, "fake", "fake 1")
"""

# finial itself, with one lie.
LIAR = """
import sys
sys.path.insert(0, {adapters!r})
import numpy as np
from run_finial import Session as Real
from serve import serve

class Session(Real):
    def run(self, prompts, new, keep):
        reply = super().run(prompts, new, keep)
        if {fault!r} == "other tokens" or {fault!r} == "other tokens when timed" and len(prompts[0]) != 32:
            reply["tokens"] = [[(7 * t + 11) % 1500 for t in ids] for ids in reply["tokens"]]
        return reply

serve(Session, "liar", "liar 1")
"""


class FakeProbe:
    """A machine that reads 50 GB/s and computes 100 G bf16 operations a second."""

    def now(self, threads: int, nbytes: int = 0) -> dict[str, Any]:
        return {"read_gb_s": 50.0, "core_to_core_ns": 55.0, "at": time.time()}

    def peaks(self, threads: int) -> dict[str, float]:
        return {"bf16": 100.0}


class Bench:
    """Makes engines whose adapter is a fake, and runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = Places(folder / "engines", folder / "models")
        self.places.models.mkdir()

    def engine(self, name: str, pace: float = 0.003, fault: str = "", since: int = 0, text: str = FAKE) -> Engine:
        file = self.folder / f"fake_{name}.py"
        file.write_text(text.format(adapters=str(ADAPTERS), pace=pace, fault=fault, since=since))
        return Engine(name, str(file), "json", "", {"stored": ""}, uncached=True)

    def worker(self, **fault: Any) -> Worker:
        limit = fault.pop("memory_bytes", None)
        made = Worker(self.engine("one", **fault).command(self.places), {}, limit)
        made.ask("load", HUNG_S, model="m", format="f", threads=1, context=8)
        return made

    def run(
        self, engines: list[Engine], workloads: tuple[Workload, ...], starts: int = 1, judged: bool = False, **more: Any
    ) -> Record:
        path = self.places.models / "record.json"
        record = Record.create(path, plan={}, started="now", commit="abc", busy=0.5, machine=describe().to_dict())
        group = Group("demo", "stored", 2, workloads, starts)
        run = Runner(record, self.places, engines, FakeProbe(), lambda text: None, **more)
        if judged:
            with Judge(self.places, 2) as judge:
                run.group(group, judge)
        else:
            run.group(group)
        return record


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(checks, "LATE_S", HUNG_S)  # a machine that stands still for a second is no engine's fault
    yield Bench(tmp_path)


# --- protocol ----------------------------------------------------------------------------------------------------


def test_noise_on_stdout_does_not_reach_the_protocol(bench: Bench) -> None:
    worker = bench.worker()
    assert worker.ask("hello", 20) == {"protocol": 1, "engine": "fake", "version": "fake 1", "operations": ["run"]}
    assert worker.ask("run", 20, prompts=[[1, 2]], new=3, keep=False)["tokens"] == [[1, 1, 1]]
    with pytest.raises(WorkerError, match="nonsense"):
        worker.ask("nonsense", 20)
    assert worker.alive
    worker.close()
    assert not worker.alive


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc for the process's state")
def test_a_worker_is_stopped_between_questions(bench: Bench) -> None:
    worker = bench.worker()
    until(lambda: _state(worker.pid) == "T")
    worker.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("die", "status 3: out of everything"),
        ("hang", "within 1 s"),
        ("no answer", "is none"),
        ("flood", "beside its answers"),
        ("endless answer", "in one answer"),
        ("leak", "more than its limit of 0.30 GB"),
        ("leak in a child", "more than its limit of 0.30 GB"),
    ],
)
def test_what_breaks_a_limit_is_ended_whole(bench: Bench, fault: str, message: str) -> None:
    if fault.startswith("leak") and not Path("/proc/self/statm").exists():
        pytest.skip("memory is watched through /proc")
    worker = bench.worker(fault=fault, memory_bytes=300_000_000)
    with pytest.raises(WorkerError, match=message):
        worker.ask("run", 1 if fault == "hang" else HUNG_S, prompts=[[1]], new=1, keep=False)
    assert not worker.alive
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        until(lambda: os.killpg(worker.pid, 0) is not None)


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_interleaves_probes_and_saves(bench: Bench) -> None:
    record = bench.run([bench.engine("finial", 0.005), bench.engine("slow", 0.02)], (DECODE, PROMPT))
    again = Record.open(record.path).data
    cell = again.cells["demo/stored/2/decode"]
    assert cell.engines["finial"].values == [pytest.approx(200)] * 3
    assert all(s.before == s.after or s.after for s in cell.engines["slow"].samples)
    orders = [(s.round, s.order) for row in cell.engines.values() for s in row.samples]
    assert sorted(orders) == [(r, o) for r in range(3) for o in range(2)]
    assert best_rival(cell, "finial") == "slow" and [name for name, _ in rank(cell)] == ["finial", "slow"]
    found = ratio(cell, "finial", "slow")
    assert found is not None and found.median == pytest.approx(4)
    assert cell.native
    page = render(again)
    assert "changed under the run" not in page and "The machine was busy: 50%" in page
    cell.native = "another"
    assert "changed under the run" in render(again)


def test_failures_are_rows_with_their_reason_and_without_a_number(bench: Bench) -> None:
    faults = {
        "unloadable": ("load", "failed", "no such kernel"),
        "dying": ("die", "failed", "out of everything"),
        "midway": ("die", "failed", "out of everything"),
        "short": ("short", "invalid", "unequal work"),
        "strange": ("no tokens", "invalid", "no token of"),
        "late": ("late", "invalid", "the answer after"),
        "backwards": ("backwards", "invalid", "backwards"),
        "thief": ("stolen times", "invalid", "begin and end"),
    }
    engines = [bench.engine(n, fault=f, since=2 if n == "midway" else 0) for n, (f, _, _) in faults.items()]
    absent = replace(bench.engine("absent"), environment="nowhere")
    record = bench.run([bench.engine("finial"), *engines, absent], (DECODE, PROMPT))
    rows = record.cells["demo/stored/2/decode"].engines
    assert rows["finial"].status == "ok" and len(rows["finial"].samples) == 3
    for name, (_, status, reason) in faults.items():
        assert rows[name].status == status and reason in rows[name].reason, name
        assert not rows[name].samples, name
    assert rows["midway"].discarded == 1, "one warm-up, one sample, then it died"
    assert "not installed" in rows["absent"].reason
    assert len(record.cells["demo/stored/2/prompt"].engines["finial"].samples) == 3, "the run goes on"
    page = render(record.data)
    assert all(reason in page for _, _, reason in faults.values()) and "failed (1)" in page and "invalid (" in page


def test_an_engine_that_was_done_long_before_its_answer_is_not_believed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "LATE_S", 1.0)
    record = bench.run([bench.engine("fast", fault="fast")], (DECODE,))
    row = record.cells["demo/stored/2/decode"].engines["fast"]
    assert row.status == "invalid" and "is said to have come" in row.reason and not row.samples


def test_a_workload_is_cut_short_with_enough_rounds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    free, engine = replace(DECODE, rounds=0), bench.engine("finial", 0.001)
    clock = iter(np.arange(10**6) * 0.02)  # looked at three times a round
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    for cell_s, rounds in ((0.01, 5), (0.4, 10)):  # late twice over after the first round; once from the seventh on
        record = bench.run([engine], (free,), cell_s=cell_s)
        assert len(record.cells["demo/stored/2/decode"].engines["finial"].samples) == rounds
    record = bench.run([engine], (replace(free, rounds=12),), cell_s=0.001)
    assert len(record.cells["demo/stored/2/decode"].engines["finial"].samples) == 12, (
        "a number that was asked for stays"
    )


def test_the_probe_reads_what_a_step_reads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model which fits a cache is held against the cache, in whole requests too."""
    asked: list[int] = []
    plain = FakeProbe.now
    monkeypatch.setattr(FakeProbe, "now", lambda self, t, nbytes=0: (asked.append(nbytes), plain(self, t))[1])
    whole = replace(DECODE, name="whole", kind="generate", rounds=1)
    record = bench.run([bench.engine("finial", 0.02)], (whole, replace(DECODE, rounds=1), replace(PROMPT, rounds=1)))
    floors = [record.cells[f"demo/stored/2/{name}"].floor for name in ("whole", "decode")]
    assert floors[0] is not None and floors[1] is not None
    assert list(dict.fromkeys(asked)) == [floors[0].bytes // 5, floors[1].bytes, 0]
    assert 0.8 < floors[0].bytes / 5 / floors[1].bytes < 1.3, "a request is about as many steps as it has tokens"


def test_what_must_be_killed_is_a_row_and_the_run_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is watched through /proc")
    killed = {"leak": "limit of 0.30 GB", "flood": "beside its answers", "no answer": "is none"}
    for limit_s, faults in ((HUNG_S, killed), (2.0, {"hang": "within 2 s"})):
        monkeypatch.setattr(samples, "RUN_S", limit_s)
        engines = [bench.engine(fault.replace(" ", "_"), fault=fault, since=1) for fault in faults]
        record = bench.run([*engines, bench.engine("finial")], (DECODE, PROMPT), memory_bytes=300_000_000)
        for cell in record.cells.values():
            assert cell.engines["finial"].status == "ok" and len(cell.engines["finial"].samples) == 3
        rows = record.cells["demo/stored/2/decode"].engines
        for fault, reason in faults.items():
            row = rows[fault.replace(" ", "_")]
            assert (row.status, row.samples) == ("failed", []) and reason in row.reason, fault


def test_text_that_is_not_the_models_makes_its_rows_invalid(bench: Bench) -> None:
    engines = [
        bench.engine("honest", text=LIAR),
        bench.engine("liar", text=LIAR, fault="other tokens"),
        bench.engine("sly", text=LIAR, fault="other tokens when timed"),
    ]
    record = bench.run(engines, (replace(DECODE, new=17),), judged=True)
    rows = record.cells["demo/stored/2/decode"].engines
    assert rows["honest"].status == "ok"
    assert rows["liar"].status == rows["sly"].status == "invalid"
    assert not rows["liar"].samples and "greedy text" in rows["liar"].reason and "measured text" in rows["sly"].reason
    verdicts = record.data.verdicts["demo/stored"]
    assert verdicts["honest"].kl_mean is not None and verdicts["honest"].kl_mean < 1e-3
    assert verdicts["honest"].greedy_agreement is not None and verdicts["honest"].greedy_agreement > 0.9
    found = verdicts["honest"]
    assert (found.positions, found.text, found.basis, found.repeat_same_text) == (192, "sampled", "logits", True)
    assert found.repeat_kl_max == 0 and found.top5 is not None and found.top5 > 0.9 and "NumPy" in found.reference
    assert found.ratio == pytest.approx(1, abs=0.01) and found.perplexity_error and found.perplexity_reference
    assert "measured text" in render(Record.open(record.path).data)
    kept = Record.open(record.path).data.verdicts["demo/stored"]
    assert [len(ids) for ids in kept["sly"].condemned] == [16] and not kept["honest"].condemned


def test_both_cache_settings_are_rows_of_one_cell(bench: Bench) -> None:
    record = bench.run([bench.engine("finial")], (replace(DECODE, caches=(True, False)),))
    rows = record.cells["demo/stored/2/decode"].engines
    assert set(rows) == {"finial", "finial, no cache"} and not rows["finial, no cache"].cache
    assert all(len(row.samples) == 3 for row in rows.values())


def test_verdicts_that_an_interruption_left_out_are_made_up_for(bench: Bench) -> None:
    engine = bench.engine("honest", text=LIAR)
    record = bench.run([engine], (DECODE,))
    at = record.cells["demo/stored/2/decode"].at
    assert not record.data.verdicts
    group = Group("demo", "stored", 2, (DECODE,))
    with Judge(bench.places, 2) as judge:
        Runner(record, bench.places, [engine], FakeProbe(), lambda text: None).group(group, judge)
    assert record.data.verdicts["demo/stored"]["honest"].kl_mean is not None
    assert record.cells["demo/stored/2/decode"].at == at, "nothing is measured again"


def test_starts_give_load_time_and_memory(bench: Bench) -> None:
    record = bench.run([bench.engine("finial"), bench.engine("other")], (DECODE,), starts=2)
    for name in (LOAD.name, MEMORY.name):
        row = record.cells[f"demo/stored/2/{name}"].engines["other"]
        assert len(row.samples) == 2 and all(v > 0 for v in row.values)
        assert row.memory is not None and (row.memory["peak_bytes"] or 0) > 1e6


def test_memory_is_the_trees_and_the_rest_is_workspace() -> None:
    """What an engine's children hold is its own; a server's adapter is not the server."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', \"x = b'x' * (200 << 20); input()\"])"
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE)
    try:
        until(lambda: (MemoryProbe(process.pid).now() or 0) > 200e6)
        found = held({"peak_bytes": 9_000_000, "weight_bytes": 100_000_000, "kv_bytes": 1}, MemoryProbe(process.pid))
        peak = found["peak_bytes"] or 0
        assert peak > 200e6 and found["workspace_bytes"] == peak - 100_000_001
        assert held({"peak_bytes": None}, MemoryProbe(process.pid)) == {}
    finally:
        process.communicate(b"\n")


def test_a_run_resumes_where_it_stopped(bench: Bench) -> None:
    engine = bench.engine("finial")
    record = bench.run([engine], (DECODE,))
    before = record.cells["demo/stored/2/decode"]
    again = Record.open(record.path)
    group = Group("demo", "stored", 2, (DECODE, PROMPT))
    Runner(again, bench.places, [engine], FakeProbe(), lambda text: None).group(group)
    assert set(again.cells) == {"demo/stored/2/decode", "demo/stored/2/prompt"}
    assert again.cells["demo/stored/2/decode"].at == before.at


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads processor times from /proc")
def test_a_disturbed_sample_is_measured_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # A warm-up; a first round that is tried again; no tries left for the second.
    readings = iter([0.9, 0.9, 0.0, 0.9, 0.0])
    monkeypatch.setattr("finial.lab.samples._others", lambda start, end: next(readings))
    monkeypatch.setattr("finial.lab.samples.OTHERS_S", 0.0)
    workload = Workload("first", "first", depth=8, new=5, rounds=2)
    record = bench.run([bench.engine("finial", fault="echo")], (workload,))
    samples = record.cells["demo/stored/2/first"].engines["finial"].samples
    assert [(s.round, s.others) for s in samples] == [(0, 0.0), (1, 0.9)]
    vocab_size = open_checkpoint(bench.places.checkpoint("demo")).config.vocab_size
    (judged_by,) = prompts(workload, vocab_size, 0)
    assert samples[0].tokens == [judged_by[:1] * workload.new], "its text goes with the prompts that it is judged by"
    assert "During 1 of 2 samples" in render(record.data)


def test_others_are_what_the_engine_did_not_take() -> None:
    cores = os.cpu_count() or 1
    assert _others((0.0, 10.0, 5.0), (1.0, 10.5, 5.25)) == pytest.approx(0.25 / cores)
    assert _others((0.0, None, 5.0), (1.0, None, 5.25)) is None


# --- records -----------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_record(tmp_path: Path) -> None:
    record = Record.create(tmp_path / "r.json", plan={}, started="", commit="", machine={}, busy=None)
    record.save()
    record.data.plan["bad"] = object()
    with pytest.raises(TypeError):
        record.save()
    assert Record.open(record.path).cells == {} and list(tmp_path.iterdir()) == [record.path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 99}', "schema 99"),
        ("[]", "schema None"),
        ("{", "no JSON"),
        ('{"schema": 2, "plan": {}}', "missing required field"),
        ('{"schema": 1}', "damaged"),
        (None, "cannot be read"),
    ],
)
def test_a_foreign_or_damaged_record_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(FileError, match=words):
        Record.open(tmp_path / "r.json")


def test_what_an_engine_says_of_how_it_ran_is_kept(bench: Bench) -> None:
    """In its row, and beside the results."""
    note = "decoding 1 row by mega: graph 0.500 ms a step, mega 0.400 ms"
    told = f"Session.memory = lambda self: dict(notes=[{note!r}])\nANSWERS = "
    record = bench.run([bench.engine("finial", text=FAKE.replace("ANSWERS = ", told))], (DECODE,))
    (cell,) = record.cells.values()
    assert cell.engines["finial"].notes == [note]
    assert f"- finial, stored: {note}" in render(Record.open(record.path).data)


def test_a_wrong_type_deep_inside_is_named(bench: Bench) -> None:
    record = bench.run([bench.engine("finial")], (DECODE,))
    raw = json.loads(record.path.read_text())
    raw["cells"]["demo/stored/2/decode"]["engines"]["finial"]["samples"][1]["value"] = "fast"
    record.path.write_text(json.dumps(raw))
    with pytest.raises(FileError, match=r"samples\[1\]\.value|samples\[\.\.\.\]\.value"):
        Record.open(record.path)


def test_the_published_schema_is_the_records_own() -> None:
    """What validates with any JSON Schema library is what the lab writes and reads."""
    published = Path(__file__).parent.parent / "docs" / "lab-record.schema.json"
    assert published.read_text() == schema(), "make it anew: docs/lab-record.md says how"
    validator = jsonschema.Draft202012Validator(json.loads(published.read_text()))
    results = Path(__file__).parent.parent / "benchmarks" / "results"
    records = [path for path in results.glob("*.json") if "schema" in json.loads(path.read_text())]
    assert len(records) >= 3
    for path in records:
        raw = json.loads(path.read_text())
        assert Record.open(path).cells.keys() == raw["cells"].keys()
        if raw["schema"] == SCHEMA:
            validator.validate(raw)
            raw["cells"][next(iter(raw["cells"]))]["threads"] = "two"
            assert not validator.is_valid(raw)


def test_the_first_schema_is_still_read() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu-first.json"
    data = Record.open(path).data
    assert data.cells and data.schema >= 2 and "finial" in next(iter(data.verdicts.values()))
    assert "÷ best of the others" in render(data)


# --- setup -------------------------------------------------------------------------------------------------------


def test_setup_says_what_is_missing(tmp_path: Path) -> None:
    places = Places(tmp_path / "engines", tmp_path / "models")
    assert "install llama.cpp" in missing(ENGINES["llama.cpp"], places) and not missing(ENGINES["finial"], places)
    there = Places(tmp_path, tmp_path, {"llama.cpp": Path(sys.executable)})
    assert missing(replace(ENGINES["llama.cpp"], module="json"), there) == ""
    assert "no_such_module" in missing(replace(ENGINES["llama.cpp"], module="no_such_module"), there)
    with pytest.raises(SetupError, match="not installed"):
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
