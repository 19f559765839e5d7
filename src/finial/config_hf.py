"""transformers' `config.json` to `ModelConfig` and back.

Three tables say everything: the families, the fields that never change the computation, and the
fields that are accepted at one value only.  A field in none of them is an error, because a model
whose unknown knob is ignored is a wrong model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finial.config import ModelConfig, Rope
from finial.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What a transformers `model_type` implies beyond its fields."""

    biases: tuple[str, ...] = ()  # always present
    attention_bias: tuple[str, ...] = ()  # present when `attention_bias` is true
    mlp_bias: tuple[str, ...] = ()  # present when `mlp_bias` is true
    head_norm: bool = False
    window: str = "none"  # "none" | "all" layers | "upper": layers from max_window_layers on, if use_sliding_window


FAMILIES: dict[str, Family] = {
    "llama": Family(attention_bias=("q", "k", "v", "o"), mlp_bias=("gate", "up", "down")),
    "mistral": Family(window="all"),
    "qwen2": Family(biases=("q", "k", "v"), window="upper"),
    "qwen3": Family(attention_bias=("q", "k", "v", "o"), head_norm=True, window="upper"),
}

# Read below, by name.
_READ = frozenset(
    """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps tie_word_embeddings attention_bias mlp_bias
    max_position_embeddings rope_theta rope_scaling rope_parameters sliding_window use_sliding_window
    max_window_layers layer_types original_max_position_embeddings
    """.split()
)

# Training, generation defaults, bookkeeping: no influence on the logits of a given token sequence.
_NO_EFFECT = frozenset(
    """
    _name_or_path architectures auto_map transformers_version torch_dtype dtype use_cache initializer_range
    attention_dropout output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    decoder_start_token_id task_specific_params problem_type id2label label2id num_labels finetuning_task
    tokenizer_class prefix torchscript use_bfloat16 pruned_heads chunk_size_feed_forward
    gradient_checkpointing attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal use_flash_attn _flash_attn_2_enabled _experts_implementation max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_version unsloth_fixed
    transformers.js_config model_name base_model router_aux_loss_coef
    """.split()
)

# Fields that change the computation; finial implements one value of each.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "is_decoder": (True, False, None),  # transformers' default is False even for these models
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "is_llama_config": (True, None),
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}

_SCALING_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        [
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
        ]
    ),
}


def read_hf(fields: Mapping[str, Any]) -> ModelConfig:
    """See `ModelConfig.from_hf`."""
    if not isinstance(fields, Mapping):
        raise ModelError(f"config.json holds a {type(fields).__name__}, expected an object of fields")
    architecture = fields.get("model_type")
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ModelError(
            f"model_type is {architecture!r}, finial knows {', '.join(FAMILIES)}",
            fix="choose a checkpoint of one of these families",
        )
    _reject_unknown(fields)
    layers = _integer(fields, "num_hidden_layers")
    heads = _integer(fields, "num_attention_heads")
    hidden = _integer(fields, "hidden_size")
    max_context = _integer(fields, "max_position_embeddings", default=2048)
    biases = family.biases
    for field, names in (("attention_bias", family.attention_bias), ("mlp_bias", family.mlp_bias)):
        if fields.get(field):
            if not names:
                raise ModelError(f"{field} is true, which the family {architecture} does not have in finial")
            biases += names
    head_dim = fields.get("head_dim")
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ModelError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim")
        head_dim = hidden // heads
    return ModelConfig(
        architecture=str(architecture),
        vocab_size=_integer(fields, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(fields, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_integer(fields, "num_key_value_heads", default=heads),
        head_dim=_integer({"head_dim": head_dim}, "head_dim"),
        rms_norm_eps=_number(fields, "rms_norm_eps", default=1e-6),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        biases=biases,
        head_norm=family.head_norm,
        rope=_read_rope(fields, max_context),
        windows=_read_windows(fields, family, layers),
        max_context=max_context,
    )


def write_hf(config: ModelConfig) -> dict[str, Any]:
    """See `ModelConfig.to_hf`.

    Raises:
        ModelError: rope divisors from a GGUF file, which config.json cannot express.
    """
    fields: dict[str, Any] = {
        "architectures": [f"{config.architecture.capitalize()}ForCausalLM"],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_scaling(config.rope),
    }
    family = FAMILIES[config.architecture]
    fields |= {name: True for name in ("attention_bias", "mlp_bias") if set(getattr(family, name)) & set(config.biases)}
    if set(_implied_biases(family, fields)) != set(config.biases):
        raise ModelError(f"config.json of family {config.architecture} cannot say biases on {', '.join(config.biases)}")
    windows = {window for window in config.windows if window is not None}
    if len(windows) > 1:
        raise ModelError(f"config.json cannot say {len(windows)} different sliding windows")
    window = windows.pop() if windows else None
    if family.window == "all":
        if window is not None and None in config.windows:
            raise ModelError(f"family {config.architecture} has one sliding window for all layers")
        fields["sliding_window"] = window
    elif family.window == "upper":
        fields |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": config.num_layers,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in config.windows],
        }
    elif window is not None:
        raise ModelError(f"family {config.architecture} has no sliding window in config.json")
    return fields


def _implied_biases(family: Family, fields: Mapping[str, Any]) -> tuple[str, ...]:
    attention = family.attention_bias if fields.get("attention_bias") else ()
    return family.biases + attention + (family.mlp_bias if fields.get("mlp_bias") else ())


def _reject_unknown(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _ONLY:
            if value not in _ONLY[name]:
                raise ModelError(
                    f"config.json: {name} is {value!r}, finial implements only {_ONLY[name][0]!r}",
                    fix="choose a checkpoint without it (for a quantised one: the original, then finial's own format)",
                )
        elif name not in _READ and name not in _NO_EFFECT:
            raise ModelError(
                f"config.json: unknown field {name!r} = {value!r} may change what the model computes",
                fix="if it does not, remove it from config.json",
            )


def _read_rope(fields: Mapping[str, Any], max_context: int) -> Rope:
    # transformers 5 writes rope_parameters (theta inside); 4 wrote rope_theta and rope_scaling.
    parameters = fields.get("rope_parameters")
    scaling = fields.get("rope_scaling")
    where = "rope_parameters" if parameters else "rope_scaling"
    rope = dict(parameters or scaling or {}) if isinstance(parameters or scaling or {}, Mapping) else None
    if rope is None:
        raise ModelError(f"config.json: {where} is {parameters or scaling!r}, expected an object")
    theta = rope.pop("rope_theta", None)
    if theta is None:
        theta = fields.get("rope_theta")
    theta = _number({"rope_theta": 10_000.0 if theta is None else theta}, "rope_theta")
    kind, old_kind = rope.pop("rope_type", None), rope.pop("type", None)
    kind = kind or old_kind or "default"
    if kind not in _SCALING_FIELDS:
        raise ModelError(f"config.json: {where} kind is {kind!r}, finial knows {', '.join(_SCALING_FIELDS)}")
    if rope.pop("partial_rotary_factor", 1.0) not in (1, None):
        raise ModelError(f"config.json: {where}.partial_rotary_factor is not 1, which finial does not implement")
    if rope.pop("truncate", True) is False:
        raise ModelError(f"config.json: {where}.truncate is false, which finial does not implement")
    unknown = set(rope) - _SCALING_FIELDS[kind]
    if kind != "default" and unknown:
        raise ModelError(f"config.json: unknown field {where}.{sorted(unknown)[0]} for kind {kind!r}")
    if kind == "default":
        return Rope(theta=theta)
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
    if kind != "linear" and original is None:
        original = max_context
    if factor is None and kind == "yarn":
        factor = max_context / _number(
            {"original_max_position_embeddings": original}, "original_max_position_embeddings"
        )
    common: dict[str, Any] = {
        "theta": theta,
        "kind": kind,
        "factor": _number({f"{where}.factor": factor}, f"{where}.factor"),
    }
    if kind == "linear":
        return Rope(**common)
    common["original_context"] = _integer(
        {"original_max_position_embeddings": original}, "original_max_position_embeddings"
    )
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if not high > low:
            raise ModelError(f"config.json: {where}.high_freq_factor {high} must exceed low_freq_factor {low}")
        return Rope(**common, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        **common,
        beta_fast=_number(rope, "beta_fast", default=32.0),
        beta_slow=_number(rope, "beta_slow", default=1.0),
        attention_scale=_yarn_attention_scale(rope, common["factor"]),
    )


def _yarn_attention_scale(rope: Mapping[str, Any], factor: float) -> float | None:
    """`attention_factor` where given, else DeepSeek's mscale quotient, else None for the paper's 0.1 ln(s) + 1."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return mscale(_number(rope, "mscale")) / mscale(_number(rope, "mscale_all_dim"))


def _write_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    if rope.kind == "table":
        raise ModelError("rope divisors stored in a GGUF file have no form in config.json", fix="keep the GGUF file")
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind != "linear":
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_scale is not None:
            scaling["attention_factor"] = rope.attention_scale
    return scaling


def _read_windows(fields: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    if family.window == "upper" and not fields.get("use_sliding_window"):
        window = None
    types = fields.get("layer_types")
    if types is not None:
        if not isinstance(types, (list, tuple)) or len(types) != layers:
            raise ModelError(f"config.json: layer_types must list {layers} layers")
        unknown = set(map(str, types)) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelError(f"config.json: layer_types has {sorted(unknown)[0]!r}, finial knows full and sliding")
    if window is None or family.window == "none":
        if types is not None and "sliding_attention" in types:
            raise ModelError("config.json: layer_types asks for sliding attention but no sliding_window is in force")
        if window is not None:
            raise ModelError(f"config.json: sliding_window is {window!r}, which this family does not have in finial")
        return (None,) * layers
    size = _integer(fields, "sliding_window")
    if size < 1:
        raise ModelError(f"config.json: sliding_window is {size}, expected at least 1")
    if types is not None:
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    first = _integer(fields, "max_window_layers", default=28) if family.window == "upper" else 0
    return tuple(size if layer >= first else None for layer in range(layers))


def _integer(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: {name} is {value!r}, expected a whole number")
    return value


def _number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ModelError(f"config.json: {name} is {value!r}, expected a positive number")
    return float(value)
