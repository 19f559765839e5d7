"""What a model's tensors are called and how large they are: transformers' names are finial's own.

Knows the names used by GGUF and by the package `reasoning-from-scratch`; knows no file and no data.

    weight_shapes(config)["model.layers.0.mlp.up_proj.weight"]  # (intermediate, hidden)
"""

from __future__ import annotations

import re

import numpy as np

from finial.config import ModelConfig

# transformers' name below `model.layers.N.` -> (GGUF's below `blk.N.`, reasoning-from-scratch's below `trf_blocks.N.`)
_LAYER = {
    "input_layernorm": ("attn_norm", "norm1"),
    "self_attn.q_proj": ("attn_q", "att.W_query"),
    "self_attn.k_proj": ("attn_k", "att.W_key"),
    "self_attn.v_proj": ("attn_v", "att.W_value"),
    "self_attn.o_proj": ("attn_output", "att.out_proj"),
    "self_attn.q_norm": ("attn_q_norm", "att.q_norm"),
    "self_attn.k_norm": ("attn_k_norm", "att.k_norm"),
    "post_attention_layernorm": ("ffn_norm", "norm2"),
    "mlp.gate_proj": ("ffn_gate", "ff.fc1"),
    "mlp.up_proj": ("ffn_up", "ff.fc2"),
    "mlp.down_proj": ("ffn_down", "ff.fc3"),
}
_TOP = {
    "model.embed_tokens.weight": ("token_embd.weight", "tok_emb.weight"),
    "model.norm.weight": ("output_norm.weight", "final_norm.scale"),
    "lm_head.weight": ("output.weight", "out_head.weight"),
}

_FROM_GGUF = {gguf: ours for ours, (gguf, _) in _LAYER.items()}
_FROM_SCRATCH = {scratch: ours for ours, (_, scratch) in _LAYER.items()}

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"


def layer(index: int, part: str) -> str:
    """transformers' name of a tensor in a layer: layer(3, "mlp.up_proj.weight")."""
    return f"model.layers.{index}.{part}"


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order in which a step reads them: name -> shape, linears as [out, in]."""
    hidden, mid = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (mid, hidden),
        "mlp.up_proj": (mid, hidden),
        "mlp.down_proj": (hidden, mid),
    }
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if config.head_norm:
        norms |= {"self_attn.q_norm": (config.head_dim,), "self_attn.k_norm": (config.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        for part in _LAYER:
            if part in norms:
                shapes[layer(index, f"{part}.weight")] = norms[part]
            elif part in linears:
                shapes[layer(index, f"{part}.weight")] = linears[part]
                if part.split(".")[1].removesuffix("_proj") in config.biases:
                    shapes[layer(index, f"{part}.bias")] = linears[part][:1]
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def parameter_count(config: ModelConfig) -> int:
    """Elements of all tensors; a tied head counts once."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in weight_shapes(config).values())


def to_gguf(name: str) -> str:
    """transformers' tensor name -> GGUF's."""
    if name in _TOP:
        return _TOP[name][0]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match and match[2] in _LAYER, name
    return f"blk.{match[1]}.{_LAYER[match[2]][0]}.{match[3]}"


def from_gguf(name: str) -> str | None:
    """GGUF's tensor name -> transformers', None for one that is no weight of these families."""
    for ours, (gguf, _) in _TOP.items():
        if name == gguf:
            return ours
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name)
    if match and match[2] in _FROM_GGUF:
        return layer(int(match[1]), f"{_FROM_GGUF[match[2]]}.{match[3]}")
    return None


def from_scratch(name: str) -> str | None:
    """A tensor name of the package `reasoning-from-scratch` (its Qwen3 model) -> transformers', None if unknown.

    Its norms call their weight `scale`.
    """
    for ours, (_, scratch) in _TOP.items():
        if name == scratch:
            return ours
    match = re.fullmatch(r"trf_blocks\.(\d+)\.(.+)\.(weight|bias|scale)", name)
    if match and match[2] in _FROM_SCRATCH:
        kind = "weight" if match[3] == "scale" else match[3]
        return layer(int(match[1]), f"{_FROM_SCRATCH[match[2]]}.{kind}")
    return None


def rope_permuted(architecture: str, name: str) -> bool:
    """Whether GGUF keeps this tensor's rows in interleaved-rope order (llama.cpp's llama architecture only)."""
    return architecture in ("llama", "mistral") and re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", name) is not None


def interleave(heads: int, head_dim: int) -> np.ndarray:
    """Row index, int64 [heads * head_dim]: interleaved = halves[index], pairs (2i, 2i+1) from (i, i + head_dim/2)."""
    rows = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


def deinterleave(heads: int, head_dim: int) -> np.ndarray:
    """Row index, int64 [heads * head_dim]: halves = interleaved[index], the inverse of `interleave`."""
    rows = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
