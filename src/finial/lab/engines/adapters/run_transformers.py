"""transformers on torch: eager with its growing cache, compiled with a static one, or without any cache.

Options: compile (bool), device ("cpu", "cuda", "mps"), dtype ("bfloat16", "float16", "float32").  All read the prompt
eagerly: compiling for each length of prompt would take longer than reading it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from serve import Clock, serve
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

SHORTEST = 256  # positions of a static cache
SHAPES = 64  # that a function may be compiled for; torch gives up after 8 otherwise
TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "stored": "bfloat16"}


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
        dtype = options.get("dtype", TYPES.get(format))
        if dtype is None:
            raise ValueError(f"transformers computes in {', '.join(TYPES)}; {format} is a file format of others")
        loaded = AutoModelForCausalLM.from_pretrained(Path(model), dtype=getattr(torch, dtype)).eval()
        self._model = loaded.to(self.device)
        self._cache, self._context = cache, context
        self._compiled = cache and options.get("compile", False)
        self._step = self._model.forward
        if self._compiled:
            torch._dynamo.config.recompile_limit = SHAPES
            # On a GPU, launches would dominate: a graph of them is replayed instead.
            mode = "reduce-overhead" if self.device == "cuda" else None
            self._step = torch.compile(self._model.forward, dynamic=False, mode=mode)
        self._static: dict[tuple[int, int], StaticCache] = {}
        mode = "compiled, static cache" if self._compiled else "eager" if cache else "eager, no cache"
        self.precision = f"{dtype} weights, activations and KV cache, {mode}"

    def _new_cache(self, sequences: int, length: int) -> Any:
        """A static one is as long as the next power of two: attention reads all of it, filled or not.

        It is made once for each length and reset, as a new one would be compiled for again.
        """
        if not self._cache:
            return None
        if not self._compiled:
            return DynamicCache(config=self._model.config)
        size = min(max(SHORTEST, 1 << (length - 1).bit_length()), max(self._context, length))
        if (sequences, size) not in self._static:
            self._static[sequences, size] = StaticCache(config=self._model.config, max_cache_len=size)
        cache = self._static[sequences, size]
        cache.reset()
        return cache

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Prompts of unequal lengths are filled up on the left, behind a mask, as transformers' own generate does."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        end = int(lengths.max())
        cache = self._new_cache(len(prompts), end + new)
        clock = Clock(len(prompts))
        tokens = torch.tensor([[0] * (end - len(prompt)) + prompt for prompt in prompts], device=self.device)
        pads = (end - lengths)[:, None]  # [B, 1]
        forward = self._model.forward
        for step in range(new):
            begin = end + step - (tokens.shape[1] if self._cache else end + step)
            positions = (torch.arange(begin, end + step) - pads).clamp(min=0)
            mask = None if not pads.any() else (torch.arange(end + step) >= pads).long().to(self.device)
            out = forward(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions.to(self.device),
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

    def memory(self) -> dict[str, Any]:
        weights = sum(tensor.nbytes for tensor in self._model.state_dict().values())
        found: dict[str, Any] = {"weight_bytes": weights}
        if self.device == "cuda":
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        return found


if __name__ == "__main__":
    serve(Session, "transformers", f"transformers {transformers.__version__}, torch {torch.__version__}")
