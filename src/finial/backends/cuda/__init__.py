"""NVIDIA GPUs: a graph as kernels compiled for its own shape, recorded once per bucket of rows and replayed.

Strict: every node runs on the device.  Knows nothing of models and files.

    program = create(threads=None).compile(graph, weights)
    outputs = program.run(step.feeds(), program.new_state(pages=64, page_size=32))
"""

from __future__ import annotations

from collections.abc import Mapping

from finial.backends.cuda.device import Device
from finial.backends.cuda.kernels import FORMATS
from finial.backends.cuda.lower_values import SMALL_ROWS
from finial.backends.cuda.program import CudaProgram, headroom
from finial.formats import Tensor
from finial.graph import Graph, Node

_OPS = ("embed", "linear", "rms_norm", "rope", "cache_write", "attention", "silu_mul", "add", "select_rows")
# Inputs that must be weights; every other one is rows, integers of the step, or a cache.
_WEIGHTS = {"embed": (1,), "linear": (1, 2), "rms_norm": (1,), "rope": (2,)}


class CudaBackend:
    """See the module.

    Attributes:
        formats: of matrices that it multiplies.
        small_rows: products of so many rows or fewer round nothing.
    """

    name = "cuda"
    small_rows = SMALL_ROWS
    formats = tuple(FORMATS)

    def __init__(self, device: Device) -> None:
        self.device = device

    @property
    def free_bytes(self) -> int:
        """Device memory that weights and caches may take together."""
        free, total = self.device.memory()
        return max(0, free - headroom(total))

    def supports(self, graph: Graph, node: Node) -> bool:
        """Every operation of the table, with weights bound by name, rows of fixed width, and heads of up to 256."""
        values = [graph.values[name] for name in node.inputs]
        bound = _WEIGHTS.get(node.op, ())
        if node.op not in _OPS or any((value.kind == "weight") != (at in bound) for at, value in enumerate(values)):
            return False
        if any(value.kind != "input" for value in values if value.dtype == "i32"):
            return False
        if any(not isinstance(dim, int) for value in values if value.dtype == "f32" for dim in value.shape[1:]):
            return False
        caches = [value for value in values if graph.is_state(value.name)]
        return all(isinstance(value.shape[3], int) and value.shape[3] <= 256 for value in caches)

    def activation_precision(self, format: str) -> str:
        """What the input of a `linear` is rounded to: nothing up to 8 rows; bf16 beyond, on tensor cores.

        With `weight_precision`, both together change a product by at most 2^-8.
        """
        return "f32" if format == "f32" else "bf16"

    def weight_precision(self, format: str) -> str:
        """What weights (scale times level, where there are scales) are rounded to where the input of a product is.

        "f32": nothing; bf16 weights and fp8's bytes are bf16 numbers already, and a row's scale stays float32.
        """
        return "bf16" if format in ("f16", "q8_0", "q4_0") else "f32"

    def attention_precision(self, kv_dtype: str) -> str:
        """What queries and attention weights are rounded to over such a cache, where a sequence has several rows."""
        return "f32" if kv_dtype == "f32" else "bf16"

    def compile(self, graph: Graph, weights: Mapping[str, Tensor]) -> CudaProgram:
        """See `finial.backends.Backend.compile`; matrices in f32, bf16, f16, fp8, q8_0 or q4_0."""
        return CudaProgram(graph, weights, self.device)


def create(threads: int | None, index: int = 0) -> CudaBackend:
    """The backend on one GPU.

    Raises:
        BackendError: no package, no driver, no such GPU; says which and what to do.
    """
    from finial.backends.cuda.driver import open_device

    return CudaBackend(open_device(index))
