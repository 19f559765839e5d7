"""One GPU through NVIDIA's driver: the `Device` that programs run on.

Recordings are CUDA graphs.  From compute capability 9.0 each kernel may start while the one before ends (programmatic
dependent launch); kernels wait themselves for what they read.  Knows nothing of graphs of nodes and of models.

    device = open_device(0)
"""

from __future__ import annotations

import ctypes
import importlib
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.backends.cuda.compiler import INSTALL, architecture, cubins
from finial.backends.cuda.device import Launch, Pinned
from finial.backends.cuda.kernels import Kernel
from finial.errors import BackendError

_STATIC_SHARED = 48 << 10  # dynamic shared memory beyond this is asked for by name (CUDA C++ programming guide)
_PINNED = 4 << 20
# What processes under NVIDIA's Multi-Process Service have set (its documentation, environment variables).
_MPS_VARIABLES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")
_NOT_READY = 600  # CUDA_ERROR_NOT_READY (driver API, CUresult): no failure


def open_device(index: int = 0) -> CudaDevice:
    """The GPU of that number.

    Raises:
        BackendError: no package, no driver, no GPU, no GPU of that number, or one that is too old.
    """
    try:
        cu = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(f"the cuda backend needs the package cuda-bindings ({error})", fix=INSTALL) from error
    try:
        status = cu.cuInit(0)[0]
    except Exception as error:  # the package's own class when libcuda is not there; it moves between versions
        raise BackendError(
            f"NVIDIA's driver is not installed here ({error})",
            fix="install the driver for your GPU, or use --backend cpu",
        ) from error
    if int(status) != 0:
        raise BackendError(
            f"NVIDIA's driver does not start: {_name(cu, status)}",
            fix="look whether nvidia-smi shows the GPU, or use --backend cpu",
        )
    count = _call(cu, cu.cuDeviceGetCount())
    if not 0 <= index < count:
        raise BackendError(f"there is no cuda:{index}: this machine has {count} GPU(s)", fix="choose cuda:0 or another")
    return CudaDevice(cu, index)


def _name(cu: Any, status: Any) -> str:
    error, name = cu.cuGetErrorName(status)
    return name.decode() if int(error) == 0 and name else str(status)


def _call(cu: Any, result: tuple[Any, ...]) -> Any:
    """The value of a driver call (one, a tuple, or None).  Raises BackendError with the driver's name of the error."""
    status, *values = result
    if int(status) != 0:
        name = _name(cu, status)
        fix = "choose a smaller --max-context or weight format" if "OUT_OF_MEMORY" in name else ""
        raise BackendError(f"NVIDIA's driver reports {name}", fix=fix)
    return values[0] if len(values) == 1 else tuple(values) or None


def _refuses_waiting(*, cooperative: bool, mps: bool, environment: Mapping[str, str]) -> str:
    """Why blocks of one launch must not wait for each other; "" where the driver promises that all are at work."""
    if not cooperative:
        return "this GPU and driver have no cooperative launch"
    named = next((name for name in _MPS_VARIABLES if environment.get(name)), "")
    if mps or named:
        return f"the GPU is shared by way of MPS ({named or 'says the driver'})"
    return ""


class _Recording:
    """A CUDA graph ready to be launched, destroyed with the object."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self.graph = graph
        weakref.finalize(self, device.destroy_graph, graph).atexit = False


class CudaDevice:
    """See `finial.backends.cuda.device.Device`.

    Args:
        dependent: use programmatic dependent launch where there is one; False only to measure what it is worth.
        cache: folder of compiled kernels; None: the user's.
    """

    def __init__(self, cu: Any, index: int, *, dependent: bool = True, cache: Path | None = None) -> None:
        self._cu = cu
        self._cache = cache
        device = _call(cu, cu.cuDeviceGet(index))
        kind = cu.CUdevice_attribute

        def attribute(name: str) -> int:
            return int(_call(cu, cu.cuDeviceGetAttribute(getattr(kind, f"CU_DEVICE_ATTRIBUTE_{name}"), device)))

        self.capability = attribute("COMPUTE_CAPABILITY_MAJOR") * 10 + attribute("COMPUTE_CAPABILITY_MINOR")
        self.multiprocessors = attribute("MULTIPROCESSOR_COUNT")
        self.shared_memory = attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self.refuses_waiting = _refuses_waiting(
            cooperative=bool(attribute("COOPERATIVE_LAUNCH")),
            # CUDA 12.4 and newer say so themselves (driver API, CU_DEVICE_ATTRIBUTE_MPS_ENABLED).
            mps=hasattr(kind, "CU_DEVICE_ATTRIBUTE_MPS_ENABLED") and bool(attribute("MPS_ENABLED")),
            environment=os.environ,
        )
        name = _call(cu, cu.cuDeviceGetName(128, device)).split(b"\0")[0].decode(errors="replace")
        self.name = f"cuda:{index} {name}"
        self.arch = architecture(self.capability)
        self.dependent = dependent and self.capability >= 90
        self._context = _call(cu, cu.cuDevicePrimaryCtxRetain(device))
        self._enter()
        flags = int(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream = _call(cu, cu.cuStreamCreate(flags))
        self._functions: dict[Kernel, Any] = {}
        self._pinned = int(_call(cu, cu.cuMemHostAlloc(_PINNED, 0)))

    def _enter(self) -> None:
        """The context belongs to a thread, and any thread may drive a step."""
        _call(self._cu, self._cu.cuCtxSetCurrent(self._context))

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        self._enter()
        free, total = _call(self._cu, self._cu.cuMemGetInfo())
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Zeroed device memory."""
        self._enter()
        status, address = self._cu.cuMemAlloc(max(nbytes, 16))
        if int(status) != 0:
            free, total = self.memory()
            raise BackendError(
                f"{self.name} has no {nbytes:,} bytes: {free:,} of {total:,} are free ({_name(self._cu, status)})",
                fix="choose a smaller --max-context or weight format",
            )
        _call(self._cu, self._cu.cuMemsetD8Async(address, 0, max(nbytes, 16), self._stream))
        return int(address)

    def free(self, address: int) -> None:
        """Give it back, once all work that was asked for is done with it."""
        self._enter()
        _call(self._cu, self._cu.cuStreamSynchronize(self._stream))
        _call(self._cu, self._cu.cuMemFree(address))

    def upload(self, address: int, data: NDArray[Any]) -> None:
        """Copy an array there; it may change when this returns."""
        assert data.flags.c_contiguous
        if data.nbytes == 0:
            return
        self._enter()
        # From pageable memory: the driver has read it, or copied it aside, when this returns.
        _call(self._cu, self._cu.cuMemcpyHtoDAsync(address, data.ctypes.data, data.nbytes, self._stream))
        if data.nbytes > 1 << 16:
            self.synchronize()

    def download(self, address: int, data: NDArray[Any]) -> None:
        """Fill an array, after everything asked for before; through pinned memory where it fits."""
        assert data.flags.c_contiguous
        self._enter()
        if data.nbytes <= _PINNED:
            _call(self._cu, self._cu.cuMemcpyDtoHAsync(self._pinned, address, data.nbytes, self._stream))
            self.synchronize()
            ctypes.memmove(data.ctypes.data, self._pinned, data.nbytes)
        else:
            _call(self._cu, self._cu.cuMemcpyDtoHAsync(data.ctypes.data, address, data.nbytes, self._stream))
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything asked for."""
        self._enter()
        _call(self._cu, self._cu.cuStreamSynchronize(self._stream))

    def busy(self) -> bool:
        """Whether anything asked for is not done yet."""
        self._enter()
        status = self._cu.cuStreamQuery(self._stream)[0]
        if int(status) == _NOT_READY:
            return True
        _call(self._cu, (status,))
        return False

    def pinned(self, nbytes: int) -> Pinned:
        """Zeroed memory of the host, mapped into the device's addresses."""
        self._enter()
        cu = self._cu
        host = int(_call(cu, cu.cuMemHostAlloc(max(nbytes, 16), cu.CU_MEMHOSTALLOC_DEVICEMAP)))
        ctypes.memset(host, 0, max(nbytes, 16))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(host))
        return Pinned(array, int(_call(cu, cu.cuMemHostGetDevicePointer(host, 0))))

    def free_pinned(self, pinned: Pinned) -> None:
        """Give it back, once all work that was asked for is done."""
        self.synchronize()
        _call(self._cu, self._cu.cuMemFreeHost(pinned.array.ctypes.data))

    # --- kernels ------------------------------------------------------------------------------------------------------

    def record(self, launches: Sequence[Launch]) -> Any:
        """A CUDA graph of the launches."""
        self._enter()
        self._load(launches)
        self.synchronize()
        cu = self._cu
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(cu, cu.cuStreamBeginCapture(self._stream, mode))
        try:
            for index, launch in enumerate(launches):
                self._launch(launch, self.dependent and index > 0)
        finally:
            graph = _call(cu, cu.cuStreamEndCapture(self._stream))
        try:
            return _Recording(self, _call(cu, cu.cuGraphInstantiate(graph, 0)))
        finally:
            _call(cu, cu.cuGraphDestroy(graph))

    def destroy_graph(self, graph: Any) -> None:
        """Of a recording that nobody has; one that is under way ends first (driver API, cuGraphExecDestroy)."""
        self._enter()
        _call(self._cu, self._cu.cuGraphExecDestroy(graph))

    def replay(self, recording: Any) -> None:
        """Launch the graph; returns at once."""
        self._enter()
        _call(self._cu, self._cu.cuGraphLaunch(recording.graph, self._stream))

    def resident(self, kernel: Kernel) -> int:
        """Blocks of a kernel that can be at work at once."""
        self._enter()
        self._load([Launch(kernel, (1, 1, 1), b"")])
        most = self._cu.cuOccupancyMaxActiveBlocksPerMultiprocessor
        each = _call(self._cu, most(self._functions[kernel], kernel.threads, kernel.shared))
        return int(each) * self.multiprocessors

    def launch(self, launch: Launch) -> None:
        """Run one launch, all of whose blocks are at work at once."""
        self._enter()
        self._load([launch])
        self._launch(launch, False)

    def run_each(self, launches: Sequence[Launch]) -> list[float]:
        """The milliseconds of each launch, one after another with a wait between them; to find what takes the time."""
        self._load(launches)
        return [self.elapsed_ms(lambda launch=launch: self._launch(launch, False)) for launch in launches]

    def elapsed_ms(self, work: Any, times: int = 1) -> float:
        """Milliseconds on the device's own clock of `times` calls of work(), which only asks for things."""
        cu = self._cu
        self._enter()
        start, stop = (_call(cu, cu.cuEventCreate(0)) for _ in range(2))
        _call(cu, cu.cuEventRecord(start, self._stream))
        for _ in range(times):
            work()
        _call(cu, cu.cuEventRecord(stop, self._stream))
        _call(cu, cu.cuEventSynchronize(stop))
        elapsed = float(_call(cu, cu.cuEventElapsedTime(start, stop)))
        for event in (start, stop):
            _call(cu, cu.cuEventDestroy(event))
        return elapsed

    def _load(self, launches: Sequence[Launch]) -> None:
        cu = self._cu
        missing = [k for k in dict.fromkeys(launch.kernel for launch in launches) if k not in self._functions]
        for kernel, cubin in cubins(missing, self.arch, self._cache).items():
            module = _call(cu, cu.cuModuleLoadData(cubin))
            function = _call(cu, cu.cuModuleGetFunction(module, kernel.name.encode()))
            if kernel.shared > _STATIC_SHARED // 2:  # static shared memory counts too
                limit = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call(cu, cu.cuFuncSetAttribute(function, limit, kernel.shared))
            self._functions[kernel] = function

    def _launch(self, launch: Launch, dependent: bool) -> None:
        cu = self._cu
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.kernel.threads, 1, 1
        config.sharedMemBytes = launch.kernel.shared
        config.hStream = self._stream
        attributes = []
        if launch.kernel.cooperative:
            attribute = cu.CUlaunchAttribute()
            attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        elif dependent:
            attribute = cu.CUlaunchAttribute()
            attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        struct = ctypes.create_string_buffer(launch.args, len(launch.args))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(struct))  # one parameter, read during the call
        _call(cu, cu.cuLaunchKernelEx(config, self._functions[launch.kernel], ctypes.addressof(pointers), 0))
