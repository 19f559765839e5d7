"""TensorRT-LLM's LLM API on its PyTorch backend; it loads checkpoints as they are and streams token ids."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import tensorrt_llm
from serve import Clock, serve
from tensorrt_llm import LLM, SamplingParams

TYPES = {"bf16": "bfloat16", "f16": "float16"}


class Session:
    """One model on a GPU.  Options: anything that tensorrt_llm.LLM takes."""

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
            raise ValueError("TensorRT-LLM always keeps a cache")
        dtype = TYPES.get(format, "auto")
        self._llm = LLM(
            model=model,
            dtype=dtype,
            max_batch_size=max(sequences, 1),
            max_seq_len=context,
            skip_tokenizer_init=True,
            **(options or {}),
        )
        self.precision = f"{dtype} weights, activations and KV cache (its defaults)"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Past any end of text: no id is one."""
        params = SamplingParams(max_tokens=new, top_k=1, end_id=-1, ignore_eos=True, detokenize=False)
        clock = Clock(len(prompts))

        async def one(sequence: int, prompt: list[int]) -> None:
            seen = 0
            async for output in self._llm.generate_async(prompt, params, streaming=True):
                tokens = output.outputs[0].token_ids  # all so far
                for token in tokens[seen:]:
                    clock.token(sequence, token)
                seen = len(tokens)

        async def every() -> None:
            await asyncio.gather(*(one(sequence, prompt) for sequence, prompt in enumerate(prompts)))

        asyncio.run(every())
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """All logits of the prompt."""
        params = SamplingParams(max_tokens=1, end_id=-1, return_context_logits=True, detokenize=False)
        logits = self._llm.generate(ids, params, use_tqdm=False).context_logits
        np.save(path, np.asarray(logits.float().cpu(), np.float32).reshape(len(ids), -1))
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "TensorRT-LLM", f"tensorrt_llm {tensorrt_llm.__version__}")
