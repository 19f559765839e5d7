"""`finial info` and `finial doctor`: look at a model, look at the machine.

Knows how to lay facts out; they come from the checkpoint, the cost model and finial.machine.

    finial info demo; finial doctor
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finial.cli import console, options
from finial.cli.console import Page, bar, binary, count, significant, size

if TYPE_CHECKING:
    from rich.text import Text

    from finial.cli.model_facts import Facts
    from finial.machine import Bandwidth, Machine

LOADED_CONTEXT = 256  # positions of the cache that `info --backend` makes: how a model is run does not hang on more
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON.")]


def info(
    model: options.ModelArgument = "demo",
    graph: Annotated[bool, typer.Option("--graph", help="Print the model's graph instead.")] = False,
    backend: Annotated[
        str, typer.Option(help="Also load it there, such as cuda, and say how it is run.", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show a model: its shape, its size in every format, what fits in this machine's memory."""
    from finial.cli import model_facts
    from finial.files.checkpoint import open_checkpoint
    from finial.files.hub import resolve
    from finial.models.decoder import build_graph

    with console.progress(model) as report:
        path = resolve(model, progress=report)
    checkpoint = open_checkpoint(path)
    if graph:
        built = build_graph(checkpoint.config)
        print((built.to_json() if as_json else built.text()).rstrip("\n"))
        return
    facts = model_facts.gather(model, checkpoint)
    loaded = _load(model, backend) if backend else None
    if as_json:
        more = {} if loaded is None else {"loaded": loaded}
        print(json.dumps({**facts.to_dict(), **more}, ensure_ascii=False, indent=2))
        return
    _info_page(facts)
    if loaded is not None:
        page = Page()
        page.section(f"on {loaded['backend']}")
        page.row("weights", size(loaded["weight_bytes"]), loaded["format"])
        page.row("load", f"{significant(loaded['load_s'])} s")
        for note in loaded["notes"]:
            page.row("", note)
        page.show(console.out())


def _load(model: str, backend: str) -> dict[str, Any]:
    """What a load on a backend tells, in the words of `LLM.notes`."""
    from finial.llm import LLM

    started = time.perf_counter()
    with LLM(model, backend=backend, max_context=LOADED_CONTEXT, max_batch=1) as llm:
        return {
            "backend": llm.info.backend,
            "format": llm.info.format,
            "weight_bytes": llm.info.weight_bytes,
            "load_s": time.perf_counter() - started,
            "notes": llm.notes,
        }


def _info_page(facts: Facts) -> None:
    from rich.table import Table
    from rich.text import Text

    shape = facts.config
    page = Page()
    page.section(f"{facts.model}: {shape.architecture}, {_parameters(facts.parameters)} parameters")
    page.row("path", facts.path)
    page.row("files", facts.kind, f"{size(facts.weight_bytes)} of weights")
    formats = " · ".join(f"{name}: {count(n, 'tensor')}, {size(nbytes)}" for name, (n, nbytes) in facts.stored.items())
    page.row("stored as", formats)
    page.section("shape")
    page.row("layers", str(shape.num_layers))
    page.row("hidden", f"{shape.hidden_size:,}", f"MLP {shape.intermediate_size:,}")
    shared = "" if shape.num_heads == shape.num_kv_heads else f" share {shape.num_kv_heads} of keys and values"
    page.row("heads", f"{shape.num_heads} × {shape.head_dim}", (f"{shape.num_heads} of queries{shared}"))
    page.row(
        "vocabulary", f"{shape.vocab_size:,}", "embedding and head " + ("tied" if shape.tie_embeddings else "apart")
    )
    scaling = "" if shape.rope.kind == "default" else f"{shape.rope.kind} scaling"
    page.row("rope theta", f"{shape.rope.theta:,.0f}", scaling)
    special = ["norms on q and k heads"] if shape.head_norm else []
    special += [f"bias on {' '.join(shape.biases)}"] if shape.biases else []
    windows = sorted({w for w in shape.windows if w is not None})
    if windows:
        layers = sum(w is not None for w in shape.windows)
        special.append(f"window of {', '.join(f'{w:,}' for w in windows)} in {count(layers, 'layer')}")
    if special:
        page.row("also", " · ".join(special))
    page.section("text")
    page.row("tokenizer", facts.tokenizer or "none: token ids only")
    page.row("chat template", "yes" if facts.chat_template else "no")
    page.row("sampling", facts.sampling)
    page.section("memory")
    page.row("context", f"{shape.max_context:,} tokens")
    kv = " · ".join(f"{binary(nbytes)} as {name}" for name, nbytes in facts.kv_bytes_per_token.items())
    page.row("KV cache", f"{kv}, for each token")
    free = "unknown" if facts.available_bytes is None else size(facts.available_bytes)
    page.row("free here", free)
    out = console.out()
    page.show(out)
    out.print()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("  format", no_wrap=True)
    table.add_column("weights", justify="right", no_wrap=True)
    table.add_column("longest context here", justify="right", no_wrap=True)
    table.add_column("")
    for row in facts.formats:
        name = Text(f"  {row.format}", style="cyan")
        if row.weight_bytes is None:
            table.add_row(name, "", "", Text(row.why_not, style="dim"))
            continue
        context = (
            console.UNAVAILABLE if row.context is None else f"{row.context:,} tokens" if row.context else "does not fit"
        )
        style = "red" if row.context == 0 else "" if row.context == shape.max_context else "yellow"
        remark = "as stored" if row.as_stored else ""
        table.add_row(name, size(row.weight_bytes), Text(context, style=style), Text(remark, style="dim"))
    out.print(table)


def _parameters(number: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{significant(number / scale)} {unit}"
    return str(number)


# --------------------------------------------------------------------------------------------------- doctor

BANDWIDTH_S = 0.4  # per number of threads


def doctor(as_json: AsJson = False) -> int:
    """Show this machine and whether finial is ready.

    CPU, memory and its measured read bandwidth, GPUs, energy counters, optional parts.

    Exit code 0 when the native backend works, 1 when it does not.
    """
    from finial.machine import describe

    with console.waiting("measuring the read bandwidth"):
        machine = describe(bandwidth_s=BANDWIDTH_S)
    if as_json:
        print(json.dumps(machine.to_dict() | {"ready": not machine.native.error}, ensure_ascii=False, indent=2))
    else:
        _doctor_page(machine)
    return 1 if machine.native.error else 0


def _doctor_page(machine: Machine) -> None:
    from rich.text import Text

    cpu, memory, native = machine.cpu, machine.memory, machine.native
    page = Page()
    page.section("system")
    page.row("system", f"{machine.system.name} · {machine.system.arch}", f"kernel {machine.system.kernel}")
    page.row("python", machine.system.python)
    page.section("CPU")
    page.row("model", cpu.model)
    parts = [count(cpu.sockets, "socket")] if cpu.sockets else []
    parts += [count(cpu.cores, "core")] if cpu.cores else []
    page.row("has", " · ".join([*parts, count(cpu.threads, "thread")]))
    limit = f"a quota of {cpu.quota:g} CPUs" if cpu.quota is not None else ""
    page.row("usable", f"{count(cpu.usable_cores, 'core')} · {count(cpu.usable_threads, 'thread')}", limit)
    page.row("instructions", " ".join(cpu.features) or None)
    page.row("caches", " · ".join(_cache(c.level, c.kind, c.bytes, c.count) for c in cpu.caches) or None)
    if cpu.governor:
        page.row("governor", cpu.governor)
    if cpu.load is not None:
        busy = cpu.load >= cpu.usable_threads
        page.row(
            "load",
            Text(f"{cpu.load:g}", "yellow" if busy else ""),
            "busy, so bandwidth reads low" if busy else "last minute",
        )
    page.section("memory")
    page.row("total", None if memory.total_bytes is None else size(memory.total_bytes),
             "the control group's limit" if memory.limit_bytes is not None else "")  # fmt: skip
    page.row("free", None if memory.available_bytes is None else size(memory.available_bytes))
    best = max((m.read_gb_s or 0 for m in machine.bandwidth), default=0)
    for measured in machine.bandwidth:
        page.row(*_bandwidth(measured, best))
    page.section("GPU")
    for gpu in machine.gpus:
        facts = [gpu.driver or "no driver"]
        facts += [size(gpu.memory_bytes)] if gpu.memory_bytes else []
        facts += [f"compute {gpu.compute}"] if gpu.compute else []
        facts += [f"CUDA up to {gpu.cuda}"] if gpu.cuda else []
        page.row(gpu.vendor, gpu.name, " · ".join(facts))
    if not machine.gpus:
        page.row("found", "none")
    page.row("Vulkan", "loader found" if machine.vulkan.loader else "no loader", ", ".join(machine.vulkan.drivers))
    page.section("energy counters")
    for counter in machine.energy:
        page.row(counter.name, "readable" if counter.readable else None, counter.reason)
    page.section("optional parts")
    if machine.extras is None:
        page.row("extras", None, "finial runs from its sources: pip install -e .")
    for extra in machine.extras or ():
        if extra.installed:
            page.row(extra.name, "installed", " ".join(extra.packages))
        else:
            page.row(extra.name, "not installed", extra.command)
    out = console.out()
    page.show(out)
    out.print()
    if native.error:
        out.print(
            Text.assemble(("not ready: ", "bold red"), f"the native backend is missing ({native.error})"),
            soft_wrap=True,
        )
        out.print(Text.assemble(("  fix: ", "bold"), "pip install . (in finial's directory, with a C++17 compiler)"))
    else:
        threads = count(native.threads or 1, "thread")
        ready = f"the cpu backend runs with {native.isa} on {threads}"
        out.print(Text.assemble(("ready: ", "bold green"), ready), soft_wrap=True)


def _cache(level: int, kind: str, nbytes: int, number: int) -> str:
    letter = {"data": "d", "instruction": "i"}.get(kind, "")
    times = f"{number} × " if number > 1 else ""
    return f"L{level}{letter} {times}{binary(nbytes)}"


def _bandwidth(measured: Bandwidth, best: float) -> tuple[str, Text | None, str]:
    from rich.text import Text

    name = f"read, {count(measured.threads, 'thread')}"
    if measured.read_gb_s is None:
        return name, None, measured.error
    return name, Text.assemble(bar(measured.read_gb_s / best), f" {significant(measured.read_gb_s)} GB/s"), ""
