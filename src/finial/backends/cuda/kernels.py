"""Kernels as data: a template of kernels/cuda with its constants, its launch bounds, and how its argument is packed.

Knows the names and numbers that the templates take; nothing of graphs, compilers or devices.

    kernel = matvec("bf16", k=1024, out=4096, rows=1, nr=4, warps=8, norm=True, eps=1e-6)
    kernel.source; kernel.pack(weight=..., x=..., out=...)
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import finial

SOURCES = Path(finial.__file__).parent / "kernels" / "cuda"

# format of a matrix -> (type in formats.cuh, weights in 16 bytes)
FORMATS = {
    "f32": ("F32", 4),
    "bf16": ("Bf16", 8),
    "f16": ("F16", 8),
    "fp8": ("Fp8", 16),
    "q8_0": ("Q8", 16),
    "q4_0": ("Q4", 32),
}
CACHES = {"bf16": ("CacheBf16", 8), "f32": ("CacheF32", 4), "q8_0": ("CacheQ8", 16)}

# Fields of the argument structs in order, by type: P a pointer, i an int32, f a float.
_ARGS = {
    "MatvecArgs": "P weight,P scales,P bias,P norm,P x,P pick,P add,P out,"
    "i x_stride,i add_stride,i out_stride,i padding",
    "EmbedArgs": "P weight,P scales,P tokens,P out,i out_stride,i padding",
    "NormArgs": "P x,P weight,P out,P pick,i x_stride,i out_stride,f eps,i rows,i groups,i padding",
    "RopeArgs": "P x,P frequencies,P positions,P out,i x_stride,i out_stride,i width,f scale",
    "CacheWriteArgs": "P keys,P values,P slots,P cache,i stride,i padding",
    "PointwiseArgs": "P a,P b,P out,P pick,i a_stride,i b_stride,i out_stride,i width",
    "AttendArgs": "P q,P k,P v,P q_norm,P k_norm,P frequencies,P cache,P positions,P slots,P sequence,P pages,P out,"
    "P parts,P tickets,i q_stride,i kv_stride,i out_stride,i page_stride,f eps,f rope_scale,f scale,i padding",
    "GemmArgs": "P weight,P scales,P bias,P x,P add,P out,P parts,P tickets,"
    "i x_stride,i add_stride,i out_stride,i rows",
    "FlashArgs": "P q,P cache,P tiles,P pages,P out,i q_stride,i out_stride,i page_stride,i padding",
    "SampleArgs": "P logits,P requests,P draws,P tokens,i vocab,i stride",
    "AheadArgs": "P logits,P requests,P draws,P states,P stop_ids,P epoch,P ring,P tokens,P positions,P slots,"
    "P sequence,P pages,i vocab,i stride,i page_stride,i padding",
    "MegaArgs": "P table,P streams,P offsets,P vectors,P frequencies,P embed,P embed_scales,P caches,P pages,P state,"
    "P x0,P x1,P qkv,P attn,P act,P parts,P tickets,P counters,P candidates,P logits,P tokens,P requests,P draws,"
    "P stops,P ring,P control,P limit_ns,i steps,i page_stride,i ring_rows,i ring_stride,i epoch,i padding",
}


def layout(fields: str) -> tuple[list[list[str]], struct.Struct]:
    """The fields of an argument struct, and how they are packed."""
    split = [field.split() for field in fields.split(",")]
    return split, struct.Struct("=" + "".join("Q" if kind == "P" else kind for kind, _ in split))


_FIELDS = {name: layout(fields)[0] for name, fields in _ARGS.items()}
_LAYOUT = {name: layout(fields)[1] for name, fields in _ARGS.items()}


@dataclass(frozen=True)
class Kernel:
    """One kernel: equal kernels are compiled once.

    Attributes:
        template: function template in `header`, which takes a struct of constants.
        constants: C++ declarations of that struct.
        threads, blocks: launch bounds: threads of a block, and blocks that must fit a multiprocessor.
        shared: dynamic shared memory in bytes.
        least_arch: the lowest compute capability it runs on, as 80.
        cooperative: its blocks wait for each other, so all must be resident at once.
    """

    template: str
    header: str
    args: str
    constants: tuple[str, ...]
    threads: int
    blocks: int = 1
    shared: int = 0
    least_arch: int = 75
    cooperative: bool = False

    @functools.cached_property
    def name(self) -> str:
        """Name of the function: the template's and a digest of the constants."""
        text = repr((self.constants, self.threads, self.blocks))
        return f"{self.template}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @functools.cached_property
    def source(self) -> str:
        """What is compiled, after an include of the header."""
        body = "".join(f"    {line};\n" for line in self.constants)
        macro = "FINIAL_COOPERATIVE" if self.cooperative else "FINIAL_KERNEL"
        return (
            f"struct {self.name}_constants {{\n{body}}};\n"
            f"{macro}({self.name}, {self.threads}, {self.blocks}, {self.args}, "
            f"{self.template}<{self.name}_constants>)\n"
        )

    def pack(self, **values: float) -> bytes:
        """The argument struct; what is not given is 0."""
        fields = _FIELDS[self.args]
        unknown = values.keys() - {name for _, name in fields}
        assert not unknown, f"{self.args} has no {unknown}"
        return _LAYOUT[self.args].pack(*(values.get(name, 0) for _, name in fields))


def program(kernels: Sequence[Kernel]) -> str:
    """One source with all of these kernels."""
    headers = dict.fromkeys(kernel.header for kernel in kernels)
    return "".join(f'#include "{header}"\n' for header in headers) + "\n" + "\n".join(k.source for k in kernels)


@functools.cache
def sources_digest() -> str:
    """A digest of all files that a kernel may include."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.cuh")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _constants(**values: int | float | bool | str) -> tuple[str, ...]:
    lines = []
    for name, value in values.items():
        if isinstance(value, str):
            lines.append(f"using {name} = {value}")
        elif isinstance(value, bool):
            lines.append(f"static constexpr bool {name} = {str(value).lower()}")
        elif isinstance(value, int):
            lines.append(f"static constexpr int {name} = {value}")
        else:
            lines.append(f"static constexpr float {name} = {float(np.float32(value)).hex()}f")
    return tuple(lines)


def padded(k: int) -> int:
    """Weights of a row on the device: K up to a multiple of 64."""
    return -(-k // 64) * 64


MATVEC_SHARED = 40 << 10  # bytes for rows of x: with the static part it stays below the 48 KiB that need no opt-in


def _loads(rows: int) -> int:
    """16-byte loads that a thread has in flight: as many as registers hold beside the sums of the rows."""
    return 16 if rows <= 2 else 8


def matvec_shape(out: int, rows: int, multiprocessors: int, gated: bool) -> tuple[int, int]:
    """(weight rows of a warp, warps of a block): an even share for all multiprocessors, then more warps."""
    best, choice = -1.0, (1, 8)
    for nr in (1, 2, 4, 8):
        if nr * rows > 32 or (gated and nr == 1):
            continue
        for warps in range(4, 17 if rows <= 2 else 9, 2):
            tiles = -(-out // (nr * warps))
            waves = -(-tiles // multiprocessors)
            busy = out / (waves * multiprocessors * nr * warps)  # share of the machine's warps that have work
            deep = min(nr * warps, 32) / 32  # enough bytes in flight on each multiprocessor
            score = busy * (0.5 + 0.5 * deep) + warps / 1000
            if score > best:
                best, choice = score, (nr, warps)
    return choice


def matvec(
    format: str,
    *,
    k: int,
    out: int,
    rows: int,
    nr: int,
    warps: int,
    norm: bool = False,
    eps: float = 0.0,
    bias: bool = False,
    add: bool = False,
    gated: bool = False,
    pick: bool = False,
) -> Kernel:
    """See matvec.cuh."""
    name, unit = FORMATS[format]
    steps = -(-(padded(k) // unit) // 32)
    at_once = max(1, min(steps, _loads(rows) // nr, MATVEC_SHARED // (rows * unit * 128)))
    batches = max(1, min(-(-steps // at_once), MATVEC_SHARED // (rows * unit * 128 * at_once)))
    return Kernel(
        "matvec",
        "matvec.cuh",
        "MatvecArgs",
        _constants(
            Format=name,
            K=k,
            OUT=out,
            R=rows,
            NR=nr,
            WARPS=warps,
            SHARED=MATVEC_SHARED,
            LOADS=_loads(rows),
            NORM=norm,
            EPS=float(eps),
            BIAS=bias,
            ADD=add,
            GATED=gated,
            PICK=pick,
        ),
        threads=32 * warps,
        shared=batches * at_once * 32 * unit * rows * 4,
    )


def embed(format: str, k: int) -> Kernel:
    """See rows.cuh."""
    return Kernel("embed", "rows.cuh", "EmbedArgs", _constants(Format=FORMATS[format][0], K=k), threads=128)


def norm(width: int, *, normed: bool, pick: bool, half: bool) -> Kernel:
    """See rows.cuh; `normed` False: only a copy, or a change to bf16."""
    threads = 128
    constants = _constants(W=width, THREADS=threads, NORM=normed, PICK=pick, HALF=half)
    return Kernel("norm", "rows.cuh", "NormArgs", constants, threads=threads)


def rope(head_dim: int) -> Kernel:
    """See rows.cuh."""
    return Kernel("rope", "rows.cuh", "RopeArgs", _constants(D=head_dim), threads=128)


def cache_write(cache: str, head_dim: int, heads: int) -> Kernel:
    """See rows.cuh."""
    constants = _constants(Cache=f"{CACHES[cache][0]}<{head_dim}>", D=head_dim, HEADS=heads)
    return Kernel("cache_write", "rows.cuh", "CacheWriteArgs", constants, threads=64)


def pointwise(op: str) -> Kernel:
    """See rows.cuh."""
    constants = _constants(OP={"add": 0, "silu_mul": 1, "select_rows": 2}[op])
    return Kernel("pointwise", "rows.cuh", "PointwiseArgs", constants, threads=256)


def cache_row_bytes(cache: str, head_dim: int) -> int:
    """Bytes of one cached key or value."""
    if cache == "q8_0":
        return -(-(head_dim + head_dim // 32 * 2) // 16) * 16
    return -(-head_dim // 16) * 16 * (2 if cache == "bf16" else 4)


def heads_at_once(cache: str, group: int) -> int:
    """Query heads of a block: a group in equal parts small enough for the registers."""
    most = {"bf16": 4, "f32": 4, "q8_0": 2}[cache]
    return -(-group // -(-group // most))


def attend(
    cache: str,
    *,
    head_dim: int,
    heads: int,
    group: int,
    splits: int,
    page_size: int,
    window: int | None,
    fused: bool,
    normed: bool,
    half: bool = False,
    warps: int = 4,
) -> Kernel:
    """See attend.cuh; `heads` are key/value heads, `group` query heads of each."""
    constants = _constants(
        Cache=f"{CACHES[cache][0]}<{head_dim}>",
        D=head_dim,
        HEADS=heads,
        GROUP=group,
        GB=heads_at_once(cache, group),
        WARPS=warps,
        U=4 if head_dim <= 128 else 2,
        SPLITS=splits,
        PAGE=page_size,
        WINDOW=window or 0,
        FUSED=fused,
        NORMED=normed,
        HALF=half,
    )
    return Kernel("attend", "attend.cuh", "AttendArgs", constants, threads=32 * warps)


def prepare_rows(cache: str, *, head_dim: int, heads: int, group: int, normed: bool, half: bool) -> Kernel:
    """See attend.cuh."""
    constants = _constants(
        Cache=f"{CACHES[cache][0]}<{head_dim}>", D=head_dim, HEADS=heads, GROUP=group, NORMED=normed, HALF=half
    )
    return Kernel("prepare_rows", "attend.cuh", "AttendArgs", constants, threads=32)


@dataclass(frozen=True)
class GemmTile:
    """Tile of a block (rows, columns), of a warp, and depth of the ring."""

    bm: int
    bn: int
    wm: int
    wn: int
    stages: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.bm // self.wm * (self.bn // self.wn) * 32

    @property
    def shared(self) -> int:
        """Bytes of the ring: rows of 64 in bf16."""
        return self.stages * (self.bm + self.bn) * 128


GEMM_TILES = (
    GemmTile(16, 64, 16, 16, 4),
    GemmTile(32, 64, 32, 16, 4),
    GemmTile(64, 64, 32, 32, 4),
    GemmTile(128, 128, 64, 32, 3),
)


def gemm_tile(rows: int) -> GemmTile:
    """The tile for a bucket of rows, 16 or more."""
    return next((tile for tile in GEMM_TILES if tile.bm >= rows), GEMM_TILES[-1])


def gemm_split(rows: int, out: int, k: int, multiprocessors: int) -> int:
    """How many blocks share the depth of a tile: until every multiprocessor has one, each at least four steps of 64."""
    tile = gemm_tile(rows)
    blocks = -(-out // tile.bn) * -(-rows // tile.bm)
    return max(1, min(multiprocessors // blocks, padded(k) // 256, 16))


def gemm(
    format: str,
    *,
    k: int,
    out: int,
    tile: GemmTile,
    split: int = 1,
    bias: bool = False,
    add: bool = False,
    gated: bool = False,
    half: bool = False,
) -> Kernel:
    """See gemm.cuh."""
    constants = _constants(
        Format=FORMATS[format][0],
        RAW=format == "bf16",
        K=k,
        OUT=out,
        BM=tile.bm,
        BN=tile.bn,
        WM=tile.wm,
        WN=tile.wn,
        STAGES=tile.stages,
        SPLIT=split,
        BIAS=bias,
        ADD=add,
        GATED=gated,
        HALF=half,
    )
    return Kernel("gemm", "gemm.cuh", "GemmArgs", constants, tile.threads, shared=tile.shared, least_arch=80)


def flash_tokens(group: int) -> int:
    """Rows of a tile: their query heads of one group fill up to 64 rows of the tensor cores."""
    return 64 // group


def has_flash(cache: str, head_dim: int, group: int) -> bool:
    """Whether tiles fit registers and shared memory; who asks for an f32 cache gets float32 attention too."""
    return cache != "f32" and head_dim <= 128 and head_dim % 16 == 0 and group <= 64


def flash(
    cache: str, *, head_dim: int, heads: int, group: int, page_size: int, window: int | None, half: bool
) -> Kernel:
    """See flash.cuh."""
    constants = _constants(
        Cache=f"{CACHES[cache][0]}<{head_dim}>",
        RAW=cache == "bf16",
        D=head_dim,
        HEADS=heads,
        GROUP=group,
        TOKENS=flash_tokens(group),
        PAGE=page_size,
        WINDOW=window or 0,
        HALF=half,
    )
    shared = 5 * 64 * (2 * head_dim + 16)
    return Kernel("flash", "flash.cuh", "FlashArgs", constants, 128, shared=shared, least_arch=80)


def sample_threads(vocab: int) -> int:
    """Threads of a block that chooses a token: each has a few logits at least, and a block has 1024 at most."""
    return max(64, min(1024, 1 << (vocab // 4).bit_length()))


def sample(vocab: int) -> Kernel:
    """See sample.cuh; one block a row."""
    threads = sample_threads(vocab)
    return Kernel("sample", "sample.cuh", "SampleArgs", _constants(THREADS=threads), threads=threads)


def sample_ahead(vocab: int, page_size: int, ring: int, ring_rows: int) -> Kernel:
    """See ahead.cuh; one block a row; the ring has `ring` steps of `ring_rows` words."""
    threads = min(768, sample_threads(vocab))  # with 64 registers, all that 1024 threads leave, it spills on sm_100
    constants = _constants(THREADS=threads, PAGE=page_size, RING=ring, RING_ROWS=ring_rows)
    return Kernel("sample_ahead", "ahead.cuh", "AheadArgs", constants, threads=threads)


def mega(*, warps: int, shared: int, **values: int | float | bool | str) -> Kernel:
    """See mega.cuh; `warps` that compute, one more brings weights; the values are those of mega/plan.py."""
    constants = _constants(WARPS=warps, **values)
    threads = 32 * (warps + 1)
    return Kernel("mega", "mega.cuh", "MegaArgs", constants, threads, shared=shared, least_arch=80, cooperative=True)
