"""Whole models against transformers in float32: every family, tie, bias, head norm and kind of rope."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kquants
import models
from finial.backends import get_backend
from finial.config import ModelConfig
from finial.executor import Executable, compile_graph
from finial.files.checkpoint import Checkpoint, open_checkpoint
from finial.files.convert import convert
from finial.files.synth import synth
from finial.formats import Tensor
from finial.graph import single_step
from finial.models.decoder import build_graph, constants
from here import BACKENDS
from rounded import product_rounding, rounding_reference

TOKENS = np.random.default_rng(0).integers(0, 160, 150).tolist()
PAGE = 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("models")
    return {name: open_checkpoint(models.save(name, root / name)) for name in models.MODELS}


def compiled(checkpoint: Checkpoint, backend: str, kv_dtype: str = "f32", format: str | None = None) -> Executable:
    weights: dict[str, Tensor | np.ndarray] = dict(checkpoint.tensors)
    if format is not None:
        weights = {name: tensor.to(format) for name, tensor in checkpoint.tensors.items()}
    executable = compile_graph(
        build_graph(checkpoint.config, kv_dtype), weights | constants(checkpoint.config), backend
    )
    executable.reserve(pages=32, page_size=PAGE)
    return executable


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Worst difference of a row over that row's own spread, so that logits near zero do not count as failures."""
    return float((np.abs(got - expected).max(axis=-1) / expected.std(axis=-1)).max())


# A residual stream of L layers passes about 12·L float32 sums of up to 96 products; rounding errors of
# random sign grow like the root of their number: u·√(96·12·3)·(a gain of about 10 through norms and
# softmax, weights of standard deviation 0.2) is near 4e-5.  A wrong bias, norm or angle gives 1e-2 and more.
TOLERANCE = 1e-4


def rounds(backend: str, format: str) -> str:
    """What a backend rounds the input of a product with weights of this format to; the reference never does."""
    return "f32" if backend == "reference" else get_backend(backend).activation_precision(format)  # type: ignore[attr-defined]


def cache_rounds(backend: str, kv_dtype: str) -> str:
    """What a backend rounds queries and attention weights to over such a cache; the reference never does."""
    return "f32" if backend == "reference" else get_backend(backend).attention_precision(kv_dtype)  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", list(models.MODELS))
def test_logits_equal_transformers(saved: dict[str, Checkpoint], name: str, backend: str) -> None:
    """The models' values are bf16: as float32 weights they are the same numbers, and nothing is rounded."""
    expected = models.logits(name, tuple(TOKENS))
    for format in (None, "f32"):
        if rounds(backend, format or "bf16") == "f32":
            got = compiled(saved[name], backend, format=format).run(single_step(TOKENS, PAGE))
            assert relative_error(got, expected) < TOLERANCE


def root_mean_square(difference: np.ndarray, expected: np.ndarray) -> float:
    """Of a difference, over the spread of what is expected."""
    return float(np.sqrt((difference**2).mean() / expected.var()))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("format", ["bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-full", "qwen2-tied-yarn", "qwen3"])
def test_rounded_inputs_cost_what_rounding_costs(
    saved: dict[str, Checkpoint], name: str, format: str, backend: str
) -> None:
    """Off by what the reference is off by when it rounds as much; an error of another kind would come on top.

    Both round at the same places, but the last bit before a rounding differs, and where it decides, the two go apart
    by a whole step: the more so the further on.  Unrelated errors of this size would be the root of 2 of it apart.
    """
    compare_with_rounding_reference(lambda engine: compiled(saved[name], engine, format=format), backend, format)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_k_quants_cost_what_rounding_costs(backend: str) -> None:
    """A model whose tied table, matrices of one input and gated pair are in different K-quants."""
    if "q4_k" not in getattr(get_backend(backend), "formats", ("q4_k",)):
        return  # refused by name: test_ops.py
    made = models.model("qwen3-wide")
    config = ModelConfig.from_hf(json.loads(made.config.to_json_string(use_diff=False)))
    weights = kquants.mixture({key: value.numpy() for key, value in made.state_dict().items()})
    precision = {rounds(backend, tensor.format) for tensor in weights.values() if tensor.format != "f32"}
    assert {tensor.format for tensor in weights.values()} == {"f32", "q4_k", "q5_k", "q6_k"} and len(precision) == 1

    def build(engine: str) -> Executable:
        executable = compile_graph(build_graph(config, "f32"), weights | constants(config), engine)
        executable.reserve(pages=32, page_size=PAGE)
        return executable

    compare_with_rounding_reference(build, backend, "q4_k")
    for key, tensor in weights.items():  # a group's range is some 4 standard deviations in 2^bits - 1 steps
        if tensor.format != "f32":
            value = made.state_dict()[key].numpy()
            assert root_mean_square(tensor.decode() - value, value) < 2.0 ** (1 - int(tensor.format[1]))


def compare_with_rounding_reference(build: Callable[[str], Executable], backend: str, format: str) -> None:
    """A model on a backend that rounds the inputs of products with weights of this format, as the test above says."""
    step = single_step(TOKENS, PAGE)
    exact = build("reference").run(step)
    got = build(backend).run(step)
    if rounds(backend, format) == "f32":
        assert relative_error(got, exact) < TOLERANCE
        return
    with rounding_reference(**product_rounding(get_backend(backend), format)):
        rounded = build("reference").run(step)
    cost = root_mean_square(rounded - exact, exact)
    assert 2**-12 < cost < 0.1
    assert root_mean_square(got - exact, exact) < 1.25 * cost
    assert root_mean_square(got - rounded, exact) < 1.1 * cost


def continuation(executable: Executable, count: int) -> list[int]:
    text, new = list(TOKENS[:20]), list(TOKENS[:20])
    while len(text) < 20 + count:
        logits = executable.run(single_step(new, PAGE, first=len(text) - len(new), wanted=[len(new) - 1]))
        new = [int(logits[0].argmax())]
        text += new
    return text[20:]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", list(models.MODELS))
def test_greedy_text_equals_transformers(saved: dict[str, Checkpoint], name: str, backend: str) -> None:
    assert continuation(compiled(saved[name], backend, format="f32"), 64) == models.greedy(name, tuple(TOKENS[:20]), 64)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("name", list(models.MODELS))
def test_rounding_changes_a_token_only_where_two_are_near(
    saved: dict[str, Checkpoint], name: str, backend: str
) -> None:
    """bf16 weights as stored, over transformers' own greedy text: another token only within the error of rounding."""
    text = [*TOKENS[:20], *models.greedy(name, tuple(TOKENS[:20]), 64)]
    exact = models.logits(name, tuple(text))
    got = compiled(saved[name], backend).run(single_step(text, PAGE))
    best, chosen = exact.max(-1), np.take_along_axis(exact, got.argmax(-1)[:, None], -1)[:, 0]
    error = root_mean_square(got - exact, exact) * exact.std()
    assert error < 2**-5 * exact.std()
    # Two logits are compared, each off by an error whose largest of 84 · 160 lies near 4 to 10 standard deviations.
    assert (best - chosen <= 2 * 10 * error).all()
    assert (got.argmax(-1) == exact.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_bf16_cache_costs_what_rounding_costs(saved: dict[str, Checkpoint], backend: str) -> None:
    """Keys and values are off by at most 2^-8 of themselves, so may be queries and attention weights: twice the places.

    Logits of a 3-layer model are off by a small multiple.
    """
    exact = compiled(saved["qwen3"], backend, "f32", "f32").run(single_step(TOKENS, PAGE))
    rounded = compiled(saved["qwen3"], backend, "bf16", "f32").run(single_step(TOKENS, PAGE))
    error = relative_error(rounded, exact)
    assert 2**-14 < error < 2**-8 * (20 if cache_rounds(backend, "bf16") == "bf16" else 10)
    with rounding_reference(queries=cache_rounds(backend, "bf16")):
        other = compiled(saved["qwen3"], "reference", "bf16").run(single_step(TOKENS, PAGE))
    # The rounding itself is the same on both; only a value that sits on a rounding boundary may fall differently.
    assert relative_error(rounded, other) < 2**-8 * (2 if cache_rounds(backend, "bf16") == "bf16" else 1)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("name", ["llama-biases", "mistral-full", "qwen2-tied-yarn", "qwen3"])
def test_rounded_attention_costs_what_rounding_costs(saved: dict[str, Checkpoint], name: str, backend: str) -> None:
    """As `test_rounded_inputs_cost_what_rounding_costs`, of queries and attention weights alone."""
    step = single_step(TOKENS, PAGE)
    plain = compiled(saved[name], "reference", "bf16", "f32").run(step)
    got = compiled(saved[name], backend, "bf16", "f32").run(step)
    precision = cache_rounds(backend, "bf16")
    with rounding_reference(queries=precision):
        rounded = compiled(saved[name], "reference", "bf16", "f32").run(step)
    cost = root_mean_square(rounded - plain, plain)
    assert 2**-14 < cost < 0.05 if precision == "bf16" else cost == 0
    # Keys and values that lie on a boundary of the cache's own rounding may fall differently, by a whole step each: the
    # root of 12 of what rounding costs in the mean, so that one in 200 of them makes a quarter of that cost.
    exact = compiled(saved[name], "reference", "f32", "f32").run(step)
    flipped = root_mean_square(plain - exact, plain) / 4
    assert root_mean_square(got - plain, plain) < 1.25 * cost + flipped
    assert root_mean_square(got - rounded, plain) < 0.75 * cost + flipped


def test_sharded_checkpoint_is_the_same_model(saved: dict[str, Checkpoint], tmp_path: Path) -> None:
    models.save("qwen3", tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    one = compiled(saved["qwen3"], "cpu").run(single_step(TOKENS, PAGE))
    many = compiled(open_checkpoint(tmp_path / "sharded"), "cpu").run(single_step(TOKENS, PAGE))
    assert np.array_equal(one.view(np.uint32), many.view(np.uint32))


_COMPILE = """
import os, sys
from pathlib import Path
if hasattr(os, "sched_setaffinity"):  # as many threads as the bound allows for
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from finial.executor import compile_graph
from finial.files.checkpoint import open_checkpoint
from finial.machine import peak_bytes
from finial.models.decoder import build_graph, constants

before = peak_bytes()
checkpoint = open_checkpoint(Path(sys.argv[1]))
weights = {name: t.later(sys.argv[2], name) if len(t.shape) == 2 else t for name, t in checkpoint.tensors.items()}
ready = compile_graph(build_graph(checkpoint.config), {**weights, **constants(checkpoint.config)}, "cpu")
ready.reserve(pages=1, page_size=1)  # waits until all is packed
largest = max(t.nbytes for t in checkpoint.tensors.values())
print(peak_bytes() - before, sum(t.nbytes for t in weights.values()), largest)
"""
PACKED_AT_ONCE = 8 << 20  # of kernels/cpu/program.cpp: pages of the file that a thread holds until they are packed


@pytest.mark.parametrize("format", ["bf16", "q8_0"])
def test_a_model_ready_to_run_is_in_memory_once(tmp_path: Path, format: str) -> None:
    """Repacking gives the mapped pages back as it goes, re-encoding too, tensor by tensor; a second copy would double
    the figure.  What a tensor takes while it is re-encoded: its pages of the file."""
    path = synth("smollm2-135m", tmp_path / "model", layers=12)
    command = [sys.executable, "-c", _COMPILE, str(path), format]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    used, nbytes, largest = map(int, done.stdout.split())
    assert used < 1.15 * (nbytes + (largest if format != "bf16" else 0)) + 2 * PACKED_AT_ONCE


@pytest.mark.parametrize("name", list(models.MODELS))
def test_gguf_is_the_same_model(saved: dict[str, Checkpoint], name: str, tmp_path: Path) -> None:
    convert(saved[name].path, tmp_path / "model.gguf", format="bf16")
    original = compiled(saved[name], "cpu").run(single_step(TOKENS, PAGE))
    gguf = compiled(open_checkpoint(tmp_path / "model.gguf"), "cpu").run(single_step(TOKENS, PAGE))
    assert np.array_equal(original.view(np.uint32), gguf.view(np.uint32))


@pytest.mark.parametrize("dtype, format", [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_each_stored_precision_is_used_as_it_is(tmp_path: Path, dtype: torch.dtype, format: str) -> None:
    checkpoint = open_checkpoint(models.save("llama", tmp_path / "model", dtype=dtype))
    assert {tensor.format for tensor in checkpoint.tensors.values()} == {format}
    got = compiled(checkpoint, "cpu").run(single_step(TOKENS, PAGE))
    exact = compiled(checkpoint, "reference").run(single_step(TOKENS, PAGE))
    assert relative_error(got, exact) < (TOLERANCE if rounds("cpu", format) == "f32" else 0.2)


def test_mixed_backends_equal_one(saved: dict[str, Checkpoint]) -> None:
    """A graph cut in two runs as one; here by hiding an operation from the first backend."""
    from finial import executor

    class Partial:
        name = "partial"

        def __init__(self) -> None:
            self.inner = get_backend("cpu")
            self.compile = self.inner.compile

        def supports(self, graph, node):  # type: ignore[no-untyped-def]
            return node.op != "silu_mul"

    checkpoint = saved["qwen3"]
    graph = build_graph(checkpoint.config, "f32")
    segments = executor.partition(graph, [Partial(), get_backend("reference")])  # type: ignore[list-item]
    assert [segment.backend.name for segment in segments] == ["partial", "reference"] * 3 + ["partial"]
    weights = {name: tensor.to("f32") for name, tensor in checkpoint.tensors.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
    mixed = executor.Executable(graph, segments, weights)
    mixed.reserve(pages=32, page_size=PAGE)
    got = mixed.run(single_step(TOKENS, PAGE))
    assert mixed.backend == "partial+reference"
    assert relative_error(got, compiled(checkpoint, "reference").run(single_step(TOKENS, PAGE))) < TOLERANCE


def test_config_reads_both_spellings_of_rope(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling."""
    from finial.config import ModelConfig

    fields = json.loads((models.save("llama-llama3-tied", tmp_path / "m") / "config.json").read_text())
    assert "rope_parameters" in fields
    old = json.loads(json.dumps(fields))
    new = old.pop("rope_parameters")
    old["rope_theta"] = new.pop("rope_theta")
    old["rope_scaling"] = {("type" if key == "rope_type" else key): value for key, value in new.items()}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(fields)
