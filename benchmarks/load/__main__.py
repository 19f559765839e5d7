"""`finial serve demo` under load; the record as JSON.

python -m benchmarks.load --clients 200 --seconds 60 --out benchmarks/results/serve-load.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from benchmarks.load.load import load
from benchmarks.load.servers import finial
from finial.machine import describe


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = ["demo", "--max-batch", str(options.max_batch)]
    with finial(arguments) as server:
        report = asyncio.run(load(server, seconds=options.seconds, clients=options.clients))
    machine = describe()
    record = {
        "command": ["python", "-m", "benchmarks.load", *sys.argv[1:]],
        "server": ["finial", "serve", *arguments],
        "machine": {"cpu": machine.cpu.model, "threads": machine.cpu.usable_threads, "isa": machine.native.isa},
        **report,
    }
    text = json.dumps(record, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    shown = {name: value for name, value in record.items() if name != "memory"}
    print(json.dumps(shown, indent=1))
    return 1 if report["errors"] or any(report["held_at_end"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
