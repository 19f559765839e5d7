"""`finial info` and `finial doctor`: what a model is, and what this machine can."""

from __future__ import annotations

import json
import re
import sys

import pytest

from commands import Call
from finial import LLM, machine


def test_info_of_the_demo(call: Call) -> None:
    code, text, errors = call("info")
    assert code == 0 and errors == "" and "\x1b" not in text
    for word in (
        "qwen3",
        "2.76 M parameters",
        "bf16",
        "KV cache",
        "1,024 tokens",
        "q4_0",
        "as stored",
        "as the model recommends",
    ):
        assert word in text


def test_info_as_json(call: Call) -> None:
    told = json.loads(call("info", "demo", "--json")[1])
    assert told["config"]["architecture"] == "qwen3" and told["chat_template"]
    assert told["kv_bytes_per_token"] == {"bf16": 2048, "f32": 4096, "q8_0": 1088}
    sizes = {row["format"]: row["weight_bytes"] for row in told["formats"]}
    with LLM("demo", format="q4_0") as small, LLM("demo", format="f32") as large:
        assert sizes["q4_0"] == small.info.weight_bytes and sizes["f32"] == large.info.weight_bytes
    assert sizes["bf16"] == told["weight_bytes"]


def test_info_on_a_backend(call: Call) -> None:
    """Also loads it; what a backend says of how it decodes is told (cuda does: tests/test_mega_program.py)."""
    code, text, _ = call("info", "demo", "--backend", "reference")
    assert code == 0 and "on reference" in text
    loaded = json.loads(call("info", "demo", "--backend", "cpu", "--json")[1])["loaded"]
    assert loaded["backend"] == "cpu" and loaded["notes"] == [] and loaded["load_s"] > 0


def test_info_graph(call: Call) -> None:
    _, text, _ = call("info", "--graph")
    assert text.startswith("graph qwen3") and "attention" in text
    from finial.graph import Graph

    assert Graph.from_json(call("info", "--graph", "--json")[1]).text() == text


def test_doctor(call: Call) -> None:
    code, text, errors = call("doctor")
    assert code == 0 and errors == "" and "\x1b" not in text
    for word in (
        "CPU",
        "instructions",
        "usable",
        "read, 1 thread",
        "GB/s",
        "GPU",
        "Vulkan",
        "energy counters",
        "optional parts",
    ):
        assert word in text
    assert text.rstrip().split("\n")[-1].startswith("ready: the cpu backend runs with")


def test_doctor_as_json(call: Call) -> None:
    told = json.loads(call("doctor", "--json")[1])
    assert told["ready"] is True and told["bandwidth"][0]["read_gb_s"] > 0 and told["cpu"]["usable_cores"] >= 1


def test_doctor_without_the_native_module(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finial._native", None)
    code, text, _ = call("doctor")
    assert (
        code == 1
        and "not ready" in text
        and "pip install ." in text
        and re.search(r"read, 1 thread +unavailable", text)
    )


def test_doctor_on_another_machine(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.describe()
    other = machine.Machine(
        system=real.system,
        cpu=real.cpu,
        memory=machine.Memory(1 << 33, 1 << 32, 1 << 35, 1 << 33),
        gpus=(machine.Gpu("NVIDIA", "NVIDIA H100", "nvidia 580.65.06", 80 << 30, "9.0", "13.0", "NVML"),),
        vulkan=machine.Vulkan(True, ("nvidia",)),
        energy=(
            machine.Counter("RAPL package-0", None, "not permitted"),
            machine.Counter("NVML 0 NVIDIA H100", 12.5, ""),
        ),
        extras=(
            machine.Extra("cuda", ("cuda-core",), ("cuda-core",), 'pip install "finial[cuda]"'),
            machine.Extra("convert", ("torch",), (), 'pip install "finial[convert]"'),
        ),
        native=real.native,
        bandwidth=(machine.Bandwidth(1, 20.0, ""), machine.Bandwidth(2, None, "no memory")),
    )
    monkeypatch.setattr(machine, "describe", lambda bandwidth_s: other)
    _, text, _ = call("doctor")
    for words in (
        r"NVIDIA +NVIDIA H100 +nvidia 580.65.06 · 85.9 GB · compute 9.0 · CUDA up to 13.0",
        r"the control group's limit",
        r"RAPL package-0 +unavailable +not permitted",
        r"NVML 0 NVIDIA H100 +readable",
        r'cuda +not installed +pip install "finial\[cuda\]"',
        r"convert +installed +torch",
        r"read, 2 threads +unavailable +no memory",
        r"loader found +nvidia",
    ):
        assert re.search(words, text), words
