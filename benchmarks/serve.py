"""Servers of the same checkpoint under the same load: tokens per second at some number of clients.

Every server gets its own process and all of the machine in its turn; turns alternate, so that what moves in the machine
moves for all.  The client is the same for all and reads as little of the replies as it can.

    python -m benchmarks.serve --finial demo --gguf demo.gguf --clients 8 --tokens 128 --rounds 3 --out result.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# llama.cpp's own server, as xllamacpp carries it: slots are decoded together.
XLLAMACPP = """
import signal, sys, xllamacpp
path, port, clients, context, threads = sys.argv[1], *map(int, sys.argv[2:6])
params = xllamacpp.CommonParams()
params.model.path = path
params.port = port
params.n_parallel = clients
params.n_ctx = clients * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
signal.sigwait({signal.SIGTERM})
import os
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(kind: str, options: argparse.Namespace, port: int) -> list[str]:
    """The command line of a server."""
    clients, context = str(options.clients), str(options.context)
    match kind:
        case "finial":
            line = [sys.executable, "-m", "finial.cli", "serve", options.finial, "--port", str(port), "--no-log"]
            line += [
                "--max-batch",
                clients,
                "--max-context",
                context,
                "--name",
                "model",
                "--threads",
                str(options.threads),
            ]
            return line + (["--format", options.format] if options.format else [])
        case "xllamacpp":
            return [sys.executable, "-c", XLLAMACPP, options.gguf, str(port), clients, context, str(options.threads)]
        case "llama-cpp-python":
            line = [options.llama_cpp_python, "-m", "llama_cpp.server", "--model", options.gguf, "--port", str(port)]
            return [*line, "--n_ctx", context, "--n_threads", str(options.threads), "--interrupt_requests", "false"]
    raise SystemExit(f"no server {kind!r}")


async def ask(port: int, body: bytes) -> tuple[int, float, list[float]]:
    """(tokens, seconds to the first byte of the answer's body, times of the events) of one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    started = time.perf_counter()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status!r} {await reader.read()!r}")
    while await reader.readline() != b"\r\n":
        pass
    data, first, times = [], 0.0, []
    while part := await reader.read(1 << 16):
        now = time.perf_counter()
        first = first or now - started
        times.append(now)
        data.append(part)
    writer.close()
    found = re.findall(rb'"completion_tokens":\s*(\d+)', b"".join(data))
    return int(found[-1]), first, times


async def load(port: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """`clients` clients, each `requests` times one after the other."""
    words = ["king", "sword", "night", "crown", "friend", "storm", "grave", "ship", "letter", "queen", "ring", "oath"]

    async def client(number: int) -> tuple[int, list[float]]:
        source, made, firsts = random.Random(seed * 1000 + number), 0, []
        for _ in range(options.requests):
            prompt = " ".join(source.choice(words) for _ in range(options.prompt))
            body: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": options.tokens, "temperature": 0}
            body |= {"ignore_eos": True} if options.ignore_eos else {}
            if options.stream:
                body |= {"stream": True, "stream_options": {"include_usage": True}}
            async with asyncio.timeout(60):
                tokens, first, _ = await ask(port, json.dumps(body).encode())
            made += tokens
            firsts.append(first)
        return made, firsts

    started = time.perf_counter()
    done = await asyncio.gather(*(client(number) for number in range(options.clients)))
    seconds = time.perf_counter() - started
    tokens = sum(made for made, _ in done)
    firsts = sorted(first for _, times in done for first in times)
    return {"tokens": tokens, "seconds": seconds, "tok_s": tokens / seconds, "first_byte_s": statistics.median(firsts)}


def turn(kind: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Start a server, warm it up, load it, end it."""
    port = free_port()
    process = subprocess.Popen(command(kind, options, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                asyncio.run(ask(port, json.dumps({"model": "model", "prompt": "a", "max_tokens": 2}).encode()))
                break
            except (OSError, SystemExit, IndexError, asyncio.IncompleteReadError):
                if time.monotonic() > end or process.poll() is not None:
                    raise SystemExit(f"{kind} does not answer") from None
                time.sleep(0.2)
        asyncio.run(load(port, options, seed=0))  # warm
        return asyncio.run(load(port, options, seed))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finial", required=True, help="model as finial names it")
    parser.add_argument("--gguf", required=True, help="the same checkpoint for llama.cpp")
    parser.add_argument("--format", help="finial's weight format")
    parser.add_argument("--llama-cpp-python", help="interpreter that has llama_cpp.server")
    parser.add_argument("--servers", default="finial,xllamacpp")
    for name, value in (("clients", 8), ("requests", 4), ("prompt", 12), ("tokens", 128), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds = options.servers.split(",")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(options.rounds):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            runs[kind].append(turn(kind, options, seed=1 + number))
            print(kind, {name: round(value, 4) for name, value in runs[kind][-1].items()}, flush=True)
    for kind in kinds[1:]:
        ratios = [a["tok_s"] / b["tok_s"] for a, b in zip(runs[kinds[0]], runs[kind], strict=True)]
        print(
            f"{kinds[0]} / {kind}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
        )
    if options.out:
        shown = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
        record = {"command": "python -m benchmarks.serve " + " ".join(shown), "runs": runs}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
