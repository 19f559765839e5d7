"""The floors of ARCHITECTURE.md: imports go down only, neighbours never meet, heavy packages stay in their room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import finial

ROOT = Path(finial.__file__).parent

# Longest prefix wins; a module's floor is where it may be imported from above.
FLOORS = {
    "finial": 0,
    "finial.errors": 0,
    "finial.formats": 0,
    "finial.quants": 0,
    "finial.config": 0,
    "finial.config_hf": 0,
    "finial.config_gguf": 0,
    "finial.names": 0,
    "finial.graph": 0,
    "finial.cost": 0,
    "finial._native": 0,
    "finial.models": 1,
    "finial.backends": 1,
    "finial.files": 1,
    "finial.executor": 2,
    "finial.machine": 2,
    "finial.engine": 3,
    "finial.loading": 3,
    "finial.llm": 4,
    "finial.verdict": 4,
    "finial.lab": 5,
    "finial.serve": 5,
    "finial.roofline": 4,
    "finial.jobs": 5,
    "finial.jobs_file": 5,
    "finial.cli": 6,
}
ROOMS = ("finial.models", "finial.backends", "finial.files")

# Heavy or optional packages, and the only modules that may import them.
OWNERS = {
    "cuda": {"finial.backends.cuda"},
    "torch": {"finial.files.pth_child", "finial.lab.engines.adapters"},
    "transformers": {"finial.lab.engines.adapters"},
    "gguf": set(),
    "typer": {"finial.cli"},
    "rich": {"finial.cli"},
    "huggingface_hub": {"finial.files.hub", "finial.files.hub_download"},
    "tokenizers": {"finial.files"},
    "matplotlib": {"finial.lab.report"},
    "jinja2": {"finial.files", "finial.lab.report.html"},
    "starlette": {"finial.serve"},
    "uvicorn": {"finial.serve"},
    "msgspec": {"finial.serve", "finial.lab", "finial.jobs", "finial.jobs_file"},
    "ray": {"finial.jobs"},
    "prometheus_client": {"finial.serve.metrics"},
    "llguidance": {"finial.serve.constraint"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ["finial", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module: str) -> int:
    while module not in FLOORS:
        assert "." in module, f"{module} has no floor: give it one here and in ARCHITECTURE.md"
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_every_module_has_a_floor_of_its_own() -> None:
    for module in modules():
        assert module == "finial" or floor(module) is not None
        top = ".".join(module.split(".")[:2])
        assert top in FLOORS, f"{module}: add {top} to FLOORS and to ARCHITECTURE.md"


def test_imports_go_down_only() -> None:
    known = set(modules()) | {"finial._native"}
    for module, path in modules().items():
        if module == "finial":  # the package's front door hands out what is upstairs, lazily
            continue
        for target in imports(path) & known - {"finial"}:
            assert floor(target) <= floor(module), (
                f"{module} (floor {floor(module)}) imports {target} (floor {floor(target)})"
            )


def test_neighbours_never_meet() -> None:
    for module, path in modules().items():
        for room in ROOMS:
            if within(module, room):
                for target in imports(path):
                    others = [other for other in ROOMS if other != room and within(target, other)]
                    assert not others, f"{module} imports {target} from the room next door"


def test_heavy_packages_have_one_owner() -> None:
    for module, path in modules().items():
        for target in imports(path):
            package = target.split(".")[0]
            if package in OWNERS:
                assert any(within(module, owner) for owner in OWNERS[package]), f"{module} imports {package}"


# The lab describes the work itself and measures finial as it measures the others: through an adapter.
LAB_KNOWS = {
    *("errors", "formats", "config", "graph", "cost", "machine", "files.checkpoint", "files.hub", "files.disk"),
    *("models.decoder", "verdict", "lab"),
}


def test_the_lab_meets_the_engine_in_an_adapter_only() -> None:
    for module, path in modules().items():
        if within(module, "finial.lab") and not within(module, "finial.lab.engines.adapters"):
            for target in imports(path) & (set(modules()) - {"finial", "finial.files", "finial.models"}):
                assert any(within(target, f"finial.{known}") for known in LAB_KNOWS), f"{module} imports {target}"


def test_importing_finial_is_light() -> None:
    code = "import sys, finial; print(*sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    heavy = [*OWNERS, "numpy", "psutil"]
    loaded = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "", f"import finial loads {loaded}"
