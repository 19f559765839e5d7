"""Machines that are not here: file trees that stand for /proc and /sys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finial.machine import Sources


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def linux(root: Path, files: Mapping[str, str], **changes: Any) -> Sources:
    """A Linux machine that consists of `files`; it has no commands and no libraries unless given."""
    write(root, files)
    given: dict[str, Any] = {
        "root": root,
        "proc": root / "proc",
        "sys": root / "sys",
        "system": "Linux",
        "arch": "x86_64",
        "run": lambda command: None,
        "load": lambda names: None,
        "affinity": lambda: None,
    }
    return Sources(**(given | changes))
