"""CTranslate2: its generator, one callback a token.  It keeps no cache between calls, so a filled one is filled again.

Its tokens are strings, which the converted model's vocabulary.json lists in the order of their ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from serve import Clock, serve

TYPES = {"stored": "float32", "f32": "float32", "bf16": "bfloat16", "q8_0": "int8", "int8_float32": "int8_float32"}


class Session:
    """One model on the CPU or, with options device="cuda", on a GPU."""

    def __init__(
        self,
        model: str,
        format: str,
        threads: int,
        context: int,
        sequences: int = 8,
        cache: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not cache:
            raise ValueError("CTranslate2 always keeps a cache while it generates")
        self.device = (options or {}).get("device", "cpu")
        kind = TYPES.get(format, format)
        able = ctranslate2.get_supported_compute_types(self.device)
        if kind not in able:
            raise ValueError(f"CTranslate2 computes {', '.join(sorted(able))} on this {self.device}, not {kind}")
        self._generator = ctranslate2.Generator(model, device=self.device, compute_type=kind, intra_threads=threads)
        self._vocabulary: list[str] = json.loads((Path(model) / "vocabulary.json").read_text(encoding="utf-8"))
        if len(set(self._vocabulary)) != len(self._vocabulary):
            raise ValueError("two tokens of this vocabulary have the same name: CTranslate2 cannot tell them apart")
        self.precision = f"{self._generator.compute_type} weights and activations, float32 KV cache"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Equal lengths are read at once; of unequal ones only the shortest's length is, the rest token by token."""
        clock = Clock(len(prompts))

        def token(step: Any) -> bool:
            clock.token(step.batch_id, step.token_id)
            return False

        self._generator.generate_batch(
            [[self._vocabulary[token] for token in prompt] for prompt in prompts],
            max_length=new,
            end_token=[],  # nothing ends the text
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=token,
        )
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """All logits."""
        np.save(path, np.array(self._generator.forward_batch([ids]).to_device(ctranslate2.Device.cpu))[0])
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "CTranslate2", f"ctranslate2 {ctranslate2.__version__}")
