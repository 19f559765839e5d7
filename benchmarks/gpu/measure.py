"""One measurement on the GPU: prints one line of JSON.  `python3 -m benchmarks.gpu.measure decode MODEL`.

Device times are of CUDA events around replays of a step's graph; medians of runs after a warm-up.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 32
TWIN = "FINIAL_GPU_TWIN"  # set: no GPU, see twin.py
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much each part does: what is measured on a GPU, or as little as shows that every line runs."""

    depths: tuple[int, ...] = (128, 1024, 4096, 32767)
    alone: tuple[int, ...] = (128, 4096)  # depths without dependent launch
    batches: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    batch_depth: int = 512
    prompts: tuple[int, ...] = (32, 128, 512, 2048, 8192)
    formats: tuple[str, ...] = ("fp8", "q8_0", "q4_0", "f16")
    smoke: tuple[tuple[str, str], ...] = (("bf16", "bf16"), ("q8_0", "q8_0"), ("q4_0", "bf16"), ("f32", "f32"))
    chunks: tuple[int, ...] = (1, 1, 40, 1, 3, 17, 1)
    text: int = 256
    first: int = 60
    samples: int = 200
    warm: int = 5
    sample_ms: float = 20.0
    seconds: float = 1.0
    together: tuple[int, ...] = (1, 8)  # sequences of a text
    repeats: int = 3


FULL = Size()
TINY = Size(
    depths=(20,), alone=(20,), batches=(2,), batch_depth=20, prompts=(16,), formats=("fp8",), smoke=(("bf16", "bf16"),),
    chunks=(1, 16), text=4, first=2, samples=2, warm=1, sample_ms=0.0, seconds=0.0,
    together=(1,), repeats=1,
)  # fmt: skip
SIZE = TINY if os.environ.get(TWIN) else FULL


def _device() -> Any:
    from finial.backends.cuda.driver import open_device

    return open_device(0)


def _program(path: Path, device: Any, format: str | None = None, kv: str = "bf16") -> tuple[Any, Any]:
    from finial.backends.cuda import CudaBackend
    from finial.files.checkpoint import open_checkpoint
    from finial.formats import Tensor
    from finial.models.decoder import build_graph, constants

    checkpoint = open_checkpoint(path)
    weights = dict(checkpoint.tensors)
    if format is not None:
        weights = {name: t.to(format) if len(t.shape) == 2 else t for name, t in weights.items()}
    weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
    graph = build_graph(checkpoint.config, kv)
    return CudaBackend(device).compile(graph, weights), checkpoint.config


def _greedy(rows: int) -> list[Any]:
    from finial.backends import Draw

    return [Draw(0.0, 0, 1.0, 0.0, 0.0)] * rows


def _decode_feeds(batch: int, depth: int, vocab: int) -> dict[str, np.ndarray]:
    """One row for each of `batch` sequences at position `depth`, each on pages of its own."""
    per = depth // PAGE + 1
    pages = np.arange(batch * per, dtype=np.int32).reshape(batch, per)
    position = np.full(batch, depth, np.int32)
    return {
        "tokens": np.random.default_rng(depth).integers(0, vocab, batch).astype(np.int32),
        "positions": position,
        "starts": np.arange(batch + 1, dtype=np.int32),
        "lengths": position + 1,
        "pages": pages,
        "slots": (pages[:, depth // PAGE] * PAGE + depth % PAGE).astype(np.int32),
        "wanted": np.arange(batch, dtype=np.int32),
    }


def _time(device: Any, program: Any, state: Any, feeds: dict[str, np.ndarray], share: float = 1.0) -> Row:
    """Milliseconds of a step's graph, the choice of the tokens included."""
    draws = _greedy(len(feeds["wanted"]))
    program.sample(feeds, state, draws)
    recorded, _ = program.steps.prepare(feeds, state, draws)

    def once() -> None:
        device.replay(recorded.sampling[0])

    for _ in range(SIZE.warm):
        once()
    device.synchronize()
    estimate = device.elapsed_ms(once, SIZE.warm) / SIZE.warm
    inner = max(1, int(SIZE.sample_ms / max(estimate, 1e-3)))  # replays of about 20 ms a sample
    samples = []
    end = time.monotonic() + share * SIZE.seconds
    while len(samples) < min(10, SIZE.samples) or time.monotonic() < end:
        samples.append(device.elapsed_ms(once, inner) / inner)
        if len(samples) >= SIZE.samples:
            break
    q = statistics.quantiles(samples, n=20)
    return {
        "ms": round(statistics.median(samples), 5),
        "p05": round(q[0], 5),
        "p95": round(q[-1], 5),
        "samples": len(samples),
    }


def machine() -> Row:
    """GPU, driver, versions."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    smi = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("nvidia-smi") else ""
    from finial.backends.cuda.compiler import compiler_version

    device = _device()
    return {
        "smi": smi.strip().splitlines(),
        "device": device.name,
        "capability": device.capability,
        "multiprocessors": device.multiprocessors,
        "memory": device.memory(),
        "python": sys.version.split()[0],
        "nvrtc": compiler_version(),
    }


def smoke() -> Row:
    """The demo model against the reference, each way that rows can go; the first thing to look at."""
    from importlib.resources import files

    from finial.backends import get_backend
    from finial.files.checkpoint import open_checkpoint
    from finial.formats import Tensor
    from finial.graph import single_step
    from finial.models.decoder import build_graph, constants

    checkpoint = open_checkpoint(Path(str(files("finial") / "demo")))
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, 80)
    result: Row = {}
    for format, kv in SIZE.smoke:
        weights = {n: t.to(format) if len(t.shape) == 2 else t for n, t in checkpoint.tensors.items()}
        weights |= {name: Tensor.from_array(array) for name, array in constants(checkpoint.config).items()}
        graph = build_graph(checkpoint.config, kv)
        outputs = []
        for name in ("reference", "cuda"):
            program = get_backend(name).compile(graph, weights)
            state, rows, at = program.new_state(8, 16), [], 0
            for count in SIZE.chunks:
                step = single_step(tokens[at : at + count].tolist(), 16, at)
                rows.append(program.run(step.feeds(), state)[0])
                at += count
            outputs.append(rows)
        result[f"{format}, cache {kv}"] = [
            round(float((np.abs(got - want).max(-1) / want.std(-1)).max()), 6)
            for want, got in zip(*outputs, strict=True)
        ]
    result["bound"] = 0.15
    worst = max(value for row in result.values() if isinstance(row, list) for value in row)
    if not worst < 0.15:
        print(json.dumps(result))
        sys.exit(1)
    return result


def decode(path: Path) -> Row:
    """Batch 1 at four depths, with and without dependent launch; the share of what memory could do."""
    from finial.cost import step_bytes
    from finial.formats import Tensor

    result: Row = {}
    for dependent in (True, False):
        device = _device()
        device.dependent = device.dependent and dependent
        program, config = _program(path, device)
        depths = SIZE.depths if dependent else SIZE.alone
        state = program.new_state(max(depths) // PAGE + 8, PAGE)
        for depth in depths:
            row = _time(device, program, state, _decode_feeds(1, depth, config.vocab_size))
            row["tokens_per_s"] = round(1000 / row["ms"], 1)
            stored = {v.name: v.shape for v in program.graph.of_kind("weight")}
            sizes = {
                n: Tensor("bf16", s, np.zeros(2 * int(np.prod(s)), np.uint8)) for n, s in stored.items() if len(s) == 2
            }
            sizes |= {n: Tensor.from_array(np.zeros(s, np.float32)) for n, s in stored.items() if len(s) == 1}
            row["read_gb_s"] = round(step_bytes(program.graph, sizes, 1, [depth + 1]) / row["ms"] / 1e6, 1)
            result[f"depth {depth}" + ("" if dependent else ", no dependent launch")] = row
        program.model.close()
    return result


def batch(path: Path) -> Row:
    """Several sequences, each at depth 512."""
    device = _device()
    program, config = _program(path, device)
    state = program.new_state(max(SIZE.batches) * (SIZE.batch_depth // PAGE + 1) + 8, PAGE)
    result: Row = {}
    for count in SIZE.batches:
        row = _time(device, program, state, _decode_feeds(count, SIZE.batch_depth, config.vocab_size), 0.5)
        row["tokens_per_s"] = round(1000 * count / row["ms"], 1)
        result[f"batch {count}"] = row
    return result


def _prompt_feeds(rows: int, vocab: int) -> dict[str, np.ndarray]:
    from finial.graph import single_step

    tokens = np.random.default_rng(rows).integers(0, vocab, rows).tolist()
    return single_step(tokens, PAGE, wanted=[rows - 1]).feeds()


def prefill(path: Path) -> Row:
    """Prompts of several lengths in one step."""
    device = _device()
    program, config = _program(path, device)
    state = program.new_state(-(-max(SIZE.prompts) // PAGE), PAGE)
    result: Row = {}
    for rows in SIZE.prompts:
        row = _time(device, program, state, _prompt_feeds(rows, config.vocab_size), 0.5)
        row["tokens_per_s"] = round(1000 * rows / row["ms"], 1)
        result[f"{rows} tokens"] = row
    return result


def first_token(path: Path) -> Row:
    """From 32 token ids on the host to the first new one there."""
    device = _device()
    program, config = _program(path, device)
    state = program.new_state(64, PAGE)
    samples = []
    rows = min(32, max(SIZE.prompts))
    for index in range(SIZE.first):
        feeds = _prompt_feeds(rows, config.vocab_size)
        feeds["tokens"] = np.roll(feeds["tokens"], index)
        start = time.perf_counter()
        token = int(program.sample(feeds, state, _greedy(1))[0])
        samples.append((time.perf_counter() - start) * 1000)
        assert token >= 0, "a logit is not finite"
    return {
        "tokens": rows,
        "ms": round(statistics.median(samples[len(samples) // 6 :]), 4),
        "min": round(min(samples), 4),
        "first": round(samples[0], 1),
    }


def formats(path: Path) -> Row:
    """Batch 1 at depth 128 in other weight formats."""
    result: Row = {}
    depth = SIZE.depths[0]
    for format in SIZE.formats:
        device = _device()
        program, config = _program(path, device, format)
        state = program.new_state(64, PAGE)
        row = _time(device, program, state, _decode_feeds(1, depth, config.vocab_size), 0.5)
        row["tokens_per_s"] = round(1000 / row["ms"], 1)
        result[format] = row
        program.model.close()
    return result


def kernels(path: Path) -> Row:
    """Microseconds of each kind of kernel alone, launches together by name; decode at 1k and a prompt of 2,048."""
    device = _device()
    program, config = _program(path, device)
    state = program.new_state(128, PAGE)
    result: Row = {}
    for name, feeds in (
        ("decode", _decode_feeds(1, SIZE.depths[min(1, len(SIZE.depths) - 1)], config.vocab_size)),
        ("prefill", _prompt_feeds(min(2048, max(SIZE.prompts)), config.vocab_size)),
    ):
        launches: list[Any] = []
        record = device.record
        device.record = lambda given, record=record, launches=launches: (launches.extend(given), record(given))[1]
        program.run(feeds, state)
        device.record = record
        times: dict[str, list[float]] = {}
        runs = [device.run_each(launches) for _ in range(min(5, SIZE.samples))]
        for index, launch in enumerate(launches):
            text = f"{launch.kernel.name} grid {launch.grid} x {launch.kernel.threads}"
            times.setdefault(text, []).append(min(run[index] for run in runs) * 1000)
        result[name] = {text: {"calls": len(us), "us": round(statistics.median(us), 2)} for text, us in times.items()}
    return result


def engine(path: Path) -> Row:
    """Tokens a second of a text through the engine, the device running ahead of the host or step by step."""
    from finial.llm import LLM

    result: Row = {}
    tokens = np.random.default_rng(1).integers(0, 1000, SIZE.depths[0]).tolist()
    with LLM(path, backend="cuda", max_context=SIZE.depths[0] + 2 * SIZE.text, max_batch=8) as llm:
        kind = type(llm._executable)
        offered = kind.runs_ahead
        for name, ahead in (("ahead", True), ("step by step", False)):
            kind.runs_ahead = property(lambda self, ahead=ahead: ahead and offered.fget(self))
            for count in SIZE.together:
                rates = []
                for seed in range(SIZE.repeats):
                    prompts = [[*tokens, seed * 8 + i] for i in range(count)]
                    begin = time.perf_counter()
                    done = llm.generate(prompts, max_tokens=SIZE.text, ignore_eos=True)
                    seconds = time.perf_counter() - begin
                    rates.append(sum(len(one.tokens) for one in done) / seconds)
                    single = done[0].timings.decode_tok_s
                row = {"tokens_per_s": round(statistics.median(rates), 1), "prompt": len(tokens), "text": SIZE.text}
                result[f"{name}, batch {count}"] = row | ({"decode_tok_s": single and round(single, 1)})
        kind.runs_ahead = offered
        result["notes"] = llm.notes
    return result


def agreement(path: Path) -> Row:
    """The embedded model's text: KL and greedy text against the float32 reference; beside it transformers in bf16."""
    from importlib.resources import files

    from finial.engine.sampling import log_softmax
    from finial.llm import LLM

    prompt = "ROMEO:\nWhat light through yonder window breaks?"
    with (
        LLM("demo", backend="cuda", max_context=512) as llm,
        LLM("demo", backend="reference", max_context=512) as oracle,
    ):
        text = llm.generate(prompt, max_tokens=SIZE.text, ignore_eos=True)
        expected = oracle.generate(prompt, max_tokens=SIZE.text, ignore_eos=True)
        ids = expected.prompt_tokens + expected.tokens
        ours, theirs = llm.score(ids).logits, oracle.score(ids).logits
        p = log_softmax(theirs)

        def divergence(logits: np.ndarray) -> Row:
            kl = (np.exp(p) * (p - log_softmax(np.asarray(logits, np.float32)))).sum(-1)
            return {"kl_mean": float(kl.mean()), "kl_max": float(kl.max())}

        result: Row = {"cuda": divergence(ours)}
        pairs = enumerate(zip(text.tokens, expected.tokens, strict=True))
        same = next((i for i, pair in pairs if pair[0] != pair[1]), SIZE.text)
        result["same_greedy_tokens"], result["of"] = same, SIZE.text
        if same < SIZE.text:  # how far the reference's two candidates are apart there, beside how far logits are off
            row = theirs[len(expected.prompt_tokens) + same - 1]
            margin = float(row[expected.tokens[same]] - row[text.tokens[same]])
            result["margin_where_they_part"] = margin
            result["root_mean_square_error"] = float(np.sqrt(((ours - theirs) ** 2).mean()))
    print(json.dumps(result), flush=True)
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        return result | {"transformers": f"not here: {error}"}
    place = "cuda" if torch.cuda.is_available() else "cpu"
    demo = str(files("finial") / "demo")
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16).to(place).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=place)).logits[0].float().cpu().numpy()
    result["transformers, bf16"] = divergence(logits)
    result["no worse than transformers"] = result["cuda"]["kl_mean"] <= result["transformers, bf16"]["kl_mean"]
    return result


def transformers(path: Path) -> Row:
    """Transformers in bf16 on the same checkpoint: decode at depth 128 (eager, then compiled), prefill of 2,048."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    place = "cpu" if os.environ.get(TWIN) else "cuda"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(place).eval()
    synchronize = torch.cuda.synchronize if place == "cuda" else lambda: None
    result: Row = {}

    def timed(work: Callable[[], object], times: int) -> float:
        samples = []
        for _ in range(times):
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples[len(samples) // 4 :]) * 1000

    with torch.inference_mode():
        rows, depth = min(2048, max(SIZE.prompts)), SIZE.depths[0]
        ids = torch.randint(0, 1000, (1, max(rows, depth)), device=place)
        result[f"prefill {rows} ms"] = timed(lambda: model(ids[:, :rows], logits_to_keep=1), min(12, SIZE.samples))
        cache = StaticCache(config=model.config, max_cache_len=2 * depth)
        model(ids[:, :depth], past_key_values=cache, cache_position=torch.arange(depth, device=place))
        one, at = ids[:, :1].clone(), torch.tensor([depth], device=place)
        result["decode ms, eager"] = timed(
            lambda: model(one, past_key_values=cache, cache_position=at), min(30, SIZE.samples)
        )
        print(json.dumps(result), flush=True)
        if place == "cpu":
            return result
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False)
        result["decode ms, compiled"] = timed(lambda: compiled(one, past_key_values=cache, cache_position=at), 60)
    return result


def probe() -> Row:
    """What the machine's memory and hand-offs can do; see probe.py."""
    from benchmarks.gpu import probe as probes

    return probes.run(_device(), **({"size": 1 << 20, "samples": 3, "least": 1000} if SIZE is TINY else {}))


PARTS: dict[str, Callable[..., Row]] = {
    "machine": machine,
    "smoke": smoke,
    "decode": decode,
    "batch": batch,
    "prefill": prefill,
    "first-token": first_token,
    "formats": formats,
    "engine": engine,
    "kernels": kernels,
    "agreement": agreement,
    "transformers": transformers,
    "probe": probe,
}

if __name__ == "__main__":
    if os.environ.get(TWIN):
        import benchmarks.gpu.twin  # noqa: F401  # it puts itself in the place of the driver
    print(json.dumps(PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))))
