"""Pickled PyTorch weights (.pth, .pt, .bin) to a safetensors directory, through a child process.

Knows transformers' tensor names and those of the PyPI package reasoning-from-scratch, whose configuration it infers
from the shapes.  Does not import torch and unpickles nothing itself.

    convert_pth([Path("qwen3-0.6B-base.pth")], folder, fields=None)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finial.config import ModelConfig
from finial.errors import FileError, ModelError
from finial.files.disk import Progress, require_space, shown
from finial.files.safetensors import SINGLE, Source, write_safetensors
from finial.formats import get_format
from finial.names import EMBEDDING, HEAD, from_scratch, layer, weight_shapes

SUFFIXES = (".pth", ".pt", ".bin")
_FORMAT = {"float32": "f32", "float64": "f32", "float16": "f16", "bfloat16": "bf16"}
_PIECE = 4 << 20
_MAX_HEADER = 64 << 20
# What a training script may save beside the weights; follows from the configuration.
_BUFFERS = ("cos", "sin", "mask", "inv_freq")


@dataclass(frozen=True)
class _Entry:
    """A tensor in the child: its name there, its format here."""

    name: str
    format: str
    shape: tuple[int, ...]
    storage: tuple[int, ...]


def is_pickled(path: Path) -> bool:
    """Whether the name says that the file is a pickle of PyTorch's."""
    return path.suffix in SUFFIXES


def convert_pth(
    paths: Sequence[Path],
    folder: Path,
    fields: Mapping[str, Any] | None,
    format: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write model.safetensors into `folder` from the pickles, which together hold one model.

    Returns config.json's fields.

    Args:
        fields: those of config.json; None infers them, which works for reasoning-from-scratch's Qwen3.
        format: "f32", "f16" or "bf16"; None keeps each tensor's.
    Raises:
        FileError: torch is not installed, a file that is no pickle of tensors or wants to run code, a full disk.
        ModelError: tensors that do not fit the configuration, or from which none can be inferred.
    """
    what = ", ".join(map(str, paths))
    for path in paths:
        if not path.is_file():
            raise FileError(f"{path}: no such file", fix="check the path")
    with _child(paths) as (requests, answers):
        entries = _by_our_names(what, _header(what, answers))
        head, embedding = entries.get(HEAD), entries.get(EMBEDDING)
        tied = embedding is not None and (head is None or _equal(requests, answers, head, embedding))
        if fields is None:
            fields = infer_config(what, {name: entry.shape for name, entry in entries.items()}, tied)
        config = ModelConfig.from_hf(fields)
        if config.tie_embeddings and not tied and head is not None:
            # A head of its own, as after fine-tuning with separate weights, must not be dropped silently.
            fields = {**fields, "tie_word_embeddings": False}
            config = ModelConfig.from_hf(fields)
        wanted = weight_shapes(config)
        _check(what, entries, wanted, config.tie_embeddings)
        sources: list[Source] = []
        for name, shape in wanted.items():
            entry = entries[name]
            to = format or entry.format
            sources.append((name, to, shape, _pieces(what, requests, answers, entry, to)))
        require_space(folder, sum(get_format(source[1]).nbytes(source[2]) for source in sources))
        write_safetensors(folder / SINGLE, sources, progress=progress)
    return dict(fields)


@contextmanager
def _child(paths: Sequence[Path]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    # -P keeps this folder, whose modules carry the names of packages, off the child's import path.
    script = Path(__file__).with_name("pth_child.py")
    command = [sys.executable, "-P", str(script), *(str(path.absolute()) for path in paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()  # it holds nothing but read-only maps


def _header(what: str, answers: IO[bytes]) -> list[Any]:
    line = answers.readline(_MAX_HEADER)
    try:
        said = json.loads(line)
    except ValueError:
        raise FileError(f"{what}: the process that reads it ended early", fix="check the file and the memory") from None
    kind = said.get("error")
    if kind == "no torch":
        raise FileError(
            f"{what}: reading pickled PyTorch files needs torch ({said['text']})",
            fix='pip install "finial[convert]", or fetch the model as safetensors',
        )
    if kind == "refused":
        text = " ".join(said["text"].split())[:200]
        raise FileError(
            f"{said['file']}: torch refuses to read it as plain weights ({text})",
            fix="it is damaged, or wants to run code when opened; get the weights as safetensors from their source",
        )
    if kind is not None:
        raise FileError(f"{said['file']}: holds no state dict but {said['text']}", fix="save model.state_dict()")
    tensors = said["tensors"]
    assert isinstance(tensors, list)
    return tensors


def _by_our_names(what: str, listed: Sequence[Any]) -> dict[str, _Entry]:
    """Entries under transformers' names, whichever of the known naming schemes the file follows."""
    names = [str(item[0]) for item in listed]
    prefixes = ("module.", "_orig_mod.")  # torch's DataParallel and compile put these in front of every name
    strip = next((p for p in prefixes if names and all(name.startswith(p) for name in names)), "")
    scratch = any(name.removeprefix(strip).startswith("trf_blocks.") for name in names)
    bare = any(name.removeprefix(strip) == EMBEDDING.removeprefix("model.") for name in names)
    out: dict[str, _Entry] = {}
    for name, dtype, shape, storage in listed:
        short = name.removeprefix(strip)
        if short.split(".")[-1] in _BUFFERS:
            continue
        ours = from_scratch(short) if scratch else short
        if not scratch and bare and not short.startswith(("model.", "lm_head.")):
            ours = f"model.{short}"
        if ours is None:
            raise ModelError(
                f"{what}: unknown tensor {shown(name)} of shape {shape}",
                fix="finial converts transformers' state dicts and reasoning-from-scratch's Qwen3",
            )
        if dtype not in _FORMAT:
            raise ModelError(
                f"{what}: tensor {shown(name)} is {dtype}", fix="save the weights as floating point numbers"
            )
        out[ours] = _Entry(name, _FORMAT[dtype], tuple(shape), tuple(storage))
    return out


def infer_config(what: str, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> dict[str, Any]:
    """config.json of a Qwen3 model of reasoning-from-scratch from its tensors' shapes.

    What no shape tells is the package's own QWEN_CONFIG_06_B: rope_base 1e6, context 40,960, epsilon 1e-6.

    Raises:
        ModelError: the shapes leave something open; says to give a configuration.
    """
    ask = "give the model's configuration: --config DIR_WITH_CONFIG_JSON, or --arch qwen3-0.6b"
    first = {part: shapes.get(layer(0, f"{part}.weight")) for part in ("self_attn.q_norm", "self_attn.q_proj")}
    key, gate = shapes.get(layer(0, "self_attn.k_proj.weight")), shapes.get(layer(0, "mlp.gate_proj.weight"))
    norm, query, embedding = first["self_attn.q_norm"], first["self_attn.q_proj"], shapes.get(EMBEDDING)
    if norm is None or query is None or key is None or gate is None or embedding is None or len(embedding) != 2:
        raise ModelError(f"{what}: its tensors alone do not tell the number of heads (no head norm)", fix=ask)
    head_dim = norm[0]
    if head_dim < 2 or query[0] % head_dim or key[0] % head_dim:
        raise ModelError(f"{what}: {query[0]} query rows are no multiple of the head norm's {head_dim}", fix=ask)
    vocab, hidden = embedding
    ends = {"bos_token_id": 151643, "eos_token_id": 151643 if "base" in Path(what).name.lower() else 151645}
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **(ends if vocab == 151936 else {}),  # Qwen's own vocabulary; another one's ends are not known here
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": gate[0],
        "max_position_embeddings": 40960,
        "num_attention_heads": query[0] // head_dim,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_key_value_heads": key[0] // head_dim,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "vocab_size": vocab,
    }


def _check(what: str, entries: Mapping[str, _Entry], wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    fix = "give the configuration of this model with --config or --arch"
    for name, shape in wanted.items():
        if name not in entries:
            raise ModelError(f"{what}: tensor {name!r} of shape {list(shape)} is missing", fix=fix)
        if entries[name].shape != shape:
            there, found = entries[name].name, list(entries[name].shape)
            raise ModelError(f"{what}: tensor {shown(there)} has shape {found}, config asks for {list(shape)}", fix=fix)
    for name in entries.keys() - wanted.keys():
        if not (tied and name == HEAD):
            raise ModelError(f"{what}: unexpected tensor {shown(entries[name].name)}", fix=fix)


def _equal(requests: IO[bytes], answers: IO[bytes], first: _Entry, second: _Entry) -> bool:
    if first.storage == second.storage and first.shape == second.shape:
        return True
    if first.shape != second.shape or first.format != second.format:
        return False
    requests.write(json.dumps({"equal": [first.name, second.name]}).encode() + b"\n")
    requests.flush()
    return answers.read(1) == b"\1"


def _pieces(what: str, requests: IO[bytes], answers: IO[bytes], entry: _Entry, to: str) -> Iterator[Any]:
    """The tensor's bytes in the format `to`, asked for when the first piece is wanted."""
    import numpy as np

    requests.write(json.dumps(entry.name).encode() + b"\n")
    requests.flush()
    stored, target = get_format(entry.format), get_format(to)
    left = stored.nbytes(entry.shape)
    while left:
        piece = answers.read(min(left, _PIECE))
        if not piece:
            raise FileError(f"{what}: the process that reads it ended in tensor {shown(entry.name)}", fix="try again")
        left -= len(piece)
        if to == entry.format:
            yield piece
        else:
            assert target.encode is not None
            blocks = np.frombuffer(piece, np.uint8).reshape(-1, stored.block_bytes)
            yield target.encode(np.ascontiguousarray(stored.decode(blocks))).reshape(-1)
