"""Small decoders through the megakernel's own sources on the CPU, launch by launch.

Knows the kernel's arguments and the table; what a program makes of them, and what the reference says, is its users'.

    model = Model(config, "bf16"); mega = MegaTwin(model, rows=2)
    mega.start([3, 5]); tokens = mega.launch(4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cuda_twin import BASE, TwinDevice
from finial.backends import get_backend
from finial.backends.cuda import kernels
from finial.backends.cuda.device import Launch
from finial.backends.cuda.mega import layout
from finial.backends.cuda.mega.plan import Plan, make_plan
from finial.backends.cuda.mega.shape import recognise
from finial.backends.cuda.mega.stream import Packer
from finial.backends.cuda.plan import plan
from finial.backends.cuda.weights import fp8_decoded, pack_matrix
from finial.config import ModelConfig
from finial.formats import Tensor
from finial.graph import Step
from finial.models.decoder import build_graph, constants

PAGE, RING_STEPS, RING_STRIDE = 16, 64, 8
ENDED = -2


class Model:
    """Random weights of a configuration in a format, and the graph of the reference with what the kernel reads.

    Attributes:
        graph, weights: for the reference; fp8 weights are there as the float32 that they stand for.
    """

    def __init__(self, config: ModelConfig, format: str = "bf16", cache: str = "f32", seed: int = 1) -> None:
        random = np.random.default_rng(seed)
        self.config, self.format, self.cache = config, format, cache
        self.graph = build_graph(config, cache)
        stored = "bf16" if format == "fp8" else format
        self.stored: dict[str, Tensor] = {}
        for value in self.graph.of_kind("weight"):
            shape = tuple(int(dim) for dim in value.shape)
            if len(shape) == 2:
                values = random.standard_normal(shape) / np.sqrt(shape[1]) * 1.5
                self.stored[value.name] = Tensor.from_array(values.astype(np.float32)).to(stored)
            else:
                centre = 1.0 if "norm" in value.name else 0.0
                values = centre + 0.2 * random.standard_normal(shape)
                self.stored[value.name] = Tensor.from_array(values.astype(np.float32))
        more = {name: Tensor.from_array(array) for name, array in constants(config).items()}
        self.stored |= more
        self.weights = dict(self.stored)
        formats = {name: tensor.format for name, tensor in self.stored.items() if len(tensor.shape) == 2}
        found = recognise(self.graph, plan(self.graph, formats), formats)
        self.found = replace(found, shape=replace(found.shape, format=format))
        if format == "fp8":
            for name, tensor in self.stored.items():
                if len(tensor.shape) == 2 and (name != found.embed or name == found.head):
                    data, scales = pack_matrix([tensor], "fp8", interleave=False)
                    self.weights[name] = Tensor.from_array(fp8_decoded(data, scales, tensor.shape[1]))


class MegaTwin:
    """Buffers of one batch on a twin, as the kernel's arguments want them; pages are scattered."""

    def __init__(
        self,
        model: Model,
        *,
        rows: int = 1,
        blocks: int = 3,
        warps: int = 2,
        pages: int = 4,
        sampled: bool = False,
        bulk: bool = True,
        least: int = 8,
        stage_bytes: int = 2048,
        seed: int = 1,
        arena: int = 16 << 20,
        limit_s: float = 300.0,
        made: Plan | None = None,
        base: int = BASE,
        fused_mlp: bool = False,
        by_head: bool = False,
        whole: bool = False,
        down_parts: int = 0,
        shared: int = 227 << 10,
    ) -> None:
        self.model, self.rows = model, rows
        shape = model.found.shape
        self.plan = made or make_plan(
            shape,
            rows=rows,
            multiprocessors=blocks,
            shared=shared,
            sampled=sampled,
            warps=warps,
            stage_bytes=stage_bytes,
            fused_mlp=fused_mlp,
            by_head=by_head,
            whole=whole,
            down_parts=down_parts,
        )
        self.kernel = self.plan.kernel(PAGE, bulk=bulk, least=least)
        self.device = TwinDevice(arena=arena, seed=seed, base=base)
        plan, put = self.plan, self._put
        random = np.random.default_rng(seed)
        order = random.permutation(rows * pages).astype(np.int32).reshape(rows, pages)
        self.pages = order
        packer = Packer(plan, model.found, model.stored)
        streams = np.full(int(plan.offsets()[-1]), 0xEE, np.uint8)
        for offset, data in packer.pieces():
            streams[offset : offset + len(data)] = data
        embed, embed_scales = pack_matrix([model.stored[model.found.embed]], shape.embed, interleave=False)
        row_bytes = kernels.cache_row_bytes(shape.cache, shape.head_dim)
        cache_bytes = rows * pages * PAGE * 2 * shape.kv_heads * row_bytes
        caches = [self.device.allocate(cache_bytes) for _ in range(shape.layers)]
        for address in caches:
            self.device.upload(address, np.full(cache_bytes, 0xFF, np.uint8))  # NaN where nothing was written
        self._caches, self._cache_bytes = caches, cache_bytes
        d, f32 = shape.head_dim, np.float32
        parts = plan.parts_bytes // 4
        self.addresses = {
            "table": put(plan.table[: plan.blocks]),
            "streams": put(streams),
            "offsets": put(plan.offsets()),
            "vectors": put(packer.vectors()),
            "frequencies": put(model.stored[model.found.frequencies].decode().reshape(-1)),
            "embed": put(embed),
            "embed_scales": put(embed_scales) if embed_scales.size else 0,
            "caches": put(np.array(caches, np.uint64)),
            "pages": put(order),
            "state": put(np.zeros((rows, 4), np.int32)),
            "x0": put(np.full((rows, shape.width), np.nan, f32)),
            "x1": put(np.full((rows, shape.width), np.nan, f32)),
            "qkv": put(np.full((rows, shape.qkv_rows), np.nan, f32)),
            "attn": put(np.full((rows, shape.heads * d), np.nan, f32)),
            "act": put(np.full((rows, shape.ffn), np.nan, f32)),
            "parts": put(np.full(parts, np.nan, f32)),
            "tickets": put(np.zeros(plan.items, np.uint32)),
            "counters": put(np.zeros(layout.counters(shape) * layout.COUNTER_STRIDE, np.uint32)),
            "candidates": put(np.zeros((2, plan.blocks, rows), np.uint64)),
            "logits": put(np.full((rows, shape.vocab), np.nan, f32)),
            "tokens": put(np.zeros((2, rows), np.int32)),
            "requests": put(np.tile(np.array([0, 0, 1, 0], f32), (rows, 1))),
            "draws": put(np.zeros((RING_STEPS, rows), np.float64)),
            "stops": put(np.full((rows, layout.STOPS), -1, np.int32)),
            "ring": put(np.zeros((RING_STEPS, RING_STRIDE), np.uint64)),
            "control": put(np.zeros(8, np.uint32)),
        }
        self.limit_s, self.epoch = limit_s, 1

    def _put(self, array: NDArray[np.generic]) -> int:
        address = self.device.allocate(array.nbytes)
        self.device.upload(address, np.ascontiguousarray(array))
        return address

    def fill_caches(self, values: Callable[[int], NDArray[np.float64]]) -> None:
        """Of an f32 cache: values(count) for all that there is."""
        for address in self._caches:
            self.device.upload(address, values(self._cache_bytes // 4).astype(np.float32))

    def write(self, name: str, array: NDArray[np.generic]) -> None:
        """Fill a buffer."""
        self.device.upload(self.addresses[name], np.ascontiguousarray(array))

    def read(self, name: str, like: NDArray[np.generic]) -> NDArray[np.generic]:
        """A buffer's first bytes, in the form of an array."""
        out = np.empty_like(like)
        self.device.download(self.addresses[name], out)
        return out

    def state(self) -> NDArray[np.int32]:
        """[rows, 4]: token, position, active, limit."""
        return self.read("state", np.zeros((self.rows, 4), np.int32))  # type: ignore[return-value]

    def control(self) -> NDArray[np.uint32]:
        """Error, steps, entry of the error."""
        return self.read("control", np.zeros(8, np.uint32))  # type: ignore[return-value]

    def start(self, rows: dict[int, tuple[int, int, int]]) -> None:
        """row -> (token, position, limit); others keep what they have, but for being active."""
        state = self.state()
        state[:, 2] = 0
        for row, (token, position, limit) in rows.items():
            state[row] = token, position, 1, limit
        self.write("state", state)

    def launch(self, steps: int) -> NDArray[np.int32]:
        """Tokens of each step that was done, [done, rows]."""
        before = int(self.control()[1])
        args = self.kernel.pack(
            **self.addresses,
            limit_ns=int(self.limit_s * 1e9),
            steps=steps,
            page_stride=self.pages.shape[1],
            ring_rows=RING_STEPS,
            ring_stride=RING_STRIDE,
            epoch=self.epoch,
        )
        launch = Launch(self.kernel, (self.plan.blocks, 1, 1), args)
        self.device.replay(self.device.record([launch]))
        self.device.synchronize()
        done = int(self.control()[1]) - before
        ring = self.read("ring", np.zeros((RING_STEPS, RING_STRIDE), np.uint64))
        words = ring[(self.epoch + np.arange(done)) % RING_STEPS, : self.rows]
        assert (words >> np.uint64(32) == (self.epoch + np.arange(done))[:, None]).all()
        self.epoch += steps
        return words.astype(np.uint32).view(np.int32)  # type: ignore[no-any-return]


class Reference:
    """The same rows through the reference backend."""

    def __init__(self, mega: MegaTwin) -> None:
        model = mega.model
        self._pages = mega.pages
        self._program = get_backend("reference").compile(model.graph, model.weights)
        self._state = self._program.new_state(mega.pages.size, PAGE)

    def logits(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """One step of these rows: [rows, vocab]."""
        at, count = np.array(positions), len(rows)
        pages = self._pages[list(rows)]
        step = Step(
            tokens=np.array(tokens, np.int32),
            positions=at.astype(np.int32),
            starts=np.arange(count + 1, dtype=np.int32),
            lengths=(at + 1).astype(np.int32),
            pages=pages,
            slots=(pages[np.arange(count), at // PAGE] * PAGE + at % PAGE).astype(np.int32),
            wanted=np.arange(count, dtype=np.int32),
        )
        return self._program.run(step.feeds(), self._state)[0]  # type: ignore[no-any-return]
