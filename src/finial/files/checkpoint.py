"""A model on disk, opened: its configuration and its tensors under transformers' names, whatever file holds them.

Knows which files make a checkpoint and checks that the tensors are exactly those the configuration asks for.
Does not know how a model is computed, and decodes nothing: the tensors are views of memory maps.

    checkpoint = open_checkpoint(Path("Qwen3-0.6B")); checkpoint.tensors["model.norm.weight"].decode()
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from finial.config import ModelConfig
from finial.errors import FileError, FinialError, ModelError
from finial.files.disk import shown
from finial.files.gguf import GgufFile
from finial.files.safetensors import INDEX, SINGLE, open_safetensors
from finial.formats import Tensor, get_format
from finial.names import EMBEDDING, HEAD, deinterleave, from_gguf, rope_permuted, to_gguf, weight_shapes

if TYPE_CHECKING:
    from finial.files.text import Text

MAX_JSON = 16 << 20  # bytes; published config.json files stay below 10 kB
ROPE_DIVISORS = "rope_freqs.weight"
_PICKLED = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class GenerationDefaults:
    """What the model's makers recommend for sampling; None where they say nothing."""

    temperature: float | None = None  # 0 where they ask for greedy decoding
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened model.

    Attributes:
        path: the directory or the .gguf file.
        kind: which of the two.
        config: the model's shape.
        tensors: transformers' names -> tensors, exactly those of `names.weight_shapes(config)`.
        generation: recommended sampling, end and begin tokens.
        fields: what the file says about itself: config.json, or GGUF metadata.
    """

    path: Path
    kind: Literal["safetensors", "gguf"]
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    generation: GenerationDefaults
    fields: Mapping[str, Any]

    @cached_property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (format, shape) as stored; asking `tensors` would copy what GGUF keeps in another row order."""
        stored = self.tensors.stored if isinstance(self.tensors, _Deinterleaved) else self.tensors
        return {name: (tensor.format, tensor.shape) for name, tensor in stored.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(get_format(format).nbytes(shape) for format, shape in self.layout.values())

    def text(self) -> Text:
        """The tokenizer and chat template; FileError when the checkpoint has none."""
        return self._text

    @cached_property
    def _text(self) -> Text:
        from finial.files.text import Text

        return Text.from_gguf(self.fields) if self.kind == "gguf" else Text.from_directory(self.path)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory (config.json and safetensors, or one GGUF file) or a .gguf file.

    Opening reads headers only; the weights are mapped.

    Raises:
        FileError: missing, damaged or another kind of directory; names the file and what to do.
        ModelError: a model that finial cannot run, or tensors that do not fit the configuration; names the tensor.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_gguf(path)
    names = sorted(item.name for item in path.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf") and not _is_later_part(name)]
    if "config.json" in names and (weights or INDEX in names or not ggufs):
        return _open_directory(path, names, weights)
    if len(ggufs) == 1:
        return _open_gguf(path / ggufs[0])
    if ggufs:
        raise FileError(
            f"{path} holds {len(ggufs)} models: {', '.join(ggufs[:8])}", fix=f"name one, for example {path / ggufs[0]}"
        )
    raise _no_model(path, names)


def _is_later_part(name: str) -> bool:
    parts = name.removesuffix(".gguf").rsplit("-", 3)
    return len(parts) == 4 and parts[2] == "of" and parts[1].isdigit() and int(parts[1]) > 1


def _no_model(path: Path, names: list[str]) -> FileError:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return FileError(
            f"{path} has its weights only as pickled PyTorch files ({', '.join(pickled[:4])})",
            fix=f"`finial convert {path / pickled[0]} OUT` makes a safetensors model of it",
        )
    if any(name.endswith(".safetensors") for name in names):
        return FileError(
            f"{path} has weights but no config.json", fix="fetch config.json of the same model into this directory"
        )
    there = f"it holds {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else "it is empty"
    return FileError(f"{path} is not a model: {there}", fix="give a directory with config.json and *.safetensors")


# ---------------------------------------------------------------------------------------------- safetensors


def _open_directory(path: Path, names: list[str], weights: list[str]) -> Checkpoint:
    fields = read_json(path / "config.json")
    quantised = fields.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ModelError(
            f"{path}: the checkpoint is quantised by {shown(method)} (quantization_config), which finial does not read",
            fix="use the model as published in bf16 or f16 and choose finial's own format, or a GGUF file",
        )
    with _About(path / "config.json"):
        config = ModelConfig.from_hf(fields)
    if not weights and INDEX not in names:
        raise _no_model(path, names)
    single = len(weights) == 1 and SINGLE not in weights and INDEX not in names
    found = open_safetensors(path / weights[0] if single else path)
    found = {_with_prefix(name, found): tensor for name, tensor in found.items()}
    tensors = _checked(path, found, config, lambda name: name)
    return Checkpoint(path, "safetensors", config, tensors, _generation_hf(path, fields), fields)


def _with_prefix(name: str, found: Mapping[str, Tensor]) -> str:
    """Checkpoints saved from the bare model lack `model.` on every tensor."""
    bare = EMBEDDING.removeprefix("model.") in found
    return f"model.{name}" if bare and not name.startswith(("model.", "lm_head.")) else name


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes; FileError when it is missing, larger, or no object."""
    try:
        if path.stat().st_size > limit:
            raise FileError(f"{path}: is {path.stat().st_size} bytes long, at most {limit} were expected")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file", fix="fetch the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)[:100] or type(error).__name__
        raise FileError(f"{path}: cannot be read as JSON ({reason})", fix="fetch the model again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds a {type(value).__name__}, not an object", fix="fetch the model again")
    return value


def _generation_hf(path: Path, fields: Mapping[str, Any]) -> GenerationDefaults:
    file = path / "generation_config.json"
    given: Mapping[str, Any] = read_json(file) if file.exists() else {}
    where = file if file.exists() else path / "config.json"
    eos = given.get("eos_token_id")
    bos = given.get("bos_token_id")
    temperature = _number(where, "temperature", given.get("temperature"))
    return GenerationDefaults(
        temperature=0.0 if given.get("do_sample") is False else temperature,
        top_k=_integer(where, "top_k", given.get("top_k")),
        top_p=_number(where, "top_p", given.get("top_p")),
        min_p=_number(where, "min_p", given.get("min_p")),
        repetition_penalty=_number(where, "repetition_penalty", given.get("repetition_penalty")),
        eos_ids=_ids(where, "eos_token_id", fields.get("eos_token_id") if eos is None else eos),
        bos_id=_integer(where, "bos_token_id", fields.get("bos_token_id") if bos is None else bos),
    )


# ----------------------------------------------------------------------------------------------------- GGUF


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile.open(path)
    metadata = dict(file.metadata)
    embedding = file.tensors.get(to_gguf(EMBEDDING))
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(
            f"{path}: has no tensor {to_gguf(EMBEDDING)!r} of two axes, so it is no language model",
            fix="name the model's main file; adapters and vision parts cannot be run alone",
        )
    # The embedding's rows are the vocabulary that is computed; a file may list fewer tokens than that.
    metadata[f"{metadata.get('general.architecture')}.vocab_size"] = embedding.shape[0]
    divisors = file.tensors.get(ROPE_DIVISORS)
    with _About(path):
        config = ModelConfig.from_gguf(metadata, file.tensors, None if divisors is None else divisors.decode())
    found = {}
    for name, tensor in file.tensors.items():
        if name != ROPE_DIVISORS:
            found[from_gguf(name) or name] = tensor
    tensors: Mapping[str, Tensor] = _checked(path, found, config, to_gguf)
    if any(rope_permuted(config.architecture, name) for name in tensors):
        tensors = _Deinterleaved(tensors, config)
    return Checkpoint(path, "gguf", config, tensors, _generation_gguf(path, metadata), file.metadata)


class _Deinterleaved(Mapping[str, Tensor]):
    """GGUF tensors of the llama architecture; rows of q and k are put into half-split order when they are asked for."""

    def __init__(self, stored: Mapping[str, Tensor], config: ModelConfig) -> None:
        self.stored = stored
        self._config = config

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.stored[name]
        if not rope_permuted(self._config.architecture, name):
            return tensor
        return tensor.rows(deinterleave(tensor.shape[0] // self._config.head_dim, self._config.head_dim))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _generation_gguf(path: Path, metadata: Mapping[str, Any]) -> GenerationDefaults:
    # The keys are those of the gguf package's constants.py; end-of-turn and end-of-message end a text as well.
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    sampling = {name: metadata.get(f"general.sampling.{name}") for name in ("temp", "top_k", "top_p", "min_p")}
    penalty = metadata.get("general.sampling.penalty_repeat")
    eos = dict.fromkeys(i for end in ends for i in _ids(path, "tokenizer.ggml.eos_token_id", end))
    return GenerationDefaults(
        temperature=_number(path, "general.sampling.temp", sampling["temp"]),
        top_k=_integer(path, "general.sampling.top_k", sampling["top_k"]),
        top_p=_number(path, "general.sampling.top_p", sampling["top_p"]),
        min_p=_number(path, "general.sampling.min_p", sampling["min_p"]),
        repetition_penalty=_number(path, "general.sampling.penalty_repeat", penalty),
        eos_ids=tuple(eos),
        bos_id=_integer(path, "tokenizer.ggml.bos_token_id", metadata.get("tokenizer.ggml.bos_token_id")),
    )


# ---------------------------------------------------------------------------------------------------- checks


def _checked(
    path: Path, found: dict[str, Tensor], config: ModelConfig, theirs: Callable[[str], str]
) -> dict[str, Tensor]:
    """The tensors in the order of `weight_shapes`; ModelError naming the first that is missing, wrong or unknown.

    `theirs` turns a name into the file's own, for the message.
    """
    wanted = weight_shapes(config)
    for name, shape in wanted.items():
        tensor = found.get(name)
        if tensor is None:
            raise ModelError(
                f"{path}: tensor {theirs(name)!r} of shape {list(shape)} is missing",
                fix="fetch the model again; if it is complete, its configuration belongs to another model",
            )
        if tensor.shape != shape:
            raise ModelError(
                f"{path}: tensor {theirs(name)!r} has shape {list(tensor.shape)}, config asks for {list(shape)}",
                fix="fetch weights and configuration of the same model",
            )
    for name in found.keys() - wanted.keys():
        # Frequencies follow from the configuration; a tied head is the embedding once more.
        if not name.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and name == HEAD):
            raise ModelError(
                f"{path}: unexpected tensor {shown(name)} of shape {list(found[name].shape)}",
                fix="the configuration describes a simpler model than the weights; choose a supported checkpoint",
            )
    return {name: found[name] for name in wanted}


class _About:
    """Put the file's name in front of an error that knows only the configuration's fields."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FinialError):
            raise type(error)(f"{self._path}: {error.what}", fix=error.fix) from error


def _number(path: Path, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise FileError(f"{path}: {name} is {shown(value)}, expected a number", fix="correct or remove it")
    # GGUF keeps float32; the shortest decimal is the number that was meant.
    return float(str(np.float32(value)))


def _integer(path: Path, name: str, value: Any) -> int | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise FileError(f"{path}: {name} is {shown(value)}, expected a whole number", fix="correct or remove it")
    return int(value)


def _ids(path: Path, name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(i for i in (_integer(path, name, v) for v in values) if i is not None and i >= 0)
