"""A smoke test of one engine: the demo model in the file that it wants, a few tokens, and a verdict on them.

Knows environments, files, the protocol and verdicts; measures no speed.

    check("openvino", root, models, print).text
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finial.errors import FinialError
from finial.lab.engines.environments import ENVIRONMENTS, known, state
from finial.lab.engines.setup import SetupError, make_file
from finial.lab.engines.table import ENGINES, Engine, Places
from finial.lab.quality import Quality
from finial.lab.quality_run import Judge, open_worker
from finial.lab.worker import WorkerError

TOKENS, GREEDY = 48, 16
TOP1 = 0.9  # share of positions where even 4-bit weights leave this model's choice as it is; below, something is wrong


@dataclass(frozen=True)
class Checked:
    """What came of it: `text` is the verdict in words, or why there is none."""

    name: str
    ok: bool
    text: str


def checkable(root: Path) -> list[str]:
    """Names of the environments that are installed and run a model."""
    return [name for name in ENVIRONMENTS if engine_of(name) is not None and state(name, root).python is not None]


def engine_of(name: str) -> Engine | None:
    """The first engine that runs in an environment (or is called so); None when none does, as for `export`."""
    return next((engine for engine in ENGINES.values() if name in (engine.environment, engine.name)), None)


def check(name: str, root: Path, models: Path, say: Callable[[str], None]) -> Checked:
    """Never raises for what an engine does; EngineError for a name that nobody knows."""
    engine = engine_of(name)
    if engine is None:
        known(name)
        return Checked(name, False, "it runs no model")
    pythons = {}
    if engine.environment:
        found = state(engine.environment, root)
        if found.python is None:
            return Checked(name, False, found.why)
        pythons = {engine.environment: found.python}
    export = state("export", root)
    places = Places(root, models, pythons | ({"export": export.python} if export.python is not None else {}))
    format = next((format for format in ("stored", "bf16", "f32", "q4_0") if format in engine.formats), None)
    if format is None:
        return Checked(name, False, f"it runs none of the demo model's formats; it has {', '.join(engine.formats)}")
    try:
        say(f"{name}: its file of the demo model")
        file = make_file(places, "demo", engine.formats[format])
        with Judge(places.checkpoint("demo"), limit=TOKENS, greedy=GREEDY, threads=1, say=say) as judge:
            say(f"{name}: loading")
            worker, operations, loaded = open_worker(
                engine.command(places),
                engine.process_environment(1),
                model=str(file),
                format=format,
                threads=1,
                context=judge.context,
                sequences=1,
                cache=True,
                options=dict(engine.options),
            )
            try:
                (quality,) = judge.verdict(worker, operations, name, format, loaded["precision"])
            finally:
                worker.close()
    except (SetupError, WorkerError, FinialError) as error:
        return Checked(name, False, str(error).replace("\n", " "))
    return Checked(name, quality.greedy_agreement >= TOP1 and not quality.flaws, _words(loaded["version"], quality))


def _words(version: str, quality: Quality) -> str:
    kl = f"KL {quality.verdict.kl_mean:.1e}, " if quality.basis == "logits" else ""
    flaws = "".join(f"; {flaw}" for flaw in quality.flaws)
    return f"{version} · {quality.precision} · {kl}greedy text agrees at {quality.greedy_agreement:.0%}{flaws}"
