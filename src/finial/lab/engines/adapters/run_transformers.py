"""transformers on torch: eager with its growing cache, compiled with a static one, or without any cache.

Options: compile (bool), device ("cpu", "cuda", "mps"), dtype ("bfloat16", "float32").  All read the prompt eagerly:
compiling for each length of prompt would take longer than reading it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from serve import Clock, serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


class Session:
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
        options = options or {}
        torch.set_num_threads(threads)
        self.device = options.get("device", "cpu")
        dtype = options.get("dtype", "bfloat16")
        loaded = AutoModelForCausalLM.from_pretrained(Path(model), dtype=getattr(torch, dtype)).eval()
        self._model = loaded.to(self.device)
        self._cache = cache
        compiled = cache and options.get("compile", False)
        self._step = torch.compile(self._model.forward, dynamic=False) if compiled else self._model.forward
        # A cache is made once and reset: a new one would be compiled for again.
        self._static = StaticCache(config=self._model.config, max_cache_len=256) if compiled else None
        mode = "compiled, static cache of 256" if compiled else "eager" if cache else "eager, no cache"
        self.precision = f"{dtype} weights, activations and KV cache, {mode}"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("this adapter takes prompts of one length")
        clock = Clock(len(prompts))
        tokens = torch.tensor(prompts, device=self.device)
        end = tokens.shape[1]
        cache = self._static if self._static is not None else DynamicCache(config=self._model.config)
        if self._static is not None:
            self._static.reset()
        forward = self._model.forward
        for step in range(new):
            positions = torch.arange(end + step - (tokens.shape[1] if self._cache else end + step), end + step)
            out = forward(
                input_ids=tokens,
                past_key_values=cache if self._cache else None,
                position_ids=positions[None].to(self.device),
                use_cache=self._cache,
                logits_to_keep=1,
            )
            chosen = out.logits[:, -1].argmax(-1)
            for sequence, token in enumerate(chosen.tolist()):  # tolist waits for the device
                clock.token(sequence, token)
            tokens = chosen[:, None] if self._cache else torch.cat([tokens, chosen[:, None]], 1)
            forward = self._step
        return clock.reply()

    @torch.inference_mode()
    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        logits = self._model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0]
        np.save(path, logits.float().cpu().numpy())
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "transformers", f"transformers {transformers.__version__}, torch {torch.__version__}")
