"""The engines: which interpreter runs which adapter, which file each reads for a format, and how that file is made.

Knows commands and paths; runs nothing.

    engine = ENGINES["llama.cpp"]; engine.command(places), engine.model_file(places, "qwen3-0.6b", "q8_0")
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import finial
from finial.errors import RequestError
from finial.lab.engines.environments import interpreter, is_here
from finial.lab.workloads import DEMO, Workload

ADAPTERS = Path(__file__).with_name("adapters")
EXPORT = "export"  # environment that turns checkpoints into other engines' files, and measures nothing


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        engines: virtual environments by name; models: checkpoints and what was made of them.
        pythons: interpreters to use instead of an environment's own, by engine.
        checkpoints: models that lie elsewhere, by name: directories or .gguf files.
    """

    engines: Path
    models: Path
    pythons: Mapping[str, Path] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)

    def python(self, name: str) -> Path:
        """The interpreter of an environment; finial's own where that has the engine and the environment is not made."""
        if name in self.pythons:
            return self.pythons[name]
        python = interpreter(self.engines, name)
        return Path(sys.executable) if not python.exists() and is_here(name) else python

    def checkpoint(self, model: str) -> Path:
        """What a model is made from."""
        if model in self.checkpoints:
            return self.checkpoints[model]
        return Path(finial.__file__).parent / "demo" if model == DEMO else self.models / model


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        adapter: file in adapters/; module: that it imports.
        environment: name of its virtual environment, "" for finial's own interpreter.
        formats: it runs, each with the suffix of its file; "" is the checkpoint itself.  "stored" is the precision of
            the checkpoint, or the nearest that the engine has; its row says which.
        slow: run only the workloads marked so.
        options: given to the adapter's `load`; each adapter's header names its own.
        device: that it needs: "cpu", "cuda", "mps"; tried: Python that ends well in its interpreter where that works.
        uncached: whether it can compute without a KV cache.
        variables: environment variables of its process.
    """

    name: str
    adapter: str
    module: str
    environment: str
    formats: Mapping[str, str]
    slow: bool = False
    sequences: bool = True
    uncached: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    tried: str = ""

    def command(self, places: Places) -> list[str]:
        """Interpreter and adapter."""
        python = Path(sys.executable) if not self.environment else places.python(self.environment)
        return [str(python), str(ADAPTERS / self.adapter)]

    def process_environment(self, threads: int) -> dict[str, str]:
        """Variables of its process."""
        # Only finial itself is found beside this interpreter's packages when it runs from its sources.
        own = {} if self.environment else {"PYTHONPATH": str(Path(finial.__file__).parent.parent)}
        return {"OMP_NUM_THREADS": str(threads), **own, **self.variables}

    def model_file(self, places: Places, model: str, format: str) -> Path:
        """Its file of a model in a format, there or not."""
        suffix = self.formats[format]
        return places.models / f"{model}{suffix}" if suffix else places.checkpoint(model)

    def runs(self, format: str, workload: Workload) -> bool:
        """Whether there is a row for it at all."""
        able = (workload.slow or not self.slow) and (self.sequences or workload.sequences == 1)
        return able and format in self.formats and (True in workload.caches or self.uncached)


_GGUF = {f: f"-{f}.gguf" for f in ("bf16", "q8_0", "q4_0", "q4_k_m", "stored")}

_CHECKPOINT = {"bf16": "", "stored": ""}

_TORCH = "import sys, torch; sys.exit(None if torch.{0}.is_available() else 'its torch was built without {0}')"

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("finial", "run_finial.py", "finial", "", {**_GGUF, "stored": ""}, uncached=True),
        Engine(
            "finial reference",
            "run_finial.py",
            "finial",
            "",
            {**_GGUF, "stored": ""},
            slow=True,
            uncached=True,
            options={"backend": "reference"},
        ),
        Engine(
            "finial cuda",
            "run_finial.py",
            "finial",
            "",
            {f: name for f, name in {**_GGUF, "stored": ""}.items() if f != "q4_k_m"},
            uncached=True,
            options={"backend": "cuda"},
            device="cuda",
            tried="from finial.backends import get_backend; get_backend('cuda')",
        ),
        Engine("llama.cpp", "run_llama_cpp.py", "llama_cpp", "llama.cpp", _GGUF),
        Engine(
            "OpenVINO GenAI",
            "run_openvino.py",
            "openvino_genai",
            "openvino",
            {"stored": "-openvino-fp16", "bf16": "-openvino-fp16", "q8_0": "-openvino-int8", "q4_0": "-openvino-int4"},
        ),
        Engine(
            "onnxruntime-genai",
            "run_onnxruntime.py",
            "onnxruntime_genai",
            "onnxruntime",
            {"stored": "-onnxruntime-fp32", "f32": "-onnxruntime-fp32", "q4_0": "-onnxruntime-int4"},
        ),
        Engine(
            "CTranslate2",
            "run_ctranslate2.py",
            "ctranslate2",
            "ctranslate2",
            {"stored": "-ctranslate2-float32", "f32": "-ctranslate2-float32", "q8_0": "-ctranslate2-int8"},
        ),
        Engine(
            "transformers eager",
            "run_transformers.py",
            "transformers",
            "transformers",
            {**_CHECKPOINT, "f32": ""},
            slow=True,
            uncached=True,
        ),
        Engine(
            "transformers compiled",
            "run_transformers.py",
            "transformers",
            "transformers",
            {**_CHECKPOINT, "f32": ""},
            slow=True,
            options={"compile": True},
        ),
        *(
            Engine(
                f"transformers {name}",
                "run_transformers.py",
                "transformers",
                "transformers",
                {**_CHECKPOINT, "f32": ""},
                uncached=not options,
                options={"device": device, **options},
                device=device,
                tried=_TORCH.format("cuda" if device == "cuda" else "backends.mps"),
            )
            for name, device, options in (
                ("CUDA", "cuda", {}),
                ("CUDA compiled", "cuda", {"compile": True}),
                ("MPS", "mps", {}),
            )
        ),
        Engine("MLX-LM", "run_mlx.py", "mlx_lm", "mlx", _CHECKPOINT, slow=sys.platform != "darwin"),
        Engine("vLLM", "run_vllm.py", "vllm", "vllm", {**_CHECKPOINT, "f32": ""}),
        Engine("SGLang", "run_sglang.py", "sglang", "sglang", _CHECKPOINT),
        Engine("TensorRT-LLM", "run_tensorrt_llm.py", "tensorrt_llm", "tensorrt-llm", _CHECKPOINT),
        Engine("ExLlamaV2", "run_exllamav2.py", "exllamav2", "exllamav2", {"f16": "", "exl2": "-exl2"}),
        Engine("ExLlamaV3", "run_exllamav3.py", "exllamav3", "exllamav3", {"exl3": "-exl3"}),
    )
}

# Any OpenAI-compatible endpoint: no row of its own, since it wants an address (options url, name, key).
SERVER = Engine(
    "server", "run_openai.py", "finial", "", dict.fromkeys(("stored", "bf16", "q8_0", "q4_0", "q4_k_m"), "")
)


def find(name: str) -> Engine:
    """An engine by its name, or the first of an environment.

    Raises:
        RequestError: there is none.
    """
    found = next((e for e in ENGINES.values() if e.name == name), None)
    found = found or next((e for e in ENGINES.values() if e.environment == name), None)
    if found is None:
        raise RequestError(f"no engine {name!r}", fix=f"choose from {', '.join(ENGINES)}, server")
    return found


def server(url: str, key: str = "") -> Engine:
    """The engine behind an address."""
    return replace(SERVER, options={"url": url, **({"key": key} if key else {})})


def make_command(places: Places, model: str, suffix: str, out: Path) -> list[str]:
    """The command that makes a model's file with this suffix at `out`."""
    source = str(places.checkpoint(model))
    export = places.python(EXPORT)
    if suffix == "-q4_k_m.gguf":
        adapter = str(ADAPTERS / "run_llama_cpp.py")
        bf16 = str(places.models / f"{model}-bf16.gguf")
        return [str(places.python("llama.cpp")), adapter, "quantize", bf16, str(out), "Q4_K_M"]
    if suffix.endswith(".gguf"):
        format = suffix[1 : -len(".gguf")]
        return [sys.executable, "-m", "finial.cli", "convert", source, str(out)] + (
            [] if format == "stored" else ["--format", format]
        )
    if suffix.startswith("-openvino-"):
        task = ["--task", "text-generation-with-past", "--weight-format", suffix.removeprefix("-openvino-")]
        run = [str(export), "-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", source]
        return [*run, *task, str(out)]
    if suffix.startswith("-ctranslate2-"):
        convert = [str(export), "-c", "from ctranslate2.converters.transformers import main; main()"]
        return [*convert, "--model", source, "--output_dir", str(out), "--quantization", suffix.rpartition("-")[2]]
    if suffix in ("-exl2", "-exl3"):
        return [f"the converter of ExLlamaV{suffix[-1]}"]  # hours on a GPU, with choices that are not the lab's to make
    if suffix.startswith("-onnxruntime-"):
        kind = suffix.removeprefix("-onnxruntime-")
        builder = [str(export), "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", str(out)]
        return [*builder, "-p", kind, "-e", "cpu", "-c", str(places.models / "onnxruntime-cache")]
    return [sys.executable, "-m", "finial.cli", "synth", model, str(out)]
