"""ExLlamaV2, its model called directly: the prompt in one call, then one token of each sequence a call."""

from __future__ import annotations

from typing import Any

import exllamav2
import numpy as np
import torch
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config
from serve import Clock, serve


class Session:
    """One model on a GPU: exl2 or GPTQ files, or an fp16 checkpoint."""

    device = "cuda"

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
            raise ValueError("this adapter computes with a cache")
        config = ExLlamaV2Config(model)
        config.max_seq_len = context
        config.max_batch_size = max(sequences, 1)
        self._context = context
        self._model = ExLlamaV2(config)
        first = ExLlamaV2Cache(self._model, batch_size=1, max_seq_len=context, lazy=True)
        self._model.load_autosplit(first)
        self._caches = {1: first}  # by number of sequences
        self._kept: list[int] = []
        self.precision = f"{format} weights, float16 activations and KV cache"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Prompts of one length: their positions are common."""
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("this adapter takes prompts of one length")
        count, end = len(prompts), len(prompts[0])
        if count not in self._caches:
            self._caches[count] = ExLlamaV2Cache(self._model, batch_size=count, max_seq_len=self._context)
        cache = self._caches[count]
        clock = Clock(count)
        begin = end - 1 if keep and count == 1 and self._kept == prompts[0] else 0
        cache.current_seq_len = begin
        self._kept = prompts[0] if count == 1 else self._kept
        tokens = torch.tensor([prompt[begin:] for prompt in prompts])
        for _ in range(new):
            logits = self._model.forward(tokens, cache, last_id_only=True)
            chosen = logits[:, -1].argmax(-1)
            for sequence, token in enumerate(chosen.tolist()):  # tolist waits for the device
                clock.token(sequence, token)
            tokens = chosen[:, None].cpu()
        return clock.reply()

    @torch.inference_mode()
    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """All logits; the vocabulary may be padded."""
        self._kept = []
        cache = self._caches[1]
        cache.current_seq_len = 0
        logits = self._model.forward(torch.tensor([ids]), cache)[0]
        np.save(path, logits[:, : self._model.config.vocab_size].float().cpu().numpy())
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "ExLlamaV2", f"exllamav2 {exllamav2.__version__}")
