"""What one generation cost, and how close to the machine's limit and to the reference it was: data, then pages.

Knows the public object, the cost of a step, the machine and the verdict; prints nothing by itself.

    stats = measure(llm, completion); stats_page(stats).show(console.err())
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finial.cli.console import Page, bar, binary, count, significant, size

if TYPE_CHECKING:
    from finial.backends import Timing
    from finial.engine.results import Completion
    from finial.llm import LLM
    from finial.verdict import Verdict


@dataclass(frozen=True)
class Stats:
    """One generation in numbers.  None: unavailable.

    Attributes:
        ttft_s: from submission to the first token; prompt_tok_s: the prompt's tokens that were computed in that time.
        decode_tok_s: (new tokens - 1) over the time from the first to the last.
        peak_bytes: of the process, before anything was measured or verified.
        step_bytes: what a decode step of mean length must read.
        read_gb_s: measured after the generation, with the same threads, over a buffer of `read_bytes`.
        in_cache: the step's bytes fit the last-level cache, so that the buffer was made as large as they are.
        roofline_share: step_bytes / read_gb_s over the time that a step took.
    """

    load_s: float
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    finish_reason: str
    ttft_s: float | None
    prompt_tok_s: float | None
    decode_tok_s: float | None
    peak_bytes: int | None
    weight_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    step_bytes: int
    read_gb_s: float | None
    read_bytes: int | None
    in_cache: bool
    roofline_share: float | None
    backend: str
    isa: str | None
    threads: int | None
    format: str
    kv_format: str
    cache: bool
    sampling: str
    seed: int
    notes: list[str]


def measure(llm: LLM, completion: Completion, sampling: str, bandwidth: bool = True) -> Stats:
    """The numbers of a generation that has just ended.

    Args:
        bandwidth: measure the machine's read bandwidth now; without it there is no share of the roofline.
    """
    from finial.machine import peak_bytes, probe_native
    from finial.roofline import measure_read, step_reads

    peak = peak_bytes()
    info, timings = llm.info, completion.timings
    prompt, new = len(completion.prompt_tokens), len(completion.tokens)
    computed = prompt - completion.reused_tokens
    on_cpu = info.backend == "cpu"
    native = probe_native()
    threads = (info.threads or native.threads) if on_cpu else None
    length = prompt + max(1, new // 2)
    bytes_read = step_reads(llm, 1 if info.cache else length, length)
    read = measure_read(llm, bytes_read) if bandwidth else None
    gb_s = None if read is None else read.gb_s
    rate = timings.decode_tok_s
    return Stats(
        load_s=info.load_s,
        prompt_tokens=prompt,
        reused_tokens=completion.reused_tokens,
        new_tokens=new,
        finish_reason=completion.finish_reason,
        ttft_s=timings.ttft_s,
        prompt_tok_s=computed / timings.ttft_s if timings.ttft_s else None,
        decode_tok_s=rate,
        peak_bytes=peak,
        weight_bytes=info.weight_bytes,
        kv_bytes=info.kv_bytes,
        kv_bytes_per_token=info.kv_bytes_per_token,
        step_bytes=bytes_read,
        read_gb_s=gb_s,
        read_bytes=None if read is None else read.over_bytes,
        in_cache=read is not None and read.in_cache,
        roofline_share=bytes_read * rate / (gb_s * 1e9) if gb_s and rate else None,
        backend=info.backend,
        isa=native.isa if on_cpu else None,
        threads=threads,
        format=info.format,
        kv_format=info.kv_format,
        cache=info.cache,
        sampling=sampling,
        seed=completion.choices[0].seed,
        notes=llm.notes,
    )


# ---------------------------------------------------------------------------------------------------- pages


def profile_page(timings: list[Timing]) -> Page:
    """Where the time of all steps went, on the first thread: work, then what it waited for slower threads."""
    page = Page()
    page.section("profile")
    total = sum(row.seconds + row.waiting for row in timings)
    if total == 0:
        page.row("steps", None, "only the cpu backend measures them")
        return page
    for row in sorted(timings, key=lambda row: -row.seconds - row.waiting):
        share = f"{significant(100 * (row.seconds + row.waiting) / total)} %"
        remark = f"{count(row.calls, 'call')} · {_seconds(row.seconds)} work, {_seconds(row.waiting)} waiting"
        rate = f" · {size(row.bytes)}, {significant(row.bytes / row.seconds / 1e9)} GB/s" if row.bytes else ""
        page.row(row.what, share, remark + rate)
    page.row("all", _seconds(total))
    return page


def stats_page(stats: Stats) -> Page:
    """The numbers for a person."""
    from rich.text import Text

    page = Page()
    page.section("speed")
    page.row("load", _seconds(stats.load_s))
    reused = f", {stats.reused_tokens:,} more from the cache" if stats.reused_tokens else ""
    prompt = count(stats.prompt_tokens - stats.reused_tokens, "prompt token") + reused
    rate = f" · {significant(stats.prompt_tok_s)} tok/s" if stats.prompt_tok_s else ""
    page.row("first token", _seconds(stats.ttft_s), prompt + rate)
    decoded = count(stats.new_tokens, "token")
    if stats.decode_tok_s:
        page.row(
            "decode", f"{significant(stats.decode_tok_s)} tok/s", f"{decoded} · {_seconds(1 / stats.decode_tok_s)} each"
        )
    else:
        page.row("decode", None, decoded)
    step = f"{size(stats.step_bytes)} a step"
    if stats.roofline_share is not None and stats.read_gb_s is not None:
        share = Text.assemble(bar(stats.roofline_share, 10), f" {significant(100 * stats.roofline_share)} %")
        place = "cache" if stats.in_cache else "memory"
        page.row("roofline", share, f"{step} · {significant(stats.read_gb_s)} GB/s from {place}")
    else:
        page.row("roofline", None, step if stats.backend == "cpu" else f"{step}; known for the cpu backend alone")
    page.section("memory")
    page.row("peak", None if stats.peak_bytes is None else size(stats.peak_bytes), "of the process")
    page.row("weights", size(stats.weight_bytes), stats.format)
    per_token = f"{stats.kv_format} · {binary(stats.kv_bytes_per_token)} a token"
    if not stats.cache:
        per_token += " · not used (--no-cache)"
    elif stats.backend == "cpu":
        per_token += " · room: memory is taken as positions are written"
    page.row("KV cache", size(stats.kv_bytes), per_token)
    page.section("how")
    isa = [stats.isa] if stats.isa else []
    threads = [count(stats.threads, "thread")] if stats.threads else []
    page.row("backend", " · ".join([stats.backend, *isa, *threads]))
    for note in stats.notes:
        page.row("", note)
    page.row("sampling", stats.sampling + (f" · seed {stats.seed}" if not stats.sampling.startswith("greedy") else ""))
    return page


def _seconds(value: float | None) -> str | None:
    if value is None:
        return None
    if value < 1e-3:
        return f"{significant(value * 1e6)} µs"
    return f"{significant(value * 1e3)} ms" if value < 1 else f"{significant(value)} s"


# -------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Finding:
    """A verdict, and what the reference ran on."""

    weights: str  # "the same weights", "the weights as stored"
    verdict: Verdict
    token: str  # texts of the token and of the reference's where the greedy texts part
    reference_token: str


def verify(llm: LLM, completion: Completion, format: str | None, plain_greedy: bool) -> list[Finding]:
    """The run's text held against the reference backend in float32: on the same weights, and on the stored ones
    where they were re-encoded.

    Both models score prompt and text teacher-forced.  The greedy text is the run's own when it was greedy, else one of
    the same length is made.  Raises what loading the reference raises: it takes 4 bytes for each parameter.
    """
    from finial.files.checkpoint import open_checkpoint
    from finial.llm import LLM
    from finial.verdict import judge

    info, prompt = llm.info, completion.prompt_tokens
    ids = prompt + completion.tokens
    logits = llm.score(ids).logits
    greedy = completion.tokens
    if not plain_greedy and completion.tokens:
        greedy = llm.generate(prompt, max_tokens=len(completion.tokens), ignore_eos=True).tokens
    runs: list[tuple[str, str | None]] = [("the same weights", format)]
    stored = {name for name, shape in open_checkpoint(info.path).layout.values() if len(shape) == 2}
    if format is not None and stored != {format}:
        runs.append(("the weights as stored", None))
    findings = []
    for label, form in runs:
        length = max(len(ids), len(prompt) + len(greedy))
        with LLM(
            info.path, backend="reference", format=form, kv_format="f32", max_context=length, max_batch=1
        ) as reference:
            expected = reference.score(ids).logits
            along = expected if greedy == completion.tokens else reference.score(prompt + greedy).logits
        verdict = judge(expected, logits, along[len(prompt) - 1 : -1] if greedy else None, greedy)
        names = ("", "")
        if verdict.divergence is not None and info.tokenizer:
            at = verdict.divergence
            names = (llm.tokenizer.decode([at.token], False), llm.tokenizer.decode([at.reference_token], False))
        findings.append(Finding(label, verdict, *names))
    return findings


def verdict_page(findings: list[Finding]) -> Page:
    """The verdicts for a person."""
    from rich.text import Text

    page = Page()
    for finding in findings:
        verdict = finding.verdict
        page.section(f"verdict against the float32 reference on {finding.weights}")
        seen = count(verdict.positions, "position")
        page.row("KL", f"mean {verdict.kl_mean:.1e} · p99 {verdict.kl_p99:.1e} · max {verdict.kl_max:.1e} nats")
        page.row("top-1", _percent(verdict.top1), f"the same top token at {seen}")
        if not verdict.greedy_tokens:
            page.row("greedy text", None)
        elif verdict.divergence is None:
            page.row("greedy text", Text("equal", "green"), f"over all {count(verdict.greedy_tokens, 'token')}")
        else:
            at = verdict.divergence
            page.row(
                "greedy text",
                Text(f"equal for {at.position} of {count(verdict.greedy_tokens, 'token')}", "yellow"),
                f"then {finding.token!r} for {finding.reference_token!r}, {at.margin:.1e} nats behind",
            )
    return page


def _percent(share: float) -> str:
    """Never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{int(share * 10_000) / 100:.2f} %"
