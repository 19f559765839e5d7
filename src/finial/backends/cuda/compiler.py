"""Kernels to cubins with NVRTC, kept on disk; needs no driver and no GPU.

A cubin's key is its whole source, every file it may include, the architecture and the compiler's version.

    cubin, log = compile_kernels([kernel], "sm_90a")
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finial.backends.cuda.kernels import SOURCES, Kernel, program, sources_digest
from finial.errors import BackendError

# Compute capability -> what NVRTC is asked for.  90a and 100a have instructions of that one architecture.
ARCHITECTURES = {
    75: "sm_75",
    80: "sm_80",
    86: "sm_86",
    87: "sm_87",
    89: "sm_89",
    90: "sm_90a",
    100: "sm_100a",
    103: "sm_103a",
    120: "sm_120",
}
_IMPORTING = threading.Lock()  # the package meets itself half-imported when two threads import it at once
INSTALL = 'pip install "finial[cuda]"'


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    registers: int
    stack: int
    spill_bytes: int
    shared: int  # static, in bytes


def architecture(capability: int) -> str:
    """What to compile for a device of this compute capability, as 90.

    Raises:
        BackendError: older than 7.5.
    """
    if capability in ARCHITECTURES:
        return ARCHITECTURES[capability]
    older = [known for known in ARCHITECTURES if known <= capability]
    if not older:
        raise BackendError(
            f"this GPU has compute capability {capability / 10:.1f}, finial's kernels need 7.5 or newer",
            fix="use --backend cpu",
        )
    return f"sm_{capability}"


def usage(log: str, kernel: Kernel) -> Usage:
    """The figures for one kernel in ptxas' log (`--ptxas-options=-v`)."""
    _, found, part = log.partition(f"Compiling entry function '{kernel.name}'")
    assert found, f"no ptxas log of {kernel.name}: {log!r:.200}"
    part = part.partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        match = re.search(pattern, part)
        return int(match[1]) if match else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Usage(
        number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), spills, number(r"(\d+) bytes smem")
    )


def compile_kernels(kernels: Sequence[Kernel], arch: str) -> tuple[bytes, str]:
    """(cubin with all of them, ptxas' log).

    Raises:
        BackendError: NVRTC or its Python binding is not installed, or the compiler refuses (its log).
    """
    core = _core()
    options = core.ProgramOptions(arch=arch, include_path=[str(SOURCES)], std="c++17", ptxas_options=["-v"])
    log = io.StringIO()
    try:
        code = core.Program(program(kernels), "c++", options).compile("cubin", logs=log).code
    except Exception as error:  # NVRTC's own class moves between versions of the package
        text = f"{error} {log.getvalue()}".strip()
        raise BackendError(
            f"NVRTC could not compile {kernels[0].name} for {arch}: {text:.2000}",
            fix=f"install the newest compiler: {INSTALL} --upgrade",
        ) from error
    return bytes(code), log.getvalue()


def cubins(kernels: Iterable[Kernel], arch: str, folder: Path | None = None) -> dict[Kernel, bytes]:
    """The cubin of each kernel: from the user's cache, else compiled (several at a time) and left there.

    Args:
        folder: the cache; None: finial/cuda in the user's cache directory.
    """
    folder = cache_folder() if folder is None else folder
    wanted = list(dict.fromkeys(kernels))
    paths = {kernel: folder / f"{_key(kernel, arch)}.cubin" for kernel in wanted}
    found: dict[Kernel, bytes] = {}
    for kernel, path in paths.items():
        try:
            found[kernel] = path.read_bytes()
        except OSError:
            continue
    missing = [kernel for kernel in wanted if not found.get(kernel)]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        for kernel, (cubin, _) in zip(missing, pool.map(lambda k: compile_kernels([k], arch), missing), strict=True):
            found[kernel] = cubin
            _write(paths[kernel], cubin)
    return found


def cache_folder() -> Path:
    """finial/cuda in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "finial" / "cuda"


def compiler_version() -> str:
    """Of the NVRTC that is installed."""
    for name in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu13"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"of the system, cuda-core {importlib.metadata.version('cuda-core')}"


def _key(kernel: Kernel, arch: str) -> str:
    own = kernel.header.startswith("/") and Path(kernel.header).read_text()  # one that is not among the sources
    text = "\0".join((program([kernel]), sources_digest(), own or "", arch, compiler_version()))
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all; a cache that cannot be written costs time, not the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError:
        return


def _core() -> Any:
    try:
        with _IMPORTING:
            import cuda.core as core

            if not hasattr(core, "Program"):  # before 0.5 everything was experimental
                import cuda.core.experimental as core
    except ImportError as error:
        raise BackendError(f"the cuda backend needs the package cuda-core ({error})", fix=INSTALL) from error
    return core
