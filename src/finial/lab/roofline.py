"""What a workload must at least read and compute, and so the speed that the measured machine allows.

The same work for every engine: finial's count of the format's bytes, whatever an engine's own file holds.

    floor = Floor.of(path_of_model, workload, format="q8_0"); floor.seconds(read_gb_s, peak_gops)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finial.cost import step_bytes, step_flops
from finial.files.checkpoint import open_checkpoint
from finial.formats import Tensor, get_format
from finial.lab.workloads import Workload
from finial.models.decoder import build_graph, constants


@dataclass(frozen=True)
class Floor:
    """One step of a workload, a decode step of mean depth or the whole prompt; or a whole request of kind "generate".

    Attributes:
        bytes: read at least; operations: multiplications and additions; tokens: that this yields.
        weight_bytes, kv_bytes: of the weights, and of the cache that the workload fills.
    """

    bytes: int
    operations: int
    tokens: int
    weight_bytes: int
    kv_bytes: int

    @staticmethod
    def of(model: Path, workload: Workload, kv_format: str = "bf16", format: str | None = None) -> Floor:
        """Count for the checkpoint `model`; reads its layout, not its weights.

        Args:
            format: that all matrices are in; None: as stored.
        """
        checkpoint = open_checkpoint(model)
        graph = build_graph(checkpoint.config, kv_format)
        layout = {
            name: (format if format is not None and len(shape) == 2 else stored, shape)
            for name, (stored, shape) in checkpoint.layout.items()
        }
        sizes = {name: get_format(stored).nbytes(shape) for name, (stored, shape) in layout.items()}
        blank = np.empty(max(sizes.values()), np.uint8)  # only sizes are looked at: views of one untouched buffer
        weights = {n: Tensor(f, shape, blank[: sizes[n]]) for n, (f, shape) in layout.items()}
        weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
        lengths, count = list(workload.prompt_lengths), workload.sequences

        def prompt() -> tuple[int, int]:
            # A row sees half of its prompt on average; every prompt's keys are read once at least.
            seen = [length // 2 for length in lengths]
            return step_bytes(graph, weights, sum(lengths), lengths), step_flops(graph, sum(lengths), count, seen)

        def decode(ahead: int) -> tuple[int, int]:
            ends = [length + ahead for length in lengths]
            return step_bytes(graph, weights, count, ends), step_flops(graph, count, count, ends)

        if workload.kind == "prompt":
            bytes, operations, tokens = *prompt(), sum(lengths)
        elif workload.kind == "generate":
            middle, read = decode(1 + workload.new // 2), prompt()
            bytes, operations = (a + b * (workload.new - 1) for a, b in zip(read, middle, strict=True))
            tokens = count * workload.new
        else:
            bytes, operations, tokens = *decode(1 + workload.new // 2), count
        one = step_bytes(graph, weights, 1, [0])
        kv = (step_bytes(graph, weights, 1, [1024]) - one) // 1024
        return Floor(bytes, operations, tokens, sum(sizes.values()), kv * sum(n + workload.new for n in lengths))

    def seconds(self, read_gb_s: float, peak_gops: float | None) -> float:
        """The longer of reading and computing; without a peak, reading alone."""
        reading = self.bytes / read_gb_s / 1e9
        return reading if peak_gops is None else max(reading, self.operations / peak_gops / 1e9)


def peak_for(format: str, peaks: dict[str, float]) -> float | None:
    """The arithmetic peak that a format can use: int8 products for the quantised, else bf16, else float32."""
    order = ("bf16", "f32") if format in ("bf16", "f16", "f32", "stored") else ("int8", "bf16", "f32")
    return next((peaks[kind] for kind in order if kind in peaks), None)
