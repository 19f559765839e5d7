"""The verdict beside every number: what an engine wrote and scored in a run, held against a float32 reference.

Knows workers and records; how a verdict comes about is finial.lab.quality's.  What it adds is a look at the text that
was generated while the clock ran.

    with Judge(places, threads=2) as judge: judge.judge(group, "llama.cpp", worker, cells)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from finial.errors import FinialError
from finial.files.checkpoint import open_checkpoint
from finial.lab import quality_run
from finial.lab.engines.table import Places
from finial.lab.quality import EXACT, Quality, not_the_models
from finial.lab.record import Cell, Divergence, Verdict
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import Group, prompts
from finial.verdict import Logits

RUN_S = 300.0
# A text and a greedy continuation that fit the shortest context that a run loads engines with, 128 positions.
WINDOW, TOKENS, GREEDY = 96, 192, 32
MEASURED_DEPTH = 256  # deepest prompt whose measured continuation is looked at
KEPT_TOKENS = 16  # of that continuation, which the record keeps


class Judge:
    """Verdicts of a run; holds one model's reference at a time, opened when it is first needed.

    Args:
        text, reference: as those of `finial.lab.quality_run.Judge`.
    """

    def __init__(self, places: Places, threads: int, text: str = "sampled", reference: str = "auto") -> None:
        self._places, self._threads, self._text, self._kind = places, threads, text, reference
        self._model = ""
        self._judge: quality_run.Judge | None = None

    def judge(self, group: Group, name: str, worker: Worker, cells: Sequence[Cell]) -> Verdict:
        """One engine's verdict; its `flaws` say why none of its numbers may stand, its `error` why there is none."""
        try:
            judge = self._of(group.model)
            operations = worker.ask("hello", RUN_S).get("operations", [])
            (found,) = judge.verdict(worker, operations, name, group.format, "")
            verdict = recorded(found)
            flaw, verdict.condemned = self._measured(judge, group, name, cells)
            verdict.flaws += [flaw] if flaw else []
            return verdict
        except (WorkerError, FinialError, OSError, ValueError, LookupError, TypeError) as error:
            return Verdict(error=str(error) or type(error).__name__)

    def close(self) -> None:
        """End the reference."""
        if self._judge is not None:
            self._judge.close()
        self._judge = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _of(self, model: str) -> quality_run.Judge:
        if self._judge is None or self._model != model:
            self.close()
            self._model = model
            self._judge = quality_run.Judge(
                self._places.checkpoint(model),
                [self._text],
                self._kind,
                self._threads,
                limit=TOKENS,
                greedy=GREEDY,
                window=WINDOW,
                positions=MEASURED_DEPTH + KEPT_TOKENS,
                places=self._places,
                ask_s=RUN_S,
            )
        return self._judge

    def _measured(
        self, judge: quality_run.Judge, group: Group, name: str, cells: Sequence[Cell]
    ) -> tuple[str, list[list[int]]]:
        """The flaw of what it generated while it was timed, and those tokens.

        The shallowest cell with tokens is looked at; of rounded weights the next ones too as long as all look wrong.
        """
        vocab_size = open_checkpoint(self._places.checkpoint(group.model)).config.vocab_size
        names: list[str] = []
        texts: list[tuple[Logits, list[int]]] = []
        flaw = ""
        for cell in sorted(cells, key=lambda cell: max(cell.workload.prompt_lengths)):
            row = cell.engines.get(name)
            sample = next((s for s in row.samples if s.tokens), None) if row is not None else None
            if sample is None or max(cell.workload.prompt_lengths) > MEASURED_DEPTH or cell.workload.kind == "serve":
                continue
            assert sample.tokens is not None
            names.append(cell.workload.name)
            pairs = zip(prompts(cell.workload, vocab_size, 0), sample.tokens, strict=True)
            texts += [(judge.along(prompt, tokens), tokens) for prompt, tokens in pairs]
            flaw = not_the_models(f"measured text ({', '.join(names)})", texts, group.format)
            if not flaw or group.format in EXACT:
                break
        return flaw, [tokens for _, tokens in texts] if flaw else []


def recorded(found: Quality) -> Verdict:
    """A verdict as the record keeps it; what is not a finite number is none there."""
    verdict, ppl = found.verdict, found.verdict.perplexity
    parted = verdict.divergence
    made = Verdict(
        positions=verdict.positions if found.basis != "tokens" else 0,
        kl_mean=_finite(verdict.kl_mean),
        kl_p99=_finite(verdict.kl_p99),
        kl_max=_finite(verdict.kl_max),
        top1=_finite(verdict.top1) if found.basis != "tokens" else None,
        top5=_finite(verdict.top5),
        greedy_tokens=verdict.greedy_tokens,
        greedy_agreement=found.greedy_agreement,
        divergence=None if parted is None else Divergence(**dataclasses.asdict(parted)),
        repeat_kl_max=None if found.repeat_kl_max is None else _finite(found.repeat_kl_max),
        repeat_same_text=found.repeat_same_text,
        basis=found.basis,
        top=found.top,
        text=found.text,
        reference=found.reference,
        flaws=list(found.flaws),
    )
    if ppl is not None:
        made.perplexity, made.perplexity_error = _finite(ppl.value), _finite(ppl.error)
        made.perplexity_reference = _finite(ppl.reference)
        made.ratio, made.ratio_error = _finite(ppl.ratio), _finite(ppl.ratio_error)
    return made


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
