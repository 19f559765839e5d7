"""Reading and writing safetensors: one file, or the shards of a directory with their index.

Knows nothing of models: names are the file's own.

    tensors = open_safetensors(Path("Qwen3-0.6B"))
    write_safetensors(Path("out.safetensors"), [("w", "bf16", (8, 8), tensors["w"].slabs("bf16"))])

Layout: a uint64 length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, the data
(https://github.com/huggingface/safetensors#format).  Every claim is compared with the file's size before it is used.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finial.errors import FileError
from finial.files.disk import Progress, Slab, atomic_file, map_file, require_space, shown
from finial.formats import Tensor, get_format

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
# A parsed JSON value takes up to 60 times the bytes of its text.  65,000 tensors, more than any model has, need about
# ten values each; a header with far more is a bomb.
MAX_VALUES = 1_000_000
MAX_AXES = 8
MAX_ELEMENTS = 1 << 60
DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}

DAMAGED = "the file is damaged or incomplete: fetch or convert it again"
TOGETHER = "fetch all files of the model again, from one place"

# A plain name only: an index must not be able to point at files elsewhere.
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,200}\.safetensors")

# A tensor to write: name, format, shape, and its bytes in order in pieces of any size, asked for when their turn comes.
Source = tuple[str, str, tuple[int, ...], Iterable[Slab]]


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a directory with model.safetensors or an index and its shards.

    The tensors are views of memory maps.  FileError naming file, tensor and fix: missing, damaged, a dtype other than
    F32, F16 and BF16, or index and shards that disagree.
    """
    if not path.is_dir():
        return _open_file(path)
    try:
        names = {item.name for item in path.iterdir()}
    except OSError as error:
        raise FileError(f"{path}: cannot be listed ({error})", fix="check the directory's permissions") from None
    if SINGLE in names:
        return _open_file(path / SINGLE)
    if INDEX in names:
        return _open_shards(path / INDEX)
    others = sorted(name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf", ".safetensors")))
    there = f" (it has {', '.join(others[:4])})" if others else ""
    raise FileError(
        f"{path}: has neither {SINGLE} nor {INDEX}{there}",
        fix="name the directory or file that holds the weights; `finial convert` reads .bin and .pth",
    )


def _open_shards(index: Path) -> dict[str, Tensor]:
    raw = map_file(index)
    if raw.size > MAX_HEADER:
        raise FileError(f"{index}: is {raw.size} bytes long, at most {MAX_HEADER} were expected", fix=TOGETHER)
    weight_map = _json(raw.data, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: has no weight_map of tensor names to file names", fix=TOGETHER)
    wanted: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise FileError(
                f"{index}: tensor {shown(name)} is in {shown(shard)}, which is no .safetensors file beside the index",
                fix=TOGETHER,
            )
        wanted.setdefault(shard, set()).add(name)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(wanted):
        path = index.with_name(shard)
        if not path.exists():
            raise FileError(f"{path}: missing, the index lists {len(wanted[shard])} tensors in it", fix=TOGETHER)
        found = _open_file(path)
        if absent := wanted[shard] - found.keys():
            raise FileError(f"{path}: lacks tensor {shown(min(absent))}, which {index.name} lists in it", fix=TOGETHER)
        if extra := found.keys() - wanted[shard]:
            raise FileError(
                f"{path}: has tensor {shown(min(extra))}, which {index.name} does not list in it", fix=TOGETHER
            )
        tensors |= found
    return {name: tensors[name] for name in weight_map}


class _Repeated(ValueError):
    """A JSON object with the same key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return out


def _json(raw: memoryview, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys; FileError otherwise."""
    try:
        text = str(raw, "utf-8")
        if sum(map(text.count, "[{,")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        found = json.loads(text, object_pairs_hook=_unique)
    except _Repeated as error:
        raise FileError(f"{path}: {shown(error.args[0])} is there twice", fix=DAMAGED) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise FileError(f"{path}: its header is not readable JSON ({reason})", fix=DAMAGED) from None
    if not isinstance(found, dict):
        raise FileError(f"{path}: its header is not a JSON object", fix=DAMAGED)
    return found


def _open_file(path: Path) -> dict[str, Tensor]:
    data = map_file(path)
    if data.size < 8:
        raise FileError(f"{path}: is {data.size} bytes long, no safetensors file", fix=DAMAGED)
    (length,) = struct.unpack_from("<Q", data.data)
    if length > min(MAX_HEADER, data.size - 8):
        raise FileError(
            f"{path}: claims a header of {length} bytes, at most {min(MAX_HEADER, data.size - 8)} are possible",
            fix=DAMAGED,
        )
    raw = data[8 : 8 + length].data
    if not length or raw[0] != ord("{") or raw[-1] not in b"} ":  # cheap, before 100 MB of noise are parsed
        raise FileError(f"{path}: its header is not a JSON object", fix=DAMAGED)
    header = _json(raw, path)
    header.pop("__metadata__", None)
    body = data[8 + length :]
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, info in header.items():
        if not _is_text(name):
            raise FileError(f"{path}: tensor {shown(name)} has a name that is not text", fix=DAMAGED)
        format, shape, start, end = _entry(info, f"{path}: tensor {shown(name)}", body.size)
        tensors[name] = Tensor(format, shape, body[start:end])
        ranges.append((start, end, name))
    at = 0
    for start, end, name in sorted(ranges):  # the format wants the data covered once, without holes
        if start != at:
            relation = "overlaps the one before it" if start < at else f"leaves {start - at} bytes unused before it"
            raise FileError(f"{path}: tensor {shown(name)} at offset {start} {relation}", fix=DAMAGED)
        at = end
    if at != body.size:
        raise FileError(f"{path}: its tensors end at byte {at} of the data, which has {body.size}", fix=DAMAGED)
    return tensors


def _entry(info: Any, what: str, room: int) -> tuple[str, tuple[int, ...], int, int]:
    """Format, shape, start and end of one header entry, checked against the `room` bytes of data."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{what} has an entry without exactly dtype, shape and data_offsets", fix=DAMAGED)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(
            f"{what} has dtype {shown(dtype)}; {', '.join(DTYPES)} are read",
            fix="use the model as published in bf16 or f16, or a GGUF file if it is quantised",
        )
    if not _sizes(shape) or len(shape) > MAX_AXES or math.prod(max(1, axis) for axis in shape) > MAX_ELEMENTS:
        raise FileError(f"{what} has shape {shown(shape)}, up to {MAX_AXES} lengths were expected", fix=DAMAGED)
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise FileError(f"{what} has data_offsets {shown(offsets)}, the data has {room} bytes", fix=DAMAGED)
    expected = get_format(DTYPES[dtype]).nbytes(tuple(shape))
    if offsets[1] - offsets[0] != expected:
        raise FileError(
            f"{what}, {dtype} {shape}, has {offsets[1] - offsets[0]} bytes of data, {expected} were expected",
            fix=DAMAGED,
        )
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _is_text(name: str) -> bool:
    """False for half a surrogate pair, which JSON can escape but nothing can print."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def write_safetensors(
    path: Path,
    tensors: Iterable[Source],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one file, or where the data exceeds `max_shard_bytes` shards named after it and their index.

    Formats f32, f16 and bf16.  `metadata` is text by text; `format: pt`, which transformers asks for, is always there.
    Each file appears whole or not at all, the index last.  Returns the files written; `model.safetensors` in shards is
    `model-00001-of-00002.safetensors` … and `model.safetensors.index.json`.

    FileError: another format, a name twice, a full disk, shards beside a single file that readers would prefer.
    """
    sources = list(tensors)
    if len({source[0] for source in sources}) < len(sources) or any(source[0] == "__metadata__" for source in sources):
        raise FileError(
            f"{path}: two tensors of one name, or one named __metadata__", fix="name every tensor differently"
        )
    for name, format, _, _ in sources:
        if format not in _DTYPE_OF:
            raise FileError(
                f"{path}: safetensors holds {', '.join(_DTYPE_OF)}, tensor {shown(name)} is to be {format}",
                fix="write GGUF for quantised weights",
            )
    shards = _shards(sources, max_shard_bytes)
    notes = {"format": "pt", **(metadata or {})}
    total = sum(_nbytes(source) for source in sources)
    done = 0

    def report(written: int, _: int) -> None:
        if progress is not None:
            progress(done + written, total)

    if len(shards) == 1:
        _write_file(path, shards[0], notes, report)
        return [path]
    if path.exists():
        raise FileError(
            f"{path}: is there and would be read instead of the shards", fix="remove it, or write elsewhere"
        )
    require_space(path.parent, total)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        written.append(path.with_name(f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"))
        _write_file(written[-1], shard, notes, report)
        done += sum(_nbytes(source) for source in shard)
        weight_map |= {source[0]: written[-1].name for source in shard}
    index = path.with_name(f"{path.name}.index.json")
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    with atomic_file(index, len(text)) as write:
        write(text.encode())
    return [*written, index]


def _nbytes(source: Source) -> int:
    return get_format(source[1]).nbytes(source[2])


def _shards(sources: list[Source], limit: int | None) -> list[list[Source]]:
    """The tensors in order, cut where the next one would exceed the limit; a larger tensor has a shard for itself."""
    shards: list[list[Source]] = [[]]
    held = 0
    for source in sources:
        size = _nbytes(source)
        if limit is not None and shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(source)
        held += size
    return shards


def _write_file(path: Path, sources: list[Source], metadata: Mapping[str, str], progress: Progress) -> None:
    # Four-byte values first, so that every tensor is aligned to its values whatever the counts.
    ordered = sorted(sources, key=lambda source: -get_format(source[1]).block_bytes)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for source in ordered:
        name, format, shape, _ = source
        end = at + _nbytes(source)
        header[name] = {"dtype": _DTYPE_OF[format], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(
        path, 8 + len(text) + at, lambda written, _: progress(max(0, written - 8 - len(text)), at)
    ) as write:
        write(struct.pack("<Q", len(text)) + text)
        for name, format, shape, slabs in ordered:
            given = 0
            for slab in slabs:
                given += write(slab)
            expected = get_format(format).nbytes(shape)
            assert given == expected, f"{name}: {given} bytes given, its format and shape are {expected}"
