"""The record of a run: everything measured, raw, as one JSON file that is whole after every cell.

Knows its own shape and the disk; measures nothing.

    record = Record.open(Path("cpu.json"), plan_key); record.put(key, cell); record.save()
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1


class Record:
    """`data` has: schema, plan, machine, versions, busy, engines, peaks, verdicts, cells.

    A cell: model, format, threads, workload (its fields), floor, native (finial's module, hashed), at, engines: {name:
    {status, reason, precision, version, warmup, samples: [{round, order, value, first, last, others, before, after}]}}.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @staticmethod
    def create(path: Path, **head: Any) -> Record:
        """An empty one, not yet on disk."""
        return Record(path, {"schema": SCHEMA, **head, "peaks": {}, "verdicts": {}, "cells": {}})

    @staticmethod
    def open(path: Path) -> Record:
        """Read one; ValueError when it is of another schema."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {data.get('schema')!r}, this version reads {SCHEMA}")
        return Record(path, data)

    @property
    def cells(self) -> dict[str, Any]:
        """By key: group and workload."""
        cells: dict[str, Any] = self.data["cells"]
        return cells

    def save(self) -> None:
        """To a temporary name, then renamed: a reader finds the old record or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(_rounded(self.data), file, indent=1)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: clocks and counters have no more."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if value < 1e9 else round(value, 2)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
