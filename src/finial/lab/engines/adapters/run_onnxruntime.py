"""onnxruntime-genai: its generator, one token at a time; a filled cache is rewound, not filled again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai as og
from serve import Clock, serve


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
        if not cache:
            raise ValueError("this engine always keeps its cache")
        config = og.Config(model)
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(overlay))
        self._model = og.Model(config)
        self._context = context
        self._kept: tuple[list[int], Any] | None = None
        weights = "int4 weights in blocks of 32" if format == "q4_0" else "float32 weights"
        self.precision = f"{weights}, float32 KV cache and activations (its defaults)"

    def _generator(self, count: int, length: int) -> Any:
        params = og.GeneratorParams(self._model)
        # A minimum as long as the maximum keeps the end-of-text token from being chosen.
        params.set_search_options(batch_size=count, max_length=length, min_length=length, do_sample=False)
        return og.Generator(self._model, params)

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        count, single = len(prompts), len(prompts) == 1
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("this adapter takes prompts of one length")
        clock = Clock(count)
        if keep and single and self._kept is not None and self._kept[0] == prompts[0]:
            generator = self._kept[1]
            generator.rewind_to(len(prompts[0]) - 1)
            generator.append_tokens(np.array([prompts[0][-1:]], np.int32))
        else:
            self._kept = None
            length = self._context if single and keep else len(prompts[0]) + new
            generator = self._generator(count, length)
            generator.append_tokens(np.array(prompts, np.int32))
            if keep and single:
                self._kept = (prompts[0], generator)
        for _ in range(new):
            generator.generate_next_token()
            for sequence, token in enumerate(generator.get_next_tokens()):
                clock.token(sequence, token)
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """A generator keeps the logits of the last id alone, so ids are given one by one."""
        generator = self._generator(1, self._context)
        rows = []
        for token in ids:
            generator.append_tokens(np.array([[token]], np.int32))
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
        np.save(path, np.stack(rows))
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "onnxruntime-genai", og.__version__)
