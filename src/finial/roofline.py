"""The roof over a loaded model: what a step must read, and how fast this machine reads so much.

Knows the public object, the cost of a step and the machine; nothing of requests or of how it is shown.

    reads = step_reads(llm, rows=1, length=100); reads * tok_s / (measure_read(llm, reads).gb_s * 1e9)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finial.cost import step_bytes
from finial.files.checkpoint import open_checkpoint
from finial.formats import Tensor, get_format
from finial.llm import LLM
from finial.machine import Sources, bandwidth_bytes, measure_bandwidth, probe_cpu, probe_memory, probe_native
from finial.models.decoder import build_graph, constants

SECONDS = 0.3  # several hundred passes over the demo's weights, some thirty over 512 MiB at 50 GB/s
MOST_BYTES = 512 << 20  # of a buffer beside a loaded model: taking 1 GB costs seconds where a host has to find it first


@dataclass(frozen=True)
class Read:
    """The read bandwidth that a model's steps are held to.

    Attributes:
        gb_s: 1e9 bytes per second, with the threads that compute the steps.
        over_bytes: size of the buffer that was read: a step's bytes, but at most MOST_BYTES and what memory allows.
        in_cache: the last-level cache holds a step's bytes.
    """

    gb_s: float
    over_bytes: int
    in_cache: bool


def step_reads(llm: LLM, rows: int, length: int) -> int:
    """Bytes that a step of one sequence must read, with the weights in the formats that were loaded.

    Args:
        rows: new tokens of the step.
        length: positions that they attend over, themselves included.
    """
    info = llm.info
    layout = open_checkpoint(info.path).layout
    reencoded = info.format if "+" not in info.format else None
    formats = {
        name: (reencoded if reencoded is not None and len(shape) == 2 else stored, shape)
        for name, (stored, shape) in layout.items()
    }
    sizes = {name: get_format(format).nbytes(shape) for name, (format, shape) in formats.items()}
    # Only sizes are looked at, so all tensors are views of one buffer that is never touched.
    blank = np.empty(max(sizes.values()), np.uint8)
    weights = {name: Tensor(format, shape, blank[: sizes[name]]) for name, (format, shape) in formats.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(info.config).items()}
    return step_bytes(build_graph(info.config, info.kv_format), weights, rows, [length])


def measure_read(llm: LLM, reads: int, seconds: float = SECONDS) -> Read | None:
    """Measure now; None where it is known for no backend of the model's, which is all but cpu."""
    threads = llm.info.threads or probe_native().threads
    if llm.info.backend != "cpu" or threads is None:
        return None
    cpu = probe_cpu(Sources())
    in_cache = 0 < reads <= cpu.last_level_bytes
    over = bandwidth_bytes(cpu, probe_memory(Sources()), min(reads, MOST_BYTES))
    gb_s = measure_bandwidth([threads], over, seconds)[0].read_gb_s
    return None if gb_s is None else Read(gb_s, over, in_cache)
