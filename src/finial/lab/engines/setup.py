"""Making ready: whether an engine runs here, and its file of each model.  Nothing is timed here.

missing(ENGINES["llama.cpp"], places); make_file(places, "qwen3-0.6b", "-q8_0.gguf")
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import finial
from finial.lab.engines.environments import ENVIRONMENTS, has_nvidia, state
from finial.lab.engines.table import EXPORT, Engine, Places, make_command


class SetupError(Exception):
    """Something could not be made ready; the message says what and why."""


def missing(engine: Engine, places: Places) -> str:
    """Why an engine cannot run here; empty when it can."""
    if engine.device == "cuda" and not has_nvidia():
        return "it needs an NVIDIA GPU, and this machine has none"
    if engine.device == "mps" and sys.platform != "darwin":
        return "it needs Apple's GPU, and this machine has none"
    reason = _installed(engine, places)
    return reason or (_tried(engine, places) if engine.tried else "")


def _tried(engine: Engine, places: Places) -> str:
    """Its own attempt, in a process of its own: what opens a device keeps memory on it."""
    python = engine.command(places)[0]
    done = subprocess.run(
        [python, "-c", engine.tried],
        env={**os.environ, **engine.process_environment(1)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else f"status {done.returncode}") if done.returncode else ""


def _installed(engine: Engine, places: Places) -> str:
    if not engine.environment:
        return ""
    python = places.pythons.get(engine.environment)
    if python is None and engine.environment not in ENVIRONMENTS:
        return f"not installed: nobody knows how to make {engine.environment}"
    if python is None:
        return state(engine.environment, places.engines).why
    # Found, not imported: an import takes seconds and may start threads.
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    done = subprocess.run([str(python), "-c", find, engine.module], capture_output=True, check=False)
    return f"{engine.module} is not installed for {python}" if done.returncode else ""


def unmakeable(engine: Engine, places: Places, model: str, format: str) -> str:
    """Why an engine's file of a model is not there and cannot be made here; empty when it is or can."""
    suffix, checkpoint = engine.formats[format], places.checkpoint(model)
    if not suffix or suffix.endswith(".gguf") or engine.model_file(places, model, format).exists():
        return ""
    if checkpoint.suffix == ".gguf":
        return "its file is made from a checkpoint's directory, not from GGUF"
    made = places.python(EXPORT)
    return "" if made.exists() else "its file is made in an environment of its own: finial engines install export"


def make_file(places: Places, model: str, suffix: str) -> Path:
    """The model's file with this suffix, made when it is not there; it appears whole or not at all.

    Raises:
        SetupError: what makes it failed or is not installed.
    """
    target = places.models / f"{model}{suffix}"
    if not suffix and places.checkpoint(model).exists():
        return places.checkpoint(model)
    checkpoint = places.checkpoint(model)
    if suffix == "-stored.gguf" and checkpoint.suffix == ".gguf":
        return checkpoint
    if target.exists():
        return target
    places.models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=places.models) as folder:
        out = Path(folder) / target.name
        source = {"PYTHONPATH": str(Path(finial.__file__).parent.parent)}
        command = make_command(places, model, suffix, out)
        _run(command, source if command[0] == sys.executable else {}, target.name)
        out.replace(target)
    return target


def _run(command: Sequence[str], variables: Mapping[str, str], what: str) -> None:
    if not (Path(command[0]).exists() or shutil.which(command[0])):
        raise SetupError(f"{what} needs {command[0]}, which is not installed")
    done = subprocess.run(
        list(command),
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
        raise SetupError(f"{what}: {lines[-1] if lines else f'status {done.returncode}'}")
