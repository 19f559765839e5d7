"""The public object: a model by name, and text or tokens out of it.

Puts checkpoint, graph, backend and engine together and sizes the cache; each of them does its own work.

    with LLM("demo") as llm:
        print(llm.generate("ROMEO:", max_tokens=50).text)
"""

from __future__ import annotations

import difflib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from finial.backends import Timing
from finial.config import ModelConfig
from finial.cost import kv_bytes_per_token
from finial.engine.generate import Engine
from finial.engine.handle import Handle, Pooling
from finial.engine.results import AsyncStream, Completion, Score, Stream
from finial.engine.sampling import SamplingParams
from finial.errors import ModelError, RequestError
from finial.executor import compile_graph, device_memory
from finial.files.checkpoint import GenerationDefaults, open_checkpoint
from finial.files.hub import resolve
from finial.files.text import Text
from finial.loading import check_positive, free_memory, gigabytes, has_tokenizer, size_cache, trim_heap, weights_in
from finial.models.decoder import build_graph, constants

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_OPTIONS = tuple(field.name for field in fields(SamplingParams))


@dataclass(frozen=True)
class Info:
    """What was loaded, and how.

    Attributes:
        backend: that runs it, as chosen ("cpu", "cuda+cpu", …).
        format: of the matrices; several joined by "+" where the checkpoint mixes them.
        weight_bytes: of all weights in their formats; kv_bytes: reserved for the cache.
        cache_tokens: positions the cache has, for all sequences together.
        generation: the sampling its makers recommend; not applied by itself.
        tokenizer: False when the checkpoint has none: then only token ids go in and out.
    """

    model: str
    path: Path
    config: ModelConfig
    backend: str
    format: str
    kv_format: str
    threads: int | None
    load_s: float
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    cache_tokens: int
    max_context: int
    max_batch: int
    cache: bool
    generation: GenerationDefaults
    tokenizer: bool


class LLM:
    """A loaded model.

    Args:
        model: "demo", a directory, a .gguf file, or `owner/name[@revision]` on the hub.
        backend: "auto", or a name of `finial.backends.BACKENDS` ("cuda:1": on the second GPU); several joined by "+".
        format: re-encode all matrices to this weight format; None: as stored.
        threads: of the cpu backend; None: its choice.
        max_context: positions of one sequence, prompt and generated together.  None: the model's own limit, or
            what a quarter of the free memory holds when that is less.
        kv_format: what keys and values are rounded to, "bf16", "f32" or "q8_0".
        cache: False recomputes the whole sequence for each token, to see what the cache is worth.
        prefix_reuse: take the beginning of a prompt from the cache where an earlier sequence left it.
        prefix_bytes: of the cache, at most so many are kept for that when no sequence holds them; None: all that is
            free.
        stall_s: by how much a step may become longer, for those who generate, through prompts of others: longer ones
            are split further.  None: only max_step_tokens counts.
        max_batch: sequences computed side by side.
        max_step_tokens: rows of one step; longer prompts are split.
        page_size: positions of one cache page.
        hidden: give out hidden states too, for `embed`.
        reserve: take the memory of the whole cache now; otherwise it is taken as positions are written.

    Sampling options of all methods below are those of `SamplingParams`; greedy unless `temperature` is given.

    Raises:
        FileError, ModelError, BackendError: the model cannot be found, read or run; says why and what to do.
        RequestError: sizes that do not fit the model or the memory, with the numbers.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        *,
        backend: str = "auto",
        format: str | None = None,
        threads: int | None = None,
        max_context: int | None = None,
        kv_format: str = "bf16",
        cache: bool = True,
        prefix_reuse: bool = True,
        prefix_bytes: int | None = None,
        stall_s: float | None = None,
        max_batch: int = 8,
        max_step_tokens: int = 512,
        page_size: int = 32,
        hidden: bool = False,
        reserve: bool = False,
    ) -> None:
        started = time.perf_counter()
        path = resolve(os.fspath(model))
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        graph = build_graph(config, kv_format, hidden=hidden)
        weights = weights_in(checkpoint, format)
        weight_bytes = sum(tensor.nbytes for tensor in weights.values())
        formats = dict.fromkeys(tensor.format for tensor in weights.values() if len(tensor.shape) == 2)
        token_bytes = kv_bytes_per_token(graph)
        check_positive(max_batch=max_batch, page_size=page_size, max_step_tokens=max_step_tokens)
        free = device_memory(backend)
        free = free_memory() if free is None else free
        context, pages = size_cache(
            config.max_context,
            token_bytes,
            free=None if free is None else free - weight_bytes,
            max_context=max_context,
            max_batch=max_batch,
            page_size=page_size,
        )
        executable = compile_graph(graph, {**weights, **constants(config)}, backend, threads)
        self._executable = executable
        self._text = checkpoint.text() if has_tokenizer(checkpoint) else None
        generation = checkpoint.generation
        del checkpoint, weights  # with the strings of a GGUF file's vocabulary, before the cache takes memory
        trim_heap()
        ends = (*generation.eos_ids, *(self._text.eos_ids if self._text is not None else ()))
        self._engine = Engine(
            executable,
            pages=pages,
            page_size=page_size,
            vocab_size=config.vocab_size,
            max_context=context,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            cache=cache,
            prefix_reuse=prefix_reuse,
            prefix_pages=None if prefix_bytes is None else prefix_bytes // (token_bytes * page_size),
            stall_s=stall_s,
            eos_ids=ends,
            hidden=hidden,
        )
        if reserve:
            executable.take()
        self.info = Info(
            model=str(model),
            path=path,
            config=config,
            backend=executable.backend,
            format="+".join(formats),
            kv_format=kv_format,
            threads=threads,
            load_s=time.perf_counter() - started,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=token_bytes,
            kv_bytes=executable.state_bytes,
            cache_tokens=pages * page_size,
            max_context=context,
            max_batch=max_batch,
            cache=cache,
            generation=generation,
            tokenizer=self._text is not None,
        )

    @property
    def engine(self) -> Engine:
        """The loop below, for who submits and drives it by himself, as a server does."""
        return self._engine

    def profile(self, on: bool = True) -> None:
        """From now on note what each operation of a step takes, from zero; or stop noting.  See `timings`."""
        self._executable.profile(on)

    @property
    def notes(self) -> list[str]:
        """What the backend has to say of how it runs, a line each: on cuda, which way it decodes and why."""
        return self._executable.notes

    def timings(self) -> list[Timing]:
        """What was noted since `profile()`, in the order of a step; nothing but on the cpu backend."""
        return self._executable.timings()

    @property
    def tokenizer(self) -> Text:
        """The tokenizer; ModelError when the checkpoint has none."""
        if self._text is None:
            raise ModelError(
                f"{self.info.path} has no tokenizer, so text cannot become tokens",
                fix="pass token ids, or add tokenizer.json to the model",
            )
        return self._text

    # --- one or many prompts ----------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str | Sequence[int], **sampling: Any) -> Completion: ...

    @overload
    def generate(self, prompts: Sequence[str] | Sequence[Prompt], **sampling: Any) -> list[Completion]: ...

    def generate(self, prompts: Any, **sampling: Any) -> Completion | list[Completion]:
        """Continue a prompt (text or token ids) or each of a list of prompts, which are computed side by side.

        Returns:
            one Completion for one prompt, a list for a list; with n > 1 each has that many `choices`.
        Raises:
            RequestError: an option, prompt or length that cannot be honoured.
            KeyboardInterrupt: on Ctrl-C, with everything cancelled.  Use `stream` to keep what came until then.
        """
        groups, single = self._submit_all(prompts, sampling)
        with self._cancelling(groups):
            self._engine.finish(handle for group in groups for handle in group)
        done = [Completion.of(group) for group in groups]
        return done[0] if single else done

    async def agenerate(self, prompts: Any, **sampling: Any) -> Any:
        """As `generate`; tasks that wait at the same time are computed in the same steps."""
        groups, single = self._submit_all(prompts, sampling)
        with self._cancelling(groups):
            await self._engine.finish_async(handle for group in groups for handle in group)
        done = [Completion.of(group) for group in groups]
        return done[0] if single else done

    def stream(self, prompt: Prompt, **sampling: Any) -> Stream:
        """The pieces of one continuation as they come: `piece.text`, `piece.token`; `completion` at any time."""
        return Stream(self._engine, self._submit_one(prompt, sampling))

    def astream(self, prompt: Prompt, **sampling: Any) -> AsyncStream:
        """As `stream`, for `async for`."""
        return AsyncStream(self._engine, self._submit_one(prompt, sampling))

    # --- conversations ----------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Completion:
        """Answer a conversation through the model's chat template.

        Args:
            messages: dicts with `role` and `content`.
            tools: JSON schemas of functions, for templates that know them.
            template_options: variables of the template, such as {"enable_thinking": False}.
        """
        handles = self._submit_chat(messages, tools, template_options, sampling)
        with self._cancelling([handles]):
            self._engine.finish(handles)
        return Completion.of(handles)

    async def achat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Completion:
        """As `chat`, from a task."""
        handles = self._submit_chat(messages, tools, template_options, sampling)
        with self._cancelling([handles]):
            await self._engine.finish_async(handles)
        return Completion.of(handles)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Stream:
        """As `chat`, in pieces."""
        _one_choice(sampling)
        return Stream(self._engine, self._submit_chat(messages, tools, template_options, sampling)[0])

    def astream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Message] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> AsyncStream:
        """As `stream_chat`, for `async for`."""
        _one_choice(sampling)
        return AsyncStream(self._engine, self._submit_chat(messages, tools, template_options, sampling)[0])

    # --- scoring ----------------------------------------------------------------------------------------------

    def score(self, tokens: Prompt) -> Score:
        """Teacher-forced logits, float32 [T, vocab], of a text or of token ids.

        Raises:
            RequestError: also when the result would not fit the free memory.
        """
        ids = self._encode(tokens)
        need, free = len(ids) * self.info.config.vocab_size * 4 * 2, free_memory()  # collected, then joined
        if free is not None and need > free:
            raise RequestError(
                f"logits of {len(ids)} positions take {gigabytes(need)}, {gigabytes(free)} is free",
                fix="score fewer tokens at a time, or ask generate for prompt_logprobs",
            )
        handle = self._engine.submit(ids, SamplingParams(max_tokens=0), keep_logits=True)
        with self._cancelling([[handle]]):
            self._engine.finish([handle])
        if handle.error is not None:
            raise handle.error
        return Score(ids, np.concatenate(handle.prompt_logits))

    def embed(self, texts: Prompt | Sequence[Prompt], pooling: Pooling = "last") -> NDArray[np.float32]:
        """Vectors of length 1, float32 [texts, hidden_size], from what the model's head would read.

        Args:
            texts: a text or token ids, or a list of such.
            pooling: "last": the state of the last token, which has seen all others; "mean": the mean over all tokens.
        Raises:
            RequestError: a model opened without hidden=True; otherwise as `generate`.
        """
        prompts: Any = [texts] if isinstance(texts, str) or _is_ids(texts) else texts
        handles: list[Handle] = []
        with self._cancelling([handles]):
            for prompt in prompts:
                handles.append(self._engine.embed(self._encode(prompt), pooling))
            self._engine.finish(handles)
        return np.stack([normalised(handle) for handle in handles]) if handles else np.empty((0, 0), np.float32)

    # --- the end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel everything and let go of the model.  A second call does nothing."""
        self._engine.close()
        self.__dict__.pop("_executable", None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- requests ---------------------------------------------------------------------------------------------

    def _submit_all(self, prompts: Any, sampling: dict[str, Any]) -> tuple[list[list[Handle]], bool]:
        single = isinstance(prompts, str) or _is_ids(prompts)
        if not single and (isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence | np.ndarray)):
            raise RequestError(
                f"a prompt of type {type(prompts).__name__}",
                fix="pass a string, a list of token ids, or a list of those",
            )
        params = _params(sampling)
        encoded = [self._encode(prompt) for prompt in ([prompts] if single else prompts)]
        groups: list[list[Handle]] = []
        with self._cancelling(groups):
            for ids in encoded:
                groups.append([])
                self._submit(ids, params, groups[-1], continues=True)
        return groups, single

    def _submit_one(self, prompt: Prompt, sampling: dict[str, Any]) -> Handle:
        _one_choice(sampling)
        handles: list[Handle] = []
        self._submit(self._encode(prompt), _params(sampling), handles, continues=True)
        return handles[0]

    def _submit_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        template_options: Mapping[str, Any] | None,
        sampling: dict[str, Any],
    ) -> list[Handle]:
        params = _params(sampling)
        template = self.tokenizer.chat_template
        if template is None:
            raise RequestError(
                f"{self.info.model} has no chat template", fix="it continues text: use generate with a prompt"
            )
        prompt = template.render(messages, tools, **(template_options or {}))
        handles: list[Handle] = []
        with self._cancelling([handles]):
            self._submit(self.tokenizer.encode(prompt, add_special=False), params, handles, continues=False)
        return handles

    def _submit(self, ids: list[int], params: SamplingParams, into: list[Handle], *, continues: bool) -> None:
        for sample in range(params.n):
            if sample == 1:  # one seed for all choices, and the prompt is scored once
                params = replace(params, seed=into[0].seed, prompt_logprobs=None)
            detokenizer = None if self._text is None else self._text.detokenizer(continues=continues)
            into.append(self._engine.submit(ids, params, detokenizer=detokenizer, sample=sample))

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            if not ids:
                raise RequestError("the prompt is empty: 0 tokens", fix="give the model something to continue")
            return ids
        if isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
            return list(prompt)  # the engine checks every id
        raise RequestError(f"a prompt of type {type(prompt).__name__}", fix="pass a string or a list of token ids")

    @contextmanager
    def _cancelling(self, groups: list[list[Handle]]) -> Iterator[None]:
        """Whatever goes wrong inside, nobody waits for these any more."""
        try:
            yield
        except BaseException:
            for group in groups:
                for handle in group:
                    if not handle.finished:
                        self._engine.cancel(handle)
            raise


def normalised(handle: Handle) -> NDArray[np.float32]:
    """The embedding of a finished sequence, of length 1; raises the error of one that failed."""
    if handle.error is not None:
        raise handle.error
    vector = handle.embedding
    assert vector is not None, "an embedding of an unfinished sequence"
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length) or length == 0.0:
        raise ModelError(
            f"the model's hidden state has the length {length}", fix="the weights are damaged: fetch the model again"
        )
    return (vector / length).astype(np.float32)


def _params(sampling: dict[str, Any]) -> SamplingParams:
    for name in sampling:
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, 1)
            fix = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_OPTIONS)}"
            raise RequestError(f"unknown option {name}={sampling[name]!r:.40}", fix=fix)
    return SamplingParams(**sampling)


def _one_choice(sampling: dict[str, Any]) -> None:
    if sampling.get("n", 1) != 1:
        raise RequestError(f"n={sampling['n']} in a stream, which is one continuation", fix="use generate or chat")


def _is_ids(prompts: Any) -> bool:
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    return (
        isinstance(prompts, Sequence)
        and not isinstance(prompts, str | bytes)
        and all(isinstance(token, int | np.integer) for token in prompts)
    )
