"""Where probes look: file roots, commands, shared libraries, and what Python itself knows of the platform.

Knows nothing of what is found there.  Tests hand in a `Sources` whose roots are faked trees.

    sources = Sources(proc=tmp_path / "proc", sys=tmp_path / "sys", system="Linux", arch="aarch64")
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND_LIMIT_S = 20.0  # system_profiler takes several seconds on a cold Mac; nothing here takes longer


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=COMMAND_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _load(names: Sequence[str]) -> Any | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _affinity() -> frozenset[int] | None:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return frozenset(affinity(0)) if affinity is not None else None


@dataclass(frozen=True)
class Sources:
    """What a probe may ask.

    Attributes:
        root: "/" for everything outside /proc and /sys.
        system, arch: as platform.system() and platform.machine() give them.
        run: a command's standard output, or None when it is missing, fails or hangs.
        load: the first shared library of these names that loads, or None.
        affinity: the logical CPUs that this process may run on; None where the system has no such thing.
    """

    root: Path = Path("/")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    system: str = field(default_factory=platform.system)
    arch: str = field(default_factory=platform.machine)
    run: Callable[[Sequence[str]], str | None] = _run
    load: Callable[[Sequence[str]], Any | None] = _load
    affinity: Callable[[], frozenset[int] | None] = _affinity

    @property
    def linux(self) -> bool:
        """Whether /proc and /sys mean anything."""
        return self.system == "Linux"


def read(path: Path) -> str | None:
    """A small file's text without surrounding space and NUL bytes; None when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """A small file's whole number; None when there is none."""
    return to_int(read(path))


def to_int(text: str | None) -> int | None:
    """A whole number, or None."""
    try:
        return int(text, 0) if text else None
    except ValueError:
        return None


def cpu_list(text: str) -> frozenset[int]:
    """Linux's list form: "0-2,8" is 0, 1, 2 and 8."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cgroup_folders(sources: Sources, controller: str) -> tuple[list[Path], bool]:
    """This process's control group folders for a controller, innermost first, and whether they are of version 2.

    Source: cgroups(7), "/proc/[pid]/cgroup": lines `hierarchy:controllers:path`; version 2 is `0::path`.  Inside a
    container the path may not exist below the mount; the mount itself is then the group.
    """
    lines = [line.split(":", 2) for line in (read(sources.proc / "self" / "cgroup") or "").splitlines()]
    mount = sources.sys / "fs" / "cgroup"
    for hierarchy in lines:
        if len(hierarchy) == 3 and controller in hierarchy[1].split(","):
            return _upwards(mount / controller, hierarchy[2]), False
    for hierarchy in lines:
        if len(hierarchy) == 3 and hierarchy[0] == "0":
            return _upwards(mount, hierarchy[2]), True
    return [mount], True


def _upwards(mount: Path, inside: str) -> list[Path]:
    folder = mount / inside.lstrip("/")
    chain = [folder, *folder.parents] if mount in folder.parents else [mount]
    return [f for f in chain if f == mount or mount in f.parents]
