"""The verdict beside every number: what an engine wrote and scored in this run, held against a float32 reference.

Knows workers and logits; nothing of clocks.  The reference is finial on the checkpoint as stored, in float32: NumPy for
small models, the cpu backend with float32 weights and cache for large ones.

    with Judge(places, threads=2) as judge: judge.judge(group, "llama.cpp", worker, cells)
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finial.errors import FinialError
from finial.files.checkpoint import Checkpoint, open_checkpoint
from finial.lab.engines.table import ENGINES, Places
from finial.lab.record import Cell, Divergence, Verdict
from finial.lab.worker import Worker, WorkerError
from finial.lab.workloads import Group, prompts
from finial.verdict import compare, compare_top, first_divergence, summary

LOAD_S, RUN_S = 180.0, 300.0
GREEDY, PROMPT = 32, 32  # tokens of the greedy text, and of the beginning that it continues
MEASURED_DEPTH = 256  # deepest prompt whose measured continuation is looked at
LARGE = 64_000_000  # bytes of weights beyond which NumPy takes minutes

# Regret: how far behind the reference's best the chosen tokens are, where 1 is as far as an average token of the
# vocabulary; another model's text or none is close to 1.  Weights as stored stay far below the first bound.  Weights
# rounded to a few bits are held against the checkpoint they were made from, and random weights forgive rounding least.
REGRET, REGRET_ROUNDED = 0.25, 0.75
EXACT = ("stored", "bf16", "f16", "f32")

TEXT = (
    "The roof of a house keeps the rain out, and the higher it stands the more of the sky it must hold up. "
    "A builder who knows the weight of every beam can say how far the walls may be apart; one who guesses "
    "will learn it from the first winter."
)

Logits = NDArray[np.float32]


class Judge:
    """Holds the reference's process, opened when it is first needed."""

    def __init__(self, places: Places, threads: int) -> None:
        self._places, self._threads = places, threads
        self._reference: Worker | None = None
        self._model = ""
        self._folder = tempfile.TemporaryDirectory(prefix="finial-verdict-")

    def judge(self, group: Group, name: str, worker: Worker, cells: Sequence[Cell]) -> Verdict:
        """One engine's verdict; its `flaws` say why none of its numbers may stand, its `error` why there is none."""
        try:
            checkpoint = open_checkpoint(self._places.checkpoint(group.model))
            ids = _text(checkpoint)
            operations = worker.ask("hello", RUN_S).get("operations", [])
            prompt = ids[:PROMPT]
            chosen = worker.ask("run", RUN_S, prompts=[prompt], new=GREEDY, keep=False)["tokens"][0]
            along = self._score(group, [*prompt, *chosen])[len(prompt) - 1 : -1]
            parted = first_divergence(along, chosen)
            verdict = Verdict(basis="tokens", greedy_tokens=len(chosen))
            if "score" in operations:
                reply = worker.ask("score", RUN_S, ids=ids, path=self._path("engine"))
                verdict = _scored(self._score(group, ids), ids, reply, self._path("engine"))
                verdict.greedy_tokens = len(chosen)
            verdict.greedy_agreement = float((along.argmax(-1) == np.asarray(chosen)).mean())
            verdict.divergence = None if parted is None else Divergence(**dataclasses.asdict(parted))
            for what, value in (("greedy text", regret(along, chosen)), *self._measured(group, name, cells)):
                if not value <= (REGRET if group.format in EXACT else REGRET_ROUNDED):
                    verdict.flaws.append(f"{what} is not this model's: {value:.0%} of the way to random tokens")
            return verdict
        except (WorkerError, FinialError, OSError, ValueError) as error:
            return Verdict(error=str(error))

    def close(self) -> None:
        """End the reference."""
        if self._reference is not None:
            self._reference.close()
        self._folder.cleanup()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _measured(self, group: Group, name: str, cells: Sequence[Cell]) -> list[tuple[str, float]]:
        """Regrets of what it generated while it was timed, in the shallowest cell that has tokens."""
        vocab_size = open_checkpoint(self._places.checkpoint(group.model)).config.vocab_size
        for cell in sorted(cells, key=lambda cell: max(cell.workload.prompt_lengths)):
            row = cell.engines.get(name)
            sample = next((s for s in row.samples if s.tokens), None) if row is not None else None
            if sample is None or max(cell.workload.prompt_lengths) > MEASURED_DEPTH or cell.workload.kind == "serve":
                continue
            assert sample.tokens is not None
            found = []
            for prompt, tokens in zip(prompts(cell.workload, vocab_size, 0), sample.tokens, strict=True):
                along = self._score(group, [*prompt, *tokens])[len(prompt) - 1 : -1]
                found.append(regret(along, tokens))
            return [(f"measured text ({cell.workload.name})", max(found))]
        return []

    def _score(self, group: Group, ids: Sequence[int]) -> Logits:
        if self._reference is None or self._model != group.model:
            if self._reference is not None:
                self._reference.close()
            self._reference, self._model = self._open(group), group.model
        self._reference.ask("score", RUN_S, ids=[int(i) for i in ids], path=self._path("reference"))
        logits: Logits = np.load(self._path("reference"))
        return logits

    def _open(self, group: Group) -> Worker:
        engine = ENGINES["finial"]
        path = self._places.checkpoint(group.model)
        checkpoint = open_checkpoint(path)
        options = {"backend": "reference", "kv_format": "f32"}
        if checkpoint.nbytes > LARGE:
            options = {"backend": "cpu", "format": "f32", "kv_format": "f32"}
        worker = Worker(engine.command(self._places), engine.process_environment(self._threads))
        context = min(checkpoint.config.max_context, 512)
        load = {"model": str(path), "format": "stored", "threads": self._threads, "options": options}
        try:
            worker.ask("load", LOAD_S, context=context, sequences=1, cache=True, **load)
        except WorkerError:
            worker.kill()
            raise
        return worker

    def _path(self, name: str) -> str:
        return str(Path(self._folder.name) / f"{name}.npy")


def _scored(expected: Logits, ids: list[int], reply: dict[str, Any], path: str) -> Verdict:
    """What a reply to `score` comes to; ValueError when it is none."""
    kind = reply.get("kind")
    if kind == "logits":
        logits = np.load(path)
        if logits.shape != expected.shape:
            raise ValueError(f"logits of shape {logits.shape} instead of {expected.shape}")
        found = summary(compare(expected, logits, ids))
    elif kind == "top":
        top = [{int(token): float(logprob) for token, logprob in known} for known in reply["top"]]
        found = summary(compare_top(expected, top, ids))
    else:
        raise ValueError(f"a score of kind {kind!r}")
    numbers: dict[str, Any] = {
        name: _finite(getattr(found, name)) for name in ("kl_mean", "kl_p99", "kl_max", "top1", "top5")
    }
    if found.perplexity is not None:
        numbers["perplexity"] = _finite(found.perplexity.value)
        numbers["perplexity_error"] = _finite(found.perplexity.error)
    flaws = [] if numbers["kl_mean"] is not None or kind == "top" else ["logits are not all numbers"]
    return Verdict(positions=found.positions, basis=kind, flaws=flaws, **numbers)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def regret(reference: Logits, chosen: Sequence[int]) -> float:
    """How far behind the best the chosen tokens are on average, in units of best minus mean; NaN stays NaN.

    Args:
        reference: float32 [N, V], its predictions for each of `chosen`.
    """
    rows = np.asarray(reference, np.float64)
    best, mean = rows.max(axis=-1), rows.mean(axis=-1)
    picked = rows[np.arange(len(rows)), np.asarray(chosen, np.int64)]
    return float(((best - picked).mean()) / max((best - mean).mean(), 1e-9))


def _text(checkpoint: Checkpoint) -> list[int]:
    try:
        return checkpoint.text().encode(TEXT)
    except FinialError:  # no tokenizer: any ids are as good
        draw = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size * 9 // 10, 110)
        return [int(i) for i in draw]
