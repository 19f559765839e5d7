"""SGLang's engine without its HTTP server; it runs in processes of its own and streams token ids back.

Its radix cache keeps prompts, so that a filled cache is not filled again; fresh prompts gain nothing by it.
"""

from __future__ import annotations

from typing import Any

import sglang
from serve import Clock, serve, top

TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
TOP = 20


class Session:
    """One model.  Options: anything that sglang.Engine takes, such as device="cpu"."""

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
            raise ValueError("SGLang always keeps a cache")
        dtype = TYPES.get(format, "auto")
        self._engine = sglang.Engine(
            model_path=model,
            dtype=dtype,
            context_length=context,
            max_running_requests=max(sequences, 1),
            skip_tokenizer_init=True,
            log_level="error",
            **(options or {}),
        )
        self.device = (options or {}).get("device", "cuda")
        self.precision = f"{dtype} weights, activations and KV cache (its defaults)"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """Past any end of text.  A piece of the stream has all ids of its sequence so far, or only the new ones."""
        params = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
        clock = Clock(len(prompts))
        single = len(prompts) == 1
        seen = [0] * len(prompts)
        for piece in self._engine.generate(
            input_ids=prompts[0] if single else prompts, sampling_params=params, stream=True
        ):
            sequence = 0 if single else piece["index"]
            ids, count = piece["output_ids"], piece["meta_info"]["completion_tokens"]
            fresh = count - seen[sequence]
            for token in ids[len(ids) - fresh :]:
                clock.token(sequence, token)
            seen[sequence] = count
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """Of each position the most likely tokens, as (log-probability, id, text); nothing predicts the first id."""
        reply = self._engine.generate(
            input_ids=ids,
            sampling_params={"temperature": 0.0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=TOP,
        )["meta_info"]
        entries = [{token: logprob for logprob, token, *_ in entry or []} for entry in reply["input_top_logprobs"]]
        for entry, own in zip(entries, reply["input_token_logprobs"], strict=True):
            if entry and own[0] is not None:
                entry.setdefault(own[1], own[0])
        return top([*entries[1:], {}])


if __name__ == "__main__":
    serve(Session, "SGLang", f"sglang {sglang.__version__}")
