"""The table of backends, and what a backend is.

A backend reads a graph and never meets the code that wrote it.  It says which nodes it runs, and
compiles a whole graph (or a segment of one) into a program whose `run` is one call per step.

    program = get_backend("cpu").compile(graph, weights)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

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
