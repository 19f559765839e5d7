"""Embeddings are the hidden states that transformers computes, whatever the chunks, the batch and the backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models
from finial import LLM
from finial.errors import RequestError
from here import BACKENDS

LENGTHS = (1, 5, 40, 23)


def tokens(length: int) -> list[int]:
    return [(7 * i * i + 3 * i + length) % 160 for i in range(length)]


def expected(name: str, ids: list[int], pooling: str) -> np.ndarray:
    with torch.no_grad():
        states = models.model(name).model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    vector = states[-1] if pooling == "last" else states.mean(axis=0)
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["qwen3-tied", "llama-biases"])
def test_embeddings_equal_transformers(tmp_path: Path, name: str, pooling: str, backend: str) -> None:
    models.save(name, tmp_path, torch.float32)
    prompts = [tokens(length) for length in LENGTHS]
    how = {"max_step_tokens": 16, "max_batch": 3, "page_size": 4, "kv_format": "f32", "backend": backend}
    with LLM(tmp_path, hidden=True, **how) as llm:  # type: ignore[arg-type]
        whole = llm.embed(prompts, pooling)  # type: ignore[arg-type]
        again = llm.embed(prompts, pooling)  # type: ignore[arg-type]  # now with prefixes in the cache
        assert llm.engine.pages_held == 0
    for vector, ids in zip(whole, prompts, strict=True):
        # Both are float32 of some hundred terms a layer; the same bound as for logits, relative to a length of 1.
        assert np.abs(vector - expected(name, ids, pooling)).max() < 2e-5
    if backend == "cpu":
        assert np.array_equal(whole, again) if pooling == "last" else np.allclose(whole, again, atol=1e-6)


def test_embeddings_and_texts_share_steps() -> None:
    with LLM("demo") as plain:
        text = plain.generate("ROMEO:", max_tokens=30).text
    with LLM("demo", hidden=True, max_step_tokens=8) as llm:
        alone = llm.embed("To be, or not to be", "mean")
        handle = llm.engine.submit(llm.tokenizer.encode("ROMEO:"), None, detokenizer=llm.tokenizer.detokenizer())
        other = llm.engine.embed(llm.tokenizer.encode("To be, or not to be"), "mean")
        llm.engine.finish([other, handle])
        assert handle.text.startswith(text)
        assert other.embedding is not None
        np.testing.assert_allclose(other.embedding / np.linalg.norm(other.embedding), alone[0], atol=1e-6)


def test_a_preempted_embedding_is_the_same() -> None:
    ids = tokens(60)
    with LLM("demo", hidden=True, max_context=64, page_size=8, max_step_tokens=8) as llm:
        alone = llm.embed([ids], "mean")
        handle = llm.engine.embed(ids, "mean")
        for _ in range(3):
            llm.engine.step()
        scheduler = llm.engine._scheduler
        sequence = scheduler.running.pop()  # as the scheduler does when pages run out
        scheduler._give_back(sequence)
        scheduler.waiting.appendleft(sequence)
        llm.engine.finish([handle])
        assert handle.embedding is not None
        np.testing.assert_allclose(handle.embedding / np.linalg.norm(handle.embedding), alone[0], atol=1e-6)


def test_a_model_opened_without_hidden_states_says_so() -> None:
    with LLM("demo") as llm, pytest.raises(RequestError, match="hidden"):
        llm.embed("To be")
