"""Graph: shapes are derived and checked, the text form reads well, JSON gives the same graph back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from finial.config import ModelConfig, Rope
from finial.cost import kv_bytes_per_token, step_bytes, step_flops
from finial.errors import ModelError
from finial.formats import Tensor
from finial.graph import OPS, Graph, GraphError, single_step
from finial.models.decoder import build_graph, constants, kv_dtypes
from finial.names import parameter_count, weight_shapes

CONFIG = ModelConfig(
    architecture="qwen3", vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, rms_norm_eps=1e-6, tie_embeddings=True, biases=("q",), head_norm=True,
    rope=Rope(), windows=(None, 16), max_context=64,
)  # fmt: skip


def test_text_form_is_readable() -> None:
    graph = Graph("tiny")
    tokens = graph.input("tokens", ("T",), "i32")
    rows = graph.apply("embed", tokens, graph.weight("table", (10, 4)))
    graph.output(graph.apply("rms_norm", rows, graph.weight("norm", (4,)), eps=1e-6, name="out"))
    assert graph.text() == (
        "graph tiny\n"
        "  input tokens : i32[T]\n"
        "  weight table : f32[10, 4]\n"
        "  weight norm : f32[4]\n"
        "  %0 = embed(tokens, table)  # f32[T, 4]\n"
        "  out = rms_norm(%0, norm, eps=1e-06)  # f32[T, 4]\n"
        "  return out\n"
    )


def test_json_round_trip() -> None:
    graph = build_graph(CONFIG)
    again = Graph.from_json(graph.to_json())
    assert again == graph
    assert again.text() == graph.text()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"name": "x", "values": [["a", [1], "f64", "input"]], "nodes": [], "outputs": []}']
)
def test_json_of_another_form_is_an_error(text: str) -> None:
    with pytest.raises(GraphError):
        Graph.from_json(text)


def test_every_op_is_used_or_documented() -> None:
    used = {node.op for node in build_graph(CONFIG).nodes}
    assert used == set(OPS)
    assert all(op.doc for op in OPS.values())


def test_misfits_are_errors() -> None:
    graph = Graph("misfit")
    rows = graph.input("x", ("T", 6))
    with pytest.raises(GraphError, match="does not fit"):
        graph.apply("linear", rows, graph.weight("w", (4, 5)))
    with pytest.raises(GraphError, match="no multiple"):
        graph.apply("rms_norm", rows, graph.weight("n", (4,)), eps=1e-6)
    with pytest.raises(GraphError, match="attributes"):
        graph.apply("rms_norm", rows, graph.weight("n6", (6,)))
    with pytest.raises(GraphError, match="unknown op"):
        graph.apply("conv", rows)
    with pytest.raises(GraphError, match="differ"):
        graph.apply("add", rows, graph.input("y", ("T", 5)))
    with pytest.raises(GraphError, match="redeclared"):
        graph.weight("w", (4, 6))
    with pytest.raises(GraphError, match="declared twice"):
        graph.input("x", ("T",))
    with pytest.raises(GraphError, match="not of this graph"):
        graph.output(Graph("other").input("z", ("T",)))


def test_states_are_followed_through_their_versions() -> None:
    graph = build_graph(CONFIG)
    attention = [node for node in graph.nodes if node.op == "attention"]
    assert [graph.state_of(node.inputs[1]).name for node in attention] == ["kv.0", "kv.1"]
    assert [node.attrs["window"] for node in attention] == [None, 16]
    assert not graph.is_state("logits")


def test_cache_formats_fit_the_head() -> None:
    assert kv_dtypes(CONFIG) == ("bf16", "f32")
    with pytest.raises(ModelError, match=r"q8_0 takes a head_dim of whole blocks of 32, this model's is 8"):
        build_graph(CONFIG, "q8_0")
    wide = dataclasses.replace(CONFIG, head_dim=64)
    assert kv_bytes_per_token(build_graph(wide, "q8_0")) * 32 == kv_bytes_per_token(build_graph(wide, "bf16")) * 17


def test_costs_are_those_of_the_shape() -> None:
    graph = build_graph(CONFIG)
    weights = {
        name: Tensor.from_array(np.zeros(shape, np.float32), "bf16") for name, shape in weight_shapes(CONFIG).items()
    }
    weights |= {name: Tensor.from_array(array) for name, array in constants(CONFIG).items()}
    kv = 2 * 2 * 2 * 8 * 2  # layers · (k and v) · heads · head_dim · bytes
    assert kv_bytes_per_token(graph) == kv
    stored = 2 * parameter_count(CONFIG) + 4 * CONFIG.head_dim // 2
    row = 2 * CONFIG.hidden_size
    assert step_bytes(graph, weights, rows=1, lengths=[10]) == stored + row + 10 * kv
    assert step_bytes(graph, weights, rows=3, lengths=[10, 20, 16]) == stored + 3 * row + (46 + 42) * kv // 2
    matrices = sum(int(np.prod(s)) for s in weight_shapes(CONFIG).values() if len(s) == 2)
    assert step_flops(graph, rows=1, wanted=1, lengths=[10]) == 2 * matrices + 2 * 4 * 32 * 10


def test_single_step_covers_its_rows() -> None:
    step = single_step([5, 6, 7], page_size=2, first=3, wanted=[2])
    assert step.positions.tolist() == [3, 4, 5] == step.slots.tolist()
    assert step.pages.tolist() == [[0, 1, 2]] and step.lengths.tolist() == [6] and step.wanted.tolist() == [2]
