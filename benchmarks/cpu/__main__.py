"""The command line: run, make ready, install rivals, show a record.

python -m benchmarks.cpu --quick --out cpu.json
python -m benchmarks.cpu install
python -m benchmarks.cpu prepare
python -m benchmarks.cpu table cpu.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.cpu.workloads import ENGINES as NAMES
from benchmarks.cpu.workloads import FORMATS, plan
from finial.errors import FinialError
from finial.lab.engines.environments import ENVIRONMENTS, EngineError, install, interpreter
from finial.lab.engines.setup import SetupError, make_file, missing
from finial.lab.engines.table import ENGINES, Engine, Places
from finial.lab.estimate import estimate
from finial.lab.limits import Probe, busy
from finial.lab.record import Record
from finial.lab.report.markdown import render
from finial.lab.runner import Runner
from finial.lab.verdicts import Judge
from finial.lab.workloads import SHAPE, Group
from finial.machine import describe, probe_native

CACHE = Path.home() / ".cache" / "finial"
BUSY = 0.05
TITLE = "CPU benchmark"


def main() -> int:
    """Run one command; 1 when it failed."""
    args = _arguments()
    places = Places(args.engines, args.models, dict(args.python))
    if args.command == "table":
        print(render(Record.open(Path(args.names[0]) if args.names else args.out).data, TITLE))
        return 0
    if args.command == "install":
        return _install(args.names or wanted(places), places)
    engines = _chosen(args.only)
    threads = args.threads or probe_native().threads or 1
    groups = plan(args.quick, threads, args.formats)
    _say(f"{len(groups)} groups, {sum(len(g.workloads) for g in groups)} workloads: about {_minutes(groups, engines)}")
    if args.dry_run:
        for group in groups:
            for workload in group.workloads:
                names = [e.name for e in engines if e.runs(group.format, workload)]
                print(f"{group.key:24} {workload.name:34} {workload.rounds:2} rounds: {', '.join(names)}")
        for engine in engines:
            print(f"{engine.name}: {missing(engine, places) or 'ready'}")
        return 0
    _prepare(engines, groups, places)
    if args.command == "prepare":
        return 0
    return _run(args, places, engines, groups, threads)


def _run(args: argparse.Namespace, places: Places, engines: list[Engine], groups: list[Group], threads: int) -> int:
    taken = busy()
    if taken is not None and taken > BUSY:
        _say(f"WARNING: {taken:.0%} of this machine's processor time is taken by something else; numbers will be wrong")
    key = {"quick": args.quick, "formats": args.formats, "engines": [e.name for e in engines], "commit": _commit()}
    if args.out.exists() and not args.fresh:
        try:
            record = Record.open(args.out)
        except FinialError as error:
            sys.exit(str(error))
        if record.data.plan != key:
            _say(f"{args.out} is of another plan or commit: give another --out, or --fresh to start over")
            return 1
        _say(f"resuming {args.out}: {len(record.cells)} cells are there")
    else:
        started = time.strftime("%Y-%m-%d %H:%M %Z")
        record = Record.create(
            args.out, plan=key, started=started, commit=_commit(), busy=taken, machine=describe().to_dict()
        )
        record.data.command = ["python", "-m", "benchmarks.cpu", *sys.argv[1:]]
    probe = Probe(places.models)
    if probe.error:
        _say(f"no core-to-core latency and no arithmetic peak: {probe.error}")
    runner = Runner(record, places, engines, probe, _say, seed=args.seed)
    start = time.monotonic()
    try:
        with Judge(places, threads) as judge:
            for group in groups:
                runner.group(group, None if args.no_verdict else judge)
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on from {args.out}")
        return 130
    page = args.out.with_suffix(".md")
    page.write_text(render(record.data, TITLE), encoding="utf-8")
    _say(f"{(time.monotonic() - start) / 60:.1f} minutes; {args.out}, {page}")
    print(render(record.data, TITLE))
    return 0


def _prepare(engines: list[Engine], groups: list[Group], places: Places) -> None:
    """Every file that a run needs, before anything is timed; one that cannot be made becomes a row's reason later."""
    try:
        if any(group.model == SHAPE for group in groups) and not places.checkpoint(SHAPE).exists():
            make_file(places, SHAPE, "")
    except SetupError as error:
        sys.exit(str(error))
    tried: set[Path] = set()
    for group in groups:
        for engine in engines:
            if not any(engine.runs(group.format, w) for w in group.workloads) or missing(engine, places):
                continue
            file = engine.model_file(places, group.model, group.format)
            if file in tried or file.exists():
                continue
            tried.add(file)
            _say(f"making {file.name}")
            try:
                make_file(places, group.model, engine.formats[group.format])
            except SetupError as error:
                _say(f"{engine.name}: {error}")


def wanted(places: Places) -> list[str]:
    """Environments of the engines that this benchmark measures, and of their files, as far as they are not there."""
    names = dict.fromkeys(["export", *(e.environment for e in _chosen([]) if e.environment)])
    return [name for name in names if not interpreter(places.engines, name).exists()]


def _install(names: list[str], places: Places) -> int:
    failed = 0
    if not names:
        _say(f"every environment is installed in {places.engines}")
    for name in names:
        _say(f"installing {name} into {places.engines / name}")
        try:
            install(name, places.engines, _say)
        except EngineError as error:
            failed = 1
            _say(f"{name}: {error}")
    return failed


def _chosen(only: list[str]) -> list[Engine]:
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        sys.exit(f"unknown engine {unknown[0]}; there is {', '.join(NAMES)}")
    return [ENGINES[name] for name in NAMES if not only or name in only]


def _minutes(groups: list[Group], engines: list[Engine]) -> str:
    return f"{estimate(groups, engines) / 60:.0f} minutes"


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="finial and its rivals on this CPU")
    parser.add_argument("command", nargs="?", default="run", choices=("run", "prepare", "install", "table"))
    environments = f"of environments to install ({', '.join(ENVIRONMENTS)}; none: those of the engines it measures)"
    parser.add_argument("names", nargs="*", help=f"{environments}, or a record")
    parser.add_argument("--quick", action="store_true", help="fewer depths, lengths and rounds")
    parser.add_argument("--dry-run", action="store_true", help="say what would run and for how long")
    parser.add_argument("--out", type=Path, default=Path("cpu.json"), help="the record; resumed when it is there")
    parser.add_argument("--fresh", action="store_true", help="replace the record")
    parser.add_argument("--only", action="append", default=[], help=f"an engine: {', '.join(NAMES)}")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--threads", type=int, help="default: as many as there are cores")
    parser.add_argument("--seed", type=int, default=0, help="of the order of engines")
    parser.add_argument("--no-verdict", action="store_true", help="for trials: the table will say that it has none")
    parser.add_argument("--engines", type=Path, default=CACHE / "engines", help="virtual environments")
    parser.add_argument("--models", type=Path, default=CACHE / "benchmark-models", help="checkpoints")
    parser.add_argument("--python", action="append", type=_named, default=[], metavar="ENVIRONMENT=PATH")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
