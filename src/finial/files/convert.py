"""Any readable checkpoint to a safetensors directory or to a GGUF file that llama.cpp loads, one slab at a time.

Knows which metadata, tensor order and row order each side expects.  Decodes and encodes through `formats` alone.

    convert("Qwen3-0.6B", "qwen3-0.6b-q8_0.gguf", format="q8_0")
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finial.config import ModelConfig, Rope
from finial.config_gguf import rope_divisors
from finial.errors import FileError, ModelError
from finial.files.checkpoint import ROPE_DIVISORS, Checkpoint, GenerationDefaults, open_checkpoint, read_json
from finial.files.disk import Progress, Slab, require_space
from finial.files.folder import check_free, new_directory
from finial.files.gguf_tokenizer import read_gguf_tokenizer, tokenizer_to_gguf
from finial.files.gguf_writer import write_gguf
from finial.files.hub import TOKENIZER_FILES
from finial.files.pth import SUFFIXES, convert_pth, is_pickled
from finial.files.safetensors import INDEX, SINGLE, Source, write_safetensors
from finial.files.synth import preset_config
from finial.formats import Tensor, get_format
from finial.names import interleave, rope_permuted, to_gguf

FLOATS = ("bf16", "f16", "f32")
MAX_TOKENIZER = 256 << 20  # bytes of tokenizer.json; published ones stay below 40 MB
# Format -> ggml's name for a file that is mostly of it (llama.h `enum llama_ftype`).
FILE_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_HF_DTYPE = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def convert(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    *,
    config: str | Path | None = None,
    arch: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the model in `source` to `out`: a GGUF file when the name ends in .gguf, else a safetensors directory.

    Norm weights and biases are f32 in GGUF, as llama.cpp wants them; a tensor whose rows are not whole blocks of a
    quantised format becomes bf16 there.  `out` appears whole or not at all.

    Args:
        source: directory, .gguf file, or pickled PyTorch weights (.pth, .pt, .bin).
        format: "bf16", "f16", "f32", for GGUF also "q8_0" and "q4_0"; None keeps what is stored, where the target
            can hold it, else bf16.
        config: for pickled weights, config.json of the model or a directory that has it.
        arch: for pickled weights, the name of a synth preset whose configuration the model has.
        force: replace `out` if it exists.
        progress: called with (bytes written, bytes in all).
    Raises:
        FileError: unreadable source, `out` exists, disk too small.
        ModelError: unknown format, or a model that the target cannot express.
    """
    source, out = Path(source), Path(out)
    gguf = out.suffix == ".gguf"
    allowed = tuple(FILE_TYPES) if gguf else FLOATS
    if format is not None and format not in allowed:
        get_format(format)
        kind = "GGUF" if gguf else "a safetensors directory"
        raise ModelError(f"{kind} is not written as {format}", fix=f"use one of {', '.join(allowed)}")
    check_free(out, force)
    if source.resolve() == out.resolve():
        raise FileError(f"{out} is also what is converted", fix="write to another name")
    pickled = _pickles(source)
    if not pickled and (config is not None or arch is not None):
        raise FileError(f"{source} states its own configuration", fix="leave --config and --arch out")
    if pickled and not gguf:
        with new_directory(out, force) as folder:
            _from_pickles(pickled, folder, format, config, arch, progress)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    if pickled:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
            _from_pickles(pickled, Path(name), None, config, arch, None)
            _to_gguf(open_checkpoint(name), out, format, progress)
    elif gguf:
        _to_gguf(open_checkpoint(source), out, format, progress)
    else:
        checkpoint = open_checkpoint(source)
        with new_directory(out, force) as folder:
            _to_directory(checkpoint, folder, format, progress)
    return out


def stored_format(stored: str, shape: tuple[int, ...], format: str | None, gguf: bool) -> str:
    """The format in which a tensor is written that is `stored` now, when the person asked for `format`."""
    if gguf and len(shape) == 1:
        return "f32"
    if format is not None:
        return format if shape[-1] % get_format(format).block == 0 else "bf16"
    return stored if gguf or stored in FLOATS else "bf16"


# ----------------------------------------------------------------------------------------------------- GGUF


def _to_gguf(checkpoint: Checkpoint, out: Path, format: str | None, progress: Progress | None) -> None:
    config = checkpoint.config
    sources: list[Source] = []
    divisors = rope_divisors(config)
    if divisors is not None:
        sources.append((ROPE_DIVISORS, "f32", divisors.shape, Tensor.from_array(divisors).slabs()))
    share = dict.fromkeys(FILE_TYPES, 0)  # bytes by format, to name the file by what it mostly is
    for name, (stored, shape) in checkpoint.layout.items():
        target = stored_format(stored, shape, format, gguf=True)
        if target not in FILE_TYPES:
            share.setdefault(target, 0)
        share[target] += get_format(target).nbytes(shape)
        sources.append((to_gguf(name), target, shape, _gguf_slabs(checkpoint, name, target)))
    main = max(share, key=lambda row: share[row])
    metadata = {
        **config.to_gguf(),
        "general.type": "model",
        "general.name": out.stem,
        "general.quantization_version": 2,  # ggml.h GGML_QNT_VERSION
        **({"general.file_type": FILE_TYPES[main]} if main in FILE_TYPES else {}),
        **_gguf_tokenizer(checkpoint),
        **_gguf_sampling(checkpoint.generation),
    }
    write_gguf(out, metadata, sources, progress)


def _gguf_slabs(checkpoint: Checkpoint, name: str, format: str) -> Iterator[Slab]:
    """The tensor's bytes as GGUF keeps them; read when the writer comes to it."""
    tensor, head_dim = checkpoint.tensors[name], checkpoint.config.head_dim
    if rope_permuted(checkpoint.config.architecture, name):
        tensor = tensor.rows(interleave(tensor.shape[0] // head_dim, head_dim))
    yield from tensor.slabs(format)


def _gguf_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer's metadata; a model without tokenizer files becomes a GGUF file that says it has none."""
    if checkpoint.kind == "gguf":
        return {key: value for key, value in checkpoint.fields.items() if key.startswith("tokenizer.")}
    file = checkpoint.path / "tokenizer.json"
    if not file.exists():
        if any((checkpoint.path / name).exists() for name in TOKENIZER_FILES):
            raise FileError(
                f"{checkpoint.path}: has tokenizer files but no tokenizer.json",
                fix="make one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        return {"tokenizer.ggml.model": "none"}
    fields: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (checkpoint.path / name).exists():
            fields |= read_json(checkpoint.path / name)
    template = checkpoint.text().chat_template
    metadata = tokenizer_to_gguf(
        read_json(file, MAX_TOKENIZER),
        fields,
        vocab_size=checkpoint.config.vocab_size,
        chat_templates=template.sources if template else None,
    )
    ends = list(checkpoint.generation.eos_ids)
    if ends:
        metadata.setdefault("tokenizer.ggml.eos_token_id", ends[0])
    others = [end for end in ends if end != metadata.get("tokenizer.ggml.eos_token_id")]
    for key, end in zip(("eot", "eom"), others, strict=False):
        metadata.setdefault(f"tokenizer.ggml.{key}_token_id", end)
    return metadata


def _gguf_sampling(generation: GenerationDefaults) -> dict[str, Any]:
    values = {
        "temp": generation.temperature,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "min_p": generation.min_p,
        "penalty_repeat": generation.repetition_penalty,
    }
    return {
        f"general.sampling.{name}": np.int32(value) if name == "top_k" else float(value)
        for name, value in values.items()
        if value is not None
    }


# -------------------------------------------------------------------------------------- safetensors directory


def _to_directory(checkpoint: Checkpoint, folder: Path, format: str | None, progress: Progress | None) -> None:
    sources: list[Source] = []
    for name, (stored, shape) in checkpoint.layout.items():
        target = stored_format(stored, shape, format, gguf=False)
        sources.append((name, target, shape, _slabs(checkpoint, name, target)))
    require_space(folder, sum(get_format(target).nbytes(shape) for _, target, shape, _ in sources))
    bulk = max(sources, key=lambda source: get_format(source[1]).nbytes(source[2]))[1]
    if checkpoint.kind == "gguf":
        _describe_gguf(checkpoint, folder, _HF_DTYPE[bulk])
    else:
        fields = {key: value for key, value in checkpoint.fields.items() if key not in ("dtype", "torch_dtype")}
        _write_json(folder / "config.json", fields | {"torch_dtype": _HF_DTYPE[bulk]})
        _copy(checkpoint.path, folder, ("generation_config.json", *TOKENIZER_FILES))
    write_safetensors(folder / SINGLE, sources, progress=progress)


def _slabs(checkpoint: Checkpoint, name: str, format: str) -> Iterator[Slab]:
    yield from checkpoint.tensors[name].slabs(format)


def _describe_gguf(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and the tokenizer's files from GGUF metadata."""
    generation = checkpoint.generation
    ids: dict[str, Any] = {}
    if generation.eos_ids:
        ids["eos_token_id"] = generation.eos_ids[0] if len(generation.eos_ids) == 1 else list(generation.eos_ids)
    if generation.bos_id is not None:
        ids["bos_token_id"] = generation.bos_id
    fields = _expressible(checkpoint.config).to_hf() | {"torch_dtype": dtype} | ids
    _write_json(folder / "config.json", fields)
    named = {
        "temperature": generation.temperature,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "min_p": generation.min_p,
        "repetition_penalty": generation.repetition_penalty,
    }
    sampling = {name: value for name, value in named.items() if value is not None}
    if sampling.get("temperature") == 0:
        sampling = {"do_sample": False}
    elif sampling:
        sampling["do_sample"] = True
    _write_json(folder / "generation_config.json", ids | sampling)
    if checkpoint.fields.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return
    from tokenizers import processors

    read = read_gguf_tokenizer(checkpoint.fields, str(checkpoint.path))
    bos = read.variables.get("bos_token")
    if read.add_bos and bos is not None and read.bos_id is not None:
        read.tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, read.bos_id)]
        )
    (folder / "tokenizer.json").write_text(read.tokenizer.to_str(), encoding="utf-8")
    settings: dict[str, Any] = dict(read.variables)
    settings |= {"add_bos_token": read.add_bos, "add_eos_token": read.add_eos}
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    template = checkpoint.text().chat_template
    if template is not None:
        texts = template.sources
        listed = [{"name": name, "template": text} for name, text in texts.items()]
        settings["chat_template"] = texts["default"] if set(texts) == {"default"} else listed
    _write_json(folder / "tokenizer_config.json", settings)


def _expressible(config: ModelConfig) -> ModelConfig:
    """The same model with llama3 rope parameters instead of the divisors that GGUF keeps of them, where they match.

    GGUF stores llama3's scaling as divisors; low_freq_factor 1 and high_freq_factor 4 are those of every Llama 3.x
    (config.json of Llama-3.1 and -3.2), the original context is found by trying.
    """
    rope = config.rope
    if rope.kind != "table":
        return config
    divisors = np.asarray(rope.divisors, np.float32)
    for context in (1 << power for power in range(5, 21)):
        tried = Rope(rope.theta, "llama3", float(np.round(divisors.max(), 3)), context, 1.0, 4.0)
        candidate = replace(config, rope=tried)
        guess = rope_divisors(candidate)
        # float32 arithmetic in another order differs by a few units in the last place, not more.
        if guess is not None and np.allclose(guess, divisors, rtol=1e-5, atol=0):
            return candidate
    return config


# ------------------------------------------------------------------------------------------ pickled PyTorch


def _pickles(source: Path) -> list[Path]:
    """The pickled files that `source` means: itself, or the shards of a directory that has nothing better."""
    if source.is_file():
        return [source] if is_pickled(source) else []
    if not source.is_dir() or (source / INDEX).exists() or any(source.glob("*.safetensors")):
        return []
    if any(source.glob("*.gguf")):
        return []
    found = sorted(item for item in source.iterdir() if item.suffix in SUFFIXES)
    found = [item for item in found if item.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    shards = [item for item in found if item.name.startswith("pytorch_model")]
    if not shards and len(found) > 1:
        raise FileError(f"{source} holds {', '.join(i.name for i in found[:6])}", fix="name the one to convert")
    return shards or found


def _from_pickles(
    paths: list[Path],
    folder: Path,
    format: str | None,
    config: str | Path | None,
    arch: str | None,
    progress: Progress | None,
) -> None:
    beside = paths[0].parent
    fields: dict[str, Any] | None = None
    origin = beside
    if config is not None and arch is not None:
        raise FileError("both a configuration and an architecture are given", fix="leave one of them out")
    if config is not None:
        file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
        fields, origin = read_json(file), file.parent
    elif arch is not None:
        fields = preset_config(arch)
    elif (beside / "config.json").exists():
        fields = read_json(beside / "config.json")
    written = convert_pth(paths, folder, fields, format, progress)
    _write_json(folder / "config.json", written)
    _copy(origin, folder, ("generation_config.json", *TOKENIZER_FILES))
    if not (folder / "tokenizer.json").exists():
        # reasoning-from-scratch calls it tokenizer-base.json beside qwen3-0.6B-base.pth.
        variant = paths[0].stem.rsplit("-", 1)[-1]
        _copy(beside, folder, (f"tokenizer-{variant}.json",), "tokenizer.json")


def _copy(source: Path, folder: Path, names: tuple[str, ...], to: str | None = None) -> None:
    for name in names:
        if (source / name).is_file():
            (folder / (to or name)).write_bytes((source / name).read_bytes())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
