"""Configurations: real ones are read, unknown ones are errors that name the field."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finial import names
from finial.config import ModelConfig, Rope
from finial.config_gguf import rope_divisors
from finial.errors import ModelError

# Published config.json fields (the models' pages on the Hugging Face hub).
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PUBLISHED = {"qwen3-0.6b": QWEN3_0_6B, "llama-3.2-1b": LLAMA_3_2_1B, "mistral-7b": MISTRAL_7B}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_are_read_and_written_back(name: str) -> None:
    config = ModelConfig.from_hf(PUBLISHED[name])
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_published_sizes() -> None:
    """Parameter counts as the model pages state them; Qwen3-0.6B is 28 layers of 15.73 M and a tied table."""
    assert names.parameter_count(ModelConfig.from_hf(QWEN3_0_6B)) == 596_049_920
    assert names.parameter_count(ModelConfig.from_hf(LLAMA_3_2_1B)) == 1_235_814_400
    mistral = ModelConfig.from_hf(MISTRAL_7B)
    assert names.parameter_count(mistral) == 7_241_732_096
    assert mistral.windows == (4096,) * 32


def gguf_names(config: ModelConfig) -> list[str]:
    return [names.to_gguf(name) for name in names.weight_shapes(config)]


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_gguf_metadata_says_the_same(name: str) -> None:
    config = ModelConfig.from_hf(PUBLISHED[name])
    divisors = rope_divisors(config)
    again = ModelConfig.from_gguf(config.to_gguf(), gguf_names(config), divisors)
    frequencies = config.rope.frequencies(config.head_dim)[0]
    # where no float32 divisor gives the very frequency, the nearest is one unit in the last place away
    np.testing.assert_array_max_ulp(again.rope.frequencies(config.head_dim)[0], frequencies, maxulp=1)
    assert {**vars(again), "rope": None} == {**vars(config), "rope": None}
    assert (again.rope == config.rope) == (divisors is None)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.7,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    ],
)
def test_rope_kinds_equal_transformers(scaling: dict) -> None:  # type: ignore[type-arg]
    theirs = transformers.LlamaConfig(
        rope_theta=500_000.0, rope_scaling=dict(scaling), head_dim=128, max_position_embeddings=131_072
    )
    # transformers' own "default" and "linear" frequencies, then scaled by kind
    expected, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    config = ModelConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    frequencies, ours = config.rope.frequencies(128)
    assert ours == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"num_experts": 64}, "num_experts"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"my_new_attention_trick": 3}, "my_new_attention_trick"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "extra": 1}}, "extra"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"hidden_size": "1024"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_layers"),
        ({"num_key_value_heads": 5}, "16 attention heads"),
        ({"head_dim": 127}, "head_dim"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 28}, "linear_attention"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_finial_would_compute_wrongly_is_an_error(change: dict, named: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ModelError, match=re.escape(named)):
        ModelConfig.from_hf(QWEN3_0_6B | change)


def test_a_config_that_is_no_object_is_an_error() -> None:
    with pytest.raises(ModelError, match="list"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"general.architecture": "gemma3"}, "gemma3"),
        ({"qwen3.block_count": None}, "qwen3.block_count"),
        ({"qwen3.block_count": 1 << 40}, "qwen3.block_count"),
        ({"qwen3.attention.head_count": "16"}, "qwen3.attention.head_count"),
        ({"qwen3.rope.scaling.type": "longrope"}, "longrope"),
        ({"qwen3.rope.dimension_count": 64}, "qwen3.rope.dimension_count"),
        ({"qwen3.expert_count": 8}, "qwen3.expert_count"),
        ({"qwen3.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        (
            {"qwen3.attention.sliding_window": 8, "qwen3.attention.sliding_window_pattern": [True]},
            "sliding_window_pattern",
        ),
    ],
)
def test_gguf_metadata_errors_name_the_key(change: dict, named: str) -> None:  # type: ignore[type-arg]
    config = ModelConfig.from_hf(QWEN3_0_6B)
    with pytest.raises(ModelError, match=re.escape(named)):
        ModelConfig.from_gguf(config.to_gguf() | change, gguf_names(config))


def test_rope_table_must_fit() -> None:
    with pytest.raises(ModelError, match="3 divisors"):
        Rope(kind="table", divisors=(1.0, 2.0, 3.0)).frequencies(8)


def test_interleaving_is_llama_cpp_s_order() -> None:
    """llama.cpp's converter: reshape(heads, 2, head_dim/2).swapaxes(1, 2)."""
    rows = np.arange(24)
    assert np.array_equal(rows[names.interleave(2, 12)], rows.reshape(2, 2, 6).swapaxes(1, 2).reshape(-1))
    assert np.array_equal(rows[names.interleave(2, 12)][names.deinterleave(2, 12)], rows)
