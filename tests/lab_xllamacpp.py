"""llama.cpp as the tests have it, a wheel with its server inside, behind the protocol of the lab: an adapter."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import xllamacpp

sys.path.insert(0, str(Path(__file__).parent.parent / "src" / "finial" / "lab" / "engines" / "adapters"))
from serve import Clock, serve


class Session:
    precision = "weights as in the file, f16 KV cache"

    def __init__(
        self,
        model: str,
        format: str,
        threads: int,
        context: int,
        sequences: int = 1,
        cache: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context * sequences, sequences, False, 0
        params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(params)

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        clock = Clock(len(prompts))

        def one(sequence: int) -> None:
            def chunk(answer: dict[str, Any]) -> bool:
                for token in answer.get("__verbose", {}).get("tokens", ()):
                    clock.token(sequence, token)
                return False  # go on

            request = {"prompt": prompts[sequence], "n_predict": new, "temperature": 0.0, "top_k": 1}
            request |= {"stream": True, "verbose": True, "return_tokens": True, "ignore_eos": True}
            self._server.handle_completions({**request, "cache_prompt": keep}, chunk)

        threads = [threading.Thread(target=one, args=(sequence,)) for sequence in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return clock.reply()


if __name__ == "__main__":
    serve(Session, "llama.cpp", "xllamacpp")
