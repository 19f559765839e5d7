"""vLLM in this process, its engine stepped by hand: what a step returns is timed when it is on the host.

Prefix caching is on, so that a filled cache is not filled again; fresh prompts gain nothing by it.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

# One process: a step's outputs come straight from it, and its memory is counted with it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from serve import Clock, serve, top
from vllm import LLM, SamplingParams

TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
KV_GB = 4  # of VLLM_CPU_KVCACHE_SPACE: vLLM on a CPU reserves it beforehand
TOP = 20  # log-probabilities of a position; vLLM's own limit unless it is told another


class Session:
    """One model.  Options: anything that vllm.LLM takes."""

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
            raise ValueError("vLLM always keeps a cache")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GB))
        self.device = vllm.platforms.current_platform.device_type
        if self.device == "cpu":  # without the variable vLLM goes on with one thread of torch's: right for a GPU alone
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        dtype = TYPES.get(format, "auto")
        self._llm = LLM(
            model=model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=max(sequences, 1),
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_logprobs=TOP,
            disable_log_stats=True,
            **(options or {}),
        )
        self._ids = itertools.count()
        self.precision = f"{dtype} weights, activations and KV cache (its defaults)"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Past any end of text."""
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        clock = Clock(len(prompts))
        order = {}
        for sequence, prompt in enumerate(prompts):
            name = str(next(self._ids))
            order[name] = sequence
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        seen = [0] * len(prompts)
        while engine.has_unfinished_requests():
            for output in engine.step():
                sequence = order[output.request_id]
                tokens = output.outputs[0].token_ids  # all so far
                for token in tokens[seen[sequence] :]:
                    clock.token(sequence, token)
                seen[sequence] = len(tokens)
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """Of each position the most likely tokens; the entry of a token is about itself, so they move up by one."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=TOP, detokenize=False)
        prompt = [{"prompt_token_ids": ids}]
        (output,) = self._llm.generate(prompt, params, use_tqdm=False)
        entries = [{token: found.logprob for token, found in (entry or {}).items()} for entry in output.prompt_logprobs]
        return top([*entries[1:], {}])


if __name__ == "__main__":
    serve(Session, "vLLM", f"vllm {vllm.__version__}")
