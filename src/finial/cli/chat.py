"""`finial chat`: a conversation, turn by turn.

Knows lines, commands and what Ctrl-C means; templates, generation and reuse of the cache are the engine's.

    finial chat demo
"""

from __future__ import annotations

import difflib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finial.cli import console, options
from finial.cli.run import load, write
from finial.errors import FinialError, RequestError

if TYPE_CHECKING:
    from finial.engine.results import Completion, Stream
    from finial.llm import LLM

COMMANDS = {
    "/help": "these commands",
    "/reset": "start over, keeping the system message",
    "/system TEXT": "set the system message and start over; without TEXT, show it",
    "/stats": "speed and memory of the last answer",
    "/quit": "end (also Ctrl-D)",
}


def chat(
    model: options.ModelArgument = "demo",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Repetition = None,
    presence_penalty: options.Presence = 0.0,
    frequency_penalty: options.Frequency = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    format: options.Format = None,
    backend: options.Backend = "auto",
    device: options.Device = None,
    threads: options.Threads = None,
    max_context: options.MaxContext = None,
    kv_format: options.KvFormat = "bf16",
) -> int:
    """Talk with a model, turn by turn.

    Ctrl-C stops an answer and keeps what was said.
    At the prompt it ends the conversation, as Ctrl-D does.
    Lines that are piped in are one turn each.
    """
    llm = load(
        model,
        backend=options.backend_on(backend, device),
        format=format,
        threads=threads,
        max_context=max_context,
        kv_format=kv_format,
        max_batch=1,
    )
    with llm:
        if llm.tokenizer.chat_template is None:
            raise RequestError(
                f"{model} has no chat template: it continues text and was not made for conversations",
                fix=f"finial run {model} -p TEXT",
            )
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
        more = {"max_tokens": max_tokens, "seed": seed, "stop": stop or ()}
        talk = _Conversation(llm, sampling, sampling.options | more, system)
        return talk.hold()


class _Conversation:
    """Messages so far, and the loop over lines."""

    def __init__(self, llm: LLM, sampling: options.Sampling, how: dict[str, Any], system: str | None) -> None:
        self._llm = llm
        self._sampling = sampling
        self._how = how
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._last: Completion | None = None
        self._person = sys.stdin.isatty()

    def hold(self) -> int:
        """Until the end of input; the exit code."""
        if self._person:
            self._greet()
        while True:
            try:
                line = self._read()
            except EOFError:
                if self._person:
                    write("\n")
                return 0
            except KeyboardInterrupt:
                write("\n")
                return 130
            if line.strip() in ("/quit", "/exit"):
                return 0
            if line.startswith("/"):
                self._command(line.strip())
            elif line.strip() and self._turn(line) and not self._person:
                return 130

    def _greet(self) -> None:
        info = self._llm.info
        try:
            import readline  # noqa: F401  # editing and history for input(), where the system has it
        except ImportError:
            console.note("no readline here: lines cannot be recalled")
        console.note(
            f"{info.model} · {info.config.architecture} · {info.format} on {info.backend} · {self._sampling.text}"
        )
        console.note("/help shows the commands, Ctrl-C stops an answer, Ctrl-D ends\n")

    def _read(self) -> str:
        if not self._person:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\n")
        return input("> ")

    def _turn(self, line: str) -> bool:
        """One question and its answer; True when it was interrupted."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self._messages, {"role": "user", "content": line}]
        interrupted = False
        stream: Stream | None = None
        try:
            stream = self._llm.stream_chat([*system, *messages], **self._how)
            for piece in stream:
                write(piece.text)
        except KeyboardInterrupt:
            interrupted = True
        except FinialError as error:
            if not self._person:
                raise
            console.print_error(error.what, f"{error.fix}, or /reset" if error.fix and self._messages else error.fix)
            return False
        if stream is None:  # while the conversation was still becoming a prompt
            write("\n")
            console.note("stopped before the answer began")
            return interrupted
        self._last = stream.completion
        answer = self._last.text
        write("\n" if answer.endswith("\n") or not self._person else "\n\n")
        if interrupted:
            console.note(f"stopped after {console.count(len(self._last.tokens), 'token')}")
        elif self._last.finish_reason == "length" and self._person:
            console.note(f"cut at {console.count(len(self._last.tokens), 'token')}; --max-tokens allows more")
        if answer:
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        return interrupted

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/help":
            page = console.Page()
            page.section("")
            for command, meaning in COMMANDS.items():
                page.row(command, meaning)
            page.show(console.err())
        elif name == "/reset":
            self._messages.clear()
            console.note("a new conversation")
        elif name == "/system":
            if rest.strip():
                self._system = rest.strip()
                self._messages.clear()
                console.note("a new conversation with this system message")
            else:
                console.note(self._system or "no system message")
        elif name == "/stats":
            self._show_stats()
        else:
            known = [command.split()[0] for command in COMMANDS]
            near = difflib.get_close_matches(name, known, 1)
            console.print_error(f"no command {name}", f"did you mean {near[0]}?" if near else "/help shows them")

    def _show_stats(self) -> None:
        from finial.cli import stats

        if self._last is None:
            console.note("nothing was said yet")
            return
        stats.stats_page(stats.measure(self._llm, self._last, self._sampling.text)).show(console.err())
