"""The terminal: every command with good and bad input, in pipes, in pseudo-terminals, and interrupted."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import finial
from finial import LLM, machine
from finial.cli import BROKEN_PIPE, INTERRUPTED, MISTAKE, console, invoke
from finial.cli.options import sampling_options
from finial.cli.run import DEMO_PROMPT
from finial.files.checkpoint import GenerationDefaults

SOURCES = str(Path(finial.__file__).parents[1])
GREEDY = ["--temperature", "0", "--threads", "1"]


def environment(**changes: str) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return base | {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"} | changes


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "finial.cli", *arguments]


def finial_(*arguments: str, stdin: str | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """A real process with pipes; without `stdin` there is none to read."""
    given = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=250, env=environment(**changes), **given
    )


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """One command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = invoke(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def greedy_text() -> str:
    with LLM("demo", threads=1) as llm:
        return llm.generate("To be", max_tokens=40).text


# -------------------------------------------------------------------------------------------------- starting


def test_help_is_light_and_quick() -> None:
    code = "import sys; from finial.cli import invoke; invoke(['--help']); sys.exit('numpy' in sys.modules)"
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0, "finial --help imports numpy"
    for name in ("run", "chat", "info", "doctor", "pull", "convert", "synth"):
        assert re.search(rf"\b{name}\b", done.stdout)
    assert min(seconds) < 0.4 * 3, "0.4 s of processor time on a quiet machine; the tests run on busy ones"


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"finial {finial.__version__}\n", "")


@pytest.mark.parametrize("name", ["run", "chat", "info", "doctor", "pull", "convert", "synth"])
def test_every_command_has_help(call: Call, name: str) -> None:
    code, text, _ = call(name, "--help")
    assert code == 0 and "Usage: finial " + name in text


MISTAKES: list[tuple[Sequence[str], Sequence[str]]] = [
    (["rum"], ["No such command", "run"]),
    (["run", "--temprature", "1"], ["--temprature", "--temperature"]),
    (["run", "demo", "-p", "x", "--max-tokens", "many"], ["--max-tokens", "integer"]),
    (["run", "demo", "x", "-p", "y"], ["two prompts"]),
    (["run", "Once upon a time"], ["model", "finial run -p 'Once upon a time'"]),
    (["run", "Hamlet"], ["no prompt", "finial run Hamlet -p", "finial run -p Hamlet"]),
    (["run", "no-such-model", "-p", "x"], ["no-such-model", "fix:"]),
    (["run", "demo", "-p", ""], ["empty"]),
    (["run", "demo", "-p", "x", "--format", "q9"], ["q9", "q8_0"]),
    (["run", "demo", "-p", "x", "--backend", "refrence"], ["refrence", "reference"]),
    (["run", "demo", "-p", "x", "--kv-format", "q8"], ["q8", "bf16"]),
    (["run", "demo", "-p", "x", "--threads", "0"], ["--threads", "1"]),
    (["run", "demo", "-p", "x", "--top-p", "3"], ["--top-p 3", "at most 1"]),
    (["run", "demo", "-p", "x", "--max-tokens", "5000"], ["1024", "--max-tokens 1023 or less"]),
    (["run", "demo", "-p", "x", "--max-context", "9999"], ["1024"]),
    (["run", "demo", "-p", "x", "--stop", ""], ["stop"]),
    (["chat", "no-such-model"], ["no-such-model"]),
    (["info", "no-such.gguf"], ["no-such.gguf"]),
    (["doctor", "extra"], ["extra"]),
    (["pull", "plain"], ["owner/name"]),
    (["pull"], ["Missing argument"]),
    (["convert", "no-such-dir", "out.gguf"], ["no-such-dir"]),
    (["convert", "demo"], ["OUT"]),
    (["synth", "qwen9", "dir"], ["qwen9", "qwen3-0.6b"]),
    (["synth", "qwen3-0.6b", "dir", "--layers", "99"], ["layers", "28"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_error_and_a_way_out(
    call: Call, arguments: Sequence[str], words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, errors = call(*arguments)
    assert code == MISTAKE and text == ""
    assert errors.startswith("error: ") and "Traceback" not in errors
    for word in words:
        assert word in errors
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"


def test_near_model_names_are_offered(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    _, _, errors = call("info", "my-modle")
    assert "did you mean my-model" in errors


def test_debug_shows_the_traceback() -> None:
    done = finial_("info", "no-such.gguf", FINIAL_DEBUG="1")
    assert "Traceback" in done.stderr and "FileError" in done.stderr


# -------------------------------------------------------------------------------------------------------- run


def test_piped_output_is_the_text_and_nothing_else(greedy_text: str) -> None:
    done = finial_("run", "demo", "To be", "--max-tokens", "40", *GREEDY)
    assert (done.returncode, done.stdout, done.stderr) == (0, greedy_text.removesuffix("\n") + "\n", "")


def test_all_ways_to_give_a_prompt_agree(call: Call, greedy_text: str) -> None:
    same = ["-n", "40", *GREEDY]
    expected = (0, greedy_text.removesuffix("\n") + "\n", "")
    assert call("run", "demo", "To be", *same) == expected
    assert call("run", "-p", "To be", *same) == expected
    assert call("run", "demo", "--prompt", "To be", *same) == expected
    assert call("run", "demo", "-", *same, stdin="To be\n") == expected
    assert call("run", *same, stdin="To be") == expected


def test_the_demo_has_a_prompt_of_its_own(call: Call) -> None:
    assert call("run", "-n", "8", *GREEDY) == call("run", "-p", DEMO_PROMPT, "-n", "8", *GREEDY)


def test_a_seed_makes_the_text_again(call: Call) -> None:
    how = ["run", "-p", "To be", "-n", "24", "--threads", "1", "--temperature", "1", "--seed"]
    assert call(*how, "7") == call(*how, "7") != call(*how, "8")


def test_stop_strings_and_token_limits(call: Call, greedy_text: str) -> None:
    stop = greedy_text.strip()[4:7]
    _, text, _ = call("run", "-p", "To be", "-n", "40", *GREEDY, "--stop", stop)
    assert text.rstrip("\n") == greedy_text[: greedy_text.index(stop)].rstrip("\n")
    assert call("run", "-p", "To be", "-n", "0", *GREEDY)[1] == "\n"


def test_without_the_cache_the_text_is_the_same(call: Call, greedy_text: str) -> None:
    _, text, errors = call("run", "-p", "To be", "-n", "40", *GREEDY, "--no-cache", "--stats")
    assert text.rstrip("\n") == greedy_text.rstrip("\n") and "not used (--no-cache)" in errors


def test_stats_go_to_standard_error(call: Call, greedy_text: str) -> None:
    _, text, errors = call("run", "-p", "To be", "-n", "40", *GREEDY, "--stats")
    assert text == greedy_text.removesuffix("\n") + "\n"
    for word in (
        "load",
        "first token",
        "decode",
        "tok/s",
        "roofline",
        "GB/s",
        "peak",
        "bf16",
        "cpu",
        "1 thread",
        "greedy",
    ):
        assert word in errors
    assert "\x1b" not in errors


def test_profile_says_where_the_time_went(call: Call, greedy_text: str) -> None:
    _, text, errors = call("run", "-p", "To be", "-n", "40", *GREEDY, "--profile")
    assert text == greedy_text.removesuffix("\n") + "\n"
    for word in ("profile", "norm + linear", "gated", "attention", "waiting", "GB/s"):
        assert word in errors
    _, _, errors = call("run", "-p", "To be", "-n", "1", *GREEDY, "--backend", "reference", "--profile")
    assert re.search(r"steps +unavailable", errors)


def test_stats_say_what_is_unavailable(call: Call) -> None:
    _, _, errors = call("run", "-p", "To be", "-n", "1", *GREEDY, "--backend", "reference", "--stats")
    assert re.search(r"decode +unavailable", errors) and re.search(r"roofline +unavailable", errors)


def test_json_holds_text_tokens_figures_and_verdict(call: Call, greedy_text: str) -> None:
    code, text, _ = call("run", "-p", "To be", "-n", "40", *GREEDY, "--json", "--verify", "--stats")
    told = json.loads(text)
    assert code == 0 and told["text"] == greedy_text and len(told["tokens"]) == 40
    assert told["finish_reason"] == "length" and told["options"]["temperature"] == 0
    stats = told["stats"]
    assert stats["new_tokens"] == 40 and stats["threads"] == 1 and stats["isa"]
    # All weights once (embedding and head are tied; the embedding reads one row), the cache at half of the text.
    kv = stats["kv_bytes_per_token"] * (stats["prompt_tokens"] + 20)
    assert stats["step_bytes"] == pytest.approx(stats["weight_bytes"] + kv, rel=0.001)
    share = stats["step_bytes"] * stats["decode_tok_s"] / (stats["read_gb_s"] * 1e9)
    assert stats["roofline_share"] == pytest.approx(share)
    (finding,) = told["verdicts"]
    verdict = finding["verdict"]
    assert verdict["positions"] == len(told["prompt_tokens"]) + 40 and verdict["greedy_tokens"] == 40
    assert 0 <= verdict["kl_mean"] < 1e-4 and verdict["top1"] > 0.9


def test_verdict_of_the_reference_against_itself_is_perfect(call: Call) -> None:
    _, _, errors = call(
        "run", "-p", "To be", "-n", "24", *GREEDY, "--backend", "reference", "--kv-format", "f32", "--verify"
    )
    assert "mean 0.0e+00" in errors and "100 %" in errors and "equal  over all 24 tokens" in errors


def test_a_reencoded_model_is_held_against_the_stored_one_too(call: Call) -> None:
    _, text, _ = call("run", "-p", "To be", "-n", "24", "--seed", "1", "--format", "q4_0", "--json", "--verify")
    same, stored = json.loads(text)["verdicts"]
    assert "same" in same["weights"] and "stored" in stored["weights"]
    # Against the same weights only the rounding of activations shows, against the stored ones that of the weights too.
    assert stored["verdict"]["kl_mean"] > 10 * same["verdict"]["kl_mean"]


def test_sampling_comes_from_the_model_unless_told() -> None:
    theirs = GenerationDefaults(temperature=0.8, top_k=50, top_p=0.95)
    assert sampling_options(theirs).options == {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
    assert sampling_options(theirs).text == "temperature 0.8, top-k 50, top-p 0.95, as the model recommends"
    assert sampling_options(theirs, temperature=0.5).options["top_k"] == 50
    assert sampling_options(theirs, temperature=0).text == "greedy"
    assert sampling_options(theirs, temperature=0).plain_greedy
    assert not sampling_options(theirs, temperature=0, repetition_penalty=1.1).plain_greedy
    assert sampling_options(GenerationDefaults()).text == "greedy"
    assert sampling_options(GenerationDefaults(top_p=0.9)).options["temperature"] == 1.0


# ------------------------------------------------------------------------------------- terminals and signals


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, **changes: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        leader, follower = pty.openpty()
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment(**changes),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C typed here becomes SIGINT
        )
        os.close(follower)
        self._leader = leader
        self.shown = ""

    def until(self, *words: str, limit_s: float = 40.0) -> str:
        """Read until all words were shown since the last call; returns what was."""
        start, deadline = len(self.shown), time.monotonic() + limit_s
        while not all(word in self.shown[start:] for word in words):
            assert time.monotonic() < deadline, f"{words} not in {self.shown[start:]!r}"
            assert self._read(0.2), f"ended without {words}: {self.shown[start:]!r}"
        return self.shown[start:]

    def asked(self) -> None:
        """Wait for the prompt, and until the process sleeps: readline listens for signals a moment after it."""
        self.until("> ")
        state, deadline = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + 40
        if not state.exists():  # a system without /proc
            time.sleep(0.5)
            return
        while state.read_text().rsplit(")", 1)[1].split()[0] != "S":
            assert time.monotonic() < deadline, "it does not wait"
            time.sleep(0.01)

    def _read(self, wait_s: float) -> bool:
        if not select.select([self._leader], [], [], wait_s)[0]:
            return True
        try:
            data = os.read(self._leader, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # what Linux says when the other side is closed
                raise
            data = b""
        self.shown += data.decode(errors="replace")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def end(self) -> tuple[int, str]:
        """(exit code, everything that was shown)."""
        deadline = time.monotonic() + 40
        while self._read(0.2):
            assert time.monotonic() < deadline, f"does not end: {self.shown!r}"
        code = self.process.wait(timeout=60)
        os.close(self._leader)
        return code, self.shown


def lines_of(shown: str) -> list[str]:
    """What a person sees, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n").split("\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_colours_and_no_line_too_wide(columns: int) -> None:
    how = ["-n", "20", *GREEDY, "--stats", "--verify"]
    code, shown = Terminal("run", "-p", "To be", *how, columns=columns).end()
    assert code == 0 and "\x1b[1m" in shown and "To be" in shown
    page = shown[shown.index("speed") :]
    for line in lines_of(page):
        line = line.split("\r")[-1]
        assert len(line) <= columns, line


def test_no_color_is_honoured() -> None:
    _, shown = Terminal("run", "-p", "To be", "-n", "4", *GREEDY, "--stats", NO_COLOR="1").end()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", shown)


def test_a_model_cannot_command_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from finial.cli import run

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    foreign = "a\x1b]0;title\x07b\x1b[2Jc\td\ne\r\x08\x7f\x9bf é🙂"
    monkeypatch.setattr(sys, "stdout", Screen())
    run.write(foreign)
    assert sys.stdout.getvalue() == "a]0;titleb[2Jc\td\nef é🙂"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run.write(foreign)
    assert sys.stdout.getvalue() == foreign, "a file gets every byte"  # type: ignore[attr-defined]


LONG = ["--max-tokens", "1000", "--ignore-eos", "--no-cache", *GREEDY]  # minutes, when nobody stops it


def test_control_c_keeps_the_text() -> None:
    process = subprocess.Popen(
        command("run", "-p", "To be", *LONG),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    first = b"".join(os.read(process.stdout.fileno(), 1) for _ in range(20))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "stopped after" in errors.decode() and "Traceback" not in errors.decode()
    text = (first + rest).decode()
    with LLM("demo", threads=1) as llm:
        expected = llm.generate("To be", max_tokens=1000, ignore_eos=True).text
    assert text.endswith("\n") and expected.startswith(text.removesuffix("\n")) and len(text) > 20


def test_control_c_in_a_terminal(greedy_text: str) -> None:
    terminal = Terminal("run", "-p", "To be", *LONG, "--stats")
    terminal.until(*greedy_text.splitlines()[:2])
    terminal.type("\x03")
    code, shown = terminal.end()
    assert code == INTERRUPTED and "stopped after" in shown and "decode" in shown and "Traceback" not in shown


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        command("run", "-p", "To be", *LONG),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.wait(timeout=60) == BROKEN_PIPE
    assert process.stderr.read() == b""
    process.stderr.close()


# -------------------------------------------------------------------------------------------------------- chat


def test_piped_lines_are_turns(call: Call) -> None:
    how = ["chat", "--threads", "1", "--max-tokens", "12", "--temperature", "0"]
    code, text, errors = call(*how, stdin="Good morrow!\n\nWhat news?\n")
    assert code == 0 and errors == ""
    with LLM("demo", threads=1) as llm:
        said = [{"role": "user", "content": "Good morrow!"}]
        first = llm.chat(said, max_tokens=12).text
        said += [{"role": "assistant", "content": first}, {"role": "user", "content": "What news?"}]
        second = llm.chat(said, max_tokens=12).text
    assert text == f"{first}\n{second}\n"


def test_commands_of_a_conversation(call: Call) -> None:
    lines = "/stats\n/help\n/system\n/system Speak.\n/system\nHail!\n/stats\n/reset\n/sistem\n/nothing\n/quit\nnever\n"
    code, text, errors = call("chat", "--max-tokens", "4", "--threads", "1", stdin=lines)
    assert code == 0 and "never" not in text
    for word in (
        "nothing was said yet", "/reset", "no system message", "Speak.", "tok/s", "a new conversation",
        "did you mean /system", "/help shows them",
    ):  # fmt: skip
        assert word in errors


def endless(folder: Path) -> str:
    """The demo model, without the end-of-turn token among those that end an answer."""
    model = folder / "endless"
    shutil.copytree(Path(finial.__file__).parent / "demo", model)
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("generation_config.json", "eos_token_id", 0),
    ):
        file = model / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    return str(model)


def test_a_conversation_in_a_terminal_with_an_interrupted_answer(tmp_path: Path) -> None:
    model = endless(tmp_path)
    with LLM(model, threads=1) as llm:
        answer = llm.chat([{"role": "user", "content": "Good morrow!"}], max_tokens=40).text
    terminal = Terminal("chat", model, "--max-tokens", "900", "--temperature", "0", "--backend", "reference")
    greeting = terminal.until("/help shows", "> ")
    assert "greedy" in greeting and "qwen3" in greeting
    terminal.type("Good morrow!\n")
    terminal.until("Good morrow!\r\n", answer.splitlines()[0])
    terminal.type("\x03")
    terminal.until("stopped after", "> ")
    terminal.type("/stats\n")
    terminal.until("roofline", "> ")
    terminal.type("\x04")
    code, shown = terminal.end()
    assert code == 0 and "Traceback" not in shown


def test_control_c_at_the_prompt_ends() -> None:
    terminal = Terminal("chat", "demo")
    terminal.asked()
    terminal.type("\x03")
    code, shown = terminal.end()
    assert code == INTERRUPTED and "Traceback" not in shown


def test_a_model_without_a_template_cannot_chat(call: Call, tmp_path: Path) -> None:
    model = tmp_path / "plain"
    shutil.copytree(Path(finial.__file__).parent / "demo", model)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    code, _, errors = call("chat", str(model))
    assert code == MISTAKE and "no chat template" in errors and "finial run" in errors


def test_a_conversation_over_the_context_is_an_error_that_says_so(call: Call) -> None:
    code, _, errors = call("chat", "--max-context", "32", "--threads", "1", stdin="Good morrow to you. " * 20 + "\n")
    assert code == MISTAKE and "context of 32" in errors


# ---------------------------------------------------------------------------------------------- info and doctor


def test_info_of_the_demo(call: Call) -> None:
    code, text, errors = call("info")
    assert code == 0 and errors == "" and "\x1b" not in text
    for word in (
        "qwen3",
        "2.76 M parameters",
        "bf16",
        "KV cache",
        "1,024 tokens",
        "q4_0",
        "as stored",
        "as the model recommends",
    ):
        assert word in text


def test_info_as_json(call: Call) -> None:
    told = json.loads(call("info", "demo", "--json")[1])
    assert told["config"]["architecture"] == "qwen3" and told["chat_template"]
    assert told["kv_bytes_per_token"] == {"bf16": 2048, "f32": 4096, "q8_0": 1088}
    sizes = {row["format"]: row["weight_bytes"] for row in told["formats"]}
    with LLM("demo", format="q4_0") as small, LLM("demo", format="f32") as large:
        assert sizes["q4_0"] == small.info.weight_bytes and sizes["f32"] == large.info.weight_bytes
    assert sizes["bf16"] == told["weight_bytes"]


def test_info_on_a_backend(call: Call) -> None:
    """Also loads it; what a backend says of how it decodes is told (cuda does: tests/test_mega_program.py)."""
    code, text, _ = call("info", "demo", "--backend", "reference")
    assert code == 0 and "on reference" in text
    loaded = json.loads(call("info", "demo", "--backend", "cpu", "--json")[1])["loaded"]
    assert loaded["backend"] == "cpu" and loaded["notes"] == [] and loaded["load_s"] > 0


def test_info_graph(call: Call) -> None:
    _, text, _ = call("info", "--graph")
    assert text.startswith("graph qwen3") and "attention" in text
    from finial.graph import Graph

    assert Graph.from_json(call("info", "--graph", "--json")[1]).text() == text


def test_doctor(call: Call) -> None:
    code, text, errors = call("doctor")
    assert code == 0 and errors == "" and "\x1b" not in text
    for word in (
        "CPU",
        "instructions",
        "usable",
        "read, 1 thread",
        "GB/s",
        "GPU",
        "Vulkan",
        "energy counters",
        "optional parts",
    ):
        assert word in text
    assert text.rstrip().split("\n")[-1].startswith("ready: the cpu backend runs with")


def test_doctor_as_json(call: Call) -> None:
    told = json.loads(call("doctor", "--json")[1])
    assert told["ready"] is True and told["bandwidth"][0]["read_gb_s"] > 0 and told["cpu"]["usable_cores"] >= 1


def test_doctor_without_the_native_module(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finial._native", None)
    code, text, _ = call("doctor")
    assert (
        code == 1
        and "not ready" in text
        and "pip install ." in text
        and re.search(r"read, 1 thread +unavailable", text)
    )


def test_doctor_on_another_machine(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.describe()
    other = machine.Machine(
        system=real.system,
        cpu=real.cpu,
        memory=machine.Memory(1 << 33, 1 << 32, 1 << 35, 1 << 33),
        gpus=(machine.Gpu("NVIDIA", "NVIDIA H100", "nvidia 580.65.06", 80 << 30, "9.0", "13.0", "NVML"),),
        vulkan=machine.Vulkan(True, ("nvidia",)),
        energy=(
            machine.Counter("RAPL package-0", None, "not permitted"),
            machine.Counter("NVML 0 NVIDIA H100", 12.5, ""),
        ),
        extras=(
            machine.Extra("cuda", ("cuda-core",), ("cuda-core",), 'pip install "finial[cuda]"'),
            machine.Extra("convert", ("torch",), (), 'pip install "finial[convert]"'),
        ),
        native=real.native,
        bandwidth=(machine.Bandwidth(1, 20.0, ""), machine.Bandwidth(2, None, "no memory")),
    )
    monkeypatch.setattr(machine, "describe", lambda bandwidth_s: other)
    _, text, _ = call("doctor")
    for words in (
        r"NVIDIA +NVIDIA H100 +nvidia 580.65.06 · 85.9 GB · compute 9.0 · CUDA up to 13.0",
        r"the control group's limit",
        r"RAPL package-0 +unavailable +not permitted",
        r"NVML 0 NVIDIA H100 +readable",
        r'cuda +not installed +pip install "finial\[cuda\]"',
        r"convert +installed +torch",
        r"read, 2 threads +unavailable +no memory",
        r"loader found +nvidia",
    ):
        assert re.search(words, text), words


# ------------------------------------------------------------------------------------- pull, convert and synth


def test_convert_and_run_what_came_out(call: Call, tmp_path: Path) -> None:
    demo, out = str(Path(finial.__file__).parent / "demo"), tmp_path / "demo-q8_0.gguf"
    code, text, errors = call("convert", "demo", str(out), "--format", "q8_0")
    assert (code, text) == (0, f"{out}\n") and "MB in" in errors
    code, text, _ = call("run", str(out), "To be", "-n", "12", *GREEDY)
    assert code == 0 and text.strip()
    assert "q8_0" in call("info", str(out))[1]
    code, _, errors = call("convert", demo, str(out), "--format", "q8_0")
    assert code == MISTAKE and str(out) in errors and "force" in errors
    assert call("convert", demo, str(out), "--format", "bf16", "--force")[0] == 0


def test_synth_and_look_at_it(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "smol"
    code, text, _ = call("synth", "smollm2-135m", str(out), "--layers", "1", "--seed", "3")
    assert (code, text) == (0, f"{out}\n")
    told = json.loads(call("info", str(out), "--json")[1])
    assert told["config"]["num_layers"] == 1 and told["config"]["hidden_size"] == 576
    code, _, errors = call("synth", "smollm2-135m", str(out))
    assert code == MISTAKE and str(out) in errors


def test_pull_offline_and_what_is_there(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    code, text, errors = call("pull", "owner/model")
    assert code == MISTAKE and text == "" and "offline" in errors
    folder = tmp_path / "models--owner--model"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    for file in (Path(finial.__file__).parent / "demo").iterdir():
        shutil.copy(file, snapshot)
    assert call("pull", "owner/model") == (0, f"{snapshot}\n", "")
    code, text, _ = call("run", "owner/model", "To be", "-n", "4", *GREEDY)
    assert code == 0 and text.strip()


# ---------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("number", "text"), [(7.966, "7.97"), (1.0, "1"), (31.46, "31.5"), (512.4, "512"), (1023.6, "1,024"), (0.0, "0")]
)
def test_significant_digits(number: float, text: str) -> None:
    assert console.significant(number) == text


def test_sizes() -> None:
    assert (
        console.size(7_966_000) == "7.97 MB" and console.size(12) == "12 bytes" and console.size(None) == "unavailable"
    )
    assert console.binary(32 << 10) == "32 KiB" and console.binary(3 << 29) == "1.5 GiB"
    assert console.count(1, "core") == "1 core" and console.count(2048, "token") == "2,048 tokens"
