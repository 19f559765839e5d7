"""MLX-LM: its own generator of steps for one sequence, its batch generator for several.

Its steps run ahead of what was read: the next one is started before a token's id is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model
from serve import Clock, serve


class Session:
    """One model on Apple's GPU, or on the CPU where MLX is built for that (or with options device="cpu")."""

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
        if (options or {}).get("device") == "cpu":
            mx.set_default_device(mx.cpu)
        self.device = str(mx.default_device()).removeprefix("Device(").split(",")[0]
        self._model, _ = load_model(Path(model))
        mx.eval(self._model.parameters())
        self._kept: tuple[list[int], Any] | None = None
        kinds = {str(value.dtype).removeprefix("mlx.core.") for _, value in _leaves(self._model.parameters())}
        self.precision = f"{'+'.join(sorted(kinds))} weights, activations and KV cache"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        """No token ends a text."""
        clock = Clock(len(prompts))
        if len(prompts) == 1:
            for token, _ in generate_step(
                mx.array(self._rest(prompts[0], keep)), self._model, max_tokens=new, prompt_cache=self._cache
            ):
                clock.token(0, token)
            return clock.reply()
        self._kept = None
        generator = BatchGenerator(
            self._model, max_tokens=new, completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
        )
        try:
            order = {uid: sequence for sequence, uid in enumerate(generator.insert(prompts))}
            left = len(prompts) * new
            while left:
                found = generator.next_generated()
                if not found:
                    raise RuntimeError(f"MLX-LM ended with {left} tokens left")
                for response in found:
                    clock.token(order[response.uid], response.token)
                left -= len(found)
        finally:
            generator.close()
        return clock.reply()

    def _rest(self, prompt: list[int], keep: bool) -> list[int]:
        """What of a prompt is still to be read, with the cache in `_cache`."""
        if keep and self._kept is not None and self._kept[0] == prompt:
            self._cache = self._kept[1]
            trim_prompt_cache(self._cache, self._cache[0].offset - len(prompt) + 1)
            return prompt[-1:]
        self._cache = make_prompt_cache(self._model)
        self._kept = (prompt, self._cache) if keep else None
        return prompt

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """All logits."""
        logits = self._model(mx.array([ids]))[0].astype(mx.float32)
        np.save(path, np.array(logits))
        return {"kind": "logits"}

    def memory(self) -> dict[str, Any]:
        """Bytes of the weights, and the most that MLX allocated on its device."""
        weights = sum(value.nbytes for _, value in _leaves(self._model.parameters()))
        return {"weight_bytes": weights, "device_peak_bytes": mx.get_peak_memory()}


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    found: list[tuple[str, Any]] = tree_flatten(tree)
    return found


if __name__ == "__main__":
    serve(Session, "MLX-LM", f"mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}")
