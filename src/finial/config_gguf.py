"""GGUF metadata to `ModelConfig` and back, under the key names of llama.cpp's converter.

Source of the key names: the GGUF specification in ggml's `docs/gguf.md` and the `gguf` package's
`constants.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from finial.config import ModelConfig, Rope
from finial.errors import ModelError

# GGUF's architecture name -> transformers' model_type; Mistral files call themselves llama.
_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_GGUF_NAME = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_BIASES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}

# Keys under `{arch}.` that change the computation in a way that finial does not implement, unless
# they have the value given.
_ONLY: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
}


def read_gguf(
    metadata: Mapping[str, Any], tensor_names: Collection[str], rope_divisors: np.ndarray | None
) -> ModelConfig:
    """See `ModelConfig.from_gguf`."""
    gguf_name = metadata.get("general.architecture")
    architecture = _ARCHITECTURES.get(gguf_name) if isinstance(gguf_name, str) else None
    if architecture is None:
        raise ModelError(
            f"general.architecture is {gguf_name!r}, finial knows {', '.join(_ARCHITECTURES)}",
            fix="choose a GGUF file of one of these architectures",
        )
    keys = _Keys(metadata, str(gguf_name))
    for name, allowed in _ONLY.items():
        value = keys.get(name)
        if value is not None and value not in allowed:
            raise ModelError(f"{keys.full(name)} is {value!r}, which finial does not implement")
    layers = keys.integer("block_count")
    if not 1 <= layers < 10_000:
        raise ModelError(f"{keys.full('block_count')} is {layers}, expected 1 to 9,999")
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", default=hidden // max(heads, 1))
    for other in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(other, default=head_dim) != head_dim:
            raise ModelError(
                f"{keys.full(other)} differs from the head size {head_dim}, which finial does not implement"
            )
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = keys.integer("vocab_size", default=len(tokens) if tokens is not None else None)
    max_context = keys.integer("context_length")
    window = keys.get("attention.sliding_window")
    if window is not None and architecture == "llama":
        architecture = "mistral"
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.integer("attention.head_count_kv", default=heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in tensor_names,
        biases=tuple(name for name, tensor in _BIASES.items() if f"blk.0.{tensor}.bias" in tensor_names),
        head_norm="blk.0.attn_q_norm.weight" in tensor_names,
        rope=_read_rope(keys, rope_divisors, max_context),
        windows=_read_windows(keys, layers),
        max_context=max_context,
    )


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_gguf`; llama3's frequency scaling is a tensor there, see `rope_divisors`."""
    name = _GGUF_NAME[config.architecture]
    rope = config.rope
    values: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope.theta),
        "vocab_size": config.vocab_size,
    }
    if rope.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.factor)}
    if rope.kind == "yarn":
        values |= {
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
        }
        if rope.attention_scale is not None:
            values["rope.scaling.attn_factor"] = float(rope.attention_scale / _paper_scale(rope.factor))
    sliding = {window for window in config.windows if window is not None}
    if len(sliding) > 1:
        raise ModelError(f"GGUF cannot say {len(sliding)} different sliding windows")
    if sliding:
        values["attention.sliding_window"] = sliding.pop()
        if None in config.windows:
            values["attention.sliding_window_pattern"] = [window is not None for window in config.windows]
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """The content of GGUF's rope_freqs.weight, float32 [head_dim // 2]: base frequency over scaled frequency.

    None for kinds that metadata alone can express.  A quotient's rounding is undone where a neighbouring float32
    number divides to the very frequency, so that the GGUF file is the same model bit for bit.
    """
    if config.rope.kind not in ("llama3", "table"):
        return None
    scaled, _ = config.rope.frequencies(config.head_dim)
    base, _ = Rope(theta=config.rope.theta).frequencies(config.head_dim)
    divisors = np.asarray(base / scaled, np.float32)
    for toward in (np.float32(0), np.float32(np.inf)):
        nearby = np.nextafter(divisors, toward)
        divisors = np.where((base / divisors != scaled) & (base / nearby == scaled), nearby, divisors)
    return divisors


class _Keys:
    """Typed look-ups under one architecture's prefix."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self._metadata, self._prefix = metadata, prefix

    def full(self, name: str) -> str:
        return f"{self._prefix}.{name}"

    def get(self, name: str) -> Any:
        return self._metadata.get(self.full(name))

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ModelError(f"GGUF key {self.full(name)} is {value!r}, expected a whole number")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ModelError(f"GGUF key {self.full(name)} is {value!r}, expected a number")
        if value <= 0:
            raise ModelError(f"GGUF key {self.full(name)} is {value!r}, expected a positive number")
        # GGUF stores float32; its shortest decimal is the number that was meant (1e-06, not 9.99999997e-07).
        return float(str(np.float32(value)))


def _paper_scale(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_rope(keys: _Keys, divisors: np.ndarray | None, max_context: int) -> Rope:
    theta = keys.number("rope.freq_base", default=10_000.0)
    kind = keys.get("rope.scaling.type")
    if kind in (None, "none") and keys.get("rope.scale_linear") is not None:  # files before 2023-10
        return Rope(theta=theta, kind="linear", factor=keys.number("rope.scale_linear"))
    if kind in (None, "none"):
        if divisors is None:
            return Rope(theta=theta)
        if not (np.isfinite(divisors).all() and (divisors > 0).all()):
            raise ModelError(
                "rope_freqs.weight holds a value that is not a positive number", fix="fetch the file again"
            )
        return Rope(theta=theta, kind="table", divisors=tuple(float(value) for value in divisors))
    if divisors is not None:
        raise ModelError(f"both rope_freqs.weight and {keys.full('rope.scaling.type')} {kind!r} are given")
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=keys.number("rope.scaling.factor"))
    if kind == "yarn":
        factor = keys.number("rope.scaling.factor")
        given = keys.number("rope.scaling.attn_factor", default=1.0)
        return Rope(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_context=keys.integer("rope.scaling.original_context_length", default=max_context),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
            attention_scale=None if given == 1.0 else given * _paper_scale(factor),
        )
    raise ModelError(f"GGUF key {keys.full('rope.scaling.type')} is {kind!r}, finial knows none, linear, yarn")


def _read_windows(keys: _Keys, layers: int) -> tuple[int | None, ...]:
    window = keys.get("attention.sliding_window")
    if window is None or window == 0:
        return (None,) * layers
    size = keys.integer("attention.sliding_window")
    if size < 1:
        raise ModelError(f"GGUF key {keys.full('attention.sliding_window')} is {size}, expected at least 1")
    pattern = keys.get("attention.sliding_window_pattern")
    if pattern is None:
        return (size,) * layers
    if isinstance(pattern, (int, np.integer)) or len(pattern) != layers:
        raise ModelError(f"GGUF key {keys.full('attention.sliding_window_pattern')} must list {layers} layers")
    return tuple(size if slides else None for slides in pattern)
