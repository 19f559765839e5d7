"""The CUDA kernels' own sources on the CPU: a `Device` for finial.backends.cuda that compiles them with g++.

See tests/cuda/twin.h.  All device memory is one arena at a fixed address, so that what a list of launches does can be
saved and run again by another program (`snapshot`), which ThreadSanitizer then watches.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import shutil
import struct
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.device import Launch, Pinned
from finial.backends.cuda.kernels import SOURCES, Kernel, program, sources_digest
from finial.errors import BackendError

HERE = Path(__file__).parent / "cuda"
CXX = shutil.which("g++")
TOGETHER = 24  # kernels of a library: many are compiled in parts, side by side
FUNCTIONS: dict[Kernel, Any] = {}  # of all libraries loaded
BASE = 0x10_0000_0000  # where arenas begin: inside what ThreadSanitizer leaves to a program
ADDRESS_BASE = 0x2000_0000_0000  # what AddressSanitizer leaves
FLAGS = [
    "-std=c++17",
    "-O1",
    "-DFINIAL_TWIN",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-w",
]


def compile_twin(kernels: Sequence[Kernel], extra: Sequence[str] = ("-shared",), main: str = "") -> Path:
    """A shared library (or a program) of these kernels; kept for this run of the tests' process."""
    assert CXX is not None
    text = program(kernels) + main
    key = hashlib.sha256(
        "\0".join((text, sources_digest(), *(file.read_text() for file in sorted(HERE.iterdir())), *extra)).encode()
    ).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"finial-twin-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / key[:32]
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, out = Path(work) / "kernels.cpp", Path(work) / "out"
            source.write_text(text)
            headers = ["-include", str(_standard_headers(folder, extra))]
            command = [
                CXX,
                *FLAGS,
                *extra,
                *headers,
                f"-I{SOURCES}",
                f"-I{HERE}",
                str(source),
                "-o",
                str(out),
                "-lpthread",
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            out.replace(path)
    return path


def _standard_headers(folder: Path, extra: Sequence[str]) -> Path:
    """What twin.h includes of the standard library, compiled beforehand: half of the time of a small kernel."""
    assert CXX is not None
    flags = [flag for flag in extra if flag != "-shared"]
    includes = "".join(
        line + "\n" for line in (HERE / "twin.h").read_text().splitlines() if line.startswith("#include <")
    )
    key = hashlib.sha256("\0".join((includes, *FLAGS, *flags)).encode()).hexdigest()[:32]
    header = folder / f"{key}.h"
    if not header.with_suffix(".h.gch").exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, out = Path(work) / "standard.h", Path(work) / "out"
            source.write_text(includes)
            command = [CXX, *FLAGS, *flags, "-x", "c++-header", str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            source.replace(header)
            out.replace(header.with_suffix(".h.gch"))
    return header


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(size: int, base: int) -> int:
    """Fresh zeroed memory near `base`."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = LIBC.mmap(base, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert address and address != 2**64 - 1
    return int(address)


class TwinDevice:
    """Blocks one after another in an order that `seed` shuffles anew for each launch.

    As on a GPU, what is asked for is done later, in order: a part of it whenever somebody asks whether the device is
    busy, all of it when somebody waits.  Copies from the host have taken the host's bytes when they were asked for.
    """

    def __init__(
        self,
        *,
        capability: int = 90,
        multiprocessors: int = 4,
        arena: int = 64 << 20,
        seed: int = 1,
        gather: set[Kernel] | None = None,
        base: int = BASE,
        refuses_waiting: str = "the twin's blocks take turns",
    ) -> None:
        """`gather`: kernels are put there and nothing runs: `preload` compiles those of many programs at once.

        `refuses_waiting` "": the megakernel may run.
        """
        self.name, self.capability, self.multiprocessors = "twin", capability, multiprocessors
        self.shared_memory, self.refuses_waiting = 227 << 10, refuses_waiting
        self.launched: list[Launch] = []  # by the last replay
        self.templates: set[str] = set()  # by all of them
        self._seed, self._gather = seed, gather
        self.arena = (_map(arena, base), arena)
        self._sizes: dict[int, int] = {}
        self._free: list[tuple[int, int]] = [self.arena]
        self._queue: deque[Launch | tuple[int, bytes]] = deque()
        self._random = random.Random(seed)

    def __del__(self) -> None:
        LIBC.munmap(*self.arena)

    def memory(self) -> tuple[int, int]:
        return sum(size for _, size in self._free), self.arena[1]

    def allocate(self, nbytes: int) -> int:
        size = (nbytes + 256 + 255) // 256 * 256  # with a gap, so that what runs over the end is found
        for i, (address, room) in enumerate(self._free):
            if room >= size:
                self._free[i] = (address + size, room - size)
                self._sizes[address] = size
                ctypes.memset(address, 0, nbytes)
                ctypes.memset(address + nbytes, 0xA5, size - nbytes)
                return address
        raise BackendError(f"the twin has no {nbytes:,} bytes")

    def free(self, address: int) -> None:
        self.synchronize()
        self._free.append((address, self._sizes.pop(address)))

    def upload(self, address: int, data: NDArray[Any]) -> None:
        assert data.flags.c_contiguous
        if self._queue:
            self._queue.append((address, data.tobytes()))
        else:
            ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, address: int, data: NDArray[Any]) -> None:
        self.synchronize()
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def pinned(self, nbytes: int) -> Pinned:
        address = self.allocate(nbytes)
        return Pinned(np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8), address)

    def free_pinned(self, pinned: Pinned) -> None:
        self.free(pinned.address)

    def record(self, launches: Sequence[Launch]) -> list[Launch]:
        if self._gather is not None:
            self._gather.update(launch.kernel for launch in launches)
            return []
        self.preload(launch.kernel for launch in launches)
        return list(launches)

    def preload(self, kernels: Iterable[Kernel]) -> None:
        missing = sorted(set(kernels) - FUNCTIONS.keys(), key=lambda kernel: kernel.name)
        if not missing:
            return
        parts = [missing[at : at + TOGETHER] for at in range(0, len(missing), TOGETHER)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            libraries = list(pool.map(compile_twin, parts))
        for part, path in zip(parts, libraries, strict=True):
            library = ctypes.CDLL(str(path))
            for kernel in part:
                function = getattr(library, kernel.name)
                function.argtypes = [ctypes.c_uint32] * 4 + [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_char_p]
                function.restype = None
                FUNCTIONS[kernel] = function

    def replay(self, recording: list[Launch]) -> None:
        self._queue.extend(recording)
        self.launched = recording
        self.templates |= {launch.kernel.template for launch in recording}

    def resident(self, kernel: Kernel) -> int:
        return self.multiprocessors

    def launch(self, launch: Launch) -> None:
        self.preload([launch.kernel])
        self._queue.append(launch)
        self.launched = [launch]
        self.templates.add(launch.kernel.template)

    def synchronize(self) -> None:
        while self._queue:
            self._one()

    def busy(self) -> bool:
        for _ in range(min(len(self._queue), self._random.randrange(40))):
            self._one()
        return bool(self._queue)

    def _one(self) -> None:
        work = self._queue.popleft()
        if isinstance(work, Launch):
            self._seed += 1
            kernel = work.kernel
            FUNCTIONS[kernel](*work.grid, kernel.threads, kernel.shared, self._seed, work.args)
        else:
            ctypes.memmove(work[0], work[1], len(work[1]))

    def snapshot(self, path: Path) -> None:
        """The arena and the launches of the last replay, for `tests/cuda/replay.h`."""
        self.synchronize()
        address, size = self.arena
        names = sorted({launch.kernel.name for launch in self.launched})
        with path.open("wb") as file:
            file.write(struct.pack("<QQQ", address, size, len(self.launched)))
            file.write(ctypes.string_at(address, size))
            for launch in self.launched:
                kernel = launch.kernel
                which = names.index(kernel.name)
                head = struct.pack("<6IQQ", which, *launch.grid, kernel.threads, 0, kernel.shared, len(launch.args))
                file.write(head + launch.args)

    def replay_under(self, sanitizer: str, work: Path) -> subprocess.CompletedProcess[str]:
        """The last replay again, each CUDA thread an OS thread, in a program built with a sanitizer."""
        self.snapshot(work / "snapshot")
        kernels = sorted({launch.kernel for launch in self.launched}, key=lambda kernel: kernel.name)
        table = ", ".join(kernel.name for kernel in kernels)
        main = f'static const Function FUNCTIONS[] = {{{table}}};\n#include "replay.h"\n'
        main = "typedef void (*Function)(u32, u32, u32, u32, u64, u32, const void*);\n" + main
        extra = [f"-fsanitize={sanitizer}", "-g1", "-DFINIAL_TWIN_THREADS", "-fno-pie", "-no-pie"]
        program = compile_twin(kernels, extra, main)
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        command = [str(program), str(work / "snapshot")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        if "unexpected memory mapping" in done.stderr:  # older sanitizers and kernels that scatter addresses far
            command = ["setarch", "-R", *command]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        return done
