"""The megakernel of real models, compiled by NVRTC for each architecture that it runs on; no GPU, no driver.

Limits: no spills, no stack frame, no static shared memory, dynamic shared memory within the device's, registers of nine
warps (allotted by fours) within the 65,536 of a multiprocessor.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from dataclasses import replace

import pytest

from cuda_twin import CXX, FLAGS, HERE
from finial.backends.cuda import kernels
from finial.backends.cuda.compiler import ARCHITECTURES, compile_kernels, usage
from finial.backends.cuda.kernels import SOURCES, Kernel
from finial.backends.cuda.mega import layout, room
from finial.backends.cuda.mega.plan import make_plan
from test_mega_table import REAL, SHARED

MOST_REGISTERS = 168
# Phases in one: gate·up and down in b, attention and the product after it too in c, which deep rows split again.
VARIANTS = {
    "a": {},
    "b": {"fused_mlp": True},
    "c": {"fused_mlp": True, "by_head": True, "whole": True},
    "c, split": {"fused_mlp": True, "by_head": True},
}
# capability -> of the models: (name, format, cache, rows, tokens are drawn, variant)
CHOSEN = {
    80: [("Qwen3-0.6B", "bf16", "bf16", 1, False, "a"), ("Llama-3.2-1B", "fp8", "bf16", 2, False, "c")],
    86: [("Llama-3.2-1B", "q8_0", "q8_0", 1, False, "a"), ("Qwen3-0.6B", "bf16", "bf16", 1, False, "c")],
    89: [("Qwen2.5-1.5B", "fp8", "bf16", 1, True, "a"), ("Qwen2.5-0.5B", "fp8", "q8_0", 2, False, "c")],
    90: [
        ("Qwen3-0.6B", "bf16", "bf16", 1, False, "a"),
        ("Qwen3-4B", "q8_0", "bf16", 8, True, "a"),
        ("Qwen3-0.6B", "q8_0", "q8_0", 4, False, "a"),
        ("Qwen3-0.6B", "fp8", "q8_0", 8, False, "c, split"),
        ("Qwen3-0.6B", "bf16", "bf16", 1, False, "b"),
        ("Qwen3-0.6B", "bf16", "bf16", 1, False, "c"),
    ],
    100: [("Llama-3.2-1B", "bf16", "bf16", 8, True, "b"), ("Qwen2.5-0.5B", "bf16", "bf16", 4, False, "c")],
    103: [("Qwen3-1.7B", "q8_0", "bf16", 1, True, "c")],
    120: [("Qwen2.5-1.5B", "bf16", "bf16", 1, False, "a"), ("Qwen3-0.6B", "bf16", "bf16", 1, False, "c, split")],
}


def real(name: str, format: str, cache: str, rows: int, sampled: bool, variant: str, capability: int) -> Kernel:
    shape = replace(REAL[name], format=format, cache=cache)
    options = dict(VARIANTS[variant])
    if format == "q8_0":
        options.pop("fused_mlp", None)
    room = SHARED[capability]
    plan = make_plan(shape, rows=rows, multiprocessors=132, shared=room, sampled=sampled, **options)
    return plan.kernel(32, bulk=capability >= 90)


@pytest.mark.parametrize("capability", list(CHOSEN))
def test_compiles_within_limits(capability: int) -> None:
    if importlib.util.find_spec("cuda") is None:
        assert os.environ.get("CI") != "true", "no cuda-core: it is one of finial[test]"
        pytest.skip('no NVRTC here; pip install "finial[cuda]" to compile the CUDA kernels')
    built = [real(*chosen, capability) for chosen in CHOSEN[capability]]
    cubin, log = compile_kernels(built, ARCHITECTURES[capability])
    assert cubin[:4] == b"\x7fELF"
    for kernel in built:
        used = usage(log, kernel)
        assert not (used.stack or used.spill_bytes or used.shared), used
        assert 0 < used.registers <= MOST_REGISTERS, used
        warps = -(-kernel.threads // 128) * 4
        assert used.registers * warps * 32 <= 65536
        assert kernel.shared <= SHARED[capability] - room.RESERVED_SHARED


@pytest.mark.skipif(CXX is None, reason="no g++ here")
@pytest.mark.parametrize(
    "normed, bias, format, variant",
    [(True, False, "fp8", "c"), (False, True, "bf16", "c, split"), (False, False, "q8_0", "a")],
)
def test_host_and_kernel_agree(normed: bool, bias: bool, format: str, variant: str) -> None:
    """Argument structs, kinds of entries, offsets of vectors and sizes, in C++ and in Python."""
    shape = replace(REAL["Qwen3-0.6B"], normed=normed, bias=bias, format=format)
    plan = make_plan(shape, rows=2, multiprocessors=40, shared=227 << 10, sampled=True, **VARIANTS[variant])
    kernel = plan.kernel(32)
    parts = f"Parts<{kernel.name}_constants>"
    offsets, stride, after, _ = layout.vectors(shape)
    known = {
        "ATTN_NORM": "attn_norm",
        "MLP_NORM": "mlp_norm",
        "Q_NORM": "q_norm",
        "K_NORM": "k_norm",
        "QKV_BIAS": "qkv_bias",
        "QKV_SCALES": "qkv_scales",
        "O_SCALES": "o_scales",
        "GATE_UP_SCALES": "gate_up_scales",
        "DOWN_SCALES": "down_scales",
    }
    equal = {f"{parts}::{name}": offsets[ours] for name, ours in known.items()}
    equal |= {f"{parts}::LAYER": stride, f"{parts}::FINAL_NORM": after["final_norm"]}
    equal |= {f"{parts}::HEAD_SCALES": after["head_scales"], f"{parts}::SHARED": kernel.shared}
    equal |= {f"{parts}::U::BYTES": layout.UNIT_BYTES[format], f"{parts}::PARTS": plan.parts}
    equal |= {f"{parts}::ROW_GROUPS": layout.groups_of(shape, layout.OUTPUT)}
    equal |= {"ATTENDS_AND_KEEPS": layout.ATTENDS_AND_KEEPS}
    equal |= {name: at for at, name in enumerate(layout.NAMES)}
    equal |= {"END": layout.END, "COUNTER_STRIDE": layout.COUNTER_STRIDE, "STOPS": layout.STOPS}
    equal |= {"(int)sizeof(Entry)": layout.ENTRY * 4}
    at = 0
    for kind, name in kernels._FIELDS["MegaArgs"]:
        equal[f"(int)offsetof(MegaArgs, {name})"] = at
        at += 8 if kind == "P" else 4
    equal["(int)sizeof(MegaArgs)"] = at
    asserts = "".join(f'static_assert({left} == {right}, "");\n' for left, right in equal.items())
    command = [CXX or "", *FLAGS, "-fsyntax-only", f"-I{SOURCES}", f"-I{HERE}", "-x", "c++", "-"]
    text = "#include <cstddef>\n" + kernels.program([kernel]) + asserts
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def main() -> None:
    """Print what each of CHOSEN takes, as docs/megakernel.md has it."""
    for capability, all_chosen in CHOSEN.items():
        for chosen in all_chosen:
            kernel = real(*chosen, capability)
            used = usage(compile_kernels([kernel], ARCHITECTURES[capability])[1], kernel)
            name, format, cache, rows, sampled, variant = chosen
            what = f"{name} | {format} | {cache} | {rows} | {variant}{', draws' if sampled else ''}"
            print(
                f"| {ARCHITECTURES[capability]} | {what} | {used.registers} | {used.spill_bytes} | {kernel.shared:,} |"
            )


if __name__ == "__main__":
    main()
