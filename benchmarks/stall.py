"""How long a token waits when somebody else sends a long prompt, with and without a bound.

One client streams while a second one sends a prompt of many tokens; what counts is the longest gap between two events
of the stream.

    python -m benchmarks.stall qwen3-0.6b-q8_0.gguf --prompt 2000 --stall-ms 50 100000
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from urllib.request import Request, urlopen


def ask(url: str, prompt: str | list[int], tokens: int, stream: bool) -> list[float]:
    """Times of the events of one answer."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as reply:
        return [time.perf_counter() for line in reply if line.startswith(b"data: {")]


def measure(model: str, stall_ms: float, prompt: int, tokens: int) -> str:
    """One server, both clients; a line of figures."""
    command = [sys.executable, "-m", "finial.cli", "serve", model, "--port", "0", "--max-context", str(prompt + 1000)]
    command += ["--stall-ms", str(stall_ms), "--no-log"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            found = re.search(r"listening on (\S+)", line)
            url = found[1] if found else url
            if line.startswith("ready"):
                break
        ask(url, "warm", 8, True)
        took: list[float] = []

        def send_prompt() -> None:
            time.sleep(0.7)  # the stream is well under way
            started = time.perf_counter()
            ask(url, [1000 + i for i in range(prompt)], 1, False)
            took.append(time.perf_counter() - started)

        second = threading.Thread(target=send_prompt)
        second.start()
        times = ask(url, "Once upon a time", tokens, True)
        second.join()
    finally:
        process.terminate()
        process.wait()
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(times)]
    return (
        f"--stall-ms {stall_ms:g}: longest gap {max(gaps):.0f} ms, median {statistics.median(gaps):.0f} ms; "
        f"the prompt of {prompt} took {took[0]:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--stall-ms", type=float, nargs="+", default=[50.0, 100_000.0])
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=120)
    options = parser.parse_args()
    for stall_ms in options.stall_ms:
        print(measure(options.model, stall_ms, options.prompt, options.tokens), flush=True)


if __name__ == "__main__":
    main()
