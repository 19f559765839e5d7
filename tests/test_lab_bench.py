"""Whole runs: the demo model on several engines, `finial bench` killed and resumed, answers and comparisons."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import browser
import finial
from finial.cli import invoke
from finial.errors import RequestError
from finial.lab import checks
from finial.lab.answer import answer
from finial.lab.compare import compare
from finial.lab.engines.table import ENGINES, Engine
from finial.lab.plan import PRESETS, Plan
from finial.lab.record import Cell, Record, Row, Sample, Verdict
from finial.lab.report.html import page
from finial.lab.session import Model, Session, choose
from finial.lab.workloads import Sizes, Workload
from finial.machine import Sources, describe, probe_energy

ROOT = Path(__file__).parent.parent
DECODE = Workload("decode", "decode")
RUN_S = 250  # for a bench to end in; one takes seconds


def environment(home: Path) -> dict[str, str]:
    source = str(Path(finial.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source, "HOME": str(home), "COLUMNS": "160"}


def bench(home: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finial.cli", "bench", *arguments]
    done = subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=RUN_S)
    assert not check or done.returncode == 0, done.stderr
    return done


# --- whole runs --------------------------------------------------------------------------------------------------


NAMES = ("finial", "finial reference", "transformers eager", "llama.cpp")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of four engines on the demo model."""
    pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("whole")
    model = Model.find("demo")
    places = model.places(folder / "engines", {"transformers": Path(sys.executable)}, folder)
    llama = Engine("llama.cpp", str(ROOT / "tests" / "lab_xllamacpp.py"), "json", "", {"stored": "-stored.gguf"})
    engines = [llama if name == "llama.cpp" else ENGINES[name] for name in NAMES]
    sizes = Sizes(generate=(9,), depth=(24,), prompt=(48,), rounds=3)
    plan = Plan.of(["decode", "prefill"], sizes, threads=[1], usable=1)
    session = Session(model, plan, places, engines, folder / "record.json", ["finial", "bench"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "LATE_S", 60.0)  # a machine that stands still for a second is no engine's fault
        session.run(lambda line: None)
    assert session.complete()
    return folder / "record.json"


def test_the_demo_model_on_four_engines(whole: Path) -> None:
    data = Record.open(whole).data
    for key in ("demo/stored/1/decode at depth 24", "demo/stored/1/prompt of 48"):
        rows = data.cells[key].engines
        assert {name: (rows[name].status, rows[name].reason) for name in NAMES} == dict.fromkeys(NAMES, ("ok", ""))
        assert all(len(rows[name].samples) == 3 and rows[name].precision for name in NAMES)
    verdicts = data.verdicts["demo/stored"]
    assert all(not verdicts[name].error and not verdicts[name].flaws for name in NAMES)
    for name in NAMES[:3]:
        kl = verdicts[name].kl_mean
        assert kl is not None and kl < 5e-3, "bf16 on one side"
    assert verdicts["llama.cpp"].basis == "tokens" and (verdicts["llama.cpp"].greedy_agreement or 0) > 0.8
    assert any(name.endswith(".safetensors") and len(file["sha256"]) == 64 for name, file in data.files.items())
    found = answer(data)
    assert found.sentence.startswith("Use ") and "GB/s" in found.limit
    assert {s.engine for s in found.tables[0].standings} == set(NAMES)


def test_everything_that_is_made_of_a_record(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = {kind: tmp_path / f"page.{kind}" for kind in ("html", "md", "csv")}
    options = [part for kind, path in made.items() for part in (f"--{kind}", str(path))]
    assert invoke(["report", str(whole), *options, "--charts", str(tmp_path / "charts")]) == 0
    assert all(name in path.read_text() for name in NAMES for path in made.values())
    assert "verdict against the float32 reference" in made["md"].read_text()
    rows = list(csv.DictReader(io.StringIO(made["csv"].read_text())))
    assert len(rows) == 2 * 4 * 3 and {row["status"] for row in rows} == {"ok"}
    assert {row["tokens_per_j"] == "unavailable" for row in rows} == {not metered()}
    drawn = {path.suffix for path in (tmp_path / "charts").iterdir()}
    assert drawn == {".svg", ".png"} and made["html"].read_text().count("<figure") >= 3
    capsys.readouterr()
    assert invoke(["compare", str(whole), str(whole)]) == 0
    assert "8 no difference shown" in capsys.readouterr().out


def test_a_browser_opens_the_page_of_a_real_run(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page([Record.open(whole).data]), encoding="utf-8")
    with browser.Browser() as chromium:
        opened = chromium.open(path.as_uri(), ready="h1")
        assert opened.problems == []
        assert all(address.startswith(("file:", "data:")) for address in opened.requests), "nothing is fetched"
        assert "Use " in opened.run("document.querySelector('.answer').innerText")


def metered() -> bool:
    return any(counter.readable for counter in probe_energy(Sources()))


# A bench that kills itself as soon as its record is so, without another instruction: nobody can be late.
KILLED = """
import os, signal
from finial.cli import main
from finial.lab.record import Record
def saved(self, save=Record.save):
    save(self)
    if len(self.cells) >= {cells}:
        os.kill(os.getpid(), signal.SIGKILL)
Record.save = saved
main()
"""


def killed(home: Path, arguments: list[str], cells: int) -> None:
    """A bench that is killed when its record has so many cells."""
    command = [sys.executable, "-c", KILLED.format(cells=cells), "bench", *arguments]
    done = subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    arguments = ["-e", "finial", "-w", "depth", "--depth", "4,8,16,32", "--rounds", "4", "--out", "r.json"]
    record = tmp_path / "r.json"
    killed(tmp_path, arguments, 1)
    before = Record.open(record).cells
    assert len(before) == 1, "it had saved a cell"
    killed(tmp_path, arguments, 4)
    unjudged = Record.open(record).data
    assert len(unjudged.cells) == 4 and not any(unjudged.verdicts.values()), "killed before its verdicts"
    done = bench(tmp_path, *arguments)
    data = Record.open(record).data
    assert "going on with" in done.stderr and "prompt" not in done.stderr
    verdict = data.verdicts["demo/stored"]["finial"]
    assert verdict.kl_mean is not None and verdict.kl_mean < 1e-3 and not verdict.error
    assert all(unjudged.cells[key].at == cell.at for key, cell in data.cells.items()), "nothing is measured again"
    assert all(data.cells[key].at == cell.at for key, cell in before.items())
    assert "Use finial" in done.stdout and "of the limit" in done.stdout
    quiet = bench(tmp_path, *arguments)
    assert "going on with" not in quiet.stderr and quiet.stdout == done.stdout, "there is nothing left to do"
    other = bench(tmp_path, *arguments, "--seed", "1", "--depth", "4", check=False)
    assert other.returncode == 2 and "another plan" in other.stderr
    if Path("/proc").exists():
        left = [p for p in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _bytes(p)]
        assert not left, "engines end with the run that started them"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = bench(tmp_path, "--dry-run", "-e", "finial", "-w", "depth", "--depth", "1:256:x4", "--threads", "1,2")
    assert "depth 64" in done.stdout and "2 threads" in done.stdout and "in all" in done.stdout
    assert not list(tmp_path.glob("*.json"))
    shown = bench(tmp_path, "--list").stdout
    assert all(name in shown for name in PRESETS)
    for arguments, words in (
        (["-w", "dept"], "choose of"),
        (["--preset", "x"], "choose of"),
        (["-e", "x"], "choose from"),
        (["-w", "depth", "--depth", "1:99999:x2"], "positions"),
        (["--depth", "x"], "no range"),
        (["--python", "x"], "ENVIRONMENT=PATH"),
        (["--text", "no.txt"], "name a text file"),
        (["--reference", "x"], "choose from auto"),
    ):
        assert invoke(["bench", *arguments, "--dry-run"]) == 2
        assert words in capsys.readouterr().err, arguments


# --- plans -------------------------------------------------------------------------------------------------------


def test_presets_have_the_shape_of_their_tables() -> None:
    def groups(preset: str) -> list[Any]:
        return Plan.of([], Sizes(limit=40960), usable=2, preset=preset).groups("m")

    assert all(w.caches == (True, False) for w in groups("cached-uncached")[0].workloads)
    assert [w.name for w in groups("batch-cases")[0].workloads] == [
        *("single_short", "single_medium", "batch_4_short", "batch_4_medium", "batch_3_mixed")
    ]
    assert groups("decode-by-position")[0].workloads[-1].depth >= 32640
    assert groups("frameworks")[0].starts == 3
    assert groups("cpu-gpu")[0].workloads[0].kind == "generate"
    with pytest.raises(RequestError, match="choose of"):
        groups("nothing")


def test_formats_and_threads_are_groups() -> None:
    assert [g.format for g in Plan.of(["formats"], Sizes(), usable=2).groups("m")] == ["bf16", "q8_0", "q4_0"]
    assert [g.threads for g in Plan.of(["threads"], Sizes(), usable=6).groups("m")] == [1, 2, 4, 6]


def test_engines_that_are_not_there_are_named(tmp_path: Path) -> None:
    places = Model.find("demo").places(tmp_path, {}, tmp_path)
    chosen, left = choose([], places, True, ("stored",))
    assert {"finial", "finial reference"} <= {engine.name for engine in chosen}
    assert "not installed" in left["llama.cpp"]
    assert [e.name for e in choose(["llama.cpp"], places, True, ("stored",))[0]] == ["llama.cpp"]


# --- answers and comparisons ---------------------------------------------------------------------------------------


def record(tmp_path: Path, name: str, started: str = "then", **values: Sequence[float]) -> Record:
    made = Record.create(
        tmp_path / name, plan={}, started=started, commit="c", machine=json.loads(json.dumps(describe().to_dict())),
        busy=0.0,
    )  # fmt: skip
    rows = {engine: Row(samples=[Sample(round=r, value=v) for r, v in enumerate(v)]) for engine, v in values.items()}
    made.cells["m/bf16/2/decode"] = Cell("m", "bf16", 2, DECODE, None, None, rows)
    made.data.verdicts["m/bf16"] = {engine: Verdict(positions=9, kl_mean=1e-4, top1=1.0) for engine in values}
    made.save()
    return made


def test_the_sentence_says_what_to_use(tmp_path: Path) -> None:
    clear = answer(record(tmp_path, "a.json", finial=[20, 21, 22, 20, 21], other=[10, 10.5, 11, 10, 10.5]).data)
    assert clear.sentence.startswith("Use finial: 2.00 × [2.00, 2.00] the speed of other")
    assert "says the same" in clear.sentence
    tie = answer(record(tmp_path, "b.json", finial=[20, 10, 22, 9, 21], other=[10, 20, 9, 22, 10]).data)
    assert "no difference shown" in tie.sentence
    none = record(tmp_path, "c.json", finial=[])
    none.cells["m/bf16/2/decode"].engines["finial"] = Row("failed", "it died")
    assert "No engine gave a number" in answer(none.data).sentence


def test_comparison_finds_what_is_slower_broken_or_gone(tmp_path: Path) -> None:
    flat = [10.0, 10.1, 9.9, 10.0, 10.05]
    old = record(tmp_path, "old.json", same=flat, slow=flat, fast=flat, broken=flat, gone=flat, wrong=flat)
    new = record(
        tmp_path, "new.json", "later", same=flat, slow=[v / 2 for v in flat], fast=[2 * v for v in flat], broken=flat,
        wrong=flat, new=flat,
    )  # fmt: skip
    new.cells["m/bf16/2/decode"].engines["broken"] = Row("failed", "it died")
    new.data.verdicts["m/bf16"]["wrong"].kl_mean = 0.5
    new.save()
    lines = {line.engine: line for line in compare(old.data, new.data)}
    assert {name: line.verdict for name, line in lines.items()} == {
        "same": "no difference shown", "slow": "slower", "fast": "faster", "broken": "broken", "gone": "gone",
        "wrong": "broken", "new": "new",
    }  # fmt: skip
    assert lines["broken"].note == "it died" and "divergence" in lines["wrong"].note
    assert lines["fast"].ratio is not None and lines["fast"].ratio.median == pytest.approx(2)
    assert compare(old.data, new.data, tolerance=0.6)[1].verdict != "slower"

    command = [sys.executable, "-m", "finial.cli", "compare", str(old.path)]
    worse, equal = (
        subprocess.run([*command, str(path)], env=environment(tmp_path), capture_output=True, text=True)
        for path in (new.path, old.path)
    )
    assert worse.returncode == 1 and "slower" in worse.stdout and equal.returncode == 0, worse.stderr
