"""The decoder-only transformer as a graph: one file says the whole model.

Llama, Mistral, Qwen2 and Qwen3 differ in the fields of `ModelConfig` alone (biases, head norms, rope,
windows, ties), so there is one function and no class per family.  Knows no weights and no backend.

    graph = build_graph(config, kv_dtype="bf16")
    bound = {**checkpoint_tensors, **constants(config)}
"""

from __future__ import annotations

import math

import numpy as np

from finial import names
from finial.config import ModelConfig
from finial.errors import ModelError
from finial.formats import get_format
from finial.graph import STEP_INPUTS, Graph, Value

ROPE_FREQUENCIES = "rope.frequencies"
KV_DTYPES = ("bf16", "f32", "q8_0")


def kv_dtypes(config: ModelConfig) -> tuple[str, ...]:
    """The cache formats that this model can have: q8_0 takes whole blocks along head_dim."""
    return tuple(dtype for dtype in KV_DTYPES if config.head_dim % get_format(dtype).block == 0)


def build_graph(config: ModelConfig, kv_dtype: str = "bf16", *, hidden: bool = False) -> Graph:
    """One step of the model: inputs of `Step`, output `logits` f32 [R, vocab_size].

    Args:
        kv_dtype: what keys and values are rounded to when cached, "bf16", "f32" or "q8_0".
        hidden: a further input `pooled`, and for its rows a second output `hidden` f32 [E, hidden_size]: what the head
            would read.
    Raises:
        ModelError: another kv_dtype, or one that does not fit head_dim.
    """
    if kv_dtype not in KV_DTYPES:
        raise ModelError(f"KV cache format is {kv_dtype!r}", fix=f"choose one of {', '.join(KV_DTYPES)}")
    if kv_dtype not in kv_dtypes(config):
        raise ModelError(
            f"KV cache format {kv_dtype} takes a head_dim of whole blocks of {get_format(kv_dtype).block}, "
            f"this model's is {config.head_dim}",
            fix=f"choose one of {', '.join(kv_dtypes(config))}",
        )
    graph = Graph(config.architecture)
    step = {name: graph.input(name, shape, "i32") for name, shape in STEP_INPUTS.items()}
    frequencies = graph.weight(ROPE_FREQUENCIES, (config.head_dim // 2,))
    _, rope_scale = config.rope.frequencies(config.head_dim)
    shapes = names.weight_shapes(config)

    def weight(name: str) -> Value:
        return graph.weight(name, shapes[name])

    def linear(rows: Value, name: str) -> Value:
        bias = f"{name}.bias"
        return graph.apply("linear", rows, weight(f"{name}.weight"), *([weight(bias)] if bias in shapes else []))

    def norm(rows: Value, name: str) -> Value:
        return graph.apply("rms_norm", rows, weight(f"{name}.weight"), eps=config.rms_norm_eps)

    def rope(rows: Value) -> Value:
        return graph.apply("rope", rows, step["positions"], frequencies, head_dim=config.head_dim, scale=rope_scale)

    residual = graph.apply("embed", step["tokens"], weight(names.EMBEDDING))
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        rows = norm(residual, f"{prefix}.input_layernorm")
        queries, keys, values = (linear(rows, f"{prefix}.self_attn.{part}_proj") for part in "qkv")
        if config.head_norm:
            queries = norm(queries, f"{prefix}.self_attn.q_norm")
            keys = norm(keys, f"{prefix}.self_attn.k_norm")
        queries, keys = rope(queries), rope(keys)
        cache = graph.state(f"kv.{index}", ("S", 2, config.num_kv_heads, config.head_dim), kv_dtype)
        cache = graph.apply("cache_write", cache, keys, values, step["slots"])
        context = graph.apply(
            "attention",
            queries,
            cache,
            *(step[name] for name in ("positions", "starts", "lengths", "pages")),
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            scale=1.0 / math.sqrt(config.head_dim),
            window=config.windows[index],
        )
        residual = graph.apply("add", residual, linear(context, f"{prefix}.self_attn.o_proj"))
        rows = norm(residual, f"{prefix}.post_attention_layernorm")
        gated = graph.apply("silu_mul", linear(rows, f"{prefix}.mlp.gate_proj"), linear(rows, f"{prefix}.mlp.up_proj"))
        residual = graph.apply("add", residual, linear(gated, f"{prefix}.mlp.down_proj"))
    wanted = graph.apply("select_rows", residual, step["wanted"])
    head = weight(names.EMBEDDING if config.tie_embeddings else names.HEAD)
    graph.output(graph.apply("linear", norm(wanted, "model.norm"), head, name="logits"))
    if hidden:
        pooled = graph.apply("select_rows", residual, graph.input("pooled", ("E",), "i32"))
        final = weight("model.norm.weight")
        graph.output(graph.apply("rms_norm", pooled, final, eps=config.rms_norm_eps, name="hidden"))
    return graph


def constants(config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights of the graph that no checkpoint holds: the rope frequencies, float32 [head_dim // 2]."""
    return {ROPE_FREQUENCIES: config.rope.frequencies(config.head_dim)[0]}
