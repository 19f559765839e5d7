"""Quality of engines in their own processes: opens the reference, asks both through the protocol, makes the texts.

Knows the protocol of docs/lab-protocol.md, finial's adapter and transformers'; nothing of making engines' files.

    with Judge(Path("model"), threads=2) as judge:
        judge.verdict(worker, "llama.cpp", "q8_0", precision)        # once per engine, file and format
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finial.errors import FinialError, ModelError, RequestError
from finial.files.checkpoint import Checkpoint, open_checkpoint
from finial.lab.engines.setup import missing
from finial.lab.engines.table import ENGINES, Engine, Places
from finial.lab.quality import GREEDY, Quality, Scored, Written, assess
from finial.lab.quality_texts import SAMPLED, WINDOW, Text, file_text, passage_text, sampled_text
from finial.lab.worker import Worker, WorkerError
from finial.verdict import Logits

OWN = ENGINES["finial"]
LARGE = 64_000_000  # parameters beyond which NumPy takes minutes; the cpu backend's float32 stands in for it there
KEPT_BYTES = 600_000_000  # of the reference's logits, so that a second engine does not compute them again
LOAD_S, ASK_S = 600.0, 1800.0
TEXTS = ("sampled", "passage")
REFERENCES = ("auto", "reference", "cpu", "transformers")


class Asked(Protocol):
    """What answers requests of the protocol: a `Worker`."""

    def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        """One request and its reply; WorkerError says why there is none."""


class EngineScorer:
    """A loaded engine, as `finial.lab.quality` wants it.

    Args:
        worker: already loaded.
        operations: those of its `hello`.
        ask_s: seconds that an answer may take.
    """

    def __init__(
        self,
        worker: Asked,
        operations: Sequence[str],
        engine: str,
        format: str,
        precision: str,
        ask_s: float = ASK_S,
    ) -> None:
        self._worker, self._operations, self._ask_s = worker, operations, ask_s
        self.engine, self.format, self.precision = engine, format, precision
        self.basis = "logits" if "score" in operations else "generated" if "greedy" in operations else "tokens"
        if "score" in operations:
            try:
                self.basis = "logits" if self.score([0, 0, 0]).logits is not None else "top"
            except WorkerError:  # a server may turn out not to give any
                self.basis = "generated" if "greedy" in operations else "tokens"

    def score(self, ids: Sequence[int]) -> Scored:
        """Logits, or the most likely tokens of each position."""
        with tempfile.TemporaryDirectory(prefix="finial-score-") as folder:
            path = Path(folder) / "logits.npy"
            reply = self._worker.ask("score", self._ask_s, ids=list(ids), path=str(path))
            if reply["kind"] == "logits":
                return Scored(np.load(path).astype(np.float32, copy=False))
        return Scored(None, [{int(token): float(logprob) for token, logprob in entry} for entry in reply["top"]])

    def greedy(self, ids: Sequence[int], count: int) -> Written:
        """Its greedy text; with log-probabilities where it has the operation for them."""
        if self.basis == "generated":
            reply = self._worker.ask("greedy", self._ask_s, ids=list(ids), new=count)
            top = [{int(token): float(logprob) for token, logprob in entry} for entry in reply["top"]]
            return Written(reply["tokens"], top)
        return Written(self._worker.ask("run", self._ask_s, prompts=[list(ids)], new=count, keep=False)["tokens"][0])


class Reference:
    """An engine in float32 that others are held against; its logits are kept while there is room."""

    def __init__(self, worker: Worker, description: str) -> None:
        self.worker, self.description = worker, description
        self._scorer = EngineScorer(worker, ["run", "score"], "reference", "f32", "")
        self._kept: dict[tuple[int, ...], Logits] = {}

    def score(self, ids: Sequence[int]) -> Logits:
        """Float32 [T, V]."""
        key = tuple(ids)
        if key not in self._kept:
            logits = self._scorer.score(ids).logits
            assert logits is not None
            while self._kept and logits.nbytes + sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = logits
        return self._kept[key]

    def sample(self, ids: list[int], count: int, seed: int) -> list[int]:
        """A continuation at temperature 1; finial's own adapter alone has it."""
        tokens: list[int] = self.worker.ask("sample", ASK_S, ids=ids, new=count, seed=seed)["tokens"]
        return tokens

    def close(self) -> None:
        """End its process."""
        self._kept = {}
        self.worker.close()


def open_worker(
    command: Sequence[str], variables: Mapping[str, str], **load: Any
) -> tuple[Worker, list[str], dict[str, Any]]:
    """A loaded engine, its operations and its answer to `load`.

    Raises:
        WorkerError: it does not start or does not load; nothing is left running.
    """
    worker = Worker(command, variables)
    try:
        operations: list[str] = worker.ask("hello", LOAD_S)["operations"]
        return worker, operations, worker.ask("load", LOAD_S, **load)
    except BaseException:
        worker.kill()
        raise


def open_reference(
    model: Path, kind: str = "auto", threads: int = 2, context: int = WINDOW + GREEDY, format: str | None = None
) -> Reference:
    """finial in float32 on the model's own weights.

    Args:
        kind: "reference" (NumPy), "cpu" (all in float32), or "auto": cpu for more than `LARGE` parameters.
        format: round the weights to it first: held against the plain one, that shows the format alone.
    Raises:
        ModelError: a format that only the cpu backend's own rounding could show.
        WorkerError: it does not load.
    """
    kind = reference_kind(model) if kind == "auto" else kind
    if kind == "cpu" and format is not None:
        raise ModelError(f"the rounding of {format} alone needs the reference backend", fix="use --reference reference")
    options = {"backend": kind, "kv_format": "f32", "format": "f32" if kind == "cpu" else format}
    given = {name: value for name, value in options.items() if value is not None}
    worker, _ = _in_float32(OWN, Places(Path(), Path()), model, threads, context, given)  # found without either
    described = {
        "reference": "finial's reference backend (NumPy), float32 throughout",
        "cpu": "finial's cpu backend with weights, KV cache and sums in float32",
    }
    return Reference(worker, described[kind])


def _in_float32(
    engine: Engine, places: Places, model: Path, threads: int, context: int, options: dict[str, Any]
) -> tuple[Worker, dict[str, Any]]:
    """An engine's process with the model loaded for one sequence, and what it said of that."""
    worker, _, loaded = open_worker(
        engine.command(places),
        engine.process_environment(threads),
        model=str(model),
        format="f32",
        threads=threads,
        context=context,
        sequences=1,
        cache=True,
        options=options,
    )
    return worker, loaded


def open_transformers(model: Path, places: Places, threads: int = 2, context: int = WINDOW + GREEDY) -> Reference:
    """transformers in float32.

    Raises:
        WorkerError: it is not installed, or does not load.
    """
    engine = ENGINES["transformers eager"]
    reason = missing(engine, places)
    if reason:
        raise WorkerError(f"{engine.name}: {reason}")
    worker, loaded = _in_float32(engine, places, model, threads, context, {})
    return Reference(worker, f"{loaded['version']} in float32")


def reference_kind(model: Path) -> str:
    """What "auto" means for a model."""
    layout = open_checkpoint(model).layout
    return "reference" if sum(math.prod(shape) for _, shape in layout.values()) <= LARGE else "cpu"


class Judge:
    """Verdicts on engines that run one model, against one reference that is opened when the first is asked for.

    Args:
        model: the checkpoint that all engines' files were made from.
        texts: of `TEXTS`, or paths of text files.
        reference: of `REFERENCES`; transformers scores texts that finial's own reference has sampled.
        limit: ids of each text at most; window: of those that are scored together.
        positions: that the reference must hold at least.
        places: where transformers is; needed for no other reference.
        ask_s: seconds that an engine's answer may take.
        say: told what takes long.
    Raises:
        RequestError: a reference that there is not.
    """

    def __init__(
        self,
        model: Path,
        texts: Sequence[str] = ("sampled",),
        reference: str = "auto",
        threads: int = 2,
        *,
        limit: int = SAMPLED,
        greedy: int = GREEDY,
        window: int = WINDOW,
        positions: int = 0,
        rounding: bool = False,
        places: Places | None = None,
        ask_s: float = ASK_S,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if reference not in REFERENCES:
            raise RequestError(f"no reference {reference!r}", fix=f"choose from {', '.join(REFERENCES)}")
        self._model, self._names, self._kind, self._threads = model, list(texts), reference, threads
        self._limit, self._greedy, self._rounding = limit, greedy, rounding
        self._places, self._ask_s, self._say = places or Places(Path(), Path()), ask_s, say
        self._checkpoint: Checkpoint = open_checkpoint(model)
        most = self._checkpoint.config.max_context
        self._window = min(window, most - greedy)
        self._positions = max(self.context, min(positions, most))
        self._reference: Reference | None = None
        self._rounded: dict[str, Reference] = {}
        self._texts: list[Text] = []

    @property
    def context(self) -> int:
        """Positions that an engine must be loaded with."""
        return self._window + self._greedy

    def verdict(
        self, worker: Asked, operations: Sequence[str], engine: str, format: str, precision: str
    ) -> list[Quality]:
        """One for each text.

        Raises:
            WorkerError: the engine or the reference failed; the message says which and why.
        """
        reference = self._open()
        scorer = EngineScorer(worker, operations, engine, format, precision, self._ask_s)
        rounded = self._round(format)
        found = []
        for text in self._texts:
            self._say(f"{engine} {format}: {text.name}, {text.tokens} tokens")
            found.append(assess(reference, scorer, text, self._greedy, rounded))
        return found

    def along(self, prompt: Sequence[int], tokens: Sequence[int]) -> Logits:
        """The reference's predictions for each token of a continuation: float32 [len(tokens), V]."""
        return self._open().score([*prompt, *tokens])[len(prompt) - 1 : -1]

    def _open(self) -> Reference:
        if self._reference is None:
            self._say("loading the reference")
            own = "auto" if self._kind == "transformers" else self._kind
            reference = open_reference(self._model, own, self._threads, self._positions)
            try:
                self._texts = [self._text(name, reference) for name in self._names]
            except BaseException:
                reference.close()
                raise
            if self._kind == "transformers":
                reference.close()
                reference = open_transformers(self._model, self._places, self._threads, self._positions)
            self._reference = reference
        return self._reference

    def _text(self, name: str, reference: Reference) -> Text:
        tokenizer = _tokenizer(self._checkpoint)
        if name == "sampled":
            self._say(f"sampling {self._limit} tokens from the reference")
            vocab_size = self._checkpoint.config.vocab_size
            return sampled_text(reference.sample, tokenizer, vocab_size, self._limit, self._window)
        if tokenizer is None:
            raise ModelError(f"{self._model} has no tokenizer", fix="use --text sampled")
        if name == "passage":
            return passage_text(tokenizer, self._window, self._limit)
        return file_text(Path(name), tokenizer, self._window, self._limit)

    def _round(self, format: str) -> Reference | None:
        """A reference on rounded weights, where that is asked for and can be made."""
        if not self._rounding or format not in ("f16", "bf16", "q8_0", "q4_0"):
            return None
        if format not in self._rounded:
            self._rounded[format] = open_reference(self._model, "reference", self._threads, self.context, format)
        return self._rounded[format]

    def close(self) -> None:
        """End the references' processes."""
        for opened in [self._reference, *self._rounded.values()]:
            if opened is not None:
                opened.close()
        self._reference, self._rounded = None, {}

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        return checkpoint.text()
    except FinialError:
        return None


def usable_threads() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
