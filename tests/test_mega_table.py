"""Which graphs the megakernel runs, and the table of who does what: sums, balance, what fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finial.backends.cuda.mega import layout, room
from finial.backends.cuda.mega.layout import COUNT, FIRST, KIND, PRODUCTS, SIGNAL, STAGES, TARGET, WAIT
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.shape import MegaShape, Recognised, Unsuited, recognise
from finial.backends.cuda.plan import plan
from finial.config import ModelConfig, Rope
from finial.graph import Graph
from finial.models.decoder import build_graph

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
QWEN3 = MegaShape(28, 1024, 16, 8, 128, 3072, 151936, normed=True)
# layers, width, heads, kv_heads, head_dim, ffn, vocab of what these are published with.
REAL = {
    "Qwen3-0.6B": QWEN3,
    "Qwen3-1.7B": MegaShape(28, 2048, 16, 8, 128, 6144, 151936, normed=True),
    "Qwen3-4B": MegaShape(36, 2560, 32, 8, 128, 9728, 151936, normed=True),
    "Qwen2.5-0.5B": MegaShape(24, 896, 14, 2, 64, 4864, 151936, bias=True),
    "Qwen2.5-1.5B": MegaShape(28, 1536, 12, 2, 128, 8960, 151936, bias=True),
    "Qwen2.5-3B": MegaShape(36, 2048, 16, 2, 128, 11008, 151936, bias=True),
    "Llama-3.2-1B": MegaShape(16, 2048, 32, 8, 64, 8192, 128256),
    "Llama-3.2-3B": MegaShape(28, 3072, 24, 8, 128, 8192, 128256),
}


BASE = ModelConfig(
    architecture="qwen3",
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    biases=(),
    head_norm=False,
    rope=Rope(),
    windows=(None, None),
    max_context=512,
)


def recognised(graph: Graph, formats: dict[str, str] | None = None) -> Recognised:
    known = {v.name: "bf16" for v in graph.of_kind("weight") if len(v.shape) == 2} | (formats or {})
    return recognise(graph, plan(graph, known), known)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": True},
        {"head_norm": True, "head_dim": 32},
        {"biases": ("q", "k", "v")},
        {"biases": ("q",), "windows": (9, 9)},
        {"num_layers": 1, "windows": (None,), "num_kv_heads": 1},
        {"num_heads": 9, "num_kv_heads": 3, "hidden_size": 72, "head_dim": 8},
    ],
)
def test_a_decoder_is_recognised(fields: dict[str, Any]) -> None:
    config = replace(BASE, **fields)
    found = recognised(build_graph(config, "f32"))
    expected = MegaShape(
        layers=config.num_layers,
        width=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        vocab=160,
        cache="f32",
        window=config.windows[0],
        eps=1e-5,
        scale=1 / math.sqrt(config.head_dim),
        normed=config.head_norm,
        bias=bool(config.biases),
    )
    assert found.shape == expected
    last = found.layers[-1]
    prefix = f"model.layers.{config.num_layers - 1}"
    assert last.qkv == tuple(f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv")
    assert last.biases == tuple(f"{prefix}.self_attn.{p}_proj.bias" if p in config.biases else "" for p in "qkv")
    assert (last.output, last.down) == (f"{prefix}.self_attn.o_proj.weight", f"{prefix}.mlp.down_proj.weight")
    assert (last.gate, last.up) == (f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight")
    assert (last.attn_norm, last.mlp_norm) == (
        f"{prefix}.input_layernorm.weight",
        f"{prefix}.post_attention_layernorm.weight",
    )
    assert (last.head_norms[1] == f"{prefix}.self_attn.k_norm.weight") == config.head_norm
    assert last.cache == f"kv.{config.num_layers - 1}"
    assert found.final_norm == "model.norm.weight" and found.embed == "model.embed_tokens.weight"
    assert found.head == (found.embed if config.tie_embeddings else "lm_head.weight")
    assert (found.tokens, found.positions, found.pages) == ("tokens", "positions", "pages")


@pytest.mark.parametrize(
    "fields, formats, reason",
    [
        ({"windows": (9, None)}, {}, "layers have different windows"),
        ({"biases": ("o",)}, {}, "the product after attention has a bias"),
        ({"biases": ("down",)}, {}, "the product after the gate has a bias"),
        ({"biases": ("gate", "up")}, {}, "gate and up have biases"),
        ({"head_dim": 12}, {}, "head_dim is 12, no multiple of 8"),
        ({"intermediate_size": 90}, {}, "widths are no multiples of 4"),
        ({}, {"lm_head.weight": "q8_0"}, "several formats: bf16, q8_0"),
        ({}, {"model.layers.1.self_attn.k_proj.weight": "q8_0"}, "do not share their input|attention reads|no chain"),
    ],
)
def test_what_is_not_recognised_is_said(fields: dict[str, Any], formats: dict[str, str], reason: str) -> None:
    with pytest.raises(Unsuited, match=reason):
        recognised(build_graph(replace(BASE, **fields)), formats)


def test_other_formats_and_graphs_are_not_recognised() -> None:
    graph = build_graph(BASE)
    all_f32 = {v.name: "f32" for v in graph.of_kind("weight")}
    with pytest.raises(Unsuited, match="weights in f32 are not streamed"):
        recognised(graph, all_f32)
    with pytest.raises(Unsuited, match="the graph is no chain"):
        recognised(build_graph(BASE, hidden=True))
    with pytest.raises(Unsuited, match="does not begin with an embedding"):
        recognised(Graph("empty"))


# --- the table --------------------------------------------------------------------------------------------------------

SMALL = MegaShape(2, 64, 4, 2, 16, 96, 160)


def entries_of(made: Plan, kind: int) -> np.ndarray:
    """The entries of a kind with their block before them, in order of layers and then blocks."""
    block, at = np.nonzero(made.table[:, :, KIND] == kind)
    rows = np.column_stack([block, made.table[block, at]])
    return rows[np.lexsort((rows[:, 0], rows[:, 2]))]


@pytest.mark.parametrize("multiprocessors", [5, 40, 132, 170])
@pytest.mark.parametrize("name", REAL)
def test_work_is_shared_out_evenly(name: str, multiprocessors: int) -> None:
    """In each phase nobody has more than one row group above another; over a step streams differ by at most 2 %."""
    shape = REAL[name]
    made = make_plan(shape, rows=1, multiprocessors=multiprocessors, shared=SHARED[90])
    assert made.blocks == multiprocessors
    for kind in PRODUCTS:
        entries = entries_of(made, kind)
        for layer in range(shape.layers if kind != layout.HEAD else 1):
            own = entries[entries[:, 1 + layout.LAYER] == layer]
            own = own[own[:, 1 + FIRST] < layout.groups_of(shape, kind)]  # further parts of down are as the first one
            counts = np.bincount(own[:, 0], own[:, 1 + COUNT], minlength=made.blocks)
            assert counts.sum() == layout.groups_of(shape, kind) and np.ptp(counts) <= 1
    stream = made.stream_bytes()
    assert np.ptp(stream) <= 0.02 * stream.mean()
    assert stream.sum() == made.offsets()[-1] - np.sum(-stream % 128)


def test_the_streams_are_the_matrices() -> None:
    """Qwen3-0.6B reads what gpu.md's limit counts: 28 layers of 31.46 MB and a head of 311 MB."""
    made = make_plan(QWEN3, rows=1, multiprocessors=132, shared=SHARED[90])
    per_layer = (1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072) * 2
    assert made.stream_bytes().sum() == 28 * per_layer + 151936 * 1024 * 2
    assert made.shared.total <= (227 << 10) - room.RESERVED_SHARED


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("name", REAL)
def test_shared_memory_is_what_there_is(name: str, capability: int, rows: int) -> None:
    shape = REAL[name]
    try:
        made = make_plan(shape, rows=rows, multiprocessors=132, shared=SHARED[capability])
    except Unsuited as reason:
        assert "no room for weights" in str(reason) and capability < 90
        # Two terms of what is not cut leave less than three of the smallest stages and sums.
        widest = 2 * rows * max(shape.width, shape.heads * shape.head_dim) * 2
        assert widest > SHARED[capability] - (64 << 10), reason
        return
    assert made.shared.total <= SHARED[capability] - room.RESERVED_SHARED
    assert made.terms in (2, 3) and made.terms * rows <= 16
    assert made.stages >= 3 and made.stage_units % made.warps == 0
    assert made.shared.ring == made.stages * made.stage_units * layout.UNIT_BYTES[shape.format]


def test_entries_stages_and_targets() -> None:
    made = make_plan(SMALL, rows=2, multiprocessors=5, shared=SHARED[86], sampled=True, warps=2)
    waits = made.table[:, :, WAIT]
    assert (made.table[:, :, TARGET] == np.where(waits >= 0, made.arrivals[waits], 0)).all()
    assert (made.table[:, -1, KIND] == layout.END).all()
    for kind in PRODUCTS:
        for entry in entries_of(made, kind)[:, 1:]:
            assert entry[STAGES] == -(-entry[COUNT] * layout.k_units(SMALL, kind) // made.stage_units) > 0
    qkv, heads = entries_of(made, layout.QKV), SMALL.kv_heads
    per_head = layout.groups_of(SMALL, layout.QKV) // heads
    for entry in qkv[:, 1:]:  # within one key/value head, whose counter it signals
        head = entry[FIRST] // per_head
        assert (entry[FIRST] + entry[COUNT] - 1) // per_head == head
        assert entry[SIGNAL] == layout.counter(SMALL, layout.QKV, entry[layout.LAYER], head)
    sampled = entries_of(made, layout.SAMPLE)
    assert sorted(sampled[:, 1 + FIRST]) == [0, 1] and len(set(sampled[:, 0])) == 2
    assert (entries_of(made, layout.TOKEN)[:, 1 + WAIT] == layout.counter(SMALL, layout.SAMPLE)).all()


def test_rows_come_in_the_order_of_heads_and_pairs() -> None:
    order = layout.row_order(replace(SMALL, heads=4, kv_heads=2, head_dim=8), layout.QKV)
    expected = [(0, r) for r in range(16)] + [(1, r) for r in range(8)] + [(2, r) for r in range(8)]
    expected += [(0, 16 + r) for r in range(16)] + [(1, 8 + r) for r in range(8)] + [(2, 8 + r) for r in range(8)]
    assert [tuple(row) for row in order.tolist()] == expected
    assert layout.row_order(SMALL, layout.GATE_UP)[:4].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert layout.row_order(SMALL, layout.DOWN)[5].tolist() == [0, 5]


def test_vectors_do_not_overlap() -> None:
    for shape in (SMALL, replace(SMALL, format="fp8", bias=True, normed=True, width=62)):
        layer, stride, after, total = layout.vectors(shape)
        offsets = [*layer.values(), stride]
        assert offsets == sorted(offsets) and all(at % 4 == 0 for at in [*offsets, *after.values()])
        assert (after["final_norm"], after["head_scales"]) >= (2 * stride, 2 * stride + shape.width)
        assert (layer["qkv_scales"] < layer["o_scales"]) == (shape.format == "fp8")
        assert total >= after["head_scales"]


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(Unsuited, match="9 sequences in a step: at most 8"):
        make_plan(SMALL, rows=9, multiprocessors=4, shared=SHARED[90])
