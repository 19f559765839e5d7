"""`finial run`: continue a text, streamed, with what it cost and a verdict when asked for.

Knows where a prompt may come from and what belongs on which stream; generation and numbers are made elsewhere.

    finial run demo -p "To be" --stats --verify
"""

from __future__ import annotations

import dataclasses
import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finial.cli import console, options
from finial.errors import RequestError

if TYPE_CHECKING:
    from finial.engine.results import Completion
    from finial.llm import LLM

DEMO_PROMPT = "ROMEO:"


def run(
    model: options.ModelArgument = "demo",
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help='Text to continue; "-" reads standard input.')
    ] = None,
    text: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, when no MODEL stands before it.")
    ] = None,
    max_tokens: options.MaxTokens = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show speed, memory and the share of the roofline.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of the steps went.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold the text against the float32 reference backend.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of streamed text.")] = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Repetition = None,
    presence_penalty: options.Presence = 0.0,
    frequency_penalty: options.Frequency = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    format: options.Format = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    no_cache: options.NoCache = False,
    max_context: options.MaxContext = None,
    kv_format: options.KvFormat = "bf16",
) -> int:
    """Continue a text.

    [bold]finial run[/] -p TEXT      [bold]finial run[/] MODEL -p TEXT      [bold]finial run[/] MODEL TEXT

    The first word is always the model, demo when there is none.
    Without a prompt, standard input is read when something is piped into it.
    The text goes to standard output, everything else to standard error.
    """
    words = find_prompt(model, prompt, text)
    llm = load(
        model,
        backend=options.backend_on(backend, device),
        format=format,
        threads=threads,
        max_context=max_context,
        kv_format=kv_format,
        cache=not no_cache,
        max_batch=1,
    )
    with llm:
        sampling = options.sampling_options(
            llm.info.generation,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        if profile:
            llm.profile()
        stream = llm.stream(
            words, max_tokens=max_tokens, seed=seed, stop=stop or (), ignore_eos=ignore_eos, **sampling.options
        )
        if sys.stdout.isatty() and not as_json:
            _show_prompt(words)
        interrupted = False
        try:
            for piece in stream:
                if not as_json:
                    write(piece.text)
        except KeyboardInterrupt:
            interrupted = True
        completion = stream.completion
        if not as_json and not completion.text.endswith("\n"):
            write("\n")
        if interrupted:
            console.note(f"stopped after {console.count(len(completion.tokens), 'token')}")
        if profile:
            from finial.cli import stats as figures

            figures.profile_page(llm.timings()).show(console.err())
        _report(llm, words, completion, sampling, stats, verify and not interrupted, as_json, format)
    return 130 if interrupted else 0


def _report(
    llm: LLM,
    words: str,
    completion: Completion,
    sampling: options.Sampling,
    stats: bool,
    verify: bool,
    as_json: bool,
    format: str | None,
) -> None:
    from finial.cli import stats as figures

    measured = figures.measure(llm, completion, sampling.text, bandwidth=stats) if stats or as_json else None
    if stats and measured is not None and not as_json:
        console.err().print()
        figures.stats_page(measured).show(console.err())
    findings = []
    if verify:
        with console.waiting("comparing with the reference"):
            findings = figures.verify(llm, completion, format, sampling.plain_greedy)
        if not as_json:
            if not stats:
                console.err().print()
            figures.verdict_page(findings).show(console.err())
    if as_json:
        assert measured is not None
        answer: dict[str, Any] = {
            "model": llm.info.model,
            "prompt": words,
            "text": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "options": sampling.options,
            "stats": dataclasses.asdict(measured),
            "verdicts": [dataclasses.asdict(finding) for finding in findings] if verify else None,
        }
        print(json.dumps(answer, ensure_ascii=False, indent=2))


def load(model: str, **how: Any) -> LLM:
    """Fetch what is missing, with a bar, and open the model."""
    from finial.files.hub import resolve
    from finial.llm import LLM

    with console.progress(model) as report:
        path = resolve(model, progress=report)
    with console.waiting(f"loading {model}"):
        llm = LLM(path, **how)
    llm.info = dataclasses.replace(llm.info, model=model)
    return llm


def shown(text: str) -> str:
    """A prompt short enough for an error message, quoted for a shell."""
    import shlex

    return shlex.quote(text if len(text) <= 40 else text[:40] + "…")


def find_prompt(model: str, argument: str | None, option: str | None) -> str:
    """The prompt: of the option, the second argument, or standard input; the demo has one of its own."""
    if any(space in model for space in " \n\t") and not Path(model).exists():
        raise RequestError(
            f"{model!r} stands where the model's name belongs",
            fix=f"for a prompt write: finial run -p {shown(model)}  or: finial run demo {shown(model)}",
        )
    if argument is not None and option is not None:
        raise RequestError("there are two prompts, one after the model and one after -p", fix="leave one of them out")
    given = option if option is not None else argument
    if given is not None and given != "-":
        return given
    if given == "-" or _piped():
        words = sys.stdin.read().removesuffix("\n")
        if words or given == "-":
            return words
    if model == "demo":
        return DEMO_PROMPT
    raise RequestError(
        f"there is no prompt for the model {model}",
        fix=f'finial run {shown(model)} -p "Once upon a time", or if that is the prompt: finial run -p {shown(model)}',
    )


def _piped() -> bool:
    """Whether standard input is a file or a pipe; not for a terminal, nor for /dev/null."""
    import os

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return sys.stdin is not None and not sys.stdin.closed and not sys.stdin.isatty()
    return not stat.S_ISCHR(mode)


def write(text: str) -> None:
    """Foreign text to standard output, at once; what would command a terminal is left out when it is one."""
    if text:
        sys.stdout.write(console.clean(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def _show_prompt(words: str) -> None:
    from rich.text import Text

    console.out().print(Text(console.clean(words), style="bold"), end="", soft_wrap=True)
    sys.stdout.flush()
