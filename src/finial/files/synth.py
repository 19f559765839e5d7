"""Random checkpoints of exactly a real model's shape, so that speed can be measured where nothing can be downloaded.

Knows the published configurations of a few models; knows nothing of how they are run.

    synth("qwen3-0.6b", Path("model"), seed=0)

The weights are noise, scaled so that activations stay near one; the text such a model writes means nothing.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.config import ModelConfig
from finial.errors import ModelError
from finial.files.disk import require_space
from finial.files.folder import new_directory
from finial.files.safetensors import SINGLE, Source, write_safetensors
from finial.files.synth_tokenizer import LLAMA3, QWEN, SMOLLM, Vocabulary, write_tokenizer
from finial.formats import FORMATS, get_format
from finial.names import weight_shapes

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


@dataclass(frozen=True)
class Preset:
    """A published model: where its configuration was read, how many parameters it has, what its files say."""

    source: str
    parameters: int
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    vocabulary: Vocabulary = field(default=QWEN)


def _qwen3(layers: int, hidden: int, mid: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mid,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def _qwen2(layers: int, hidden: int, mid: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mid,
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": context,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


_LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}

_SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}

_QWEN3_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}
_QWEN2_GENERATION = {
    "bos_token_id": 151643,
    "do_sample": False,
    "eos_token_id": 151643,
    "max_new_tokens": 2048,
    "transformers_version": "4.37.0",
}
_LLAMA_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": 128001,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}
_SMOLLM_GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "transformers_version": "4.40.1",
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", 596_049_920, _qwen3(28, 1024, 3072, 16), _QWEN3_GENERATION),
        "qwen3-1.7b": Preset("Qwen/Qwen3-1.7B", 1_720_574_976, _qwen3(28, 2048, 6144, 16), _QWEN3_GENERATION),
        "qwen3-4b": Preset("Qwen/Qwen3-4B", 4_022_468_096, _qwen3(36, 2560, 9728, 32), _QWEN3_GENERATION),
        "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", 494_032_768, _qwen2(24, 896, 4864, 14, 32768), _QWEN2_GENERATION),
        "qwen2.5-1.5b": Preset(
            "Qwen/Qwen2.5-1.5B", 1_543_714_304, _qwen2(28, 1536, 8960, 12, 131072), _QWEN2_GENERATION
        ),
        "llama-3.2-1b": Preset("meta-llama/Llama-3.2-1B", 1_235_814_400, _LLAMA_32_1B, _LLAMA_GENERATION, LLAMA3),
        "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", 134_515_008, _SMOLLM2_135M, _SMOLLM_GENERATION, SMOLLM),
    }
)


def get_preset(name: str) -> Preset:
    """The preset of that name; ModelError listing the known ones."""
    preset = PRESETS.get(name.lower())
    if preset is None:
        raise ModelError(f"no preset {name!r}", fix="use one of " + ", ".join(PRESETS))
    return preset


def preset_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """The fields of the published config.json; with `layers` those of the same model cut to so many layers.

    Raises:
        ModelError: no such preset, or a number of layers that it does not have.
    """
    fields = dict(get_preset(name).config)
    if layers is not None:
        have = int(fields["num_hidden_layers"])
        if not 1 <= layers <= have:
            raise ModelError(f"layers is {layers}, {name} has {have}", fix=f"give a number from 1 to {have}")
        fields["num_hidden_layers"] = layers
        if "max_window_layers" in fields:
            fields["max_window_layers"] = layers
    return fields


def synth(
    preset: str,
    out: str | Path,
    seed: int = 0,
    layers: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Write a random bf16 checkpoint of the preset's shape: weights, configuration, tokenizer and chat template.

    The same preset, layers and seed give the same bytes.  The directory appears whole or not at all.

    Args:
        preset: a name in PRESETS.
        out: directory to make.
        layers: keep only so many layers.
        progress: called with (bytes written, bytes in all).
        force: replace an existing directory.
    Raises:
        ModelError: unknown preset or layers out of range.
        FileError: `out` exists, or the disk is too small.
    """
    chosen = get_preset(preset)
    fields = preset_config(preset, layers)
    shapes = weight_shapes(ModelConfig.from_hf(fields))
    out = Path(out)
    with new_directory(out, force) as folder:
        require_space(folder, sum(get_format("bf16").nbytes(shape) for shape in shapes.values()) + (32 << 20))
        _write_json(folder / "config.json", fields)
        _write_json(folder / "generation_config.json", dict(chosen.generation))
        write_tokenizer(folder, chosen.vocabulary, int(fields["vocab_size"]))
        note = f"random weights in the shape of {chosen.source}, seed {seed}"
        sources = list(random_tensors(shapes, int(fields["num_hidden_layers"]), seed))
        write_safetensors(folder / SINGLE, sources, {"finial": note}, progress=progress)
    return out


# ------------------------------------------------------------------------------------------------ weights

_NORMALS = 4_194_301  # a prime: steps of any size visit every position once
_PIECE_BYTES = 4 << 20


def random_tensors(shapes: Mapping[str, tuple[int, ...]], layers: int, seed: int) -> Iterator[Source]:
    """One source of bf16 bytes per name of `shapes`, made piece by piece when it is written.

    Norm weights are one.  Linear weights are normal with standard deviation 1/sqrt(fan_in), so that a normalised
    input gives an output near one; those that write into the residual stream are divided by sqrt(2 layers) as in
    GPT-2 (Radford et al. 2019, section 2.3).  Biases have 0.02.
    """
    normals = _Normals(seed)
    for name, shape in shapes.items():
        if len(shape) == 1 and name.endswith(".bias"):
            deviation = 0.02
        elif len(shape) == 1:
            deviation = 0.0
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 1 / math.sqrt(shape[-1] * (2 * layers if residual else 1))
        yield name, "bf16", shape, normals.pieces(name, shape, deviation)


class _Normals:
    """Rows cut out of one slab of normal numbers, each at a place and with a sign of its own.

    Drawing every weight would take minutes for the larger models; copying windows runs at memory speed.  No two rows
    of a tensor start at the same place, so none repeats.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._unit: NDArray[np.float32] | None = None
        self._scaled: dict[tuple[float, int], NDArray[np.uint16]] = {}

    def _slab(self, deviation: float, width: int) -> NDArray[np.uint16]:
        """bf16 bit patterns, uint16 [_NORMALS + width]: the slab, continued with its own beginning."""
        key = (deviation, width)
        if key not in self._scaled:
            if self._unit is None:
                self._unit = np.random.default_rng(self._seed).standard_normal(_NORMALS, np.float32)
            encode = FORMATS["bf16"].encode
            assert encode is not None
            bits = encode((self._unit * np.float32(deviation)).reshape(-1, 1)).reshape(-1).view("<u2")
            self._scaled[key] = np.concatenate([bits, np.resize(bits, width)])
        return self._scaled[key]

    def pieces(self, name: str, shape: tuple[int, ...], deviation: float) -> Iterator[NDArray[np.uint8]]:
        if deviation == 0:
            yield np.full(shape, 0x3F80, "<u2").reshape(-1).view(np.uint8)  # one, in bf16
            return
        rows, width = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        start, step = int(random.integers(_NORMALS)), int(random.integers(width, _NORMALS - width))
        windows = np.lib.stride_tricks.sliding_window_view(self._slab(deviation, width), width)
        at_once = max(1, _PIECE_BYTES // (2 * width))
        for first in range(0, rows, at_once):
            index = np.arange(first, min(first + at_once, rows), dtype=np.int64)
            piece = windows[(start + step * index) % _NORMALS]
            piece ^= (random.integers(0, 2, (len(index), 1), np.uint16)) << np.uint16(15)
            yield piece.reshape(-1).view(np.uint8)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
