"""A byte-level BPE tokenizer of an exact vocabulary size, for models whose weights are random anyway.

Knows, of three published vocabularies, the pre-tokenizer and the special tokens that begin, end or frame a text; the
other tokens are made up.

    write_tokenizer(Path("model"), QWEN, 151936)

Every text can be encoded and comes back the same.  The made-up tokens are pairs of bytes and pairs of those, the
letters that are frequent in English first, so that prompts spread over the vocabulary as they do with a real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

# The pre-tokenizer expressions are the published tokenizers' own; they decide what llama.cpp calls the kind.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """What of a published vocabulary matters to a program: special tokens at their ids, splitting, chat format."""

    specials: dict[int, str]  # id -> token; other ids up to the vocabulary's size from `reserved_from` on are reserved
    reserved_from: int  # ids below are bytes and made-up tokens, except for specials
    bos: str | None
    eos: str
    add_bos: bool
    chat_template: str
    kind: str  # "qwen", "llama3" or "smollm"


QWEN = Vocabulary(
    {
        151643: "<|endoftext|>",
        151644: "<|im_start|>",
        151645: "<|im_end|>",
    },
    151643,
    None,
    "<|endoftext|>",
    False,
    _CHATML,
    "qwen",
)
LLAMA3 = Vocabulary(
    {
        128000: "<|begin_of_text|>",
        128001: "<|end_of_text|>",
        128006: "<|start_header_id|>",
        128007: "<|end_header_id|>",
        128008: "<|eom_id|>",
        128009: "<|eot_id|>",
    },
    128000,
    "<|begin_of_text|>",
    "<|end_of_text|>",
    True,
    _LLAMA3_CHAT,
    "llama3",
)
SMOLLM = Vocabulary(
    {
        0: "<|endoftext|>",
        1: "<|im_start|>",
        2: "<|im_end|>",
    },
    49152,
    "<|endoftext|>",
    "<|endoftext|>",
    False,
    _CHATML,
    "smollm",
)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) of exactly `size` tokens."""
    text = json.dumps(tokenizer_json(vocabulary, size), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    config = {
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": False,
        "bos_token": vocabulary.bos,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": vocabulary.eos,
        "model_max_length": 1 << 20,
        "pad_token": vocabulary.eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tokenizer_json(vocabulary: Vocabulary, size: int) -> dict[str, Any]:
    """The content of tokenizer.json, in the form of the package `tokenizers`."""
    plain_end = min(vocabulary.reserved_from, size)
    specials = {i: t for i, t in vocabulary.specials.items() if i < size}
    specials |= {i: f"<|reserved_{i}|>" for i in range(plain_end, size) if i not in specials}
    ids = [i for i in range(plain_end) if i not in specials]
    symbols = _byte_symbols()
    merges = list(islice(_merges(symbols), len(ids) - 256))
    tokens = symbols + [a + b for a, b in merges]
    assert len(tokens) == len(ids), f"{size} tokens are more than two levels of merges give"
    # Special tokens below the last plain one are part of the model's own table, as tokenizers writes it.
    vocab = dict(zip(tokens, ids, strict=True)) | {t: i for i, t in specials.items() if i < plain_end}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in sorted(specials.items())
        ],
        "normalizer": {"type": "NFC"} if vocabulary.kind == "qwen" else None,
        "pre_tokenizer": _pre_tokenizer(vocabulary.kind),
        "post_processor": _post_processor(vocabulary),
        "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.kind == "llama3",
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[a, b] for a, b in merges],
        },
    }


_BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _pre_tokenizer(kind: str) -> dict[str, Any]:
    first: dict[str, Any]
    if kind == "smollm":
        first = {"type": "Digits", "individual_digits": True}
    else:
        split = {"Regex": _QWEN_SPLIT if kind == "qwen" else _LLAMA3_SPLIT}
        first = {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, _BYTE_LEVEL | {"use_regex": kind == "smollm"}]}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any]:
    byte_level = _BYTE_LEVEL | {"trim_offsets": False}
    if not vocabulary.add_bos or vocabulary.bos is None:
        return byte_level
    bos = {"SpecialToken": {"id": vocabulary.bos, "type_id": 0}}
    at = next(i for i, token in vocabulary.specials.items() if token == vocabulary.bos)
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            bos,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": vocabulary.bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {vocabulary.bos: {"id": vocabulary.bos, "ids": [at], "tokens": [vocabulary.bos]}},
    }
    return {"type": "Sequence", "processors": [byte_level, template]}


def _byte_symbols() -> list[str]:
    """The printable stand-ins of all 256 bytes (GPT-2's table), frequent ones in English first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbol = {byte: chr(byte) for byte in printable}
    symbol |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in symbol)}
    frequent = b" etaoinshrdlucmfwypvbgkqjxz"  # Norvig 2012, "English letter frequency counts", after the space
    order = [*frequent, *(byte for byte in range(256) if byte not in frequent)]
    return [symbol[byte] for byte in order]


def _merges(symbols: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs of bytes, then pairs of the foremost pairs; no two give the same text."""
    ranks = range(len(symbols))
    pairs = sorted(((a, b) for a in ranks for b in ranks), key=lambda pair: (max(pair), pair))
    yield from ((symbols[a], symbols[b]) for a, b in pairs)
    texts = [symbols[a] + symbols[b] for a, b in pairs[:400]]
    yield from ((a, b) for a in texts for b in texts)
