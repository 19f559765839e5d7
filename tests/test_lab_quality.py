"""Quality: what a verdict says of engines that give logits, a few log-probabilities, or tokens alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finial.cli import invoke
from finial.errors import FileError, ModelError, RequestError
from finial.files.checkpoint import open_checkpoint
from finial.lab.engines.table import ENGINES, Places
from finial.lab.quality import BASES, Quality, Scored, Written, assess, not_the_models
from finial.lab.quality_engines import judge_all
from finial.lab.quality_run import EngineScorer, Judge, open_worker, reference_kind
from finial.lab.quality_texts import Text, cut, file_text, passage_text, sampled_text
from finial.lab.worker import WorkerError

VOCABULARY = 40
DEMO = Places(Path(), Path()).checkpoint("demo")
TEXT = Text("test", "a test", (tuple(range(30)), tuple(range(5, 25))))


class Toy:
    """A language model of one matrix: the next token depends on the last one."""

    description = "the toy itself"
    engine, format, precision = "toy", "f32", "float32"

    def __init__(self, basis: str = "logits", noise: float = 0.0, seed: int = 0) -> None:
        self.basis = basis
        draw = np.random.default_rng(0)
        self.table = (3 * draw.normal(size=(VOCABULARY, VOCABULARY))).astype(np.float32)
        self.table += (noise * np.random.default_rng(seed + 1).normal(size=self.table.shape)).astype(np.float32)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.table[list(ids)]

    def top(self, ids: Sequence[int], count: int = 6) -> list[dict[int, float]]:
        found = []
        for row in self.logits(ids).astype(np.float64):
            logprobs = row - np.log(np.exp(row).sum())
            found.append({int(i): float(logprobs[i]) for i in np.argsort(-row)[:count]})
        return found

    def score(self, ids: Sequence[int]) -> Any:
        return Scored(self.logits(ids)) if self.basis == "logits" else Scored(None, self.top(ids))

    def greedy(self, ids: Sequence[int], count: int) -> Written:
        tokens, last = [], ids[-1]
        for _ in range(count):
            last = int(self.table[last].argmax())
            tokens.append(last)
        return Written(tokens, self.top([ids[-1], *tokens[:-1]]) if self.basis == "generated" else ())


class Exactly(Toy):
    """The same as a reference."""

    def score(self, ids: Sequence[int]) -> Any:
        return self.logits(ids)


def test_one_choice_says_nothing_of_rounded_weights() -> None:
    """A model of random weights that repeats itself: rounding moved its one choice to where a random one might be."""
    rows = np.random.default_rng(3).normal(size=(16, VOCABULARY)).astype(np.float32)
    repeated = [(row[None].repeat(9, 0), [int(np.abs(row - row.mean()).argmin())] * 9) for row in rows]
    assert not_the_models("text", repeated[:1], "q4_0") == not_the_models("text", repeated[:3], "q4_0") == ""
    assert "of the way to random tokens" in not_the_models("text", repeated[:8], "q4_0")
    assert not_the_models("text", [*repeated[:1], (rows, rows.argmax(-1).tolist())], "q4_0") == ""
    good = [(rows, rows.argmax(-1).tolist())] * 7
    assert not_the_models("text", [*good, *repeated[:1]], "bf16"), "as stored, one text among many is enough"
    assert not_the_models("text", good, "stored") == ""


def judged(basis: str, noise: float, **changes: Any) -> Quality:
    return assess(Exactly(), Toy(basis, noise, **changes), TEXT, greedy=20)


# --- what each basis gives ---------------------------------------------------------------------------------------


def test_an_engine_equal_to_the_reference_is_equal_on_every_basis() -> None:
    for basis in BASES:
        quality = judged(basis, 0.0)
        assert quality.basis == basis and quality.verdict.top1 == 1.0 and quality.greedy_agreement == 1.0
        assert quality.verdict.divergence is None and quality.repeat_same_text and quality.flaws == []
        if basis == "tokens":
            assert math.isnan(quality.verdict.kl_mean) and quality.verdict.perplexity is None
        else:
            assert quality.verdict.kl_max < 1e-6 and quality.verdict.top5 == 1.0


def test_bounds_stay_below_the_divergence_and_agreement_is_exact() -> None:
    whole, part = judged("logits", 0.4), judged("top", 0.4)
    assert 0 < part.verdict.kl_mean < whole.verdict.kl_mean
    assert part.verdict.top1 == whole.verdict.top1 < 1 and part.verdict.top5 == pytest.approx(whole.verdict.top5)
    assert part.top == 6 and whole.top == 0 and whole.tokens == 50
    assert whole.repeat_kl_max == 0.0 and part.repeat_kl_max is None


def test_tokens_alone_tell_where_a_text_parts_and_how_often_it_agrees() -> None:
    quality = next(q for q in (judged("tokens", 1.0, seed=s) for s in range(20)) if q.verdict.divergence is not None)
    parted = quality.verdict.divergence
    assert parted is not None and parted.margin > 0 and quality.greedy_agreement < 1
    assert quality.verdict.top1 == quality.greedy_agreement and quality.to_dict()["verdict"]["kl_mean"] is None


def test_an_engine_that_offers_generated_logprobs_but_gives_none_is_judged_by_tokens() -> None:
    toy = Toy("generated")
    toy.top = lambda ids, count=6: []  # type: ignore[method-assign]
    assert assess(Exactly(), toy, TEXT, greedy=8).basis == "tokens"


def test_broken_logits_are_named() -> None:
    toy = Toy()
    toy.table[7] = np.nan
    quality = assess(Exactly(), toy, TEXT, greedy=8)
    assert "not numbers at 2 of 50" in quality.flaws[0]
    assert json.loads(json.dumps(quality.to_dict(), allow_nan=False))["verdict"]["kl_mean"] is None


def test_another_vocabulary_is_an_error_not_a_number() -> None:
    toy = Toy()
    toy.table = toy.table[:, :-1]
    with pytest.raises(ModelError, match=r"\[30, 39\]"):
        assess(Exactly(), toy, TEXT, greedy=8)


def test_the_formats_share_is_told_apart() -> None:
    quality = assess(Exactly(), Toy(noise=0.5), TEXT, greedy=8, rounding=_Rounded(noise=0.5))
    assert quality.rounding is not None and quality.rounding.kl_mean == quality.verdict.kl_mean > 0


class _Rounded(Exactly):
    description = "rounded"


# --- texts -------------------------------------------------------------------------------------------------------


def test_windows_leave_no_crumbs() -> None:
    assert [len(piece) for piece in cut(range(1030), 512)] == [512, 512]
    assert [len(piece) for piece in cut(range(1032), 512)] == [512, 512, 8]


def test_texts(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(DEMO).text()
    passage = passage_text(tokenizer, window=256, limit=300)
    assert passage.tokens == 300 and [len(w) for w in passage.windows] == [256, 44]
    asked: list[Any] = []

    def sample(ids: list[int], count: int, seed: int) -> list[int]:
        asked.append((ids, count, seed))
        return [9] * count

    assert sampled_text(sample, None, 100, count=20).windows == ((50, *[9] * 19),)
    assert sampled_text(sample, tokenizer, 100, count=20).tokens == 20 and asked[1][1] == 19
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times, it was the worst of times.")
    assert file_text(book, tokenizer).name == "book.txt"
    book.write_text("No")
    with pytest.raises(RequestError, match="at least 8"):
        file_text(book, tokenizer)
    with pytest.raises(FileError):
        file_text(tmp_path / "none.txt", tokenizer)


# --- engines in processes ----------------------------------------------------------------------------------------


class Asked:
    """An engine that answers as it is told."""

    def __init__(self, **replies: Any) -> None:
        self.replies = replies

    def ask(self, op: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
        if op not in self.replies:
            raise WorkerError(f"no {op} here")
        reply: dict[str, Any] = self.replies[op]
        return reply


def test_the_basis_is_what_an_engine_turns_out_to_give() -> None:
    def basis(operations: list[str], **replies: Any) -> str:
        return EngineScorer(Asked(**replies), operations, "e", "f", "p").basis

    assert basis(["run"]) == "tokens"
    assert basis(["run", "score"], score={"kind": "top", "top": [[], [], []]}) == "top"
    assert basis(["run", "score", "greedy"]) == "generated", "it promised to score, and cannot"
    assert basis(["run", "score"]) == "tokens"


def test_finial_against_its_reference_in_processes_of_their_own() -> None:
    assert reference_kind(DEMO) == "reference"
    own = ENGINES["finial"]
    with Judge(DEMO, ["sampled"], threads=1, limit=48, greedy=12, rounding=True) as judge:
        worker, operations, loaded = open_worker(
            own.command(Places(Path(), Path())),
            own.process_environment(1),
            model=str(DEMO),
            format="q4_0",
            threads=1,
            context=judge.context,
            options={"format": "q4_0"},
        )
        try:
            (quality,) = judge.verdict(worker, operations, "finial", "q4_0", loaded["precision"])
        finally:
            worker.close()
    assert quality.tokens == 48 and quality.text == "sampled" and quality.repeat_kl_max == 0.0
    assert quality.rounding is not None
    # Four bits cost what they cost; the engine adds little to that.
    assert 1e-3 < quality.verdict.kl_mean < 0.1
    assert quality.verdict.kl_mean == pytest.approx(quality.rounding.kl_mean, rel=0.3)
    assert quality.verdict.perplexity is not None and quality.verdict.perplexity.tokens == 47


def test_what_cannot_be_judged_is_said(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "engines": ["finial"],
        "formats": ["stored"],
        "texts": ["sampled"],
        "limit": 16,
        "greedy": 4,
        "reference": "auto",
        "backend": "cpu",
        "threads": 1,
        "rounding": False,
        "url": None,
        "say": print,
        "places": Places(tmp_path / "engines", tmp_path / "models"),
    }
    for changes, words in (
        ({"reference": "oracle"}, "oracle"),
        ({"engines": ["lama"]}, "lama"),
        ({"engines": ["server"]}, "address"),
        ({"formats": ["q9"]}, "q9"),
    ):
        with pytest.raises(RequestError, match=words):
            judge_all(DEMO, **(given | changes))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    arguments = ["quality", "demo", "--format", "q8_0", "--text", "passage", "--tokens", "40", "--greedy", "6"]
    assert invoke([*arguments, "--threads", "1", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "NumPy" in shown and "top-5" in shown and "perplexity" in shown and "of 6 tokens" in shown
    (verdict,) = json.loads(out.read_text())
    assert verdict["basis"] == "logits" and verdict["tokens"] == 40 and 0 < verdict["verdict"]["kl_mean"] < 1e-3
    assert invoke(["quality", "demo", "--engine", "lama"]) == 2
