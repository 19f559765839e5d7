"""Every kernel template in its main configurations, compiled by NVRTC for every architecture; no GPU, no driver.

Limits: no spills and no stack frame anywhere, registers as they are today with a little room, shared memory of a block
within what the smallest of these architectures gives.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finial.backends.cuda import compiler, kernels
from finial.backends.cuda.compiler import ARCHITECTURES, compile_kernels, usage
from finial.backends.cuda.kernels import Kernel
from finial.errors import BackendError

if importlib.util.find_spec("cuda") is None:
    assert os.environ.get("CI") != "true", "no cuda-core: it is one of finial[test]"
    pytest.skip('no NVRTC here; pip install "finial[cuda]" to compile the CUDA kernels', allow_module_level=True)

# Bytes of shared memory that a block may have (CUDA C++ programming guide, technical specifications): 64 KiB on 7.5,
# 99 KiB on 8.6, 8.9 and 12.0; the others have more.
SHARED = {75: 64 << 10}
MOST_SHARED = 99 << 10


def product(format: str, rows: int, k: int, out: int, *, gated: bool = False, add: bool = False) -> Kernel:
    nr, warps = kernels.matvec_shape(out, rows, 132, gated)
    return kernels.matvec(
        format, k=k, out=out, rows=rows, nr=nr, warps=warps, norm=not add, eps=1e-6, gated=gated, add=add
    )


def attend(cache: str, group: int, *, fused: bool = True) -> Kernel:
    return kernels.attend(
        cache, head_dim=128, heads=8, group=group, splits=32, page_size=32, window=None, fused=fused, normed=True
    )


def gemm(format: str, rows: int, split: int = 1) -> Kernel:
    return kernels.gemm(
        format, k=1024, out=6144, tile=kernels.gemm_tile(rows), split=split, gated=True, half=True, bias=True
    )


def flash(cache: str) -> Kernel:
    return kernels.flash(cache, head_dim=128, heads=8, group=2, page_size=32, window=None, half=True)


# Shapes of Qwen3-0.6B.  name -> (kernel, most registers on any architecture)
KERNELS: dict[str, tuple[Kernel, int]] = {
    "qkv bf16": (product("bf16", 1, 1024, 4096), 128),
    "gate·up bf16": (product("bf16", 1, 1024, 6144, gated=True), 168),
    "down q4_0": (product("q4_0", 1, 3072, 1024, add=True), 168),
    "gate·up q8_0, 8 rows": (product("q8_0", 8, 1024, 6144, gated=True), 255),
    "head bf16, 4 rows": (product("bf16", 4, 1024, 151936), 168),
    "qkv fp8": (product("fp8", 1, 1024, 4096), 168),
    "attend bf16": (attend("bf16", 2), 128),
    "attend q8_0, group 8": (attend("q8_0", 8), 168),
    "attend f32, group 3, plain": (attend("f32", 3, fused=False), 168),
    "prepare rows": (
        kernels.prepare_rows("q8_0", head_dim=128, heads=8, group=2, normed=True, half=True),
        64,
    ),
    "norm": (kernels.norm(1024, normed=True, pick=True, half=True), 64),
    "embed": (kernels.embed("q4_0", 1024), 64),
    "rope": (kernels.rope(128), 64),
    "cache write": (kernels.cache_write("q8_0", 128, 8), 64),
    "silu": (kernels.pointwise("silu_mul"), 64),
    "gemm bf16, 128 rows": (gemm("bf16", 128), 168),
    "gemm q4_0, 16 rows, split": (gemm("q4_0", 16, split=2), 128),
    "gemm f16, 64 rows": (gemm("f16", 64), 168),
    "sample": (kernels.sample(151936), 64),
    "sample ahead": (kernels.sample_ahead(151936, 32, 256, 64), 80),
    "flash bf16": (flash("bf16"), 224),
    "flash q8_0": (flash("q8_0"), 224),
}


CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)


def fitting(capability: int) -> dict[str, tuple[Kernel, int]]:
    """Those that run on such a GPU."""
    return {name: row for name, row in KERNELS.items() if row[0].least_arch <= capability}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[int], tuple[bytes, str]]]:
    """What the compiler made for an architecture; all that the selected tests want is under way at the same time."""
    wanted = {item.callspec.params.get("capability") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        under_way = {
            capability: pool.submit(
                compile_kernels, [kernel for kernel, _ in fitting(capability).values()], ARCHITECTURES[capability]
            )
            for capability in sorted(wanted & set(CAPABILITIES))
        }
        yield lambda capability: under_way[capability].result()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_within_limits(capability: int, compiled: Callable[[int], tuple[bytes, str]]) -> None:
    cubin, log = compiled(capability)
    assert cubin[:4] == b"\x7fELF"
    over = {}
    for name, (kernel, registers) in fitting(capability).items():
        used = usage(log, kernel)
        shared = used.shared + kernel.shared
        if used.stack or used.spill_bytes or used.registers > registers or shared > SHARED.get(capability, MOST_SHARED):
            over[name] = (used, shared)
        assert used.registers > 0 and used.registers * kernel.threads <= 65536, (name, used)
    assert not over, over


def test_cubins_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.pointwise("add")
    first = compiler.cubins([kernel], "sm_80", tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile_kernels", never)
        assert compiler.cubins([kernel], "sm_80", tmp_path) == first
        with pytest.raises(AssertionError):
            compiler.cubins([kernel], "sm_86", tmp_path)  # another architecture is another cubin
        patch.setattr(compiler, "sources_digest", lambda: "changed")
        with pytest.raises(AssertionError):
            compiler.cubins([kernel], "sm_80", tmp_path)  # and so are other sources


def test_several_threads_may_be_the_first_to_compile(tmp_path: Path) -> None:
    """In a fresh process, as when a model is opened: the compiler's package must not be met half-imported."""
    code = (
        "import sys; from pathlib import Path; from finial.backends.cuda import compiler, kernels;"
        "made = compiler.cubins([kernels.pointwise(op) for op in ('add', 'silu_mul')], 'sm_80', Path(sys.argv[1]));"
        "assert len(made) == 2"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cubins_without_a_place_to_keep_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert compiler.cubins([kernels.pointwise("add")], "sm_80", tmp_path / "file" / "cache")


def test_what_the_compiler_refuses_is_said() -> None:
    broken = Kernel("norm", "rows.cuh", "NormArgs", ("int wrong",), threads=128)
    with pytest.raises(BackendError, match="could not compile norm_"):
        compile_kernels([broken], "sm_80")


def test_old_gpus_are_refused() -> None:
    with pytest.raises(BackendError, match=r"compute capability 6\.1"):
        compiler.architecture(61)
    assert compiler.architecture(121) == "sm_121"


def test_probes_compile() -> None:
    """The experiments of `make gpu`, for the architecture that they are written for."""
    from benchmarks.gpu import probe

    found = [experiment.kernel for experiment in probe.all_probes().values()]
    cubin, log = compile_kernels(found, "sm_90a")
    assert cubin and not any(usage(log, kernel).spill_bytes for kernel in found)
