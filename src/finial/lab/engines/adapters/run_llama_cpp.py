"""llama.cpp through the C functions that llama-cpp-python binds: no sampler chain, no text, nothing but the model.

Greedy by argmax over the logits in NumPy, which is faster than llama.cpp's own sampler.  Also makes Q4_K_M files:

    python run_llama_cpp.py quantize IN.gguf OUT.gguf Q4_K_M
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
from serve import Clock, serve

SCORED = 256  # of which all logits are kept at once
CHUNK = 2048  # tokens of one llama_decode; it splits them into 512 by itself


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _data: Any) -> None:
    if level >= 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


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
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._threads, self._context_size = threads, context
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context, self._kind = None, (0, 0)
        self._cached: list[int] = []
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self._open(1, context)
        self.precision = f"{format} weights, f16 KV cache"

    def _open(self, sequences: int, size: int) -> None:
        if self._kind == (sequences, size):
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = size * sequences, sequences, CHUNK
        params.n_threads = params.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"no llama.cpp context of {sequences} × {size}")
        self._kind, self._cached = (sequences, size), []

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call; rows are (token, position, sequence, wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        count = len(prompts)
        self._open(count, self._context_size if count == 1 else -(-(len(prompts[0]) + new) // 256) * 256)
        memory = llama_cpp.llama_get_memory(self._context)
        begin = 0
        clock = Clock(count)
        if keep and count == 1 and self._cached == prompts[0]:
            begin = len(prompts[0]) - 1
            llama_cpp.llama_memory_seq_rm(memory, 0, begin, -1)
        else:
            llama_cpp.llama_memory_clear(memory, False)
        self._cached = prompts[0] if count == 1 else []
        rows = [
            (token, begin + at, sequence, begin + at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt[begin:])
        ]
        for at in range(0, len(rows), CHUNK):
            self._decode(rows[at : at + CHUNK])
        wanted = [at % CHUNK for at, row in enumerate(rows) if row[3]]  # all prompts of a batch fit one chunk
        positions = [len(prompt) for prompt in prompts]
        for step in range(new):
            tokens = [self._argmax(row) for row in wanted]
            for sequence, token in enumerate(tokens):
                clock.token(sequence, token)
            if step + 1 < new:
                self._decode([(t, p + step, s, True) for s, (t, p) in enumerate(zip(tokens, positions, strict=True))])
                wanted = list(range(count))
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        self._open(1, self._context_size)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._cached = []
        logits = np.empty((len(ids), self._vocab), np.float32)
        for at in range(0, len(ids), SCORED):
            part = ids[at : at + SCORED]
            self._decode([(token, at + row, 0, True) for row, token in enumerate(part)])
            for row in range(len(part)):
                pointer = llama_cpp.llama_get_logits_ith(self._context, row)
                logits[at + row] = np.ctypeslib.as_array(pointer, (self._vocab,))
        np.save(path, logits)
        return {"kind": "logits"}

    def memory(self) -> dict[str, Any]:
        return {"weight_bytes": llama_cpp.llama_model_size(self._model)}


def quantize(source: str, target: str, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status:
        sys.exit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["quantize"]:
        quantize(*sys.argv[2:5])
    else:
        serve(Session, "llama.cpp", f"llama-cpp-python {llama_cpp.__version__}")
