"""Reads pickled PyTorch weights in a process of its own; the only place where finial imports torch.

Run by `pth.py` as a script, with the files as arguments.  It imports nothing of finial, so that a checkpoint that
breaks it breaks nothing else.  `weights_only=True` keeps torch's unpickler from calling what a pickle names.

Standard output: one line of JSON, {"tensors": [[name, dtype, shape, storage], …]} or {"error": kind, "text": …}.
Then for each line on standard input: a name -> that tensor's bytes; {"equal": [a, b]} -> one byte, 1 or 0.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO

PIECE = 1 << 20  # elements sent at a time
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts put the weights


def main(paths: list[str], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until standard input ends."""

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    try:
        import torch
    except ImportError as error:
        return say({"error": "no torch", "text": str(error)})
    tensors: dict[str, Any] = {}
    for path in paths:
        try:
            found = _load(torch, path)
        except Exception as error:  # whatever a damaged or hostile file raises, the parent says it in one sentence
            return say({"error": "refused", "text": f"{type(error).__name__}: {error}", "file": path})
        if not isinstance(found, dict):
            return say({"error": "no weights", "text": type(found).__name__, "file": path})
        for name, value in found.items():
            if isinstance(value, torch.Tensor):
                if value.layout != torch.strided or value.is_quantized:
                    return say(
                        {"error": "no weights", "text": f"tensor {name!r} of layout {value.layout}", "file": path}
                    )
                tensors[str(name)] = value
    say({"tensors": [[n, str(t.dtype).removeprefix("torch."), list(t.shape), _storage(t)] for n, t in tensors.items()]})
    for line in requests:
        asked = json.loads(line)
        if isinstance(asked, dict):
            first, second = (tensors[name] for name in asked["equal"])
            answers.write(b"\1" if torch.equal(first, second) else b"\0")
        else:
            _send(torch, tensors[asked], answers)
        answers.flush()
    return None


def _load(torch: Any, path: str) -> Any:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        found = torch.load(path, map_location="cpu", weights_only=True)  # torch before 1.6 wrote no zip archive
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            return found[key]
    return found


def _storage(tensor: Any) -> list[int]:
    return [tensor.data_ptr(), *tensor.stride()]


def _send(torch: Any, tensor: Any, answers: BinaryIO) -> None:
    """The values in row-major order, little-endian, float64 as float32."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        piece = piece.to(torch.float32) if piece.dtype == torch.float64 else piece.contiguous()
        answers.write(piece.view(torch.uint8).numpy())


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdin.buffer, sys.stdout.buffer)
