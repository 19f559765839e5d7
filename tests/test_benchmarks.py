"""The project's own plan for the CPU record, on top of the lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cpu.__main__ import wanted
from benchmarks.cpu.workloads import ENGINES as NAMES
from benchmarks.cpu.workloads import FORMATS, plan

from finial.lab.engines.environments import interpreter
from finial.lab.engines.table import ENGINES, Places
from finial.lab.estimate import estimate

ROOT = Path(__file__).parent.parent


def test_plans_cover_what_they_promise() -> None:
    full, quick = plan(False, 2), plan(True, 2)
    assert {group.format for group in full} == {*FORMATS, "stored"}
    names = {w.name for group in full for w in group.workloads}
    assert {"decode at depth 32", "decode at depth 4,096", "prompt of 2,048", "8 sequences at once"} <= names
    assert any(group.threads == 1 for group in full) and all(group.threads == 1 for group in plan(False, 1))
    engines = [ENGINES[name] for name in NAMES]
    assert 0 < estimate(quick, engines) < estimate(full, engines) / 2


def test_the_command_line_estimates_and_shows(tmp_path: Path) -> None:
    base = [sys.executable, "-m", "benchmarks.cpu"]
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    dry = subprocess.run([*base, "--quick", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "minutes" in dry.stderr and "llama.cpp: not installed" in dry.stdout
    record = str(ROOT / "benchmarks" / "results" / "cpu.json")
    shown = subprocess.run([*base, "table", record], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0 and "| decode at depth 32 | tok/s |" in shown.stdout


def test_install_without_names_takes_what_is_not_there(tmp_path: Path) -> None:
    places = Places(tmp_path / "engines", tmp_path / "models", {})
    assert set(wanted(places)) == {"export", *(ENGINES[name].environment for name in NAMES)} - {""}
    there = interpreter(places.engines, "openvino")
    there.parent.mkdir(parents=True)
    there.touch()
    assert "openvino" not in wanted(places) and "llama.cpp" in wanted(places)
