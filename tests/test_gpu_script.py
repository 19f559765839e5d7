"""`make gpu` tried without a GPU: each of its parts on the tests' device, so that no line is first run on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.__main__ import dry_parts, parts  # noqa: E402

if shutil.which("g++") is None:
    assert os.environ.get("CI") != "true", "no g++: see .ci/run"
    pytest.skip("no g++ here; install it to run the CUDA kernels on the CPU", allow_module_level=True)

# What they run, the suite runs elsewhere too, and they take most of the time.
LEFT_OUT = {"models", "transformers", "megakernel"}


@pytest.mark.timeout(400)  # a minute when the machine has nothing else to do
def test_every_part_runs(tmp_path: Path) -> None:
    names = [name for name, _, _ in dry_parts(Path("a"), Path("b")) if name not in LEFT_OUT]
    command = [sys.executable, "-m", "benchmarks.gpu", "--twin", "--only", ",".join(names), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "twin.json").read_text())
    assert list(report) == names and all(row["ok"] for row in report.values())
    probes = report["probe"]["result"]
    assert not [name for name, figure in probes.items() if str(figure).startswith(("failed", "wrong"))], probes
    assert report["agreement"]["result"]["no worse than transformers"]


def test_what_is_not_tried_needs_no_gpu() -> None:
    tried = {name for name, _, _ in dry_parts(Path("a"), Path("b"))}
    assert {name for name, _, _ in parts(Path("a"), Path("b"))} - tried == {
        "build",
        "synth",
        "synth 1.5b",
        "decode 1.5b",
    }


def test_a_part_that_does_not_exist_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--twin", "--only", "dekode", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no part dekode" in done.stderr
