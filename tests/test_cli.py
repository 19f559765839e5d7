"""The terminal: every command with good and bad input, in pipes, in pseudo-terminals, and interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import finial
from commands import GREEDY, Call, Terminal, command, environment, finial_, lines_of
from finial import LLM
from finial.cli import BROKEN_PIPE, INTERRUPTED, MISTAKE, console
from finial.cli.options import sampling_options
from finial.cli.run import DEMO_PROMPT
from finial.files.checkpoint import GenerationDefaults


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
