"""ExLlamaV3: its generator of jobs, which pages its cache and finds equal beginnings again by itself."""

from __future__ import annotations

from typing import Any

import exllamav3
import numpy as np
import torch
from exllamav3 import Cache, Config, Generator, GreedySampler, Job, Model, Tokenizer
from serve import Clock, serve

PAGE = 256  # positions; caches are whole pages


class Session:
    """One model on a GPU: exl3 files."""

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
        config = Config.from_directory(model)
        self._model = Model.from_config(config)
        pages = -(-context // PAGE) * max(sequences, 1)
        kept = Cache(self._model, max_num_tokens=pages * PAGE)
        self._model.load()
        tokenizer = Tokenizer.from_config(config)
        self._vocabulary = tokenizer.actual_vocab_size
        self._generator = Generator(
            model=self._model, cache=kept, tokenizer=tokenizer, max_batch_size=max(sequences, 1)
        )
        self.precision = f"{format} weights, float16 activations and KV cache"

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Without stop conditions nothing ends a text."""
        clock = Clock(len(prompts))
        for sequence, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], dtype=torch.long)
            job = Job(input_ids=ids, max_new_tokens=new, sampler=GreedySampler(), identifier=sequence)
            self._generator.enqueue(job)
        while self._generator.num_remaining_jobs():
            for result in self._generator.iterate():
                if result["stage"] == "streaming" and "token_ids" in result:
                    for token in result["token_ids"].flatten().tolist():
                        clock.token(result["identifier"], token)
        return clock.reply()

    @torch.inference_mode()
    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """All logits, computed without a cache; the vocabulary is padded."""
        logits = self._model.forward(torch.tensor([ids], dtype=torch.long), {"attn_mode": "flash_attn_nc"})[0]
        np.save(path, logits[:, : self._vocabulary].float().cpu().numpy())
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "ExLlamaV3", f"exllamav3 {exllamav3.__version__}")
