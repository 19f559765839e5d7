"""Tokenizers: equal to their originals from every source, and streamed text equal to text decoded at once."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer

from finial.errors import FileError, RequestError
from finial.files.gguf_tokenizer import tokenizer_to_gguf
from finial.files.text import Text

CORPUS = [
    "Before we proceed any further, hear me speak. I'll say what's due; they've done it, we'd go, HE'S here, can't.",
    "def tokenize(text: str) -> list[int]:\n\treturn [ord(c) for c in text if c != '\\n']  # naïve\n\n\n\tif x > 9:\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]*0x1F3; }\r\n\r\n#include <stdio.h>\r\n",
    "你好,世界。日本語のテキストと한국어 텍스트。东京2024年12月31日",
    "😀 👩‍💻 👨‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 👍🏽 ❤️‍🔥 ☃\ufe0f",
    "e\u0301 é n\u0303 ñ a\u0323\u0307 ą̣ ﬁ Å \u212b ぽ は\u309a",
    "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 ٣٤٥ ½ Ⅷ ²",
    " a  b   c    d     e\t\tf \t g\u00a0h\u3000i\u2003j   ",
    "\n\n\n \n  \n\t\n a\n b\n\n",
    "\x00\x01\x07\x1b[31m\x7f\x85\u200b\u200e\ufeff\U000e0001",
    "שלום עולם! مرحبا بالعالم — नमस्ते दुनिया ภาษาไทย",
    "<|im_start|>user\nHi<|im_end|>\n<think> x </think><|endoftext|><s></s>[INST]",
    "ﷺ ẞ ß İ ı ǆ Σς \U0001d54f \U00010348 \uffff \ufffd",
    "aaaaaaaaaaaa abababababab ________ ======== ---------- ......",
    "▁under▁score ▁ Ġ Ċ Ã© <0x0A> <unk>",
    " leading",
    "trailing ",
    " ",
    "",
]
MIXED = st.lists(
    st.one_of(
        st.sampled_from([part for line in CORPUS for part in line.split(" ")]),
        st.sampled_from(
            ["  ", "\n", "\n\n", " ", "\t", "<|im_start|>", "<|im_end|>", "<think>", "'s", "\u0301", "\u200d"]
        ),
        st.text(max_size=8),
    ),
    max_size=12,
).map("".join)

# The published tokenizer.json files of these models, in the parts that decide how text is cut.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool, trim: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim, "use_regex": use_regex}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence(split(WORDS + r"\p{N}" + REST), byte_level(False, False)),
        "post_processor": byte_level(False, False),
        "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "bos_token": None},
    },
    "llama-bpe": {
        "normalizer": None,
        "pre_tokenizer": sequence(split(WORDS + r"\p{N}{1,3}" + REST), byte_level(False, True)),
        "post_processor": {
            "type": "Sequence",
            "processors": [
                byte_level(True, False),
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"<s>": {"id": "<s>", "ids": [None], "tokens": ["<s>"]}},
                },
            ],
        },
        "ignore_merges": True,
        "specials": ["<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"],
        "config": {"eos_token": "<|im_end|>", "bos_token": "<s>"},
    },
    "smollm": {
        "normalizer": None,
        "pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, byte_level(True, True)),
        "post_processor": None,
        "specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "config": {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"},
    },
    "gpt-2": {
        "normalizer": None,
        "pre_tokenizer": byte_level(True, True),
        "post_processor": byte_level(True, False),
        "specials": ["<|endoftext|>"],
        "config": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    },
}


def training_text() -> list[str]:
    """Words of the corpus in random order, often enough to make merges across scripts and spaces."""
    rng = random.Random(0)
    words = [word for line in CORPUS for word in line.split(" ")]
    return [line for line in CORPUS for _ in range(3)] + [" ".join(rng.choices(words, k=12)) for _ in range(400)]


def train(kind: str) -> dict[str, Any]:
    """A tokenizer.json of this kind, as its publisher would write it."""
    row = KINDS[kind]
    first = kind == "smollm"  # special tokens before the others, as in SmolLM2; after them elsewhere
    blank = json.loads(Tokenizer(models.BPE()).to_str())
    blank |= {"normalizer": row["normalizer"], "pre_tokenizer": row["pre_tokenizer"]}
    tokenizer = Tokenizer.from_str(json.dumps(blank))
    alphabet = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=row["specials"] if first else [], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if not first:
        tokenizer.add_special_tokens(row["specials"])
    made = json.loads(tokenizer.to_str())
    made["model"]["ignore_merges"] = row.get("ignore_merges", False)
    made["decoder"] = byte_level(True, True)
    made["post_processor"] = row["post_processor"]
    after = max([*made["model"]["vocab"].values(), *(t["id"] for t in made["added_tokens"])]) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    made["added_tokens"] += [{"id": after + i, "content": c, **plain} for i, c in enumerate(("<think>", "</think>"))]
    text = json.dumps(made)
    if kind == "llama-bpe":
        bos = next(t["id"] for t in made["added_tokens"] if t["content"] == "<s>")
        text = text.replace('"ids": [null]', f'"ids": [{bos}]')
    parsed: dict[str, Any] = json.loads(text)
    return parsed


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, row in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        (made[kind] / "tokenizer.json").write_text(json.dumps(train(kind)), encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}T", **row["config"]}
        (made[kind] / "tokenizer_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def pairs(directories: dict[str, Path]) -> dict[str, tuple[Text, Text, Any]]:
    """By kind: Text from the directory, Text from GGUF metadata made of it, transformers' tokenizer."""
    made = {}
    for kind, path in directories.items():
        parsed = json.loads((path / "tokenizer.json").read_text())
        config = json.loads((path / "tokenizer_config.json").read_text())
        metadata = tokenizer_to_gguf(parsed, config, vocab_size=1024, chat_templates={"default": "{{ bos_token }}T"})
        assert metadata["tokenizer.ggml.pre"] == kind
        assert "tokenizer.huggingface.json" not in metadata, "these kinds are said by the keys alone"
        assert len(metadata["tokenizer.ggml.tokens"]) == 1024
        made[kind] = (Text.from_directory(path), Text.from_gguf(metadata), AutoTokenizer.from_pretrained(path))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_equals_transformers(pairs: dict[str, tuple[Text, Text, Any]], kind: str) -> None:
    directory, gguf, original = pairs[kind]

    @settings(max_examples=300)
    @given(st.one_of(MIXED, st.text()))
    def check(text: str) -> None:
        expected = original(text)["input_ids"]
        assert directory.encode(text) == expected
        assert gguf.encode(text) == expected
        assert gguf.encode(text, add_special=False) == original(text, add_special_tokens=False)["input_ids"]
        assert directory.decode(expected, skip_special=False) == original.decode(expected)
        assert gguf.decode(expected) == original.decode(expected, skip_special_tokens=True)

    for line in CORPUS:
        check.hypothesis.inner_test(line)
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids(pairs: dict[str, tuple[Text, Text, Any]], kind: str) -> None:
    for text in pairs[kind][:2]:
        assert text.bos_id == pairs[kind][2].bos_token_id
        assert text.eos_ids[0] == pairs[kind][2].eos_token_id
        assert text.chat_template is not None
        bos = KINDS[kind]["config"]["bos_token"] or ""
        assert text.chat_template.render([{"role": "user", "content": "x"}]) == bos + "T"
    directory, gguf, original = pairs[kind]
    assert directory.vocab_size == len(original)
    assert gguf.vocab_size == 1024
    assert (
        directory.token_bytes(len(original)) == directory.token_bytes(1 << 31) == directory.token_bytes(1 << 70) == b""
    )
    names = KINDS[kind]["specials"]
    ends = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>"} & set(names)
    assert {gguf.token_id(name) for name in ends} == set(gguf.eos_ids)


def test_untrusted_text_makes_no_special_tokens(pairs: dict[str, tuple[Text, Text, Any]]) -> None:
    for directory, gguf, _ in pairs.values():
        for text in (directory, gguf):
            name = "<|endoftext|>" if text.token_id("<|endoftext|>") is not None else "<|im_end|>"
            assert text.encode(f"a{name}b", add_special=False).count(text.token_id(name)) == 1
            literal = text.encode(f"a{name}b", add_special=False, parse_special=False)
            assert not any(text.is_special(i) for i in literal)
            assert text.decode(literal) == f"a{name}b"


def test_default_splitting_is_llama_cpps() -> None:
    metadata = byte_metadata()
    del metadata["tokenizer.ggml.pre"]
    text = Text.from_gguf(metadata)
    assert text.decode(text.encode("x+1 12345 'tis  ok\n\n")) == "x+1 12345 'tis  ok\n\n"


# SentencePiece


class Pieces:
    """A SentencePiece BPE model as Llama-2's was trained, with the GGUF metadata that says the same."""

    def __init__(self, **options: Any) -> None:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in training_text() for line in text.replace("\0", "").split("\n")]),
            model_writer=out,
            model_type="bpe",
            vocab_size=900,
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            **options,
        )
        self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
        ids = range(sp.get_piece_size())
        kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
        self.metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in ids], np.float32),
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        }


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces()


def test_scores_equal_sentencepiece(pieces: Pieces) -> None:
    text = Text.from_gguf(pieces.metadata)
    assert (text.bos_id, text.eos_ids) == (1, (2,))

    @settings(max_examples=1500)
    @given(st.one_of(MIXED, st.text(), st.text(alphabet="ab \n"), st.text(alphabet=" \n\t▁ae日😀\u200d", min_size=1)))
    def check(line: str) -> None:
        expected = pieces.processor.encode(line)
        assert text.encode(line, add_special=False, parse_special=False) == expected
        assert text.encode(line, parse_special=False) == [1, *expected]
        if not line.startswith("▁"):  # SentencePiece's decoder takes all of these away, tokenizers' the first
            assert text.decode(expected) == pieces.processor.decode(expected)

    for line in CORPUS:
        check.hypothesis.inner_test(line)
    check()


def test_scores_of_pieces_that_overlap_themselves() -> None:
    """Equal scores go to the leftmost pair: "ab a ba" is aba|ba, whichever way "aba" was made."""
    rng = random.Random(1)
    lines = ["".join(rng.choices(["ab", "aba", "abab", "a", "b", "aab"], k=rng.randint(2, 12))) for _ in range(300)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(sp.get_piece_size())
    text = Text.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [2 if i == 0 else 3 if i < 3 else 6 if sp.is_byte(i) else 1 for i in ids],
        }
    )
    for _ in range(3000):
        line = "".join(rng.choices("aabb ", k=rng.randint(1, 25)))
        assert text.encode(line, add_special=False) == sp.encode(line)


def test_without_space_prefix(pieces: Pieces) -> None:
    bare = Pieces(add_dummy_prefix=False)
    text = Text.from_gguf({**bare.metadata, "tokenizer.ggml.add_space_prefix": False})
    for line in CORPUS:
        ids = text.encode(line, add_special=False, parse_special=False)
        assert ids == bare.processor.encode(line)
        assert text.decode(ids) == line.replace("▁", " ")


def spaced_json(metadata: dict[str, Any], scheme: str | None) -> dict[str, Any]:
    """Llama-2's tokenizer.json: as first published (scheme None), or with Metaspace as later ones are."""
    made: dict[str, Any] = json.loads(Text.from_gguf(metadata)._tokenizer.to_str())
    if scheme is not None:
        made["normalizer"] = None
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return made


@pytest.mark.parametrize("scheme", [None, "first", "always"])
def test_spaced_tokenizer_json_through_gguf(pieces: Pieces, tmp_path: Path, scheme: str | None) -> None:
    parsed = spaced_json(pieces.metadata, scheme)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    original = AutoTokenizer.from_pretrained(tmp_path)
    metadata = tokenizer_to_gguf(parsed, config)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert ("tokenizer.huggingface.json" in metadata) == (scheme is not None)
    directory, gguf = Text.from_directory(tmp_path), Text.from_gguf(metadata)
    for line in [*CORPUS, "a</s>b", "<s> a", "</s> </s>"]:
        expected = original(line)["input_ids"]
        assert directory.encode(line) == expected
        assert gguf.encode(line) == expected
        assert directory.decode(expected) == original.decode(expected, skip_special_tokens=True)
        assert gguf.decode(expected, skip_special=False) == original.decode(expected)


# Streaming


@pytest.fixture(scope="module")
def streams(pairs: dict[str, tuple[Text, Text, Any]], pieces: Pieces) -> list[Text]:
    return [pairs["qwen2"][0], pairs["smollm"][1], Text.from_gguf(pieces.metadata)]


@settings(max_examples=400)
@given(data=st.data())
@pytest.mark.parametrize("which", [0, 1, 2])
def test_streamed_text_is_decoded_text(streams: list[Text], which: int, data: st.DataObject) -> None:
    text = streams[which]
    alone = [i for i in range(text.vocab_size) if len(text.token_bytes(i)) == 1 and text.token_bytes(i)[0] >= 0x80]
    ids = data.draw(st.lists(st.one_of(st.integers(0, text.vocab_size + 3), st.sampled_from(alone)), max_size=20))
    skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
    stream = text.detokenizer(skip, continues)
    pushed = [stream.push(i) for i in ids]
    whole = text.decode(ids, skip, continues)
    assert "".join(pushed) + stream.finish() == whole
    for n in range(len(ids)):  # what is out stays out, and a character is out with its last byte
        so_far = text.decode(ids[: n + 1], skip, continues)
        assert so_far.rstrip("\ufffd").startswith("".join(pushed[: n + 1]).rstrip("\ufffd"))
        assert len("".join(pushed[: n + 1])) >= len(so_far.rstrip("\ufffd"))
    if which < 2 or ("\ufffd" not in whole and not continues):
        assert whole == text._tokenizer.decode(ids, skip_special_tokens=skip)


def test_characters_are_never_split(streams: list[Text]) -> None:
    for text in streams:
        ids = text.encode("né 日本 \U0001f469\u200d\U0001f4bb!", add_special=False)
        stream = text.detokenizer()
        got = [stream.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in got)
        assert "".join(got) == "né 日本 \U0001f469\u200d\U0001f4bb!"
        assert stream.finish() == ""
        cut = text.detokenizer()
        emoji = next(i for i in range(text.vocab_size) if text.token_bytes(i) == b"\xf0")
        assert (cut.push(emoji), cut.finish()) == ("", "\ufffd")


def test_space_after_a_prompt_is_kept(pieces: Pieces) -> None:
    text = Text.from_gguf(pieces.metadata)
    ids = text.encode("hear me", add_special=False)
    assert text.decode(ids) == "hear me"
    assert text.decode(ids, continues=True) == " hear me"
    with pytest.raises(RequestError, match="token id -1 is negative"):
        text.decode([-1])


def test_a_push_does_not_grow_with_the_text(streams: list[Text]) -> None:
    text = streams[0]
    ids = text.encode("word " * 100, add_special=False) * 200
    stream = text.detokenizer()
    start = time.process_time()
    for i in ids:
        stream.push(i)
    assert (time.process_time() - start) / len(ids) < 50e-6  # a few microseconds; quadratic would take milliseconds


# Directories


@pytest.fixture
def copy(directories: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    def make(kind: str = "qwen2", **changes: Any) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(directories[kind], path)
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
        return path

    yield make


def test_templates_of_a_directory(copy: Callable[..., Path]) -> None:
    path = copy(chat_template=[{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}])
    template = Text.from_directory(path).chat_template
    assert template is not None
    assert template.sources == {"default": "A", "tool_use": "B"}
    (path / "chat_template.jinja").write_text("C{{ eos_token }}")
    template = Text.from_directory(path).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": ""}]) == "C<|im_end|>"
    (path / "tokenizer_config.json").unlink()
    (path / "chat_template.jinja").unlink()
    assert Text.from_directory(path).chat_template is None


def test_end_tokens_of_a_directory(copy: Callable[..., Path]) -> None:
    path = copy(eos_token={"content": "<|im_end|>", "special": True})
    first = Text.from_directory(path)
    end, other = first.token_id("<|im_end|>"), first.token_id("<|endoftext|>")
    assert first.eos_ids == (end,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [other, end]}))
    assert Text.from_directory(path).eos_ids == (end, other)


@pytest.mark.parametrize(("before", "after"), [("<s>", "<|im_end|>"), ("", "<|im_end|>"), ("<s>", ""), ("", "")])
@pytest.mark.parametrize("flag", [True, False])
def test_what_goes_around_a_text(copy: Callable[..., Path], before: str, after: str, flag: bool) -> None:
    path = copy("llama-bpe", add_bos_token=flag, add_eos_token=flag)
    parsed = json.loads((path / "tokenizer.json").read_text())
    template = parsed["post_processor"]["processors"][1]
    ids = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    special = [{"SpecialToken": {"id": name, "type_id": 0}} for name in (before, after)]
    template["single"] = [*special[: bool(before)], template["single"][1], *special[1 : 1 + bool(after)]]
    names = [name for name in (before, after) if name]
    template["special_tokens"] = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
    (path / "tokenizer.json").write_text(json.dumps(parsed))
    expected = AutoTokenizer.from_pretrained(path)("hear me")["input_ids"]
    assert expected[0] == ids.get(before, expected[0])
    assert Text.from_directory(path).encode("hear me") == expected
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert Text.from_gguf(tokenizer_to_gguf(parsed, config)).encode("hear me") == expected


def test_vocab_and_merges_files(copy: Callable[..., Path], pairs: dict[str, tuple[Text, Text, Any]]) -> None:
    path = copy()
    parsed = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]), encoding="utf-8")
    lines = [" ".join(merge) for merge in parsed["model"]["merges"]]
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    with pytest.raises(FileError, match="does not say how to split"):
        Text.from_directory(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    config["added_tokens_decoder"] = {str(t["id"]): t for t in parsed["added_tokens"]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    text = Text.from_directory(path)
    for line in CORPUS:
        assert text.encode(line) == pairs["qwen2"][0].encode(line)
    config["added_tokens_decoder"]["5000"] = {"content": "<|far|>", "special": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"'<\|far\|>' has the id 5000"):
        Text.from_directory(path)
    (path / "merges.txt").write_text("zzz yyy\n")
    with pytest.raises(FileError, match="line 1 joins tokens not in"):
        Text.from_directory(path)


def test_broken_directories(copy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"(?s)no tokenizer.json.*fix: fetch"):
        Text.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(FileError, match=r"(?s)no tokenizer.json.*save_pretrained"):
        Text.from_directory(tmp_path)
    path = copy()
    whole = (path / "tokenizer.json").read_bytes()
    for damage in (b"", b"{}", whole[:100], whole[: len(whole) // 2], b"\xff" * 50, b"[" * 100_000, b"null"):
        (path / "tokenizer.json").write_bytes(damage)
        with pytest.raises(FileError, match=r"tokenizer\.json: "):
            Text.from_directory(path)
    parsed = json.loads(whole)
    for key, value in (("decoder", {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True}),):
        (path / "tokenizer.json").write_text(json.dumps({**parsed, key: value}))
        with pytest.raises(FileError, match=r"decoder .*CTC.* is not known"):
            Text.from_directory(path)
    (path / "tokenizer.json").write_bytes(whole)
    for text in ("[]", "{", "3", '{"chat_template": 3}', '{"chat_template": [{"name": "x"}]}'):
        (path / "tokenizer_config.json").write_text(text)
        with pytest.raises(FileError, match=r"tokenizer_config\.json"):
            Text.from_directory(path)


def test_text_that_is_none(pairs: dict[str, tuple[Text, Text, Any]]) -> None:
    text = pairs["qwen2"][0]
    with pytest.raises(RequestError, match="surrogate"):
        text.encode("a\ud800b")
    with pytest.raises(RequestError, match="type bytes"):
        text.encode(b"a")  # type: ignore[arg-type]


# Damaged metadata


def byte_metadata() -> dict[str, Any]:
    letters = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
    tokens = [*letters, "he", "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 1) + [3], np.int32),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": np.uint32(len(tokens) - 1),
    }


T = "tokenizer.ggml."
DAMAGE: list[tuple[str, Any, str]] = [
    ("model", None, "model is missing"),
    ("model", "bert", "model is 'bert'"),
    ("model", 3, "model is of type int"),
    ("pre", "mystery", r"pre is 'mystery', and known are qwen2"),
    ("pre", 1, "pre is of type int"),
    ("tokens", None, "tokens is missing"),
    ("tokens", [], "tokens is empty"),
    ("tokens", "abc", "tokens is of type str"),
    ("tokens", ["a", 1], r"tokens\[1\] is of type int"),
    ("tokens", ["a", "b", "a"], r"tokens\[2\] is 'a', which is token 0"),
    ("tokens", ["x" * 100_000], r"tokens\[0\] has 100,000 characters"),
    ("tokens", [""] * 5_000_000, "tokens has 5,000,000 entries"),
    ("token_type", np.array([1, 2], np.int32), "token_type has 2 entries, expected 258"),
    ("token_type", "x", "token_type is of type"),
    ("token_type", [[1], [2, 3]], "token_type is no list of numbers"),
    ("merges", None, "merges is missing"),
    ("merges", ["h  e"], r"merges\[0\] is 'h  e'"),
    ("merges", ["he"], r"merges\[0\] is 'he', expected two"),
    ("merges", ["h e", "he zz"], r"merges\[1\] is 'he zz', and 'zz' is not in"),
    ("merges", ["h f"], r"merges\[0\] is 'h f', and 'hf' is not in"),
    ("eos_token_id", 258, "eos_token_id is 258, expected an id below"),
    ("bos_token_id", -1, "bos_token_id is -1"),
    ("eot_token_id", 2**40, "eot_token_id is 1099511627776"),
    ("padding_token_id", "3", "padding_token_id is of type str"),
    ("unknown_token_id", True, "unknown_token_id is of type bool"),
    ("add_bos_token", 1, "add_bos_token is of type int"),
]


@pytest.mark.parametrize(("key", "value", "what"), DAMAGE)
def test_damaged_metadata(key: str, value: Any, what: str) -> None:
    metadata = {**byte_metadata(), T + key: value}
    if value is None:
        del metadata[T + key]
    with pytest.raises(FileError, match=r"model\.gguf: tokenizer\.ggml\." + what):
        Text.from_gguf(metadata, "model.gguf")


def test_empty_tokens_get_a_name_as_in_llama_cpp() -> None:
    metadata = byte_metadata()
    tokens = [*metadata[T + "tokens"], "", ""]
    metadata |= {T + "tokens": tokens, T + "token_type": np.array([1] * (len(tokens) - 3) + [3, 1, 1], np.int32)}
    text = Text.from_gguf(metadata, "model.gguf")
    he, end = tokens.index("he"), tokens.index("<|end|>")
    assert text.encode("he<|end|>") == [he, end], "a merge is found, and what lies before the empty ones"
    assert text.decode([he, end + 1, he]) == f"he[EMPTY_{end + 1}]he"
    assert text.vocab_size == len(tokens)
    metadata[T + "tokens"] = [*tokens[:-2], "he", ""]
    with pytest.raises(FileError, match=rf"tokens\[{end + 1}\] is 'he', which is token {he} already"):
        Text.from_gguf(metadata, "model.gguf")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("scores", None, "scores is missing"),
        ("scores", np.zeros(3, np.float32), "scores has 3 entries"),
        ("scores", "nan", r"scores\[0\] is not a number"),
        ("scores", np.zeros((2, 2)), "scores is of type"),
        ("token_type", None, "token_type is missing"),
        ("tokens", [f"{'x' * 16000}{i}" for i in range(900)], "tokens has too many long pieces"),
    ],
)
def test_damaged_sentencepiece_metadata(pieces: Pieces, key: str, value: Any, what: str) -> None:
    metadata = {**pieces.metadata, T + key: value}
    if value is None:
        del metadata[T + key]
    elif isinstance(value, str):
        metadata[T + key] = np.full(len(pieces.metadata[T + "tokens"]), np.nan)
    with pytest.raises(FileError, match=T + what):
        Text.from_gguf(metadata)


def test_damaged_published_json() -> None:
    with pytest.raises(FileError, match=r"tokenizer\.huggingface\.json: damaged"):
        Text.from_gguf({**byte_metadata(), "tokenizer.huggingface.json": "{"})
    other = json.dumps(train("gpt-2"))
    with pytest.raises(FileError, match=r"tokenizer\.huggingface\.json has .* unlike tokenizer\.ggml\.tokens"):
        Text.from_gguf({**byte_metadata(), "tokenizer.huggingface.json": other})


def test_what_gguf_cannot_say() -> None:
    parsed = train("qwen2")
    strange = {**parsed, "pre_tokenizer": sequence(split(r"\w+"), byte_level(False, False))}
    with pytest.raises(FileError, match="splits text in a way that GGUF has no known name for"):
        tokenizer_to_gguf(strange)
    with pytest.raises(FileError, match="GGUF needs BPE"):
        tokenizer_to_gguf({**parsed, "model": {"type": "Unigram", "vocab": [], "unk_id": 0}})
    with pytest.raises(FileError, match="but the model has 10 rows"):
        tokenizer_to_gguf(parsed, vocab_size=10)
    for damaged in ({}, {"model": {}}, {**parsed, "added_tokens": [{}]}, {**parsed, "pre_tokenizer": {}}):
        with pytest.raises(FileError, match=r"tokenizer\.json: "):
            tokenizer_to_gguf(damaged)
