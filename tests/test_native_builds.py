"""The kernels' own tests (tests/native) for what the machines which test finial do not have, or not all.

NEON is cross-compiled for 64-bit ARM and run by an emulator.  Needs a cross compiler and qemu-user; where they are
missing the test is skipped, but never in CI, which installs them.  AVX-VNNI is emulated in plain words, which takes
AVX2, and so are tile registers (AMX), which takes AVX-512; these are compared with the registers themselves where the
processor has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finial import _native

ISAS = _native.isas_available()
ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build"  # kept: the next run compiles what changed
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}  # command -> Debian's package


def tool(name: str) -> str | None:
    """A command, from the environment that runs the tests or from the system."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def call(*command: str, seconds: int) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def build(name: str, *options: str) -> str:
    """The native tests' program."""
    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake, "no cmake: the test extra installs it"
    options += ("-DFINIAL_NATIVE_TESTS=ON", "-DFINIAL_OPTIMIZE=-O1")
    if ninja:
        options += ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    call(cmake, "-S", str(ROOT), "-B", str(BUILDS / name), *options, seconds=120)
    call(cmake, "--build", str(BUILDS / name), "--parallel", "2", seconds=600)
    return str(BUILDS / name / "finial_op_tests")


@pytest.mark.timeout(900)
def test_neon_kernels_under_an_emulator() -> None:
    """Every kernel of the instruction sets baseline, neon and neon_dot; one case of each kind."""
    missing = [package for command, package in NEEDED.items() if shutil.which(command) is None]
    missing += [] if tool("cmake") else ["cmake"]
    if missing:
        message = f"NEON is not tested here: install {' '.join(missing)}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    program = build(
        "aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    )
    said = call("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, "--quick", seconds=600).splitlines()
    assert said[:-1] == ["baseline", "neon", "neon_dot", "threads"]
    passed = re.fullmatch(r"(\d+) passed, 0 failed", said[-1])
    assert passed and int(passed[1]) > 500


if "avx2" in ISAS:

    @pytest.mark.timeout(900)
    def test_instructions_in_plain_words() -> None:
        """Every kernel on emulated instructions; tile registers' own must give the same bits."""
        emulated = ["avx2_vnni_emulated", "avx2_vnni", *(["amx_emulated", "amx"] if "avx512" in ISAS else [])]
        isas = [isa for isa in emulated if isa.endswith("emulated") or isa in ISAS]
        program = build("emulated", f"-DFINIAL_ISAS={';'.join(isas)}")
        said = call(program, "--quick", seconds=600).splitlines()
        assert said[:-1] == [*isas, "threads"]
        passed = re.fullmatch(r"(\d+) passed, 0 failed", said[-1])
        assert passed and int(passed[1]) > 250 * len(isas)
