"""The server as a process: a port that answers while the model loads, signals, and an orderly end.

Knows sockets, uvicorn and when to stop; nothing of requests.

    run(Settings(port=8080), lambda: LLM("demo"))
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from finial.errors import RequestError
from finial.llm import LLM
from finial.serve.app import Gate, build_app
from finial.serve.guard import ANY, LOOPBACK_NAMES, Access, Guard, is_loopback, stderr_log
from finial.serve.prompts import TEMPLATE_OPTIONS
from finial.serve.service import MAX_QUEUE, Service
from finial.serve.site import page_routes

HEAD_S = 10.0  # for the head of a request to arrive
HEAD_BYTES = 64 << 10
STUCK_S = 60.0  # for a client to read at least something of an answer that waits for it
KEEP_ALIVE_S = 30
MAX_CONNECTIONS = 1024
SWITCH_INTERVAL_S = 0.0005  # see `serve`


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
        port: 0 takes a free one.
        keys: API keys; without any, host must be a loopback address.
        allowed_hosts: further names that the Host header may have.
        allowed_origins: of pages that may use the server beside its own.
        drain_s: how long requests that are being answered have after a signal.
        access_log: a line of JSON per request on standard error; log_prompts puts their bodies in.
        template_options: what requests may pass in chat_template_kwargs.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    name: str | None = None
    keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = MAX_QUEUE
    drain_s: float = 30.0
    access_log: bool = True
    log_prompts: bool = False
    template_options: tuple[str, ...] = field(default=TEMPLATE_OPTIONS)

    def __post_init__(self) -> None:
        if not self.keys and not is_loopback(self.host):
            raise RequestError(
                f"host {self.host} can be reached by other machines, and there is no API key",
                fix="set FINIAL_API_KEY or --api-key, or listen on 127.0.0.1",
            )
        if any(len(key) < 8 for key in self.keys):
            raise RequestError("an API key of fewer than 8 characters", fix="take a longer one: openssl rand -hex 24")
        for origin in self.allowed_origins:
            if "://" not in origin or origin.count("/") != 2:
                raise RequestError(f"{origin!r} is no origin", fix="write it as https://name or http://name:port")

    @property
    def access(self) -> Access:
        """The rules of `Guard`."""
        hosts: tuple[str, ...] = tuple(name.lower() for name in self.allowed_hosts)
        if is_loopback(self.host):
            hosts += (*LOOPBACK_NAMES, self.host.strip("[]").lower())
        elif not hosts:  # whoever has the key may call the server by any name
            hosts = (ANY,)
        return Access(self.keys, hosts, self.allowed_origins)


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, with bounds on the head of a request, in time and size, and on clients that do not read."""

    _head: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)
        if self._stuck is not None:
            self._stuck.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()

    def data_received(self, data: bytes) -> None:
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._begin_head()
        if self._head is not None:
            self._head_bytes += len(data)
            # A first packet may carry body too; only what is far over any head is certainly none.
            if self._head_bytes > HEAD_BYTES and b"\r\n\r\n" not in data:
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._head_bytes = 0
        self._head = self.loop.call_later(HEAD_S, self.transport.close)

    def _end_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Server(uvicorn.Server):
    """uvicorn's server, which on the first signal finishes what it has, and on the second stops."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain_s: float, said: Callable[[str], None]) -> None:
        super().__init__(config)
        self._gate = gate
        self._drain_s = drain_s
        self._deadline = 0.0
        self._said = said
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._gate.draining:
            self.should_exit = self.force_exit = True
        else:
            self._deadline = time.monotonic() + self._drain_s
            self._gate.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._gate.draining and not self.should_exit:
            busy = len(self.server_state.tasks)
            if busy and not self._told:
                self._told = True
                self._said(f"finishing {busy} requests, at most {self._drain_s:g} s; a second signal stops at once")
            self.should_exit = not busy or time.monotonic() > self._deadline
        return await super().on_tick(counter)


def run(settings: Settings, load: Callable[[], LLM], said: Callable[[str], None] = lambda text: None) -> None:
    """Serve until a signal comes.

    Args:
        load: opens the model; called in a thread of its own, while the port already answers 503.
        said: takes lines for a person.
    Raises:
        RequestError: the port cannot be had.  And whatever `load` raises.
    """
    listener = _bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    said(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
    # The engine's thread needs Python's lock for some microseconds between steps of some hundred.  Python's own 5 ms
    # until a busy event loop must hand the lock over would be many steps.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        with contextlib.closing(listener), asyncio.Runner(loop_factory=uvicorn_loop()) as runner:
            runner.run(_serve(settings, load, said, listener))
    finally:
        sys.setswitchinterval(interval)


def uvicorn_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    return uvicorn.Config("", loop="auto").get_loop_factory()


async def _serve(
    settings: Settings, load: Callable[[], LLM], said: Callable[[str], None], listener: socket.socket
) -> None:
    gate = Gate()
    log = stderr_log if settings.access_log else None
    app = Guard(build_app(gate, page_routes()), settings.access, log, settings.log_prompts, gate.meter.request)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=2,
        limit_concurrency=MAX_CONNECTIONS,
    )
    server = _Server(config, gate, settings.drain_s, said)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = asyncio.create_task(_in_thread(load))
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():  # stopped while it loads: the thread ends with the process
        await serving
        return
    if loading.exception() is not None:
        server.should_exit = server.force_exit = True
        await serving
        raise loading.exception()  # type: ignore[misc]
    llm = loading.result()
    try:
        opened = functools.partial(
            Service,
            llm,
            name=settings.name,
            max_queue=settings.max_queue,
            template_options=settings.template_options,
            meter=gate.meter,
            measure=True,
        )
        service = await asyncio.get_running_loop().run_in_executor(None, opened)
        await service.start()
        gate.service = service
        said(f"ready: {service.name}")
        try:
            while not server.should_exit and not serving.done():
                await asyncio.sleep(0.05)
        finally:
            await service.close()  # what is unfinished ends with an error, so that connections can close
            await serving
    finally:
        llm.close()


async def _in_thread(load: Callable[[], LLM]) -> LLM:
    """`load()` in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[LLM] = loop.create_future()

    def settle(result: LLM | None, error: BaseException | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                assert result is not None
                done.set_result(result)

    def work() -> None:
        result: LLM | None = None
        error: BaseException | None = None
        try:
            result = load()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="finial-load", daemon=True).start()
    return await done


def _bind(host: str, port: int) -> socket.socket:
    try:
        found: list[Any] = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = "another program listens there" if taken else getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"cannot listen on {host} port {port}: {reason}", fix="choose another --port, or --port 0 for a free one"
        ) from None
    listener.setblocking(False)
    return listener
