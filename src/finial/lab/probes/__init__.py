"""What is measured beside the work: time, memory, energy, state.

Each probe is a protocol, what really measures, and a fake, so that everything above them is tested without hardware.
"""

from finial.lab.probes.clock import Clock, DeviceClock, FakeClock
from finial.lab.probes.energy import FakeMeter, Meter, open_meter
from finial.lab.probes.memory import FakeMemory, MemoryProbe
from finial.lab.probes.state import FakeState, read_state

__all__ = [
    "Clock",
    "DeviceClock",
    "FakeClock",
    "FakeMemory",
    "FakeMeter",
    "FakeState",
    "MemoryProbe",
    "Meter",
    "open_meter",
    "read_state",
]
