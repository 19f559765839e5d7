"""A request in, a reply or a stream of chunks out: what the server and `finial batch` have in common.

Knows one model, its engine thread and the bound of its queue; nothing of HTTP.

    service = Service(llm); await service.start()
    async with await service.chat(request) as run:
        reply = await run.reply()                       # or: async for chunks in run.chunks()
    await service.close()
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from finial.engine.handle import Handle
from finial.llm import LLM, normalised
from finial.roofline import measure_read, step_reads
from finial.serve.engine_thread import EngineThread, Watch
from finial.serve.metrics import Meter
from finial.serve.prompts import TEMPLATE_OPTIONS, Prepared, Preparer
from finial.serve.replies import Embedding, EmbeddingReply, EmbeddingUsage, Facts, Model, ModelList
from finial.serve.runs import ChatRun, Run, TextRun
from finial.serve.wire import (
    MAX_INPUTS,
    BusyError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    InvalidRequest,
    UnavailableError,
    checked,
    texts,
)

MAX_QUEUE = 128  # sequences that may wait beside those that are computed
PREPARING_THREADS = 2  # tokenisation leaves Python's lock alone, templates do not

SomeRun = TypeVar("SomeRun", bound=Run)
Answer = TypeVar("Answer")


class Service:
    """Answers requests with one model.

    Args:
        name: of the model, in replies; requests may name it or no model at all.
        max_queue: sequences that may wait; more are refused with BusyError.
        template_options: variables of the chat template that requests may set.
        meter: counts tokens; None: one of its own.
        measure: measure the machine's read bandwidth now, with all cores for a third of a second, and tell clients.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        name: str | None = None,
        max_queue: int = MAX_QUEUE,
        template_options: Iterable[str] = TEMPLATE_OPTIONS,
        meter: Meter | None = None,
        measure: bool = False,
    ) -> None:
        self.llm = llm
        self.name = name if name is not None else llm.info.model
        self.created = int(time.time())
        self.draining = False
        on_cpu = "cpu" in llm.info.backend.split("+")
        self.thread = EngineThread(llm.engine, meter, keep_core=on_cpu and llm.info.threads != 1)
        self.preparer = Preparer(llm, template_options)
        self.limit = llm.info.max_batch + max_queue
        self._preparing = 0  # sequences whose prompts are being made
        self._runs: set[Run] = set()
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="finial-prepare")
        self._facts = self._measure() if measure else UNSET

    @property
    def waiting(self) -> int:
        """Sequences that are not finished, those included whose prompts are being made."""
        return self.thread.engine.unfinished + self._preparing

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread against its will."""
        return self.thread.failure

    async def start(self) -> None:
        """Begin; the running event loop is the one that all requests come from."""
        self.thread.start(asyncio.get_running_loop())

    async def close(self) -> None:
        """End everything, whatever is unfinished; the model stays open."""
        for run in list(self._runs):
            run.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self.thread.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.preparer.close()

    def models(self) -> ModelList:
        """The one model there is."""
        info = self.llm.info
        return ModelList([Model(self.name, self.created, "finial", info.max_context, self._facts)])

    def _measure(self) -> Facts:
        info, reads = self.llm.info, step_reads(self.llm, rows=1, length=0)
        read = measure_read(self.llm, reads)
        return Facts(
            format=info.format,
            backend=info.backend,
            thinking=self.preparer.reasoning,
            step_bytes=reads,
            kv_bytes_per_token=info.kv_bytes_per_token,
            read_gb_s=None if read is None else read.gb_s,
        )

    async def chat(self, request: ChatRequest, client: str = "") -> ChatRun:
        """Begin to answer a conversation.

        Args:
            client: whose request it is: clients take turns.
        Raises:
            BusyError, UnavailableError; InvalidRequest and other RequestErrors: what cannot be honoured.
        """
        checked(request)
        return await self._begin(ChatRun, request, request.n or 1, lambda: self.preparer.chat(request), client)

    async def complete(self, request: CompletionRequest, client: str = "") -> TextRun:
        """Begin to continue one prompt or many; as `chat`."""
        checked(request)
        prompts = len(texts(request.prompt, "prompt", 2**31))
        count = prompts * (request.n or 1)
        return await self._begin(TextRun, request, count, lambda: self.preparer.completion(request), client)

    async def embed(self, request: EmbeddingRequest, client: str = "") -> EmbeddingReply:
        """Vectors for texts; as `chat`, but whole: who gives up waiting cancels it."""
        self._check_model(request.model)
        size = self.llm.info.config.hidden_size
        if request.dimensions not in (None, size):
            raise InvalidRequest(f"dimensions={request.dimensions}, the model has {size}", param="dimensions")
        count = len(texts(request.input, "input", MAX_INPUTS))
        prompts = await self._prepare(1, lambda: self.preparer.embedding(request))
        vectors: list[NDArray[np.float32]] = []
        # A few at a time: a request for thousands is no reason to refuse others.
        for at in range(0, count, self.llm.info.max_batch):
            watch = Watch(every=False)
            handles: list[Handle] = []
            try:
                for ids in prompts[at : at + self.llm.info.max_batch]:
                    handles.append(self.thread.embed(ids, request.pooling or "last", watch=watch, owner=client))
                for handle in handles:
                    while handle.finish_reason is None:
                        await watch.wait()
            finally:
                for handle in handles:
                    self.thread.cancel(handle)
            if any(handle.finish_reason == "cancel" for handle in handles):
                raise UnavailableError("the server ended before the answer did", "ask again")
            vectors += [normalised(handle) for handle in handles]
        plain = request.encoding_format != "base64"
        data = [
            Embedding(i, v.tolist() if plain else base64.b64encode(v.astype("<f4").tobytes()).decode())
            for i, v in enumerate(vectors)
        ]
        tokens = sum(map(len, prompts))
        return EmbeddingReply(data, self.name, EmbeddingUsage(tokens, tokens))

    async def _begin(
        self,
        kind: type[SomeRun],
        request: ChatRequest | CompletionRequest,
        count: int,
        prepare: Callable[[], Prepared],
        client: str,
    ) -> SomeRun:
        self._check_model(request.model)
        prepared = await self._prepare(count, prepare)
        run = kind(self, request, prepared, Watch(every=bool(request.stream)))
        try:
            run.submit(client)
        except BaseException:
            run.cancel()
            raise
        self._runs.add(run)
        return run

    async def _prepare(self, count: int, prepare: Callable[[], Answer]) -> Answer:
        """Make prompts off the event loop, if there is room for what they ask."""
        if self.draining:
            raise UnavailableError("the server is about to end", "ask another one, or later")
        if count > self.limit:
            raise InvalidRequest(f"the request asks for {count} texts at once, at most {self.limit}", "split it")
        waiting = self.waiting
        if waiting + count > self.limit:
            raise BusyError(waiting, 1 + waiting // 64)
        self._preparing += count
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, prepare)
        finally:
            self._preparing -= count

    def forget(self, run: Run) -> None:
        """A run has ended."""
        self._runs.discard(run)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.name):
            raise InvalidRequest(
                f"the model {name!r} is not served here",
                f"ask for {self.name!r}",
                param="model",
                code="model_not_found",
            )
