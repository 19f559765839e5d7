"""The table of backends, and what a backend is.

A backend reads a graph and never meets the code that wrote it.  It says which nodes it runs, and
compiles a whole graph (or a segment of one) into a program whose `run` is one call per step.

    program = get_backend("cpu").compile(graph, weights)
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph, Node


@dataclass(frozen=True)
class Timing:
    """What one kind of instruction took on the first thread.

    Attributes:
        what: operations and widths, as "norm + linear 1024 > 2048, 1024".
        bytes: of weights that all calls read.
        seconds: of work; waiting: at the barriers before it, for slower threads.
    """

    what: str
    calls: int
    bytes: int
    seconds: float
    waiting: float


@dataclass(frozen=True)
class Draw:
    """How the token of one row of logits is chosen: `engine.sampling.choose` without what depends on earlier tokens.

    Attributes:
        temperature: 0 is greedy; top_k: 0 keeps all; top_p: 1 keeps all; min_p: 0 keeps all.
        uniform: the random number in [0, 1).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


ENDED = -2  # instead of a token: the row ended in an earlier step of the run
NOT_FINITE = -1  # instead of a token: the row's highest logit is not finite, or the host had better choose


@dataclass(frozen=True)
class Ahead:
    """How the tokens of a run of decode steps are chosen, and when its rows end (`RunsAhead`).

    Attributes:
        draws: of each row, the same in all steps; `Draw.uniform` is not looked at.
        uniforms: float64 [N, B], in [0, 1): the random number of each step and row; N >= 1 is the most steps.
        stop_ids: of each row, the tokens that end it.
        limits: int32 [B], 1 to N: how many tokens a row gets at most.
    """

    draws: Sequence[Draw]
    uniforms: NDArray[np.float64]
    stop_ids: Sequence[frozenset[int]]
    limits: NDArray[np.int32]


class State(Protocol):
    """The cache of one program: what its graph's state values hold."""

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""


class Program(Protocol):
    """A compiled graph."""

    def new_state(self, pages: int, page_size: int) -> Any:
        """A zeroed cache of pages · page_size slots for every state of the graph.

        Raises:
            BackendError: not enough memory; names the bytes asked for.
        """

    def run(self, feeds: Mapping[str, np.ndarray], state: Any) -> list[np.ndarray]:
        """One step: arrays by input name in, the graph's outputs in order out (fresh arrays, float32).

        Raises:
            BackendError: feeds that point outside the vocabulary, the cache or themselves.
        """


class RunsAhead(Protocol):
    """What a program has besides that decodes several steps without the host between them."""

    def ahead(
        self, feeds: Mapping[str, np.ndarray], state: Any, ahead: Ahead
    ) -> Generator[NDArray[np.int32], None, None] | None:
        """Start a run of up to N decode steps, each of which takes in the tokens that the one before chose.

        Step k computes, for each row b that has not ended, position positions[b] + k of a sequence that then has
        lengths[b] + k positions, from the token that step k - 1 chose (step 0: tokens[b]), keeps its key and value
        in the slot that `pages` gives for that position, and chooses the row's next token.  A row ends with a token
        of its stop_ids, with its limits[b]-th token, or with NOT_FINITE; it writes nothing from then on.

        Args:
            feeds: of step 0, as `Program.run` takes them: one row a sequence (starts are 0, 1, … B, wanted is 0, 1,
                … B - 1), the newest of its sequence (lengths = positions + 1).  `pages` has entries for positions
                up to positions[b] + limits[b] - 1.  The arrays may change when this returns.
            ahead: N, B and what belongs to them.

        Returns:
            A generator; the device is at work when this returns, before anything is asked of it.  It yields an int32
            [B] for each step in order, once the step is known: the token of each row, NOT_FINITE or ENDED.  It ends
            after N steps, or with the step with which the last row ended; or after any other step, when the program
            would rather compute the rows that are left in another way: ask it again.
            `close()` ends the run where it stands, and so does letting go of the generator: what is already under way
            may still write to positions[b] … positions[b] + limits[b] - 1 of each row, so of these only those whose
            steps were yielded are kept; all of it is done before whatever is asked of the program next.  Until the
            generator has ended or is closed nothing else may be asked of this program.
            None, with nothing done: this program cannot run this step ahead; `sample` and `run` can.
        Raises:
            BackendError: as `Program.run`; also while the run is under way, when the device fails.
        """


class Backend(Protocol):
    """A device and the operations it has."""

    name: str

    def supports(self, graph: Graph, node: Node) -> bool:
        """Whether this backend runs this node as it stands."""

    def compile(self, graph: Graph, weights: Mapping[str, Tensor]) -> Program:
        """A program for a graph whose nodes are all supported.

        Args:
            weights: a tensor for each weight value of the graph, by name.
        """


# name a user types -> module that has `create(threads: int | None) -> Backend`; cuda's also takes the number of a GPU
BACKENDS: dict[str, str] = {
    "cpu": "finial.backends.cpu",
    "cuda": "finial.backends.cuda",
    "reference": "finial.backends.reference",
}


def get_backend(name: str, threads: int | None = None) -> Backend:
    """The backend of that name.

    Args:
        name: of the table; "cuda:1" is cuda on the second GPU.
        threads: CPU threads; None: the backend's choice.
    Raises:
        BackendError: no such backend, or one that cannot work on this machine (says why).
    """
    name, colon, number = name.partition(":")
    if name not in BACKENDS:
        raise BackendError(f"no backend {name!r}", fix=f"choose one of: auto, {', '.join(BACKENDS)}")
    if threads is not None and not 1 <= threads <= 1024:
        raise BackendError(f"threads is {threads}", fix="ask for 1 to 1024")
    if colon and (name != "cuda" or not number.isdecimal()):
        raise BackendError(f"no device {name}:{number}", fix="only cuda has numbered devices: cuda:0, cuda:1, …")
    module = importlib.import_module(BACKENDS[name])
    backend: Backend = module.create(threads, int(number)) if colon else module.create(threads)
    return backend
