"""What a workload must at least read and compute, and so the speed that the measured machine allows.

The same work for every engine: finial's count of the format's bytes, whatever an engine's own file holds.

    floor = Floor.of(path_of_gguf, workload, kv_format="bf16"); floor.seconds(read_gb_s, peak_gops)
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
    """One step of a workload: a decode step of mean depth, or the whole prompt.

    Attributes:
        bytes: read at least; operations: multiplications and additions; tokens: that the step yields.
        weight_bytes, kv_bytes: of the weights, and of the cache that the workload fills.
    """

    bytes: int
    operations: int
    tokens: int
    weight_bytes: int
    kv_bytes: int

    @staticmethod
    def of(model: Path, workload: Workload, kv_format: str = "bf16") -> Floor:
        """Count for the checkpoint `model`; reads its layout, not its weights."""
        checkpoint = open_checkpoint(model)
        graph = build_graph(checkpoint.config, kv_format)
        sizes = {name: get_format(format).nbytes(shape) for name, (format, shape) in checkpoint.layout.items()}
        blank = np.empty(max(sizes.values()), np.uint8)  # only sizes are looked at: views of one untouched buffer
        weights = {n: Tensor(f, shape, blank[: sizes[n]]) for n, (f, shape) in checkpoint.layout.items()}
        weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
        count = workload.sequences
        if workload.kind == "prompt":
            rows = workload.depth * count
            # A row sees half the prompt on average.
            operations = step_flops(graph, rows, count, [workload.depth // 2] * count)
            length = workload.depth
        else:
            rows, length = count, workload.depth + 1 + workload.new // 2
            operations = step_flops(graph, rows, rows, [length] * count)
        one = step_bytes(graph, weights, 1, [0])
        kv = (step_bytes(graph, weights, 1, [1024]) - one) // 1024
        return Floor(
            bytes=step_bytes(graph, weights, rows, [length] * count),
            operations=operations,
            tokens=workload.depth * count if workload.kind == "prompt" else count,
            weight_bytes=sum(sizes.values()),
            kv_bytes=kv * count * (workload.depth + workload.new),
        )

    def seconds(self, read_gb_s: float, peak_gops: float | None) -> float:
        """The longer of reading and computing; without a peak, reading alone."""
        reading = self.bytes / read_gb_s / 1e9
        return reading if peak_gops is None else max(reading, self.operations / peak_gops / 1e9)


def peak_for(format: str, peaks: dict[str, float]) -> float | None:
    """The arithmetic peak that a format can use: int8 products for the quantised, else bf16, else float32."""
    order = ("bf16", "f32") if format in ("bf16", "stored") else ("int8", "bf16", "f32")
    return next((peaks[kind] for kind in order if kind in peaks), None)
