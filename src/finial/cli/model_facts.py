"""What `finial info` tells of a checkpoint: data, computed from its headers and this machine's memory.

Knows checkpoints, formats and the cost of a cache; reads no weight.

    facts = gather("demo", open_checkpoint(path)); facts.formats
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finial.cli.options import sampling_options
from finial.config import ModelConfig
from finial.cost import kv_bytes_per_token
from finial.errors import FileError, ModelError
from finial.files.checkpoint import Checkpoint
from finial.formats import get_format
from finial.machine import Sources, probe_memory
from finial.models.decoder import build_graph, kv_dtypes

OFFERED = ("f32", "f16", "bf16", "q8_0", "q4_0")


@dataclass(frozen=True)
class InFormat:
    """The model in one weight format.

    Attributes:
        weight_bytes: None when the shape does not allow it; why_not says why.
        context: the longest that the free memory holds beside the weights, with a bf16 cache; 0: not even the weights
            fit; None: free memory is unknown.
    """

    format: str
    as_stored: bool
    weight_bytes: int | None
    context: int | None
    why_not: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything; `stored` is format -> (tensors, bytes)."""

    model: str
    path: str
    kind: str
    parameters: int
    weight_bytes: int
    stored: Mapping[str, tuple[int, int]]
    config: ModelConfig
    kv_bytes_per_token: Mapping[str, int]
    available_bytes: int | None
    formats: tuple[InFormat, ...]
    tokenizer: str | None
    chat_template: bool
    sampling: str
    eos_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the graph's inputs, not its rope table of numbers."""
        return dataclasses.asdict(self)


def gather(model: str, checkpoint: Checkpoint) -> Facts:
    """Reads headers and the tokenizer.  A missing tokenizer is a fact; a damaged one an error."""
    config, layout = checkpoint.config, checkpoint.layout
    stored: dict[str, tuple[int, int]] = {}
    for name, shape in layout.values():
        tensors, nbytes = stored.get(name, (0, 0))
        stored[name] = (tensors + 1, nbytes + get_format(name).nbytes(shape))
    cache = {dtype: kv_bytes_per_token(build_graph(config, dtype)) for dtype in kv_dtypes(config)}
    free = probe_memory(Sources()).available_bytes
    matrices = {name for name, shape in layout.values() if len(shape) == 2}
    offered = [*OFFERED, *sorted(matrices - set(OFFERED))]
    formats = []
    for name in offered:
        if name not in OFFERED:  # a format that is read, not written: the model as it is
            formats.append(_in_format("+".join(sorted(matrices)), checkpoint.nbytes, True, config, cache["bf16"], free))
            break
        try:
            nbytes = sum(get_format(name if len(shape) == 2 else own).nbytes(shape) for own, shape in layout.values())
        except ModelError as error:
            formats.append(InFormat(name, False, None, None, error.what))
            continue
        formats.append(_in_format(name, nbytes, matrices == {name}, config, cache["bf16"], free))
    tokenizer, template = _text(checkpoint)
    return Facts(
        model=model,
        path=str(checkpoint.path),
        kind="GGUF" if checkpoint.kind == "gguf" else "safetensors",
        parameters=sum(math.prod(shape) for _, shape in layout.values()),
        weight_bytes=checkpoint.nbytes,
        stored=stored,
        config=config,
        kv_bytes_per_token=cache,
        available_bytes=free,
        formats=tuple(formats),
        tokenizer=tokenizer,
        chat_template=template,
        sampling=sampling_options(checkpoint.generation).text,
        eos_ids=checkpoint.generation.eos_ids,
    )


def _in_format(name: str, nbytes: int, stored: bool, config: ModelConfig, per_token: int, free: int | None) -> InFormat:
    context = None if free is None else min(config.max_context, max(0, free - nbytes) // per_token)
    return InFormat(name, stored, nbytes, context)


def _text(checkpoint: Checkpoint) -> tuple[str | None, bool]:
    """(the tokenizer in words, whether there is a chat template)."""
    names = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if checkpoint.kind == "safetensors" and not any((checkpoint.path / name).exists() for name in names):
        return None, False
    if checkpoint.kind == "gguf" and checkpoint.fields.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None, False
    try:
        text = checkpoint.text()
    except FileError as error:
        return f"unreadable: {error.what}", False
    ends = " ".join(repr(text.decode([token], skip_special=False)) for token in text.eos_ids)
    return f"{text.vocab_size:,} entries · ends with {ends or 'nothing'}", text.chat_template is not None
