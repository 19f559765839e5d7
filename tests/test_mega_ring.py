"""The megakernel's ring of stages (ring.cuh) on the CPU: what workers read is what was sent, whatever the delays."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cuda_twin import CXX, TwinDevice
from finial.backends.cuda import kernels
from finial.backends.cuda.device import Launch
from finial.backends.cuda.kernels import Kernel

if CXX is None:
    assert os.environ.get("CI") != "true", "no g++: see .ci/run"
    pytest.skip("no g++ here; install it to run the CUDA kernels on the CPU", allow_module_level=True)

HEADER = str(Path(__file__).parent / "cuda" / "ring_use.cuh")
SLOT = 1024


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    fields, packed = kernels.layout("P data,P sizes,P sums,P seen,i stages,i stop")
    monkeypatch.setitem(kernels._FIELDS, "RingUseArgs", fields)
    monkeypatch.setitem(kernels._LAYOUT, "RingUseArgs", packed)


def user(stages: int, warps: int, bulk: bool, *, early: bool = False, late: bool = False) -> Kernel:
    constants = [f"static constexpr int SLOT_BYTES = {SLOT}, STAGES = {stages}, WARPS = {warps}"]
    flags = {"BULK": bulk, "EARLY": early, "LATE": late}
    constants += [f"static constexpr bool {name} = {str(value).lower()}" for name, value in flags.items()]
    shared = 2048 + stages * SLOT
    return Kernel("ring_use", HEADER, "RingUseArgs", tuple(constants), 32 * (warps + 1), shared=shared)


USERS = {
    (stages, warps, bulk): user(stages, warps, bulk)
    for stages, warps in ((1, 1), (3, 2), (4, 3))
    for bulk in (True, False)
}
FAULTY = {(fault, bulk): user(3, 2, bulk, **{fault: True}) for fault in ("early", "late") for bulk in (True, False)}


@pytest.fixture(scope="module")
def compiled() -> None:
    TwinDevice(arena=1 << 20).preload([*USERS.values(), *FAULTY.values()])


def run(kernel: Kernel, warps: int, seed: int, stop: int = 0, device: TwinDevice | None = None) -> tuple[int, int]:
    """(stages whose sums are right, stages that were used) of 37 stages of which every third is short."""
    random = np.random.default_rng(seed)
    sizes = np.where(np.arange(37) % 3 == 2, 16 * random.integers(1, SLOT // 16, 37), SLOT).astype(np.int32)
    data = random.integers(0, 256, int(sizes.sum())).astype(np.uint8)
    device = device or TwinDevice(arena=1 << 20, seed=seed)
    sums, seen = np.zeros((37, warps), np.uint32), np.zeros(1, np.uint32)
    addresses = [device.allocate(array.nbytes) for array in (data, sizes, sums, seen)]
    for address, array in zip(addresses, (data, sizes, sums, seen), strict=True):
        device.upload(address, array)
    names = dict(zip(("data", "sizes", "sums", "seen"), addresses, strict=True))
    device.replay(device.record([Launch(kernel, (1, 1, 1), kernel.pack(**names, stages=37, stop=stop))]))
    device.download(addresses[2], sums)
    device.download(addresses[3], seen)
    ends = np.cumsum(sizes)
    right = 0
    for i in range(int(seen[0])):
        stage = data[ends[i] - sizes[i] : ends[i]].astype(np.uint32)
        right += int(
            (stage * np.arange(1, len(stage) + 1, dtype=np.uint32)).sum(dtype=np.uint32) == sums[i].sum(dtype=np.uint32)
        )
    return right, int(seen[0])


@pytest.mark.parametrize("shape", list(USERS), ids=str)
def test_stages_arrive_whole(compiled: None, shape: tuple[int, int, bool]) -> None:
    for seed in range(4):
        assert run(USERS[shape], shape[1], seed) == (37, 37)


@pytest.mark.parametrize("stop", [1, 2, 5, 36])
@pytest.mark.parametrize("bulk", [True, False])
def test_workers_may_leave(compiled: None, bulk: bool, stop: int) -> None:
    """No copy is under way when the block ends: the producer waits for what it asked for."""
    for seed in range(3):
        assert run(USERS[(3, 2, bulk)], 2, seed, stop) == (stop, stop)


@pytest.mark.parametrize("fault", ["early", "late"])
@pytest.mark.parametrize("bulk", [True, False])
def test_the_twin_finds_faults(compiled: None, fault: str, bulk: bool) -> None:
    assert any(run(FAULTY[(fault, bulk)], 2, seed, 30)[0] < 30 for seed in range(4))


@pytest.mark.parametrize("bulk, fault", [(True, ""), (False, ""), (True, "early")])
def test_no_race_in_the_ring(bulk: bool, fault: str, tmp_path: Path) -> None:
    device = TwinDevice(arena=1 << 20)
    kernel = FAULTY[(fault, bulk)] if fault else USERS[(3, 2, bulk)]
    run(kernel, 2, 1, 9, device)
    done = device.replay_under("thread", tmp_path)
    assert (done.returncode == 0) == (not fault) and ("data race" in done.stderr) == bool(fault), done.stderr[:3000]
