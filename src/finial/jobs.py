"""A file of requests in, a file of answers out: OpenAI's batch format, on this machine or on Ray Data.

Answer n stands on line n, whoever computed it: only this process writes.  Knows how a line is answered and by whom; the
files are jobs_file.py's.

    with LLM("demo") as llm, JobFiles(Path("in.jsonl"), Path("out.jsonl")) as files:
        run_local(files, llm)
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from finial.errors import BackendError, FinialError
from finial.jobs_file import MAX_LINE, JobFiles, Line, custom_id

if TYPE_CHECKING:
    from finial.llm import LLM
    from finial.serve.runs import Run
    from finial.serve.service import Service
    from finial.serve.wire import Sampled

HELD = 4096  # answers that may wait for an earlier one
RAY_ROWS = 32  # lines of one task on Ray

Report = Callable[[int], None]  # so many answers more are in the file


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    body: msgspec.Raw


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: Any


class _Error(msgspec.Struct):
    code: str
    message: str


class _Answer(msgspec.Struct):
    id: str
    custom_id: Any
    response: _Response | None = None
    error: _Error | None = None


# ------------------------------------------------------------------------------------------------ answering


async def answer(service: Service, line: Line) -> bytes:
    """The answer to one line, whatever is wrong with it, as one line of JSON.

    Raises:
        EngineStopped: nothing can be answered any more.
    """
    from finial.serve.engine_thread import EngineStopped

    name = f"batch_req_{line.number:08d}"
    reply = _Answer(name, custom_id(line.text))
    try:
        if len(line.text) > MAX_LINE:
            raise FinialError(f"the line is over {MAX_LINE:,} bytes")
        request = msgspec.json.decode(line.text, type=_Request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, FinialError) as error:
        reply.error = _Error("invalid_line", str(error))
        return msgspec.json.encode(reply)
    try:
        status, body = await _respond(service, request.url, bytes(request.body))
    except EngineStopped:
        raise
    except Exception as error:
        from finial.serve.app import error_reply, status_of

        status, body = status_of(error), error_reply(error)
    reply.response = _Response(status, name, body)
    return msgspec.json.encode(reply)


async def _respond(service: Service, url: str, body: bytes) -> tuple[int, Any]:
    from finial.serve.wire import ChatRequest, CompletionRequest, EmbeddingRequest, decode

    if url == "/v1/embeddings":
        return 200, await service.embed(decode(EmbeddingRequest, body))
    run: Run
    if url == "/v1/chat/completions":
        chat = decode(ChatRequest, body)
        _check_whole(chat)
        run = await service.chat(chat)
    else:
        text = decode(CompletionRequest, body)
        _check_whole(text)
        run = await service.complete(text)
    async with run:
        return 200, await run.reply()


def _check_whole(request: Sampled) -> None:
    from finial.serve.wire import InvalidRequest

    if request.stream:
        raise InvalidRequest("stream in a batch", "leave it out", param="stream")


def run_local(files: JobFiles, llm: LLM, *, name: str | None = None, report: Report = lambda count: None) -> None:
    """Answer what is pending with a model of this process; its `max_batch` requests are computed side by side.

    Args:
        name: of the model, in requests; None: as it was opened.
    """
    asyncio.run(_run_local(files, llm, name, report))


async def _run_local(files: JobFiles, llm: LLM, name: str | None, report: Report) -> None:
    service = _service(llm, name)
    await service.start()
    try:
        pending = files.pending()
        queue: deque[asyncio.Task[bytes]] = deque()  # in order of the lines
        running: set[asyncio.Task[bytes]] = set()
        width = 2 * llm.info.max_batch  # while some are computed, the next are made ready
        while True:
            while len(running) < width and len(queue) < HELD and (line := next(pending, None)) is not None:
                queue.append(asyncio.create_task(answer(service, line)))
                running.add(queue[-1])
            if not queue:
                return
            if running:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            ready = []
            while queue and queue[0].done():
                ready.append(queue.popleft().result())
            if ready:
                files.append(ready)
                report(len(ready))
    finally:
        await service.close()


def _service(llm: LLM, name: str | None) -> Service:
    from finial.serve.service import Service

    return Service(llm, name=name, max_queue=1 << 20)  # who asks waits by itself


# ------------------------------------------------------------------------------------------------------ Ray


def run_ray(
    files: JobFiles,
    options: dict[str, Any],
    *,
    address: str,
    name: str | None = None,
    workers: int = 1,
    cpus: float = 1,
    rows: int = RAY_ROWS,
    report: Report = lambda count: None,
) -> None:
    """Answer what is pending with actors on Ray Data, each with a model of its own.

    A task that dies with its worker is done again by another; its lines are in the file once, because only this
    process writes, in order.

    Args:
        options: of `LLM`, model included; every node must find the model under that name.
        address: of a cluster ("host:6379", "ray://…"), or "local" for one on this machine that ends with the files.
        workers, cpus: how many actors, and the CPUs that each takes.
        rows: lines of one task; an actor computes them side by side.
    Raises:
        BackendError: ray is not installed, or there is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendError(f"ray cannot be imported ({error})", fix='pip install "finial[ray]"') from None
    lines = [{"number": line.number, "text": line.text} for line in files.pending()]
    if not lines:
        return
    how: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        how |= {"num_cpus": max(1, -int(-workers * cpus // 1)), "include_dashboard": False}
    try:
        ray.init(address=address, **how)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BackendError(f"no Ray cluster at {address}: {error}", fix="check the address, or use local") from None
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        answers = ray.data.from_items(lines, override_num_blocks=-(-len(lines) // rows)).map_batches(
            _RayWorker,
            fn_constructor_kwargs={"options": options, "name": name},
            batch_size=rows,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
        )
        for block in answers.iter_batches(batch_size=None):
            assert list(block["number"]) == list(range(files.done, files.done + len(block["number"])))
            files.append([bytes(text) for text in block["answer"]])
            report(len(block["answer"]))
    finally:
        ray.shutdown()


class _RayWorker:
    """An actor: one model, asked for the lines of one task at a time."""

    def __init__(self, options: dict[str, Any], name: str | None) -> None:
        from finial.llm import LLM

        self._loop = asyncio.new_event_loop()
        self._service = _service(LLM(**options), name)
        self._loop.run_until_complete(self._service.start())

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        lines = [Line(int(n), bytes(text)) for n, text in zip(block["number"], block["text"], strict=True)]
        return {"number": block["number"], "answer": self._loop.run_until_complete(self._all(lines))}

    async def _all(self, lines: list[Line]) -> list[bytes]:
        return await asyncio.gather(*[answer(self._service, line) for line in lines])
