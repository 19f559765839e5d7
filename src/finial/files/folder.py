"""A directory that appears whole or not at all.

Knows no file format.

    with new_directory(Path("model"), force=False) as folder: (folder / "config.json").write_text("{}")
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finial.errors import FileError


@contextmanager
def new_directory(out: Path, force: bool) -> Iterator[Path]:
    """Yield a hidden directory beside `out`; it is renamed to `out` when the block ends without an error.

    An empty directory of that name is replaced; one with content only with `force`, and only after the new one is
    complete.

    Raises:
        FileError: `out` exists and `force` is false, or the disk refuses.
    """
    check_free(out, force)
    mark = secrets.token_hex(4)
    part, old = out.with_name(f".{out.name}.{mark}.part"), out.with_name(f".{out.name}.{mark}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    except OSError as error:
        raise FileError(f"{out}: cannot be written ({error})", fix="check the directory and its free space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        _remove(old)


def check_free(out: Path, force: bool) -> None:
    """FileError when `out` holds something and `force` is false."""
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not force:
        raise FileError(f"{out} exists", fix="choose another name, or add --force to replace it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
