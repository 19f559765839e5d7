"""finial, as anyone would use it: the public object, its own cache, batching and sampling.

Options: those of finial.LLM, such as backend ("cpu", "reference", …), kv_format, format (re-encodes all weights).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from serve import Clock, serve

import finial
from finial import LLM


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
        options = {"backend": "cpu", **(options or {})}
        self.device = "cuda" if options["backend"].startswith("cuda") else "cpu"
        if options["backend"] == "reference":
            threads = None  # type: ignore[assignment]  # NumPy's own
        self.llm = LLM(model, threads=threads, max_context=context, max_batch=sequences, cache=cache, **options)
        self.precision = f"{self.llm.info.format} weights, {self.llm.info.kv_format} KV cache, float32 sums"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        if len(prompts) == 1:
            clock = Clock(1)
            for piece in self.llm.stream(prompts[0], max_tokens=new, ignore_eos=True):
                assert piece.token is not None
                clock.token(0, piece.token)
            return clock.reply()
        start = time.perf_counter()
        done = self.llm.generate(prompts, max_tokens=new, ignore_eos=True)
        return {
            "first": [d.timings.first_token - start for d in done],
            "last": [d.timings.last_token - start for d in done],
            "tokens": [d.tokens for d in done],
            "times": None,
        }

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        np.save(path, self.llm.score(ids).logits)
        return {"kind": "logits"}

    def sample(self, ids: list[int], new: int, seed: int) -> dict[str, Any]:
        """At temperature 1: the text that a verdict is made over."""
        return {"tokens": self.llm.generate(ids, max_tokens=new, temperature=1.0, seed=seed, ignore_eos=True).tokens}

    def memory(self) -> dict[str, Any]:
        held = {"weight_bytes": self.llm.info.weight_bytes, "kv_bytes": self.llm.info.kv_bytes}
        return {**held, "notes": self.llm.notes}


if __name__ == "__main__":
    serve(Session, "finial", finial.__version__)
