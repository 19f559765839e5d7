"""`finial chat` in pipes and pseudo-terminals, and interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import finial
from commands import Call, Terminal
from finial import LLM
from finial.cli import INTERRUPTED, MISTAKE


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


def test_control_c_before_an_answer_begins_is_back_at_the_prompt(tmp_path: Path) -> None:
    model = tmp_path / "slow"
    shutil.copytree(Path(finial.__file__).parent / "demo", model)
    file = model / "tokenizer_config.json"
    waits = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"  # hours
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": waits}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    terminal = Terminal("chat", str(model), "--threads", "1")
    terminal.asked()
    terminal.type("Good morrow!\n")
    terminal.taken("Good morrow!\r\n")
    terminal.type("\x03")
    terminal.until("stopped before the answer began", "> ")
    terminal.type("/quit\n")
    code, shown = terminal.end()
    assert code == 0 and "Traceback" not in shown


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
