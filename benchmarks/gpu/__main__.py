"""`make gpu`: builds finial, runs its tests on the GPU, measures; one JSON file, written anew after each part.

Each part is a process with a time limit, so one that fails or hangs leaves the others' results.  Needs Linux, one GPU,
a CUDA 13 driver, Python 3.12 with PyTorch, and no network (see docs/cuda.md).

    python3 -m benchmarks.gpu [--only decode,prefill] [--budget 470]
    python3 -m benchmarks.gpu --twin        # here, without a GPU: does every line run?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "100"]
BUILD = (
    "cmake -S . -B build/gpu -DPython_EXECUTABLE={python} -DCMAKE_BUILD_TYPE=Release"
    " && cmake --build build/gpu --parallel && cmake --install build/gpu --prefix src"
)
MEASURE = [sys.executable, "-m", "benchmarks.gpu.measure"]
# What is measured or tested there is the graph's: the megakernel would be packed and tried at each load for nothing.
GRAPH = ["env", "FINIAL_CUDA=graph"]


def parts(model: Path, second: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds at most), what others need and what matters most first."""
    several = ["-n", "8"] if _has("xdist") else []
    synth = [sys.executable, "-m", "finial.cli", "synth"]
    return [
        ("machine", [*MEASURE, "machine"], 30),
        ("build", ["bash", "-c", BUILD.format(python=sys.executable)], 150),
        ("smoke", [*GRAPH, *MEASURE, "smoke"], 60),
        ("synth", [*synth, "qwen3-0.6b", str(model)], 90),
        ("decode", [*GRAPH, *MEASURE, "decode", str(model)], 120),
        ("megakernel", [sys.executable, "-m", "benchmarks.gpu.mega", str(model)], 150),
        ("engine", [*MEASURE, "engine", str(model)], 60),
        ("batch", [*GRAPH, *MEASURE, "batch", str(model)], 60),
        ("prefill", [*GRAPH, *MEASURE, "prefill", str(model)], 60),
        ("first token", [*GRAPH, *MEASURE, "first-token", str(model)], 60),
        ("agreement", [*MEASURE, "agreement", str(model)], 90),
        ("ops", [*GRAPH, *PYTEST, *several, "tests/test_ops.py", "-k", "cuda"], 150),
        ("models", [*GRAPH, *PYTEST, *several, "tests/test_models.py", "tests/test_golden.py", "-k", "cuda"], 150),
        ("formats", [*GRAPH, *MEASURE, "formats", str(model)], 90),
        ("probe", [*MEASURE, "probe"], 60),
        ("kernels", [*GRAPH, *MEASURE, "kernels", str(model)], 60),
        ("synth 1.5b", [*synth, "qwen2.5-1.5b", str(second)], 90),
        ("decode 1.5b", [*GRAPH, *MEASURE, "decode", str(second)], 60),
        ("transformers", [*MEASURE, "transformers", str(model)], 100),
    ]


def dry_parts(model: Path, second: Path) -> list[tuple[str, list[str], int]]:
    """The same parts on the twin: a layer of the embedded model, a few tests; what needs no GPU is left out."""
    left_out = {"build", "synth", "synth 1.5b", "decode 1.5b"}
    tests = {"ops": "cuda and (linear-1x96 or rms_norm)", "models": "cuda and logits_equal and qwen3-tied"}
    out = []
    for name, command, _ in parts(model, second):
        if name not in left_out:
            if name in tests:
                keep = [part for part in command[:-2] if part not in ("-n", "8")]
                command = [*keep, "-p", "benchmarks.gpu.twin", "-k", tests[name]]
            out.append((name, command, 200))
    return out


def main() -> int:
    """Exit code 0 when all parts that ran succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of parts, joined by commas")
    parser.add_argument(
        "--twin", action="store_true", help="no GPU: every part on the tests' device, small; see twin.py"
    )
    parser.add_argument("--budget", type=int, default=470, help="seconds for all of it")
    parser.add_argument("--name", default="gpu.json", help="of the file in that folder")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "gpu" / "results")
    )
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as work:
        model, second = Path(work) / "qwen3-0.6b", Path(work) / "qwen2.5-1.5b"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(["src", "tests", ".", os.environ.get("PYTHONPATH", "")]),
        }
        if options.twin:
            environment["FINIAL_GPU_TWIN"] = "1"
            _one_layer(model)
        wanted = [name for name in options.only.split(",") if name]
        chosen = dry_parts(model, second) if options.twin else parts(model, second)
        unknown = set(wanted) - {name for name, _, _ in chosen}
        if unknown:
            parser.error(f"no part {', '.join(unknown)}: there are {', '.join(name for name, _, _ in chosen)}")
        for name, command, limit in chosen:
            needed = (name == "build" and set(wanted) - {"machine", "probe"}) or (
                name.startswith("synth") and any(_reads(row, name) for row in chosen if row[0] in wanted)
            )
            if wanted and name not in wanted and not needed:
                continue
            left = options.budget - (time.monotonic() - started)
            if left < 5:
                report[name] = {"ok": False, "why": "no time left"}
                continue
            report[name] = _part(command, min(limit, left), environment)
            print(f"{name}: {json.dumps(report[name])[:400]}", flush=True)
            target = options.out / ("twin.json" if options.twin else options.name)
            temporary = target.with_suffix(".part")
            temporary.write_text(json.dumps(report, indent=1) + "\n")
            temporary.replace(target)
    failed = [name for name, row in report.items() if not row["ok"]]  # type: ignore[index]
    print(
        f"{time.monotonic() - started:.0f} s; " + (f"failed: {', '.join(failed)}" if failed else "all parts succeeded")
    )
    return 1 if failed else 0


def _one_layer(out: Path) -> None:
    """The embedded model cut down: what takes long on the twin."""
    sys.path.insert(0, str(ROOT / "src"))
    from finial.files.safetensors import open_safetensors, write_safetensors

    demo = ROOT / "src" / "finial" / "demo"
    shutil.copytree(demo, out)
    config = json.loads((demo / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (out / "config.json").write_text(json.dumps(config))
    tensors = open_safetensors(demo / "model.safetensors").items()
    kept = [(name, tensor) for name, tensor in tensors if ".layers." not in name or ".layers.0." in name]
    write_safetensors(out / "model.safetensors", [(name, t.format, t.shape, t.slabs()) for name, t in kept])


def _reads(part: tuple[str, list[str], int], synth: str) -> bool:
    """Whether a part reads the model that this other part makes."""
    return part[1][-1].endswith("1.5b" if synth.endswith("1.5b") else "0.6b")


def _part(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, object]:
    """Its result line (JSON, the last of its output) or the end of what it printed."""
    begin = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        code, out = done.returncode, done.stdout + done.stderr
        lines = done.stdout.strip().splitlines()
    except subprocess.TimeoutExpired as error:
        code, lines = -1, []
        out = f"over {limit:.0f} s\n" + _text(error.stdout) + _text(error.stderr)
    row: dict[str, object] = {"ok": code == 0, "seconds": round(time.monotonic() - begin, 1)}
    try:
        row["result"] = json.loads(lines[-1])
    except (ValueError, IndexError):
        row["output"] = out[-6000:] if code else out[-600:]
    if code and "output" not in row:
        row["output"] = out[-6000:]
    return row


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
