"""`finial serve`: a model behind the OpenAI API.

Knows options and their defaults; the port, the requests and the model are others' work.

    finial serve demo --port 8080
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from finial.cli import console, options
from finial.errors import BackendError

_PORT, _LIMITS = "Port and access", "Limits"


def serve(
    model: options.ModelArgument = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_PORT)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_PORT)
    ] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients must send; may be repeated. FINIAL_API_KEY keeps it out of the process list.",
            rich_help_panel=_PORT,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that clients may call the server by.", rich_help_panel=_PORT),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of a web page that may use the server.", rich_help_panel=_PORT),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API (default: MODEL).")] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Sequences computed side by side.", rich_help_panel=_LIMITS)
    ] = 8,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more are answered 429.", rich_help_panel=_LIMITS)
    ] = 128,
    max_step_tokens: Annotated[
        int, typer.Option(min=1, help="Rows of one step; longer prompts are split.", rich_help_panel=_LIMITS)
    ] = 512,
    stall_ms: Annotated[
        float,
        typer.Option(
            min=0, help="Longer prompts of others may delay a token by so much, or double it.", rich_help_panel=_LIMITS
        ),
    ] = 50.0,
    prefix_cache: Annotated[
        int | None,
        typer.Option(
            min=0, help="MiB of cache kept for common beginnings (default: all free).", rich_help_panel=_LIMITS
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(min=0, help="Seconds that answers have after SIGTERM; a second stops.", rich_help_panel=_LIMITS),
    ] = 30.0,
    template_option: Annotated[
        list[str] | None,
        typer.Option(help="What clients may set in chat_template_kwargs (default: enable_thinking)."),
    ] = None,
    log: Annotated[bool, typer.Option("--log/--no-log", help="A line of JSON per request on standard error.")] = True,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Put requests' text into that log.")] = False,
    format: options.Format = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    max_context: options.MaxContext = None,
    kv_format: options.KvFormat = "bf16",
) -> None:
    """Serve a model behind the OpenAI API.

    It listens on this machine alone unless --host says otherwise, which needs an API key.
    """
    try:
        from finial.serve.server import Settings, run
    except ModuleNotFoundError as error:
        raise BackendError(
            f"finial serve needs the package {error.name}", fix='install it: pip install "finial[serve]"'
        ) from None
    from finial.cli.run import load

    keys = [*(api_key or ()), *filter(None, [os.environ.get("FINIAL_API_KEY")])]
    settings = Settings(
        host=host,
        port=port,
        name=name if name is not None else model,
        keys=tuple(dict.fromkeys(keys)),
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        max_queue=max_queue,
        drain_s=drain,
        access_log=log,
        log_prompts=log_prompts,
        **({} if template_option is None else {"template_options": tuple(template_option)}),
    )
    run(
        settings,
        lambda: load(
            model,
            backend=options.backend_on(backend, device),
            format=format,
            threads=threads,
            max_context=max_context,
            kv_format=kv_format,
            max_batch=max_batch,
            max_step_tokens=max(max_step_tokens, max_batch),
            stall_s=stall_ms / 1000,
            prefix_bytes=None if prefix_cache is None else prefix_cache << 20,
            hidden=True,
            reserve=True,
        ),
        console.note,
    )
