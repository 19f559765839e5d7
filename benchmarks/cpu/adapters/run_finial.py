"""finial, as anyone would use it: the public object, its own cache, batching and sampling."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from serve import Clock, serve

import finial
from finial import LLM
from finial.verdict import judge


class Session:
    def __init__(self, model: str, format: str, threads: int, context: int) -> None:
        self._model = model
        self.llm = LLM(model, backend="cpu", threads=threads, max_context=context, max_batch=8)
        self.version = finial.__version__
        self.precision = f"{self.llm.info.format} weights, {self.llm.info.kv_format} KV cache, float32 sums"

    def generate(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
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
        }

    def verdict(self, text: str, ids: list[int], greedy: int) -> dict[str, Any]:
        """Held against the reference backend in float32, on the same weights."""
        if not ids:
            ids = self.llm.tokenizer.encode(text)
        logits = self.llm.score(ids).logits
        chosen = self.llm.generate(ids, max_tokens=greedy, ignore_eos=True).tokens
        with LLM(
            self._model, backend="reference", kv_format="f32", max_context=len(ids) + greedy, max_batch=1
        ) as reference:
            expected = reference.score(ids + chosen).logits
        verdict = judge(expected[: len(ids)], logits, expected[len(ids) - 1 : -1], chosen)
        return {"verdict": dataclasses.asdict(verdict)}


if __name__ == "__main__":
    serve(Session)
