"""Introduces a graph to backends: who runs which nodes, and one `run` for the whole of it.

*Asked for means all of it*: a named backend runs every node or the error names one that it cannot.
Several backends joined by "+" share a graph, the first that can taking each node; a cache and every
node that touches it stay on one backend.  Knows no model and no scheduling.

    executable = compile_graph(graph, weights, backend="auto")
    executable.reserve(pages=64, page_size=32)
    logits = executable.run(step)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finial.backends import Ahead, Backend, Draw, Program, Timing, get_backend
from finial.errors import BackendError
from finial.formats import Tensor
from finial.graph import Graph, Node, Step

AUTO = "auto"
AUTOMATIC = ("cpu",)  # in order of preference; the reference is far too slow to be chosen for anybody


@dataclass(frozen=True)
class Segment:
    """A run of nodes on one backend; `graph` has the values that come from other segments as inputs."""

    backend: Backend
    graph: Graph
    carries: tuple[str, ...]  # names of the segment's outputs


class Executable:
    """A graph compiled on its backends, with room for its caches.

    Attributes:
        backend: the names of the backends that run it, joined by "+".
    """

    def __init__(self, graph: Graph, segments: list[Segment], weights: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.backend = "+".join(dict.fromkeys(segment.backend.name for segment in segments))
        self.segments = segments
        self._programs: list[Program] = []
        for segment in segments:
            own = {value.name: weights[value.name] for value in segment.graph.of_kind("weight")}
            self._programs.append(segment.backend.compile(segment.graph, own))
        self._states: list[Any] = []

    def reserve(self, pages: int, page_size: int) -> None:
        """Make room for pages · page_size positions; what was cached before is gone.

        Raises:
            BackendError: not enough memory.
        """
        self._states = []  # the old cache goes before the new one comes
        self._states = [program.new_state(pages, page_size) for program in self._programs]

    def take(self) -> None:
        """Take the caches' memory from the system now, where a backend would take it as positions are written."""
        for state in self._states:
            if hasattr(state, "take"):
                state.take()

    @property
    def state_bytes(self) -> int:
        """Bytes reserved for caches."""
        return sum(state.nbytes for state in self._states)

    def run(self, step: Step) -> np.ndarray:
        """The graph's first output: logits, float32 [R, vocab_size].

        Raises:
            BackendError: a step that points outside the vocabulary or the cache.
        """
        return self.outputs(step)[0]

    def outputs(self, step: Step) -> list[np.ndarray]:
        """As `run`, with all of the graph's outputs in their order."""
        assert self._states or not self._programs, "reserve() comes before run()"
        feeds = step.feeds()
        if len(self._programs) == 1:
            return self._programs[0].run(feeds, self._states[0])
        for segment, program, state in zip(self.segments, self._programs, self._states, strict=True):
            inputs = {value.name: feeds[value.name] for value in segment.graph.of_kind("input")}
            feeds.update(zip(segment.carries, program.run(inputs, state), strict=True))
        return [feeds[name] for name in self.graph.outputs]

    def sample(self, step: Step, draws: Sequence[Draw]) -> np.ndarray | None:
        """A step whose tokens are chosen where the logits are: int32 [R], -1 where the highest logit is not finite,
        or the host had better choose.

        None, with nothing done, when no backend of this graph does that.
        """
        choose = getattr(self._programs[0], "sample", None) if len(self._programs) == 1 else None
        if choose is None:
            return None
        tokens: np.ndarray | None = choose(step.feeds(), self._states[0], draws)
        return tokens

    @property
    def runs_ahead(self) -> bool:
        """Whether `ahead` is worth asking."""
        return len(self._programs) == 1 and hasattr(self._programs[0], "ahead")

    def ahead(self, step: Step, ahead: Ahead) -> Generator[np.ndarray, None, None] | None:
        """A run of decode steps without the host between them; see `finial.backends.RunsAhead.ahead`.

        None, with nothing done, when no backend of this graph does that.
        """
        if not self.runs_ahead:
            return None
        program: Any = self._programs[0]
        steps: Generator[np.ndarray, None, None] | None = program.ahead(step.feeds(), self._states[0], ahead)
        return steps

    @property
    def notes(self) -> list[str]:
        """What backends have to say of how they run, a line each."""
        return [note for program in self._programs for note in getattr(program, "notes", [])]

    def profile(self, on: bool) -> None:
        """From now on note what each instruction of a step takes, from zero; or stop noting.

        Only the cpu backend notes anything.
        """
        for program in self._programs:
            if hasattr(program, "profile"):
                program.profile(on)

    def timings(self) -> list[Timing]:
        """What was noted, in the order of the step."""
        return [row for program in self._programs if hasattr(program, "timings") for row in program.timings()]


def compile_graph(
    graph: Graph, weights: Mapping[str, Tensor | np.ndarray], backend: str = AUTO, threads: int | None = None
) -> Executable:
    """Partition and compile.

    Args:
        weights: a tensor for each weight value of the graph, by name; arrays are taken as float32.
        backend: a backend's name, several joined by "+", or "auto": the first of `AUTOMATIC` that runs all of it.
    Raises:
        BackendError: unknown or unavailable backend, a node that none of those named runs (named), a
            weight that is missing or of another shape.
    """
    bound = _bind(graph, weights)
    if backend == AUTO:
        return _first_that_can(graph, bound, threads)
    backends = [get_backend(name, threads) for name in dict.fromkeys(backend.split("+"))]
    return Executable(graph, partition(graph, backends), bound)


def device_memory(backend: str) -> int | None:
    """Free bytes of the device on which a named backend keeps its caches; None: they are in the computer's memory.

    Raises:
        BackendError: unknown or unavailable backend.
    """
    names = [] if backend == AUTO else backend.split("+")
    free = [getattr(get_backend(name), "free_bytes", None) for name in names]
    return min((size for size in free if size is not None), default=None)


def partition(graph: Graph, backends: list[Backend]) -> list[Segment]:
    """Cut a graph into runs of nodes, each for the first of `backends` that supports it.

    Raises:
        BackendError: a node, or the nodes around one cache, that no single backend supports.
    """
    owners = [_owner(graph, node, backends) for node in graph.nodes]
    groups: list[tuple[Backend, list[Node]]] = []
    for owner, node in zip(owners, graph.nodes, strict=True):
        if groups and groups[-1][0] is owner:
            groups[-1][1].append(node)
        else:
            groups.append((owner, [node]))
    if len(groups) == 1:
        return [Segment(groups[0][0], graph, tuple(graph.outputs))]
    return [_segment(graph, owner, nodes, number) for number, (owner, nodes) in enumerate(groups)]


def _owner(graph: Graph, node: Node, backends: list[Backend]) -> Backend:
    state = next((graph.state_of(name) for name in node.inputs if graph.is_state(name)), None)
    together = [node]
    if state is not None:
        together = [
            other
            for other in graph.nodes
            if any(graph.is_state(name) and graph.state_of(name) == state for name in other.inputs)
        ]
    for backend in backends:
        if all(backend.supports(graph, other) for other in together):
            return backend
    asked = "+".join(backend.name for backend in backends)
    unable = next(other for other in together if not backends[0].supports(graph, other))
    shapes = ", ".join(str(graph.values[name]) for name in unable.inputs)
    raise BackendError(
        f"backend {asked} does not run the node {unable} with {shapes}",
        fix=f"use --backend auto, or add one that does: --backend {asked}+reference",
    )


def _segment(graph: Graph, owner: Backend, nodes: list[Node], number: int) -> Segment:
    made = dict.fromkeys(name for node in nodes for name in node.outputs)
    used = dict.fromkeys(name for node in nodes for name in node.inputs if name not in made)
    part = Graph(f"{graph.name}.{number}")
    for name in used:
        value = graph.values[name]
        if value.kind == "weight":
            part.weight(name, value.shape)
        elif value.kind == "state":
            part.state(name, value.shape, value.dtype)
        elif graph.is_state(name):
            raise BackendError(
                f"the cache {name} would be written in one segment and read in another",
                fix="ask for one backend",
            )
        else:
            part.input(name, value.shape, value.dtype)
    for node in nodes:
        part.apply(node.op, *(part.values[name] for name in node.inputs), name=node.outputs[0], **node.attrs)
    own = set(map(id, nodes))
    later = {name for node in graph.nodes if id(node) not in own for name in node.inputs} | set(graph.outputs)
    carries = tuple(name for name in made if name in later and not graph.is_state(name))
    for name in carries:
        part.output(part.values[name])
    return Segment(owner, part, carries)


def _first_that_can(graph: Graph, weights: Mapping[str, Tensor], threads: int | None) -> Executable:
    reasons = []
    for name in AUTOMATIC:
        try:
            return Executable(graph, partition(graph, [get_backend(name, threads)]), weights)
        except BackendError as error:
            reasons.append(error)
    if len(reasons) == 1:
        raise reasons[0]
    raise BackendError("no backend runs this model here: " + "; ".join(error.what for error in reasons))


def _bind(graph: Graph, weights: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    bound = {}
    for value in graph.of_kind("weight"):
        tensor = weights.get(value.name)
        if tensor is None:
            raise BackendError(f"the graph needs a tensor {value.name} {list(value.shape)}, none was given")
        if not isinstance(tensor, Tensor):
            tensor = Tensor.from_array(np.asarray(tensor, np.float32))
        if tensor.shape != value.shape:
            raise BackendError(f"tensor {value.name} is {list(tensor.shape)}, the graph needs {list(value.shape)}")
        bound[value.name] = tensor
    return bound
