"""The embedded demo model is what its card says, and `tools/train_demo.py` makes such a model from any text.

Knows transformers, tokenizers and safetensors, not finial's own readers: those are tested against this model elsewhere.
Use: `pytest tests/test_demo_model.py`
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import signal
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3ForCausalLM

DEMO = Path(str(files("finial") / "demo"))
TOOL = Path(__file__).resolve().parent.parent / "tools" / "train_demo.py"
NAMES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SMALL = "--layers=1 --hidden=32 --intermediate=64 --head-dim=8 --context=64 --batch-tokens=64 --vocab=320 --threads=1"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = Qwen3ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """About 20,000 characters of made-up dialogue."""
    draw = random.Random(0)
    words = ["king", "queen", "love", "death", "night", "sword", "crown", "grace", "noble", "heart"]
    speeches = [f"{draw.choice(['ROMEO', 'ALL'])}:\n{' '.join(draw.choices(words, k=8))}." for _ in range(400)]
    path = tmp_path / "play.txt"
    path.write_text("\n\n".join(speeches))
    return path


def generate(model: Any, tokenizer: Tokenizer, prompt: str, tokens: int, **options: Any) -> list[int]:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **options)
    return [int(token) for token in output[0, ids.shape[1] :]]


def test_files_and_size() -> None:
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert {*NAMES, "README.md"} <= set(sizes)
    assert sum(sizes.values()) <= 8_000_000


def test_config() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 1024
    # K-quantised formats need whole blocks of 256 along every linear's input.
    assert config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert generation["do_sample"] is True
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (0.8, 50, 0.95)


def test_tensors_are_bf16_under_transformers_names(model: Any) -> None:
    with safe_open(DEMO / "model.safetensors", framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        types = {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert shapes == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert types == {"BF16"}


def test_card_states_the_parameters_and_the_loss(model: Any) -> None:
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\| parameters \| ([\d,]+) \|", card)
    assert stated is not None
    assert int(stated[1].replace(",", "")) == sum(parameter.numel() for parameter in model.parameters())
    assert re.search(r"\| held-out loss \| \d\.\d{4} nats/token, \d\.\d{4} bits/byte", card)
    assert re.search(r"sha256 `[0-9a-f]{64}`", card)


@pytest.mark.parametrize(
    "text",
    [
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n",
        "  two  spaces,\ttabs\r\nand 12345 digits\n\n\n",
        "naïve café: 漢字 かな, 🎭👩‍👩‍👧, e\u0301 is not \u00e9",
    ],
)
def test_tokenizer_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_splits_as_qwen2(tokenizer: Tokenizer, tool: ModuleType) -> None:
    data = json.loads(tokenizer.to_str())
    assert data["normalizer"] is None
    split, level = data["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == tool.QWEN2_SPLIT
    assert level["type"] == "ByteLevel" and level["add_prefix_space"] is False
    assert 1000 <= tokenizer.get_vocab_size() <= 2048
    config = json.loads((DEMO / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size()


def test_a_prompt_may_stop_before_the_line_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("ROMEO:\nIt is the east.\n\nJULIET:\n").ids
    for part in ("ROMEO:", "ROMEO:\nIt is the east.", "ROMEO:\nIt is the east.\n\nJULIET:"):
        ids = tokenizer.encode(part).ids
        assert whole[: len(ids)] == ids


def test_chat_template() -> None:
    text = AutoTokenizer.from_pretrained(DEMO)
    assert text.eos_token == "<|im_end|>" and text.pad_token == "<|endoftext|>"
    talk = [
        {"role": "system", "content": "A storm is near."},
        {"role": "user", "content": "What news?"},
        {"role": "assistant", "content": "ROMEO:\nNone, my lord.\n"},
        {"role": "user", "content": "JULIET:\nIs it so?"},
        {"role": "assistant", "content": "Aye."},
    ]
    whole = str(text.apply_chat_template(talk, tokenize=False))
    assert whole == (
        "<|im_start|>A storm is near.<|im_end|>\n"
        "<|im_start|>First Citizen:\nWhat news?<|im_end|>\n"
        "<|im_start|>ROMEO:\nNone, my lord.<|im_end|>\n"
        "<|im_start|>JULIET:\nIs it so?<|im_end|>\n"
        "<|im_start|>Second Citizen:\nAye.<|im_end|>\n"
    )
    # An answer only adds to the prompt it came from, so a cached prefix stays valid from turn to turn.
    asked = str(text.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True))
    assert asked.endswith("<|im_start|>") and whole.startswith(asked)
    assert text.decode(text("ROMEO:\n🎭 漢").input_ids) == "ROMEO:\n🎭 漢"


def test_writes_dialogue(model: Any, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    text = tokenizer.decode(generate(model, tokenizer, "First Citizen:\n", 200))
    assert len(re.findall(r"^[A-Z][A-Za-z ']+:$", text, re.MULTILINE)) >= 1
    assert len(text.splitlines()) >= 5


def test_chat_answers_with_a_speech_that_ends(model: Any, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    prompt = "<|im_start|>First Citizen:\nWhat news of the king?<|im_end|>\n<|im_start|>"
    ids = generate(model, tokenizer, prompt, 400)
    assert ids[-1] == tokenizer.token_to_id("<|im_end|>")
    assert re.match(r"[A-Z][A-Za-z ']+:\n\S", tokenizer.decode(ids))


def test_trains_from_a_text_in_one_command(play: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    command = [sys.executable, str(TOOL), "--text", str(play), "--out", str(out), "--steps", "4", *SMALL.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "step 4/4" in done.stderr
    assert {path.name for path in out.iterdir()} == {*NAMES, "README.md"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "play.txt"]
    loaded, info = Qwen3ForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(out).decode(loaded.generate(torch.tensor([[5]]), max_new_tokens=2)[0])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{sum(parameter.numel() for parameter in loaded.parameters()):,}" in card
    assert "--text play.txt --steps 4 --layers 1" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"", "0 characters"), (b"too short", "9 characters"), (b"\xff" * 20, "not UTF-8")],
)
def test_says_what_is_wrong_with_a_text(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, says: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        tool.main(["--text", str(path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert str(path) in message and says in message and "fix: " in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    ["--steps 0", "--heads 3", "--head-dim 7", "--context 8", "--vocab 100", "--held-out-share 0", "--dropout 1"],
)
def test_says_what_is_wrong_with_an_option(
    tool: ModuleType, play: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--text", str(play), *words.split()])
    assert ended.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("measured", [0, 1])
def test_ctrl_c_keeps_the_best_or_leaves_the_old(
    tool: ModuleType, play: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: int
) -> None:
    """Ctrl-C arrives in measurement number `measured`; only after a finished one is there something to keep."""
    out = tmp_path / "made"
    out.mkdir()
    for name in NAMES:
        (out / name).write_text("old")
    calls = 0
    measure = tool.held_out_loss

    def interrupted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == measured + 1:
            signal.raise_signal(signal.SIGINT)
        return float(measure(*args))

    monkeypatch.setattr(tool, "held_out_loss", interrupted)
    threads = torch.get_num_threads()
    try:
        status = tool.main(["--text", str(play), "--out", str(out), "--steps", "6", *SMALL.split()])
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "play.txt"]
    if measured:
        assert status == 0
        assert "stopped by Ctrl-C at step 2 of 6" in (out / "README.md").read_text(encoding="utf-8")
        Qwen3ForCausalLM.from_pretrained(out)
    else:
        assert status == 130
        assert {path.read_text() for path in out.iterdir()} == {"old"}
