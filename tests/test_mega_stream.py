"""The megakernel's streams: every matrix can be taken out of them again, bit by bit, and they hold nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.layout import COUNT, FIRST, KIND, LAYER, ROWS
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.shape import Recognised
from finial.backends.cuda.mega.stream import Packer, matrices
from finial.backends.cuda.weights import fp8_decoded
from finial.config import ModelConfig
from finial.formats import Tensor
from finial.models.decoder import build_graph
from test_mega_table import BASE, recognised


def made(config: ModelConfig, format: str, blocks: int, **variant: bool) -> tuple[Plan, Recognised, dict[str, Tensor]]:
    graph, random = build_graph(config), np.random.default_rng(3)
    weights = {}
    for value in graph.of_kind("weight"):
        shape = tuple(int(dim) for dim in value.shape)
        tensor = Tensor.from_array(random.standard_normal(shape).astype(np.float32))
        weights[value.name] = tensor.to("bf16" if format == "fp8" else format) if len(shape) == 2 else tensor
    found = recognised(graph, {name: t.format for name, t in weights.items()})
    found = replace(found, shape=replace(found.shape, format=format))
    plan = make_plan(found.shape, rows=2, multiprocessors=blocks, shared=227 << 10, warps=2, **variant)
    return plan, found, weights


def groups_in(plan: Plan, stream: np.ndarray, kind: int, layer: int) -> np.ndarray:
    """What the blocks find of a product in their streams: units [groups, k units, bytes]."""
    units, k_units = plan.units(), layout.k_units(plan.shape, kind)
    out = np.zeros((layout.groups_of(plan.shape, kind), k_units, layout.UNIT_BYTES[plan.shape.format]), np.uint8)
    found = np.zeros(len(out), int)
    for block, base in enumerate(plan.offsets()[:-1].tolist()):
        at = base
        for entry, count in zip(plan.table[block], units[block].tolist(), strict=True):
            nbytes = count * out.shape[2]
            if entry[KIND] == kind and entry[LAYER] == layer:
                mine = slice(entry[FIRST], entry[FIRST] + entry[COUNT])
                out[mine] = stream[at : at + nbytes].reshape(-1, k_units, out.shape[2])
                found[mine] += 1
            at += nbytes
    assert (found == 1).all()
    return out


@pytest.mark.parametrize("blocks", [3, 6, 20])
@pytest.mark.parametrize("format", ["bf16", "q8_0", "fp8"])
@pytest.mark.parametrize(
    "fields",
    [
        {"biases": ("q", "v"), "head_norm": True},
        {"vocab_size": 157, "num_heads": 6, "num_kv_heads": 3, "hidden_size": 96, "intermediate_size": 64},
        {"hidden_size": 52, "intermediate_size": 44, "head_dim": 24, "tie_embeddings": True},
    ],
)
def test_streams_hold_the_matrices(fields: dict[str, Any], format: str, blocks: int) -> None:
    config = replace(BASE, **fields)
    if format == "q8_0" and (config.hidden_size % 32 or config.intermediate_size % 32):
        config = replace(config, hidden_size=64, intermediate_size=32, head_dim=24, num_heads=4, num_kv_heads=2)
    plan, names, weights = made(config, format, blocks)
    stream = np.full(int(plan.offsets()[-1]), 0xEE, np.uint8)
    written = np.zeros(len(stream), bool)
    packer = Packer(plan, names, weights)
    for offset, data in packer.pieces():
        assert not written[offset : offset + len(data)].any()
        stream[offset : offset + len(data)] = data
        written[offset : offset + len(data)] = True
    assert written.sum() == plan.stream_bytes().sum()
    vectors = packer.vectors()
    layer_offsets, stride, after, total = layout.vectors(plan.shape)
    assert len(vectors) == total
    scale_names = {0: "qkv_scales", 2: "o_scales", 3: "gate_up_scales", 4: "down_scales"}
    true_bytes = 0.0
    for kind in layout.PRODUCTS:
        order, (rows, k) = layout.row_order(plan.shape, kind), layout.product_size(plan.shape, kind)
        for layer in range(config.num_layers if kind != layout.HEAD else 1):
            tensors = [weights[name] for name in matrices(names, kind, layer)]
            values = [tensor.decode() for tensor in tensors]
            expected = np.stack([values[which][row] for which, row in order.tolist()])
            units = groups_in(plan, stream, kind, layer)
            true_bytes += rows * k * {"bf16": 2, "fp8": 1, "q8_0": 34 / 32}[format]
            if format == "fp8":
                at = after["head_scales"] if kind == layout.HEAD else layer * stride + layer_offsets[scale_names[kind]]
                got = read(units, format, vectors[at:])
                # e4m3 has 3 bits of mantissa, and steps of 2^-9 of the scaled row below 2^-6.
                largest = np.abs(expected).max(axis=1, keepdims=True)
                assert (np.abs(got[:rows, :k] - expected) <= np.maximum(np.abs(expected) / 16, largest / 2**17)).all()
                expected = got[:rows, :k]
            else:
                got = read(units, format, vectors)
            np.testing.assert_array_equal(got[:rows, :k], expected)
            assert not got[rows:].any() and not got[:, k:].any()
    padding = plan.stream_bytes().sum() - true_bytes
    assert padding >= 0 and (padding == 0 or fields.keys() & {"vocab_size", "hidden_size"})


def read(units: np.ndarray, format: str, scales: np.ndarray) -> np.ndarray:
    """The values of units [groups, k units, bytes], float32 [groups · 8, k]; scales of rows for fp8."""
    if format == "bf16":
        return bf16(by_row(units, 64))
    if format == "fp8":
        data = by_row(units, 32)
        return fp8_decoded(data, scales[: len(data)].reshape(-1, 1), data.shape[1])
    numbers = by_row(units[:, :, :256], 32).astype(np.float32) - 128
    blocks = by_row(units[:, :, 256:], 2).view(np.float16).astype(np.float32)
    return numbers * np.repeat(blocks, 32, axis=1)


@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_streams_of_the_fused_variant_hold_down_by_neurons(format: str) -> None:
    """Each block has all rows of down for its own neurons, octet by octet, right after their gate·up."""
    plan, names, weights = made(replace(BASE, hidden_size=52), format, 5, fused_mlp=True)
    stream = np.full(int(plan.offsets()[-1]), 0xEE, np.uint8)
    packer = Packer(plan, names, weights)
    for offset, data in packer.pieces():
        stream[offset : offset + len(data)] = data
    vectors, (offsets, stride, _, _) = packer.vectors(), layout.vectors(plan.shape)
    for layer, own in enumerate(names.layers):
        down = weights[own.down].decode()
        got = np.full((layout.down_groups(plan.shape) * ROWS, plan.shape.ffn), np.nan, np.float32)
        for block, base in enumerate(plan.offsets()[:-1].tolist()):
            at = base
            for entry, nbytes in zip(plan.table[block], plan.entry_bytes()[block].tolist(), strict=True):
                if entry[KIND] == layout.MLP_DOWN and entry[LAYER] == layer:
                    octets = stream[at : at + nbytes].reshape(
                        -1, int(entry[COUNT]), ROWS, nbytes // len(got) // entry[COUNT]
                    )
                    mine = octets.transpose(0, 2, 1, 3).reshape(len(got), -1)
                    scales = vectors[layer * stride + offsets["down_scales"] :][: len(got)].reshape(-1, 1)
                    values = fp8_decoded(mine, scales, mine.shape[1]) if format == "fp8" else bf16(mine)
                    got[:, entry[FIRST] * ROWS : (entry[FIRST] + entry[COUNT]) * ROWS] = values
                at += nbytes
        assert np.isfinite(got).all() and not got[len(down) :].any()
        if format == "bf16":
            np.testing.assert_array_equal(got[: len(down)], down)
        else:
            largest = np.abs(down).max(axis=1, keepdims=True)
            assert (np.abs(got[: len(down)] - down) <= np.maximum(np.abs(down) / 16, largest / 2**17)).all()


@pytest.mark.parametrize("blocks", [2, 9])
@pytest.mark.parametrize("format", ["bf16", "fp8", "q8_0"])
def test_streams_hold_the_product_after_attention_by_head_groups(format: str, blocks: int) -> None:
    """All rows by a head group's columns, with groups of three and two heads, whether attention is split or not."""
    config = replace(BASE, hidden_size=96, num_heads=10, head_dim=32 if format == "q8_0" else 8)
    plan, names, weights = made(config, format, blocks, by_head=True, whole=True)
    stream = np.full(int(plan.offsets()[-1]), 0xEE, np.uint8)
    packer, shape = Packer(plan, names, weights), plan.shape
    for offset, data in packer.pieces():
        stream[offset : offset + len(data)] = data
    vectors, (offsets, stride, _, _) = packer.vectors(), layout.vectors(shape)
    groups = layout.groups_of(shape, layout.OUTPUT)
    for layer, own in enumerate(names.layers):
        expected = weights[own.output].decode()
        got, found = np.full(expected.shape, np.nan, np.float32), []
        for block, base in enumerate(plan.offsets()[:-1].tolist()):
            at = base
            for entry, nbytes in zip(plan.table[block], plan.entry_bytes()[block].tolist(), strict=True):
                if entry[KIND] == layout.GROUP_OUTPUT and entry[LAYER] == layer:
                    number, group = divmod(int(entry[FIRST]), groups)
                    first, columns = (int(n) for n in layout.head_columns(shape, number))
                    units = stream[at : at + nbytes].reshape(entry[COUNT], -1, layout.UNIT_BYTES[format])
                    row = group * ROWS
                    scales = vectors[layer * stride + offsets["o_scales"] + row :] if format == "fp8" else vectors
                    values = read(units, format, scales)
                    got[row : row + len(values), first : first + columns] = values[:, :columns]
                    assert not values[:, columns:].any()
                    found.append(len(values) * columns)
                at += nbytes
        assert np.isfinite(got).all() and sum(found) == got.size
        if format == "fp8":
            largest = np.abs(expected).max(axis=1, keepdims=True)
            assert (np.abs(got - expected) <= np.maximum(np.abs(expected) / 16, largest / 2**17)).all()
        else:
            np.testing.assert_array_equal(got, expected)
    other, _, _ = made(config, format, blocks, by_head=True, whole=False)
    again = np.full(len(stream), 0xEE, np.uint8)
    for offset, data in Packer(other, names, weights).pieces():
        again[offset : offset + len(data)] = data
    np.testing.assert_array_equal(stream, again)


def bf16(rows: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def by_row(units: np.ndarray, width: int) -> np.ndarray:
    """[groups, k units, 8 rows of `width` bytes] as the matrix [groups · 8, bytes of a row]."""
    groups, k_units, _ = units.shape
    rows = units.reshape(groups, k_units, ROWS, width).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows).reshape(groups * ROWS, k_units * width)


def test_vectors_hold_norms_and_biases() -> None:
    config = replace(BASE, biases=("q", "v"), head_norm=True)
    plan, names, weights = made(config, "bf16", 4)
    packer = Packer(plan, names, weights)
    vectors = packer.vectors()
    offsets, stride, after, _ = layout.vectors(plan.shape)
    for layer, own in enumerate(names.layers):
        for part, name in zip(
            ("attn_norm", "mlp_norm", "q_norm", "k_norm"), (own.attn_norm, own.mlp_norm, *own.head_norms), strict=True
        ):
            values = weights[name].decode()
            np.testing.assert_array_equal(vectors[layer * stride + offsets[part] :][: len(values)], values)
        bias = vectors[layer * stride + offsets["qkv_bias"] :][: plan.shape.qkv_rows].reshape(2, 4, 16)
        np.testing.assert_array_equal(bias[:, :2].reshape(-1), weights[own.biases[0]].decode())
        np.testing.assert_array_equal(bias[:, 3].reshape(-1), weights[own.biases[2]].decode())
        assert not bias[:, 2].any()
    final = weights["model.norm.weight"].decode()
    np.testing.assert_array_equal(vectors[after["final_norm"] :][: len(final)], final)


def test_all_plans_of_a_device_share_their_streams() -> None:
    """Whatever the number of rows and whether tokens are drawn: the same rows in the same blocks."""
    plan, names, weights = made(BASE, "bf16", 5)
    expected = [(at, data.tobytes()) for at, data in Packer(plan, names, weights).pieces()]
    for rows, sampled in ((1, False), (1, True), (8, True)):
        other = make_plan(plan.shape, rows=rows, multiprocessors=5, shared=99 << 10, sampled=sampled)
        assert [(at, data.tobytes()) for at, data in Packer(other, names, weights).pieces()] == expected
