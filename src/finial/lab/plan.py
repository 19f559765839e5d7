"""From what a person asks for to groups of workloads: families, sizes, formats, threads, and the presets.

Knows names and sizes; runs nothing.

    Plan.of(["depth"], Sizes(depth=(1, 1024)), formats=["bf16"], threads=[2]).groups("demo")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finial.errors import RequestError
from finial.lab.workloads import Group, Sizes, Workload, make
from finial.machine import thread_steps

FORMATS = ("bf16", "q8_0", "q4_0")  # of the family "formats", when none are named
QUICK = ("quick",)  # of `finial bench` without arguments
QUICK_S = 15.0  # of samples of each of its workloads: a busy machine gives fewer samples, not a longer wait


_OWN = Sizes()


@dataclass(frozen=True)
class Preset:
    """A table as people publish it: which workloads, and of which sizes."""

    what: str
    families: tuple[str, ...]
    sizes: Sizes = _OWN
    formats: tuple[str, ...] = ()
    starts: int = 1


PRESETS: Mapping[str, Preset] = {
    "cached-uncached": Preset(
        "each engine and device with and without a KV cache, and how both grow",
        ("cache",),
    ),
    "cpu-gpu": Preset(
        "the same prompt on every device: time to first token, decoding, and whether the text is identical",
        ("latency",),
        Sizes(prompt=(128,), generate=(128,)),
    ),
    "batch-cases": Preset(
        "no cache, cache and the optimised engines over five batch cases",
        ("batch-cache",),
    ),
    "decode-by-position": Preset(
        "one decode step at cache positions 1, 2, 4, … 32,640",
        ("depth",),
    ),
    "frameworks": Preset(
        "time to first token, decode tok/s, peak memory, power, tokens per joule, KL, perplexity, argmax match",
        ("latency", "decode", "prefill"),
        Sizes(prompt=(128,), generate=(128,)),
        starts=3,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What to measure, before it is known on which model.

    Attributes:
        families: of `workloads.FAMILIES`; formats: weight formats, "stored" for the file's own.
        threads: numbers of threads; starts: how often each engine is started, for load times and memory.
    """

    families: tuple[str, ...]
    sizes: Sizes
    formats: tuple[str, ...]
    threads: tuple[int, ...]
    starts: int = 1

    @staticmethod
    def of(
        families: Sequence[str],
        sizes: Sizes,
        formats: Sequence[str] = (),
        threads: Sequence[int] = (),
        *,
        usable: int,
        preset: str = "",
    ) -> Plan:
        """Fill in what was not said.

        Args:
            usable: threads of this machine.
        Raises:
            RequestError: an unknown preset.
        """
        starts = 1
        if preset:
            if preset not in PRESETS:
                raise RequestError(f"no preset {preset!r}", fix=f"choose of {', '.join(PRESETS)}")
            known = PRESETS[preset]
            families, formats = families or known.families, formats or known.formats
            own = known.sizes
            sizes = replace(
                sizes,
                prompt=sizes.prompt or own.prompt,
                generate=sizes.generate or own.generate,
                depth=sizes.depth or own.depth,
                batch=sizes.batch or own.batch,
            )
            starts = known.starts
        families = tuple(families) or QUICK
        if not formats:
            formats = FORMATS if "formats" in families else ("stored",)
        if not threads:
            threads = thread_steps(usable) if "threads" in families else (usable,)
        return Plan(families, sizes, tuple(formats), tuple(threads), starts)

    def groups(self, model: str) -> list[Group]:
        """One for each format and number of threads; a workload that two families share is measured once."""
        found: dict[str, Workload] = {}
        for family in self.families:
            for workload in make(family, self.sizes):
                found.setdefault(workload.name, workload)
        workloads = tuple(found.values())
        return [Group(model, f, t, workloads, self.starts) for f in self.formats for t in self.threads]
