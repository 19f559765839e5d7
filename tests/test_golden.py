"""The demo model's greedy continuation is a golden text, the same on every backend and every instruction set.

When the demo model is trained again, `python tests/test_golden.py` writes the file anew from the reference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finial import LLM
from here import BACKENDS

GOLDEN = Path(__file__).parent / "golden" / "demo.txt"
PROMPT, COUNT = "KING RICHARD III:\n", 120


def continuation(backend: str, **options: object) -> str:
    with LLM("demo", backend=backend, max_context=256, max_batch=1, **options) as llm:  # type: ignore[arg-type]
        return llm.generate(PROMPT, max_tokens=COUNT, ignore_eos=True).text


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_greedy_text_is_the_golden_one(backend: str) -> None:
    assert continuation(backend) == GOLDEN.read_text()


@pytest.mark.parametrize("options", [{"cache": False}, {"kv_format": "f32"}, {"page_size": 3}, {"threads": 1}], ids=str)
def test_no_option_of_execution_changes_it(options: dict[str, object]) -> None:
    assert continuation("cpu", **options) == GOLDEN.read_text()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx2_vnni", "avx512_vnni", "avx512", "amx", "neon", "neon_dot"])
def test_every_instruction_set_writes_it(isa: str) -> None:
    from finial import _native

    code = "import sys, test_golden; sys.stdout.buffer.write(test_golden.continuation('cpu').encode())"
    environment = {
        **os.environ,
        "FINIAL_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(GOLDEN.parents[1]), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    if isa in _native.isas_available():
        assert done.stdout.decode() == GOLDEN.read_text()
    else:  # asked for what this machine lacks: refused, by name
        assert done.returncode != 0 and isa in done.stderr.decode()


if __name__ == "__main__":
    GOLDEN.write_text(continuation("reference"))
