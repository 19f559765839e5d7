"""What a decoder-only model is, in fifteen numbers; foreign configurations are translated here, once.

Knows the key names of transformers' `config.json` and of GGUF metadata, and which of their fields
change the computation.  Does not know tensors, files or how a model is run.

    config = ModelConfig.from_hf(json.load(open("config.json")))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finial.errors import ModelError


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and frequency scaling (Su et al. 2021, arXiv:2104.09864).

    `kind` is "default", "linear", "llama3", "yarn" or "table"; the other fields are used by the kinds
    that need them.  "table" holds explicit divisors of the base frequencies, as GGUF stores llama3's.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0  # positions the model was trained on before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_scale: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    divisors: tuple[float, ...] = ()  # table

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Angular step per position of each rotated pair, and the factor on cos and sin.

        Returns:
            (float32 [head_dim // 2], scale); element i rotates the pair (i, i + head_dim // 2).
        Raises:
            ModelError: a table of another length than head_dim // 2.
        """
        # float32 throughout, as transformers computes it, so that angles at large positions agree.
        exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        base = (np.float32(1.0) / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        return _ROPE_KINDS[self.kind](self, base, head_dim)


def _default(rope: Rope, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    return base, 1.0


def _linear(rope: Rope, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return (base / np.float32(rope.factor)).astype(np.float32), 1.0


def _llama3(rope: Rope, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between.

    Source: Llama 3.1 reference code (`apply_scaling`); the same in transformers' rope utilities.
    """
    wavelength = 2 * math.pi / base
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    blend = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * base / rope.factor + blend * base
    scaled = np.where(wavelength > longest, base / rope.factor, np.where(wavelength < shortest, base, blended))
    return scaled.astype(np.float32), 1.0


def _yarn(rope: Rope, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    """YaRN, "NTK-by-parts" with attention temperature (Peng et al. 2023, arXiv:2309.00071, sections 3.2–3.4)."""

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(rope.original_context / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    span = max(high - low, 0.001)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    scaled = base / rope.factor * ramp + base * (1 - ramp)
    scale = rope.attention_scale
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return scaled.astype(np.float32), float(scale)


def _table(rope: Rope, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    if len(rope.divisors) != head_dim // 2:
        raise ModelError(
            f"rope table has {len(rope.divisors)} divisors, head_dim {head_dim} needs {head_dim // 2}",
            fix="convert the original checkpoint to GGUF again",
        )
    return (base / np.asarray(rope.divisors, np.float32)).astype(np.float32), 1.0


_ROPE_KINDS: dict[str, Callable[[Rope, np.ndarray, int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "table": _table,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; every field changes the computation or bounds it."""

    architecture: str  # transformers' model_type: "llama", "mistral", "qwen2", "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_embeddings: bool
    biases: tuple[str, ...]  # which of q k v o gate up down have a bias
    head_norm: bool  # RMS norm on each head of q and k (Qwen3)
    rope: Rope
    windows: tuple[int | None, ...]  # per layer: positions a row may look back on, itself included; None: all
    max_context: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise ModelError(f"{name} is {value}, expected 1 to {2**31 - 1}", fix="check the model's configuration")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads evenly",
                fix="check num_attention_heads and num_key_value_heads",
            )
        if self.head_dim < 2 or self.head_dim % 2 or self.head_dim > 65536:
            raise ModelError(
                f"head_dim is {self.head_dim}, rotary embedding needs an even number from 2 to 65,536",
                fix="check head_dim, hidden_size and num_attention_heads",
            )
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise ModelError(f"rms_norm_eps is {self.rms_norm_eps}, expected a small positive number")
        if self.max_context < 1:
            raise ModelError(f"max_context is {self.max_context}, expected at least 1")
        if len(self.windows) != self.num_layers:
            raise ModelError(f"{len(self.windows)} attention windows for {self.num_layers} layers")

    @staticmethod
    def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
        """From the fields of a transformers `config.json`.

        Raises:
            ModelError: unknown architecture, a field that changes the computation in a way finial does
                not implement, or a value of the wrong kind; each names the field.
        """
        from finial.config_hf import read_hf

        return read_hf(fields)

    def to_hf(self) -> dict[str, Any]:
        """The fields that `from_hf` reads, as transformers writes them."""
        from finial.config_hf import write_hf

        return write_hf(self)

    @staticmethod
    def from_gguf(
        metadata: Mapping[str, Any], tensor_names: Collection[str], rope_divisors: np.ndarray | None = None
    ) -> ModelConfig:
        """From GGUF metadata and the names of the file's tensors (which tell ties, biases and head norms).

        Args:
            rope_divisors: the tensor rope_freqs.weight, float32 [head_dim // 2], where the file has one.
        Raises:
            ModelError: unknown architecture, missing key, unsupported scaling; each names the key.
        """
        from finial.config_gguf import read_gguf

        return read_gguf(metadata, tensor_names, rope_divisors)

    def to_gguf(self) -> dict[str, Any]:
        """GGUF metadata of this model's shape (no tokenizer), as llama.cpp's converter names it."""
        from finial.config_gguf import write_gguf

        return write_gguf(self)
