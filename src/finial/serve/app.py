"""Routes: bodies in, replies and server-sent events out.  The only part that speaks HTTP, with `guard` before it.

Knows the service and what each of its errors is in HTTP; nothing of models or tokens.

    app = build_app(Gate())          # gate.service = Service(llm) once the model is there
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finial.errors import FinialError, RequestError
from finial.serve.engine_thread import EngineStopped
from finial.serve.metrics import Meter, exposition
from finial.serve.openapi import document
from finial.serve.replies import Chunk, ErrorBody, ErrorReply, Health
from finial.serve.runs import Run
from finial.serve.service import Service
from finial.serve.wire import (
    MAX_BODY,
    BusyError,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    InvalidRequest,
    UnavailableError,
    decode,
)

BODY_S = 30.0  # for a request's body to arrive
DONE = b"data: [DONE]\n\n"
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

_encoder = msgspec.json.Encoder()


class Gate:
    """Whether there is a service, and whether it takes requests."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.service: Service | None = None
        self.draining = False

    @property
    def status(self) -> Literal["ok", "loading", "draining", "failed"]:
        """In one word."""
        if self.service is not None and self.service.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self.service is None else "ok"

    def enter(self) -> Service:
        """The service, if it takes requests; UnavailableError otherwise."""
        if self.service is None:
            raise UnavailableError("the model is loading", "ask again in a moment; /ready says when")
        if self.draining:
            raise UnavailableError("the server is about to end", "ask another one, or later")
        return self.service


class BodyError(Exception):
    """A body that is not read: too large (413), too slow (408), of another type (415), or broken off (400)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body, refused as soon as it is over the limit."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise BodyError(415, f"the content type is {kind.decode('latin-1')!r}, send application/json")
    too_large = BodyError(413, f"the body is over {MAX_BODY:,} bytes")
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise BodyError(400, "the body broke off")
                part = message.get("body", b"")
                size += len(part)
                if size > MAX_BODY:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise BodyError(408, f"the body took more than {BODY_S:g} s") from None


Answer = Callable[[Service, bytes, "Sending", dict[str, Any]], Awaitable[None]]


class Endpoint:
    """An ASGI endpoint: reads a body and has it answered; ends when its client does."""

    def __init__(self, gate: Gate, answer: Answer) -> None:
        self._gate = gate
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or give up as soon as the client has gone."""
        sending = Sending(send)
        try:
            body = await read_body(scope, receive)
        except BodyError as error:
            await sending.fail(error)
            return
        answer = asyncio.create_task(self._try(body, sending, scope.setdefault("state", {})))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)
        if not answer.cancelled() and (mistake := answer.exception()) is not None:
            raise mistake

    async def _try(self, body: bytes, sending: Sending, state: dict[str, Any]) -> None:
        try:
            await self._answer(self._gate.enter(), body, sending, state)
        except Exception as error:
            await sending.fail(error)
            if status_of(error) == 500:
                raise


def generation(
    kind: type[ChatRequest] | type[CompletionRequest], begin: Callable[[Service, Any, str], Awaitable[Run]]
) -> Answer:
    """Answers requests for text, whole or as a stream."""

    async def answer(service: Service, body: bytes, sending: Sending, state: dict[str, Any]) -> None:
        request = decode(kind, body)
        async with await begin(service, request, state.get("client", "")) as run:
            state["run"] = run
            if not request.stream:
                await sending.whole(200, _encoder.encode(await run.reply()))
                return
            async for chunks in run.chunks():
                await sending.events(chunks)
            await sending.end()

    return answer


async def embedding(service: Service, body: bytes, sending: Sending, state: dict[str, Any]) -> None:
    """Answers requests for embeddings."""
    reply = await service.embed(decode(EmbeddingRequest, body), state.get("client", ""))
    await sending.whole(200, _encoder.encode(reply))


class Sending:
    """One response on its way."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False

    async def whole(self, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """A response in one piece."""
        self._started = True
        size = [(b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": [*JSON, *size, *headers]})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, chunks: list[Chunk]) -> None:
        """All that is new, in one write."""
        await self._body(b"".join([b"data: " + _encoder.encode(chunk) + b"\n\n" for chunk in chunks]), True)

    async def end(self) -> None:
        """The end of a stream."""
        await self._body(DONE, False)

    async def fail(self, error: Exception) -> None:
        """An error: as a response, or as the last event of a stream that has begun."""
        reply = _encoder.encode(error_reply(error))
        if self._started:
            await self._body(b"data: " + reply + b"\n\n", False)
            return
        headers = [(b"retry-after", str(error.retry_s).encode())] if isinstance(error, BusyError) else []
        if isinstance(error, BodyError):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.whole(status_of(error), reply, headers)

    async def _body(self, data: bytes, more: bool) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    match error:
        case BodyError() | HTTPException():
            return error.status if isinstance(error, BodyError) else error.status_code
        case BusyError():
            return 429
        case UnavailableError() | EngineStopped():
            return 503
        case InvalidRequest(code="model_not_found"):
            return 404
        case RequestError():
            return 400
    return 500


def error_reply(error: BaseException) -> ErrorReply:
    """The body of an error; of a mistake of ours it says no more than that."""
    status = status_of(error)
    kind = (
        "invalid_request_error"
        if status < 500 and status != 429
        else "rate_limit_error"
        if status == 429
        else "server_error"
    )
    if isinstance(error, FinialError):
        text = error.what + (f" ({error.fix})" if error.fix else "")
    elif isinstance(error, BodyError | EngineStopped):
        text = str(error)
    elif isinstance(error, HTTPException):
        text = error.detail
    else:
        text = "an error of the server; its log says more"
    return ErrorReply(ErrorBody(text, kind, getattr(error, "param", None), getattr(error, "code", None)))


async def _disconnected(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


def json_response(value: Any, status: int = 200) -> Response:
    """A struct as a response."""
    return Response(_encoder.encode(value), status, media_type="application/json")


def build_app(gate: Gate, more: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The routes.

    Args:
        more: further routes, such as those of the page.
    """

    async def health(_: Request) -> Response:
        return json_response(Health(gate.status), 500 if gate.status == "failed" else 200)

    async def ready(_: Request) -> Response:
        return json_response(Health(gate.status), 200 if gate.status == "ok" else 503)

    async def models(_: Request) -> Response:
        return json_response(gate.enter().models())

    async def model(request: Request) -> Response:
        listed = gate.enter().models().data[0]
        if request.path_params["name"] != listed.id:
            raise InvalidRequest("there is no such model", f"ask for {listed.id!r}", code="model_not_found")
        return json_response(listed)

    async def failed(_: Request, error: Exception) -> Response:
        return json_response(error_reply(error), status_of(error))

    async def metrics(_: Request) -> Response:
        engine = None if gate.service is None else gate.service.thread.engine
        body, kind = await asyncio.to_thread(exposition, gate.meter, engine)
        return Response(body, headers={"content-type": kind})

    async def openapi(_: Request) -> Response:
        return json_response(document())

    chat = generation(ChatRequest, lambda service, request, client: service.chat(request, client))
    text = generation(CompletionRequest, lambda service, request, client: service.complete(request, client))
    return Starlette(
        routes=[
            Route("/v1/chat/completions", Endpoint(gate, chat), methods=["POST"]),
            Route("/v1/completions", Endpoint(gate, text), methods=["POST"]),
            Route("/v1/embeddings", Endpoint(gate, embedding), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            *more,
        ],
        exception_handlers={HTTPException: failed, FinialError: failed},
    )
