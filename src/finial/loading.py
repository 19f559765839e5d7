"""What stands between a checkpoint and a running model: its weights in a format, and a cache that fits the memory.

Knows checkpoints and this machine's memory; nothing of graphs, backends or requests.

    weights = weights_in(checkpoint, "q8_0"); context, pages = size_cache(32768, 114_688, free=free_memory(), ...)
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from finial.errors import ModelError, RequestError
from finial.files.checkpoint import Checkpoint
from finial.formats import Tensor, get_format
from finial.machine.memory import probe_memory
from finial.machine.sources import Sources


def weights_in(checkpoint: Checkpoint, format: str | None) -> dict[str, Tensor]:
    """The checkpoint's tensors; where a format is asked for, matrices that are re-encoded as they are read."""
    if format is None:
        return dict(checkpoint.tensors)
    if get_format(format).encode is None:
        raise ModelError(f"format {format} can be read, not written", fix="choose f32, f16, bf16, q8_0, q4_0 or fp8")
    weights = {}
    for name, tensor in checkpoint.tensors.items():
        try:
            weights[name] = tensor.later(format, name) if len(tensor.shape) == 2 else tensor
        except ModelError as error:
            raise ModelError(f"{name}: {error.what}", fix=error.fix) from error
    return weights


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there is one to read; a damaged one is still an error."""
    if checkpoint.kind == "gguf":
        return "tokenizer.ggml.model" in checkpoint.fields
    return any((checkpoint.path / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))


def size_cache(
    model_context: int,
    token_bytes: int,
    *,
    free: int | None,
    max_context: int | None,
    max_batch: int,
    page_size: int,
) -> tuple[int, int]:
    """(positions of one sequence, pages of the cache).

    The cache holds max_batch sequences of that length, or what a quarter of the free memory holds, but at least one.

    Args:
        model_context: positions the model was made for.
        token_bytes: cache bytes of one position.
        free: bytes left for the cache; None: unknown.
    Raises:
        RequestError: max_context is over the model's own, or one such sequence does not fit into `free`.
    """
    quarter = None if free is None else max(0, free) // 4 // token_bytes  # positions
    if max_context is None:
        context = model_context if quarter is None else min(model_context, max(quarter, min(model_context, 512)))
    else:
        check_positive(max_context=max_context)
        context = max_context
        if context > model_context:
            raise RequestError(
                f"max_context={context} is over the model's own {model_context}", fix=f"ask for {model_context} or less"
            )
    pages = -(-context // page_size)
    need = pages * page_size * token_bytes
    if free is not None and need > free:
        fits = max(0, free) // token_bytes
        raise RequestError(
            f"a context of {context} tokens needs {gigabytes(need)} of cache ({token_bytes:,} bytes a token), "
            f"{gigabytes(max(0, free))} is free beside the weights",
            fix=f"ask for max_context={fits} or less"
            if fits
            else "free some memory, or choose a smaller weight format",
        )
    if quarter is None:
        return context, pages * max_batch
    return context, max(pages, min(pages * max_batch, quarter // page_size))


def check_positive(**values: Any) -> None:
    """Raises RequestError for a value that is not an integer of 1 or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"{name}={value!r}", fix="pass an integer, 1 or more")


def free_memory() -> int | None:
    """Bytes that a new allocation may take; None: this machine does not say."""
    return probe_memory(Sources()).available_bytes


def trim_heap() -> None:
    """Give back what the C library keeps of freed memory, where it is glibc, which can be asked to.

    Making a tokenizer of 150,000 entries leaves it 90 MB in pieces that nobody asks for again.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def gigabytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e9:.2f} GB"
