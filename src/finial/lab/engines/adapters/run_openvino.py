"""OpenVINO GenAI through its continuous batching pipeline, stepped by hand: one step, one token of each sequence.

Its own per-token times are already divided by the batch, so the wall clock is used.  Prefix caching is on, so that a
filled cache is not filled again; fresh prompts gain nothing by it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
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
        config = openvino_genai.SchedulerConfig()
        config.enable_prefix_caching = True
        config.max_num_batched_tokens = max(context, 512)  # a prompt in one step, as its LLMPipeline does
        config.max_num_seqs = max(8, sequences)
        config.cache_size = 1  # GB
        self._pipe = openvino_genai.ContinuousBatchingPipeline(model, config, "CPU", {"INFERENCE_NUM_THREADS": threads})
        self._ids = itertools.count()
        self._file, self._threads, self._plain = Path(model) / "openvino_model.xml", threads, None
        self.precision = {
            "bf16": "fp16 file computed in bf16 where the CPU has it",
            "q8_0": "int8 weights per row",
            "q4_0": "int4 weights in groups of 128, embedding and head int8",
        }[{"stored": "bf16"}.get(format, format)] + ", 8-bit KV cache (its defaults)"

    def run(self, prompts: list[list[int]], new: int, keep: bool) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        inputs = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        clock = Clock(len(prompts))
        handles = [self._pipe.add_request(next(self._ids), tensor, config) for tensor in inputs]
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            for sequence, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            clock.token(sequence, token)
        return clock.reply()

    def score(self, ids: list[int], path: str) -> dict[str, Any]:
        """The pipeline gives no logits; the same file in OpenVINO's own runtime, on which it is built, does."""
        if self._plain is None:
            properties = {"INFERENCE_NUM_THREADS": self._threads}
            self._plain = ov.Core().compile_model(self._file, "CPU", properties).create_infer_request()
        self._plain.reset_state()
        names = {name for port in self._plain.model_inputs for name in port.get_names()}
        whole = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._plain.infer({name: value for name, value in whole.items() if name in names})
        np.save(path, self._plain.get_tensor("logits").data[0].astype(np.float32))
        return {"kind": "logits"}


if __name__ == "__main__":
    serve(Session, "OpenVINO GenAI", openvino_genai.__version__)
