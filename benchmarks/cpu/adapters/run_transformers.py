"""transformers on torch: eager with its growing cache, or compiled with a static one (TRANSFORMERS_COMPILE=1).

Both read the prompt eagerly: compiling for each length of prompt would take longer than reading it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from serve import Clock, serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

COMPILE = os.environ.get("TRANSFORMERS_COMPILE") == "1"


class Session:
    def __init__(self, model: str, format: str, threads: int, context: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(Path(model), dtype=torch.bfloat16).eval()
        self._step = torch.compile(self._model.forward, dynamic=False) if COMPILE else self._model.forward
        self._static = StaticCache(config=self._model.config, max_cache_len=256) if COMPILE else None
        mode = "compiled, static cache of 256" if COMPILE else "eager"
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.precision = f"bf16 weights, activations and KV cache, {mode}"

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        tokens = torch.tensor(prompts)
        end = tokens.shape[1]
        clock = Clock(len(prompts))
        cache = self._static if self._static is not None else DynamicCache(config=self._model.config)
        if self._static is not None:
            self._static.reset()
        forward = self._model.forward
        for step in range(new):
            positions = torch.arange(end + step - tokens.shape[1], end + step)
            out = forward(
                input_ids=tokens, past_key_values=cache, position_ids=positions[None], use_cache=True, logits_to_keep=1
            )
            chosen = out.logits[:, -1].argmax(-1)
            for sequence, token in enumerate(chosen.tolist()):
                clock.token(sequence, token)
            tokens, forward = chosen[:, None], self._step
        return clock.reply()


if __name__ == "__main__":
    serve(Session)
