"""Bytes in and bytes out: read-only memory maps, and files that appear whole or not at all.

Knows no file format.

    data = map_file(Path("model.gguf"))
    with atomic_file(Path("out.gguf"), total_bytes) as write: write(b"...")
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finial.errors import FileError

Slab = bytes | bytearray | memoryview | NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def shown(name: object) -> str:
    """A name from a file as an error message may print it: quoted, control characters escaped, at most 80 long."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes as a read-only uint8 [size] view of a memory map, which lives as long as any view of it.

    FileError when it is missing, not a regular file, or unreadable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            kind = "a directory" if path.is_dir() else "no regular file"
            raise FileError(f"{path}: is {kind}, a file was expected", fix="name the file itself")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                return np.frombuffer(b"", np.uint8)
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file", fix="check the path, or fetch the model again") from None
    except (OSError, ValueError) as error:  # mmap raises ValueError when the file shrinks in between
        raise FileError(f"{path}: cannot be read ({error})", fix="check the file's permissions and its disk") from error


def require_space(directory: Path, nbytes: int) -> None:
    """FileError when `directory` does not exist or its disk has less than `nbytes` free."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise FileError(f"{directory}: cannot be written to ({error})", fix="create the directory first") from None
    if free < nbytes:
        raise FileError(
            f"{directory}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            fix="free some space, or write to another disk",
        )


@contextmanager
def atomic_file(path: Path, nbytes: int, progress: Progress | None = None) -> Iterator[Callable[[Slab], int]]:
    """Yield a function that appends bytes and returns their count.

    `path` appears, or is replaced, only when the block ends without an error.
    Writes to a hidden file in the same directory, which is removed on any error.  FileError when the disk is too full
    or cannot be written; `nbytes` is what will be written, for that check and for `progress`.
    """
    require_space(path.parent, nbytes)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    done = 0
    try:
        with part.open("xb") as file:

            def write(data: Slab) -> int:
                nonlocal done
                written = file.write(data.data if isinstance(data, np.ndarray) else data)
                done += written
                if progress is not None:
                    progress(done, nbytes)
                return written

            yield write
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error})", fix="check the directory and its free space") from error
    finally:
        part.unlink(missing_ok=True)
