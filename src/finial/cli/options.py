"""The options that several commands have, and what they mean to the engine.

Knows names, help texts and which defaults come from the model; nothing of how tokens are chosen.

    sampling = sampling_options(checkpoint.generation, temperature=None, top_p=0.9)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finial.files.checkpoint import GenerationDefaults

_SAMPLING = "Sampling (default: what the model's makers recommend, else greedy)"
_RUNNING = "Running"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="demo (embedded), a directory, a .gguf file, or a hub name such as Qwen/Qwen3-0.6B."
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=0, help="New tokens at most (default 256).", show_default=False)
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=_SAMPLING)
]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely; 0 keeps all.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(help="Keep the most likely up to this sum.", rich_help_panel=_SAMPLING)]
MinP = Annotated[
    float | None, typer.Option(help="Keep those at least so probable beside the best.", rich_help_panel=_SAMPLING)
]
Repetition = Annotated[float | None, typer.Option("--repetition-penalty", help="1: none.", rich_help_panel=_SAMPLING)]
Presence = Annotated[float, typer.Option("--presence-penalty", help="-2 to 2.", rich_help_panel=_SAMPLING)]
Frequency = Annotated[float, typer.Option("--frequency-penalty", help="-2 to 2.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after end-of-text tokens.", rich_help_panel=_SAMPLING)
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Weight format: f32, f16, bf16, q8_0, q4_0; with --backend cuda also fp8 (default: as stored).",
        rich_help_panel=_RUNNING,
    ),
]
Backend = Annotated[
    str, typer.Option(help="auto, cpu, cuda, reference, or several joined by +.", rich_help_panel=_RUNNING)
]
Device = Annotated[
    str | None,
    typer.Option(help="A GPU, such as cuda:1; the backend is then cuda.", rich_help_panel=_RUNNING, show_default=False),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads (default: one per usable core).", rich_help_panel=_RUNNING)
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Recompute everything for each token.", rich_help_panel=_RUNNING)
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Positions of prompt and text (default: the model's, or what memory holds).",
        rich_help_panel=_RUNNING,
    ),
]
KvFormat = Annotated[str, typer.Option(help="KV cache format: bf16, f32 or q8_0.", rich_help_panel=_RUNNING)]

# name of an option -> what it reads as in a line for people
_LABELS = {
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
    "repetition_penalty": "repetition penalty",
    "presence_penalty": "presence penalty",
    "frequency_penalty": "frequency penalty",
}
_NEUTRAL = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Sampling:
    """Options for `LLM.stream`, and a line that says them and where they come from."""

    options: dict[str, Any]
    text: str

    @property
    def plain_greedy(self) -> bool:
        """Whether the text is the model's own greedy text."""
        return self.options["temperature"] == 0 and not any(
            self.options.get(name, neutral) != neutral for name, neutral in _NEUTRAL.items() if name.endswith("penalty")
        )


def backend_on(backend: str, device: str | None) -> str:
    """The backend's name with the device that was asked for.

    Raises:
        RequestError: a device of another backend than the one asked for.
    """
    if device is None:
        return backend
    from finial.errors import RequestError

    name = device.partition(":")[0]
    if backend not in ("auto", name):
        raise RequestError(f"--device {device} with --backend {backend}", fix=f"leave --backend out, or use {name}")
    return device


def sampling_options(recommended: GenerationDefaults, **given: Any) -> Sampling:
    """What was asked for, and the model's recommendation for what was not.

    Sampling that the model's files describe without a temperature has transformers' default, 1.
    """
    options = {name: value for name, value in given.items() if value is not None}
    theirs = {
        name: getattr(recommended, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    theirs = {name: value for name, value in theirs.items() if value is not None}
    if "temperature" not in theirs:
        theirs["temperature"] = 1.0 if theirs.keys() & {"top_k", "top_p", "min_p"} else 0.0
    filled = [name for name in theirs if name not in options]
    for name in filled:
        options[name] = theirs[name]
    if options["temperature"] == 0:
        shown = ["greedy"]
        names = [name for name in _LABELS if name.endswith("penalty")]
    else:
        shown = [f"temperature {options['temperature']:g}"]
        names = [name for name in _LABELS if name != "temperature"]
    shown += [
        f"{_LABELS[name]} {options[name]:g}" for name in names if options.get(name, _NEUTRAL[name]) != _NEUTRAL[name]
    ]
    told = [name for name in filled if getattr(recommended, name) is not None and name in ("temperature", *names)]
    if told:
        shown.append("as the model recommends" if len(filled) == len(theirs) else "the rest as the model recommends")
    return Sampling(options, ", ".join(shown))
