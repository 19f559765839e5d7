"""The one loop: requests in, steps of the executable, pieces out.  A single prompt is a batch of one.

Knows requests and threads; nothing of files, graphs, or what is in a step (`stepping.py`).

    engine = Engine(executable, pages=64, page_size=16, vocab_size=1536, max_context=1024)
    handle = engine.submit([1, 2, 3], SamplingParams(max_tokens=8))
    engine.finish([handle]); handle.tokens

Nobody owns the loop: whoever waits for a sequence drives a step for everybody, and all others who wait meanwhile
take what that step brought them.  Asyncio tasks share steps that run in one thread of the engine's own.
"""

from __future__ import annotations

import asyncio
import operator
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from finial.engine.batch import StepBuilder
from finial.engine.handle import Constraint, Detokenizer, Handle, Pooling
from finial.engine.kvcache import PagePool
from finial.engine.pace import Pace
from finial.engine.sampling import SamplingParams
from finial.engine.scheduler import Scheduler
from finial.engine.scheduler import Sequence as Scheduled
from finial.engine.stepping import Executable, Stepper
from finial.errors import RequestError

DEFAULT_MAX_TOKENS = 256
LOGIT_BYTES = 64 << 20  # at most about this much for the logits of one chunk when all of its rows are wanted


class Engine:
    """Generation over one executable.

    Args:
        pages, page_size: the cache, in pages and positions per page.
        vocab_size: token ids are below it.
        max_context: positions of one sequence, prompt and generated together.
        max_batch: sequences computed side by side; more wait.
        max_step_tokens: rows of one step; longer prompts are split.
        cache: False recomputes every sequence from its first token for each new one.
        prefix_reuse: sequences share the full pages of a common beginning, also with those already finished.
        prefix_pages: pages at most that are kept for that when nobody holds them; None: all.
        stall_s: by how much prompts may make the steps of those who generate longer, see `Pace`; None: by any time.
        eos_ids: token ids that end a text unless `ignore_eos`.
        hidden: the executable has hidden states, so `embed` works.
    """

    def __init__(
        self,
        executable: Executable,
        *,
        pages: int,
        page_size: int,
        vocab_size: int,
        max_context: int,
        max_batch: int = 8,
        max_step_tokens: int = 512,
        cache: bool = True,
        prefix_reuse: bool = True,
        prefix_pages: int | None = None,
        stall_s: float | None = None,
        eos_ids: Iterable[int] = (),
        hidden: bool = False,
    ) -> None:
        for name, value in (
            ("pages", pages),
            ("page_size", page_size),
            ("max_context", max_context),
            ("max_batch", max_batch),
            ("max_step_tokens", max_step_tokens),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RequestError(f"{name}={value!r}", fix="pass an integer, 1 or more")
        if max_step_tokens < max_batch:
            raise RequestError(
                f"max_step_tokens={max_step_tokens} is less than max_batch={max_batch}",
                fix="each running sequence needs one row in a step: raise max_step_tokens or lower max_batch",
            )
        self.vocab_size = vocab_size
        self._pool = PagePool(pages, page_size, reuse=prefix_reuse and cache, max_idle=prefix_pages)
        self._scheduler = Scheduler(
            self._pool,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_context=max_context,
            max_logit_rows=max(1, LOGIT_BYTES // (4 * vocab_size)),
            cache=cache,
        )
        self._hidden = hidden
        self._stepper = Stepper(
            executable,
            self._scheduler,
            StepBuilder(page_size, pooled=hidden),
            None if stall_s is None else Pace(stall_s, max_step_tokens),
        )
        self._eos_ids = frozenset(eos_ids)
        self._handles = self._stepper.handles  # those not finished, in order of submission
        self._inbox: deque[Scheduled] = deque()
        self._cancelled: deque[Handle] = deque()
        self._turn = threading.Condition(threading.Lock())  # guards everything above between steps
        self._stepping = False
        self._thread: ThreadPoolExecutor | None = None
        self._shared: Future[bool] | None = None
        self._closed = False
        executable.reserve(pages, page_size)

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self._stepper.steps

    @property
    def pages_held(self) -> int:
        """Pages that unfinished sequences hold; pages kept only for reuse are not counted."""
        return self._pool.held

    @property
    def pages(self) -> int:
        """Pages of the cache."""
        return self._pool.pages

    @property
    def pages_cached(self) -> int:
        """Pages kept only for reuse."""
        return self._pool.idle

    @property
    def running(self) -> int:
        """Sequences that are computed."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return max(0, len(self._handles) - len(self._scheduler.running))

    @property
    def unfinished(self) -> int:
        """Sequences that are computed or wait."""
        return len(self._handles)

    def submit(
        self,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        detokenizer: Detokenizer | None = None,
        sample: int = 0,
        keep_logits: bool = False,
        constraint: Constraint | None = None,
        listener: Callable[[Handle], None] | None = None,
        owner: str = "",
    ) -> Handle:
        """Queue one sequence; returns at once.

        Args:
            tokens: the prompt, at least one id.
            detokenizer: a fresh one, for this sequence alone; None: its pieces have no text.
            sample: stream of random numbers under the same seed, 0 … params.n - 1; params.n itself is not looked at.
            keep_logits: keep the logits of every prompt position (Handle.prompt_logits).
            constraint: which tokens may come, for this sequence alone.
            listener: see Handle.
            owner: whose it is: owners take turns in the queue.
        Raises:
            RequestError: an id outside the vocabulary, an empty prompt, more positions than context or cache have,
                stop strings without a tokenizer, a closed engine.
        """
        params = params if params is not None else SamplingParams()
        ids = self._checked(tokens)
        params.check_vocabulary(self.vocab_size)
        if params.stop and detokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none", fix="use stop_ids")
        max_new = params.max_tokens
        if max_new is None:
            context = min(self._scheduler.max_context, self._pool.pages * self._pool.page_size)
            max_new = max(1, min(DEFAULT_MAX_TOKENS, context - len(ids)))
        self._scheduler.check_length(len(ids), max_new)
        all_logits = keep_logits or params.prompt_logprobs is not None
        sequence = Scheduled(ids, max_new, all_logits=all_logits, owner=owner)
        handle = Handle(
            sequence,
            params,
            seed=params.seed if params.seed is not None else secrets.randbits(64),
            sample=sample,
            stop_ids=frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self._eos_ids),
            detokenizer=detokenizer,
            keep_logits=keep_logits,
            submitted=time.perf_counter(),
            listener=listener,
            constraint=constraint,
        )
        if max_new == 0 and not all_logits:
            handle.end("length")
            return handle
        return self._queue(handle)

    def embed(
        self,
        tokens: Sequence[int],
        pooling: Pooling,
        *,
        listener: Callable[[Handle], None] | None = None,
        owner: str = "",
    ) -> Handle:
        """Queue one sequence whose hidden state is wanted (Handle.embedding); returns at once.

        Args:
            pooling: "last": of the last token; "mean": the mean over all of them.
        Raises:
            RequestError: as `submit`; an engine without hidden states.
        """
        if not self._hidden:
            raise RequestError(
                "hidden states were not asked for when the model was opened", fix="open it with hidden=True"
            )
        ids = self._checked(tokens)
        self._scheduler.check_length(len(ids), 0)
        sequence = Scheduled(ids, 0, pool_from=len(ids) - 1 if pooling == "last" else 0, owner=owner)
        return self._queue(
            Handle(
                sequence,
                SamplingParams(max_tokens=0),
                seed=0,
                sample=0,
                stop_ids=frozenset(),
                detokenizer=None,
                keep_logits=False,
                submitted=time.perf_counter(),
                listener=listener,
                pooling=pooling,
            )
        )

    def _queue(self, handle: Handle) -> Handle:
        with self._turn:
            if self._closed:
                raise RequestError("the engine is closed", fix="open the model again")
            self._handles[handle.sequence] = handle
            self._inbox.append(handle.sequence)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a sequence where it stands; what it produced stays.  Nothing happens to one that has ended.

        Never waits, so a destructor may call it: while a step runs, the end comes with the end of that step.
        """
        self._cancelled.append(handle)
        if self._turn.acquire(blocking=False):
            try:
                if not self._stepping:
                    self._take_in()
            finally:
                self._turn.release()

    def step(self) -> bool:
        """One step for everybody, or, while another thread is in one, its end.  False when there was nothing to do.

        An error of the executable fails the sequences of that step (Handle.error); the engine stays usable.
        """
        mine = False
        try:
            with self._turn:
                if self._stepping:
                    self._turn.wait()
                    return True
                mine = self._stepping = True
                self._take_in()
            return self._stepper.step()
        except BaseException:
            # Ctrl-C may arrive between any two lines.  Page tables that were being changed are not trusted:
            # all sequences start over from their tokens, which loses time and nothing else.
            if mine:
                with self._turn:
                    self._inbox.clear()
                    self._stepper.restart()
            raise
        finally:
            if mine:
                with self._turn:
                    self._stepping = False
                    if self._cancelled:
                        self._take_in()
                    self._turn.notify_all()

    def wait(self, handle: Handle, seen: int) -> None:
        """Drive until the handle has more than `seen` pieces or is finished."""
        while len(handle.pieces) <= seen and handle.finish_reason is None:
            worked = self.step()
            assert worked or handle.finish_reason is not None, "waiting for a sequence that this engine does not have"

    def finish(self, handles: Iterable[Handle]) -> None:
        """Drive until all handles are finished; when interrupted, they are cancelled."""
        handles = list(handles)
        try:
            for handle in handles:
                while handle.finish_reason is None:
                    self.wait(handle, len(handle.pieces))
        finally:
            for handle in handles:
                if handle.finish_reason is None:
                    self.cancel(handle)

    async def wait_async(self, handle: Handle, seen: int) -> None:
        """As `wait`, from a task: tasks that wait at the same time share the steps."""
        while len(handle.pieces) <= seen and handle.finish_reason is None:
            with self._turn:
                if self._shared is None or self._shared.done():
                    if self._thread is None:
                        self._thread = ThreadPoolExecutor(1, thread_name_prefix="finial-step")
                    self._shared = self._thread.submit(self.step)
                shared = self._shared
            # Shielded: a task that is cancelled must not take the step away from the others.
            await asyncio.shield(asyncio.wrap_future(shared))

    async def finish_async(self, handles: Iterable[Handle]) -> None:
        """As `finish`, from a task."""
        handles = list(handles)
        try:
            for handle in handles:
                while handle.finish_reason is None:
                    await self.wait_async(handle, len(handle.pieces))
        finally:
            for handle in handles:
                if handle.finish_reason is None:
                    self.cancel(handle)

    def close(self) -> None:
        """Cancel everything, end the engine's thread, let go of the executable.  A second call does nothing."""
        with self._turn:
            self._closed = True
            while self._stepping:
                self._turn.wait()
            self._cancelled.extend(self._handles.values())
            self._take_in()
            thread, self._thread = self._thread, None
            self._stepper.close()
        if thread is not None:
            thread.shutdown(wait=True)

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(token) for token in tokens]
        except TypeError:
            raise RequestError(f"{tokens!r:.80} is not a list of token ids", fix="pass integers") from None
        if not ids:
            raise RequestError("the prompt is empty: 0 tokens", fix="pass at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            at = next(i for i, token in enumerate(ids) if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"token {ids[at]} at position {at} of the prompt is outside the vocabulary of {self.vocab_size}",
                fix=f"pass ids 0 … {self.vocab_size - 1}; were these made by another model's tokenizer?",
            )
        return ids

    def _take_in(self) -> None:
        """New and cancelled sequences.  Only under the lock and between steps."""
        while self._inbox:
            sequence = self._inbox.popleft()
            self._scheduler.waiting.append(sequence, sequence.owner)
        while self._cancelled:
            handle = self._cancelled.popleft()
            if self._handles.pop(handle.sequence, None) is not None:
                self._scheduler.finish(handle.sequence)
                handle.end("cancel")
