"""Small random models of every family, made with transformers and saved as it saves them."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# name -> (transformers' class prefix, fields that differ from BASE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_scaling": LINEAR}),
    "llama-llama3-tied": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0, "tie_word_embeddings": True}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN}),
    "smollm2": (
        "Llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 24}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN, "rope_theta": 1e6}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3-biases-linear": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_scaling": LINEAR}),
    "qwen3-yarn-mqa": (
        "Qwen3",
        {"head_dim": 32, "num_key_value_heads": 1, "rope_scaling": YARN | {"attention_factor": 1.5}},
    ),
}
# Of whole blocks of 256, for K-quants.
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-wide": (
        "Qwen3",
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 8,
            "head_dim": 32,
            "num_hidden_layers": 2,
            "initializer_range": 0.1,
            "tie_word_embeddings": True,
        },
    ),
}


@functools.cache
def model(name: str) -> transformers.PreTrainedModel:
    """A random float32 model whose weights are bf16 values; norms and biases are random too."""
    kind, fields = (MODELS | WIDE)[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **fields}, attn_implementation="eager")
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    vary(made)
    return made  # type: ignore[no-any-return]


def vary(made: transformers.PreTrainedModel) -> None:
    """Random norms and biases, so that each counts; every weight to the nearest bf16 value."""
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.3)
            parameter.copy_(parameter.to(torch.bfloat16).to(torch.float32))


def save(name: str, path: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """As a user would find it on disk; the tied embedding stands there once."""
    # A copy: casting rounds the rope frequencies too, and they would not come back.
    copy.deepcopy(model(name)).to(dtype).save_pretrained(path, **options)
    return path


@functools.cache
def logits(name: str, tokens: tuple[int, ...]) -> np.ndarray:
    """transformers' float32 logits, [T, vocab]."""
    with torch.no_grad():
        return model(name)(torch.tensor([list(tokens)])).logits[0].numpy()


@functools.cache
def greedy(name: str, tokens: tuple[int, ...], count: int) -> list[int]:
    """transformers' greedy continuation."""
    ids = model(name).generate(
        torch.tensor([list(tokens)]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return ids[0, len(tokens) :].tolist()  # type: ignore[no-any-return]
