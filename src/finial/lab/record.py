"""The record of a run: everything measured, raw, as one JSON file that is whole after every cell.

Knows its own shape (docs/lab-record.md) and the disk; measures nothing.

    record = Record.open(Path("cpu.json")); record.cells[key] = cell; record.save()
"""

from __future__ import annotations

import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from finial.errors import FileError
from finial.lab.roofline import Floor
from finial.lab.workloads import Group, Workload

SCHEMA = 2
MAX_BYTES = 256 << 20  # of a record that is read


class Reading(msgspec.Struct, omit_defaults=True):
    """The machine beside a sample.

    Attributes:
        read_gb_s: read bandwidth, 1e9 bytes per second, of a buffer of `over_bytes`, as many as a step reads (0: not
            noted, 256 MiB or four times the last cache level); from_cache: the last cache level holds it.
        core_to_core_ns: one way between two cores; at: Unix time.
    """

    read_gb_s: float | None
    core_to_core_ns: float | None
    at: float
    from_cache: bool = False
    over_bytes: int = 0


class Request(msgspec.Struct, omit_defaults=True):
    """One request of an open-loop run, in seconds since the run began.

    Attributes:
        due: when it was to be sent; sent: when it was; times: when each token came.
    """

    due: float
    sent: float
    times: list[float] = []
    tokens: int = 0
    error: str = ""


class Sample(msgspec.Struct, omit_defaults=True):
    """One run of a workload.

    Attributes:
        value: in the workload's unit (bytes for memory); first, last: of each sequence, seconds since submission.
        times: of each sequence's tokens, kept of the first runs alone; tokens: the beginning of what was generated.
        others: share of the machine that something else took; wall_s: between question and answer.
    """

    round: int = 0
    order: int = 0
    value: float = 0.0
    first: list[float] = []
    last: list[float] = []
    times: list[list[float]] | None = None
    tokens: list[list[int]] | None = None
    others: float | None = None
    wall_s: float | None = None
    before: Reading | None = None
    after: Reading | None = None
    requests: list[Request] | None = None


class Energy(msgspec.Struct):
    """What an engine took while it did a workload again and again, without a pause.

    Attributes:
        seconds: of the window; joules: by cumulative counter; tokens: that came of it, as the workload counts them.
    """

    seconds: float
    joules: dict[str, float]
    tokens: int


class Row(msgspec.Struct, omit_defaults=True):
    """An engine in a cell.

    Attributes:
        status: "ok", "failed" (it said no, died, took too long) or "invalid" (it answered, but not what was asked).
        reason: why not; discarded: samples taken before that, which do not count.
        cache: whether it had a KV cache; memory: what the adapter said of it, in bytes.
        notes: how it ran, in its words.
        energy: None where there is no counter (the record says why) or it could not be measured.
    """

    status: str = "ok"
    reason: str = ""
    samples: list[Sample] = []
    warmup: list[Sample] = []
    discarded: int = 0
    cache: bool = True
    version: str = ""
    precision: str = ""
    device: str = ""
    load_s: float | None = None
    memory: dict[str, int | None] | None = None
    notes: list[str] = []
    energy: Energy | None = None

    @property
    def values(self) -> list[float]:
        """Of its samples."""
        return [sample.value for sample in self.samples]


class Cell(msgspec.Struct):
    """One workload on all engines.

    Attributes:
        native: finial's native module, hashed; at: when it was finished.
    """

    model: str
    format: str
    threads: int
    workload: Workload
    floor: Floor | None
    native: str | None
    engines: dict[str, Row]
    at: str = ""


class Divergence(msgspec.Struct):
    """As `finial.verdict.Divergence`."""

    position: int
    token: int
    reference_token: int
    margin: float


class Verdict(msgspec.Struct, omit_defaults=True):
    """How far an engine is from the float32 reference; `error` instead where it could not be found out.

    Attributes:
        basis: "logits", "top", "generated" or "tokens": what the engine gave, in the words of `finial.lab.quality`.
        top: how many log-probabilities a position had where there were no logits.
        text: name of the text; reference: what it was held against.
        perplexity_reference: the reference's on the text; ratio, ratio_error: the engine's over it, token by token.
        greedy_agreement: share of its greedy text where the reference chooses the same.
        repeat_kl_max, repeat_same_text: its own second run against its first.
        flaws: why none of its numbers may stand.
        condemned: of a flaw in what it generated while it was timed, that text's first tokens, by sequence.
    """

    positions: int = 0
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    top5: float | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None
    perplexity_reference: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    greedy_tokens: int = 0
    greedy_agreement: float | None = None
    divergence: Divergence | None = None
    repeat_kl_max: float | None = None
    repeat_same_text: bool | None = None
    basis: str = "logits"
    top: int = 0
    text: str = ""
    reference: str = ""
    error: str = ""
    flaws: list[str] = []
    condemned: list[list[int]] = []


class Data(msgspec.Struct):
    """The file.

    Attributes:
        plan: what was asked for; a run is resumed only by the same.
        command: the command line; busy: share of the machine that was taken before the run; warnings: what a reader
            must know.
        machine: as `finial doctor --json`; states: before and after the run.
        files: what was run, by name, with size and SHA-256.
        peaks: 1e9 operations per second by number of threads and kind of number.
        verdicts: by "model/format", then by engine; cells: by "model/format/threads/workload".
        idle_w: power by counter with nothing loaded ("empty"), and with the engines of a group loaded, warm and waiting
            ("loaded", a space, "model/format/threads").
        energy: why it is unavailable; empty where there is a counter.
    """

    schema: int
    plan: dict[str, Any]
    started: str
    commit: str
    busy: float | None
    machine: dict[str, Any]
    peaks: dict[str, dict[str, float]]
    verdicts: dict[str, dict[str, Verdict]]
    cells: dict[str, Cell]
    command: list[str] = []
    versions: dict[str, str] = {}
    files: dict[str, dict[str, Any]] = {}
    warnings: list[str] = []
    states: dict[str, Any] = {}
    idle_w: dict[str, dict[str, float]] = {}
    energy: str = ""


class Record:
    """A record and where it lies."""

    def __init__(self, path: Path, data: Data) -> None:
        self.path, self.data = path, data

    @staticmethod
    def create(
        path: Path, *, plan: dict[str, Any], started: str, commit: str, machine: dict[str, Any], busy: float | None
    ) -> Record:
        """An empty one, not yet on disk."""
        return Record(path, Data(SCHEMA, plan, started, commit, busy, machine, {}, {}, {}))

    @staticmethod
    def open(path: Path) -> Record:
        """Read one, of this schema or an earlier one.

        Raises:
            FileError: missing, damaged, or of a later version; names the file and the field.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise FileError(f"{path} has {path.stat().st_size:,} bytes, a record has at most {MAX_BYTES:,}")
            raw = msgspec.json.decode(path.read_bytes())
        except OSError as error:
            why = error.strerror or str(error)
            raise FileError(f"{path} cannot be read: {why}", fix="name a record that is there") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FileError(f"{path} is no JSON: {error}", fix="it is damaged: measure again") from error
        version = raw.get("schema") if isinstance(raw, dict) else None
        if not isinstance(version, int) or not 1 <= version <= SCHEMA:
            raise FileError(
                f"{path} has schema {version!r}, this version reads 1 to {SCHEMA}",
                fix="update finial, or give a record that `finial bench` wrote",
            )
        try:
            return Record(path, msgspec.convert(_upgraded(raw) if version < SCHEMA else raw, Data))
        except (msgspec.ValidationError, KeyError, AttributeError, TypeError) as error:
            raise FileError(f"{path} is damaged: {error}", fix="measure again") from error

    @property
    def cells(self) -> dict[str, Cell]:
        """By key: group and workload."""
        return self.data.cells

    def save(self) -> None:
        """To a temporary name, then renamed: a reader finds the old record or the new one."""
        text = msgspec.json.format(msgspec.json.encode(_rounded(msgspec.to_builtins(self.data))), indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def cells_of(data: Data, group: Group) -> list[Cell]:
    """A group's cells that are there."""
    return [cell for key, cell in data.cells.items() if key.startswith(f"{group.key}/")]


def unjudged(data: Data, group: Group) -> list[str]:
    """Rows of a group that have numbers and no verdict yet."""
    judged = data.verdicts.get(f"{group.model}/{group.format}", {})
    names = dict.fromkeys(name for cell in cells_of(data, group) for name, row in cell.engines.items() if row.samples)
    return [name for name in names if name not in judged]


def reject(row: Row, status: str, reason: str) -> None:
    """Take a row's numbers away."""
    row.status, row.reason, row.energy = status, reason, None
    row.discarded, row.samples = row.discarded + len(row.samples), []


def schema() -> str:
    """JSON Schema (draft 2020-12) of the file as it is written, as text: docs/lab-record.schema.json."""
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Record of finial bench, schema {SCHEMA}",
    }
    made = msgspec.json.schema(Data)
    for part in made["$defs"].values():
        part["description"] = inspect.cleandoc(part.get("description", ""))  # Python 3.13 does so by itself
    return msgspec.json.format(msgspec.json.encode({**head, **made}), indent=1).decode() + "\n"


def _upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 had one verdict for a format, finial's."""
    verdicts = {key: {"finial": verdict} for key, verdict in raw["verdicts"].items()}
    return {**raw, "schema": SCHEMA, "verdicts": verdicts}


def _rounded(value: Any) -> Any:
    """Floats with seven significant digits: clocks and counters have no more."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if value < 1e9 else round(value, 2)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
