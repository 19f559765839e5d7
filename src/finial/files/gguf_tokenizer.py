"""Tokenizers as GGUF metadata: reading them into a `tokenizers.Tokenizer`, and writing a tokenizer.json as such keys.

Two kinds exist among the models finial runs: "gpt2" (byte-level BPE with ranked merges, its splitting named by
`tokenizer.ggml.pre`) and "llama" (SentencePiece BPE, where the score of a merged piece is its rank).  Knows nothing of
chat templates or streaming, and nothing of files: metadata comes in and goes out as a mapping.

    tokenizer = read_gguf_tokenizer(metadata).tokenizer

Keys: ggml's docs/gguf.md, section "Tokenizer".  Where these keys cannot say all of a tokenizer.json, the writer adds
the key `tokenizer.huggingface.json` of the same page, which the reader prefers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from finial.errors import FileError

# llama.h `enum llama_token_type`; SentencePiece's ModelProto.SentencePiece.Type has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKENS = 1 << 22
MAX_MERGES = 1 << 24
MAX_TOKEN_LENGTH = 1 << 14  # the longest published pieces are runs of a few hundred spaces
MAX_SPLITS = 1 << 28  # characters looked at while merges are made from scores; Llama-2 needs 2 million

SPACE = "▁"

# The published tokenizer.json expressions of Qwen2, Llama 3 and GPT-2 (the last is built into `tokenizers`).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_QWEN2_SPLITS = (_WORDS + r"\p{N}" + _REST,)
_LLAMA3_SPLITS = (_WORDS + r"\p{N}{1,3}" + _REST,)
# llama.cpp's meaning of "default" (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_DEFAULT): four splits, one after the other.
_DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Splitting:
    """How a byte-level BPE tokenizer normalises and cuts text before merging."""

    splits: tuple[str, ...] = ()  # regular expressions, each cutting out its matches
    digits: bool = False  # every digit alone
    gpt2: bool = False  # GPT-2's own expression, inside ByteLevel
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False  # unless the file says otherwise


# By `tokenizer.ggml.pre`.  The first name of equal rows is the one that is written.
SPLITTINGS: Mapping[str, Splitting] = {
    "qwen2": Splitting(_QWEN2_SPLITS, nfc=True),  # llama.cpp leaves out NFC; Qwen's tokenizer.json is what was trained
    "deepseek-r1-qwen": Splitting(_QWEN2_SPLITS),
    "llama-bpe": Splitting(_LLAMA3_SPLITS, ignore_merges=True, add_bos=True),
    "llama3": Splitting(_LLAMA3_SPLITS, ignore_merges=True, add_bos=True),
    "llama-v3": Splitting(_LLAMA3_SPLITS, ignore_merges=True, add_bos=True),
    "smollm": Splitting(digits=True, gpt2=True),
    "gpt-2": Splitting(gpt2=True),
    "default": Splitting(_DEFAULT_SPLITS),
}

# End tokens of published chat formats.  GGUF names one or two of a model's several; llama.cpp finds the others by these
# names too (llama-vocab.cpp, special_eog_ids).
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer read from metadata, with the ids and switches that stand beside it."""

    tokenizer: Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    variables: dict[str, str]  # bos_token, eos_token …, as chat templates use them


def read_gguf_tokenizer(metadata: Mapping[str, Any], origin: str = "GGUF metadata") -> GgufTokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Raises:
        FileError: a key is missing, of the wrong type, out of range, or of a kind that is not known; it is named.
    """
    return _Reader(metadata, origin).read()


class _Reader:
    """Checks of one file's metadata; every message starts with the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], origin: str) -> None:
        self.metadata = metadata
        self.origin = origin

    def fail(self, key: str, what: str, fix: str = "fetch or convert the file again") -> FileError:
        return FileError(f"{self.origin}: {key} {what}", fix=fix)

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if isinstance(value, np.generic):
            value = value.item()
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.fail(key, f"is of type {type(value).__name__}, expected {kind.__name__}")
        return value

    def strings(self, key: str, limit: int) -> list[str]:
        value = self.metadata.get(key)
        if value is None:
            raise self.fail(key, "is missing", fix="use a file that includes its tokenizer")
        if not isinstance(value, (list, tuple)):
            raise self.fail(key, f"is of type {type(value).__name__}, expected a list of strings")
        if len(value) > limit:
            raise self.fail(key, f"has {len(value):,} entries, over the limit of {limit:,}")
        if set(map(type, value)) - {str} or max(map(len, value), default=0) > MAX_TOKEN_LENGTH:
            self.check_strings(key, value)
        return list(value)

    def check_strings(self, key: str, value: Sequence[object]) -> None:
        for i, item in enumerate(value):
            if not isinstance(item, str):
                raise self.fail(f"{key}[{i}]", f"is of type {type(item).__name__}, expected a string")
            if len(item) > MAX_TOKEN_LENGTH:
                raise self.fail(f"{key}[{i}]", f"has {len(item):,} characters, over the limit of {MAX_TOKEN_LENGTH:,}")

    def numbers(self, key: str, count: int, kinds: str) -> np.ndarray:
        value = self.metadata.get(key)
        if value is None:
            raise self.fail(key, "is missing", fix="use a file that includes its whole tokenizer")
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            raise self.fail(key, "is no list of numbers") from None
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.fail(key, f"is of type {array.dtype}, expected a list of {count:,} numbers")
        if len(array) != count:
            raise self.fail(key, f"has {len(array):,} entries, expected {count:,} as in tokenizer.ggml.tokens")
        return array

    def distinct(self) -> dict[str, int]:
        """The vocabulary where tokens are empty, which get a name, or are there twice, which is an error."""
        vocab: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            other = vocab.setdefault(token or f"[EMPTY_{i}]", i)
            if other != i:
                raise self.fail(f"tokenizer.ggml.tokens[{i}]", f"is {token!r}, which is token {other} already")
        return vocab

    def id(self, name: str, default: int | None = None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value: int | None = self.get(key, int, default)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.fail(key, f"is {value}, expected an id below the {len(self.tokens):,} tokens")
        return value

    def read(self) -> GgufTokenizer:
        model = self.get("tokenizer.ggml.model", str, None)
        if model not in ("gpt2", "llama"):
            what = "is missing" if model is None else f"is {model!r}, expected 'gpt2' or 'llama'"
            raise self.fail("tokenizer.ggml.model", what, fix="use a model with a BPE tokenizer")
        self.tokens = self.strings("tokenizer.ggml.tokens", MAX_TOKENS)
        if not self.tokens:
            raise self.fail("tokenizer.ggml.tokens", "is empty")
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) < len(self.tokens) or "" in self.vocab:
            self.vocab = self.distinct()
        self.types = np.full(len(self.tokens), NORMAL)
        if model == "llama" or "tokenizer.ggml.token_type" in self.metadata:
            self.types = self.numbers("tokenizer.ggml.token_type", len(self.tokens), "iu")
        llama = model == "llama"
        bos = self.id("bos", 1 if llama and len(self.tokens) > 2 else None)
        eos = self.id("eos", 2 if llama and len(self.tokens) > 2 else None)
        unknown, padding = self.id("unknown", 0 if llama else None), self.id("padding")
        kind = Splitting(add_bos=True) if llama else self.splitting()
        add_bos = self.get("tokenizer.ggml.add_bos_token", bool, kind.add_bos)
        add_eos = self.get("tokenizer.ggml.add_eos_token", bool, False)
        named = {"bos_token": bos, "eos_token": eos, "unk_token": unknown, "pad_token": padding}
        special = set(np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL))).tolist())
        ends = [eos, self.id("eot"), self.id("eom"), *(self.vocab.get(name) for name in END_NAMES)]
        ends = ends[:3] + [end for end in ends[3:] if end in special]
        whole = self.get("tokenizer.huggingface.json", str, None)
        tokenizer = self.published(whole) if whole else self.llama(unknown) if llama else self.gpt2(kind)
        return GgufTokenizer(
            tokenizer,
            bos,
            tuple(dict.fromkeys(end for end in ends if end is not None)),
            add_bos and bos is not None,
            add_eos and eos is not None,
            {name: self.tokens[i] for name, i in named.items() if i is not None},
        )

    def published(self, text: str) -> Tokenizer:
        tokenizer = parse_tokenizer(text, f"{self.origin}: tokenizer.huggingface.json")
        for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
            if i >= len(self.tokens) or self.tokens[i] != token:
                raise self.fail("tokenizer.huggingface.json", f"has {token!r} as {i}, unlike tokenizer.ggml.tokens")
        return tokenizer

    def splitting(self) -> Splitting:
        name = self.get("tokenizer.ggml.pre", str, "default")
        if name not in SPLITTINGS:
            raise self.fail(
                "tokenizer.ggml.pre",
                f"is {name!r}, and known are {', '.join(SPLITTINGS)}",
                fix="use the model's own directory with its tokenizer.json",
            )
        return SPLITTINGS[name]

    def gpt2(self, kind: Splitting) -> Tokenizer:
        return self.with_added(byte_level_bpe(self.vocab, self.merges(), kind))

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of the vocabulary's own strings: copies of them would take as much memory as all the rest here."""
        key, ids, own = "tokenizer.ggml.merges", self.vocab, list(self.vocab)
        lines = self.strings(key, MAX_MERGES)
        try:
            pairs = [(own[ids[left]], own[ids[right]]) for left, right in map(methodcaller("split", " "), lines)]
        except (ValueError, KeyError):
            pairs = []
        if len(pairs) == len(lines) and all(map(ids.__contains__, map("".join, pairs))):
            return pairs
        for i, line in enumerate(lines):
            left, space, right = line.partition(" ")
            if not space or not left or not right or " " in right:
                raise self.fail(f"{key}[{i}]", f"is {line!r}, expected two tokens with a space between")
            for part in (left, right, left + right):
                if part not in ids:
                    raise self.fail(f"{key}[{i}]", f"is {line!r}, and {part!r} is not in tokenizer.ggml.tokens")
        raise AssertionError("merges that are right one by one were refused together")

    def llama(self, unknown: int | None) -> Tokenizer:
        key = "tokenizer.ggml.scores"
        scores = self.numbers(key, len(self.tokens), "fiu").astype(np.float64)
        if np.isnan(scores).any():
            raise self.fail(f"{key}[{int(np.flatnonzero(np.isnan(scores))[0])}]", "is not a number")
        normal = {self.tokens[i]: float(scores[i]) for i in np.flatnonzero(self.types == NORMAL).tolist()}
        work = sum(len(piece) ** 2 for piece in normal)
        if work > MAX_SPLITS:
            raise self.fail("tokenizer.ggml.tokens", "has too many long pieces for a SentencePiece vocabulary")
        model = models.BPE(
            vocab=self.vocab,
            merges=merges_from_scores(normal, self.vocab),
            unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=bool((self.types == BYTE).any()),
        )
        tokenizer = Tokenizer(model)
        prefix = self.get("tokenizer.ggml.add_space_prefix", bool, True)
        spaces = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return self.with_added(tokenizer)

    def with_added(self, tokenizer: Tokenizer) -> Tokenizer:
        """Adds the tokens that are found in text before it is split; the vocabulary has them already."""
        for types, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
            ids = np.flatnonzero(np.isin(self.types, types)).tolist()
            added = [AddedToken(self.tokens[i], special=special, normalized=False) for i in ids if self.tokens[i]]
            tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
        return tokenizer


def parse_tokenizer(text: str, origin: str) -> Tokenizer:
    """A `tokenizers.Tokenizer` from the text of a tokenizer.json, or a `FileError`."""
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise FileError(f"{origin}: damaged: {error}"[:500], fix="fetch the file again") from None


def byte_level_bpe(vocab: dict[str, int], merges: Iterable[tuple[str, str]], kind: Splitting) -> Tokenizer:
    """A byte-level BPE tokenizer: text is UTF-8 bytes, written as 256 printable characters, merged by rank."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=kind.ignore_merges))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in kind.splits]
    if kind.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def merges_from_scores(pieces: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Ranked merges that do what SentencePiece's BPE does with scores: join the neighbours whose union scores best.

    Every way to cut a piece into two pieces is a merge.  Ways of the same piece score the same, and SentencePiece then
    takes the leftmost pair in the text; ranks cannot say "leftmost", but such pairs overlap only when the piece repeats
    itself with some period, and then the cut after one period lies left of the other one, so it goes first.
    """
    ranked: list[tuple[float, int, bool, int, str, str]] = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-score, vocab[piece], not piece.startswith(right), vocab[left], left, right))
    ranked.sort(key=lambda entry: entry[:4])
    return [(left, right) for *_, left, right in ranked]


# tokenizer.json -> metadata


def tokenizer_to_gguf(
    tokenizer: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    vocab_size: int | None = None,
    chat_templates: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The GGUF metadata of a tokenizer.json, so that `read_gguf_tokenizer` and llama.cpp give the same ids.

    Args:
        tokenizer: the parsed tokenizer.json.
        config: the parsed tokenizer_config.json, for bos_token, eos_token, unk_token and pad_token.
        vocab_size: rows of the model's embedding; ids without a token up to it become unused tokens.
        chat_templates: by name; "default" is the one llama.cpp uses.

    Raises:
        FileError: a kind of tokenizer that GGUF has no name for, or more tokens than `vocab_size`.
    """
    config = config or {}
    try:
        return _metadata(tokenizer, config, vocab_size, chat_templates or {})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FileError(
            f"tokenizer.json: damaged, or of a kind not known: {type(error).__name__} {error}", fix="fetch it again"
        ) from error


def _metadata(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int | None, chat_templates: Mapping[str, str]
) -> dict[str, Any]:
    model = tokenizer["model"]
    if model.get("type") not in ("BPE", None):
        raise FileError(f"tokenizer.json: a model of type {model['type']!r}, GGUF needs BPE here")
    vocab: dict[str, int] = {**model["vocab"], **{t["content"]: t["id"] for t in tokenizer.get("added_tokens") or ()}}
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    count = max(vocab.values()) + 1
    if vocab_size is not None and vocab_size < count:
        raise FileError(f"tokenizer.json: token id {count - 1}, but the model has {vocab_size:,} rows")
    count = vocab_size or count
    if count > MAX_TOKENS:
        raise FileError(f"tokenizer.json: {count:,} ids, over the limit of {MAX_TOKENS:,}")
    tokens = [f"[PAD{i}]" for i in range(count)]
    types = np.full(count, UNUSED, np.int32)
    for token, i in vocab.items():
        tokens[i], types[i] = token, NORMAL
    exact = True
    for token in tokenizer.get("added_tokens") or ():
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        plain = not (token["lstrip"] or token["rstrip"] or token["single_word"])
        exact &= plain and not (token["normalized"] and tokenizer.get("normalizer"))
    out: dict[str, Any] = {}
    steps = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        name = _splitting_name(steps, tokenizer.get("normalizer"), bool(model.get("ignore_merges")))
        exact &= SPLITTINGS[name].ignore_merges == bool(model.get("ignore_merges"))
        out |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        out["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    else:
        prefix, everywhere = _space_prefix(steps, _flat(tokenizer.get("normalizer"), "normalizers"))
        for i, token in enumerate(tokens):
            if types[i] == NORMAL and len(token) == 6 and token.startswith("<0x"):
                types[i] = BYTE
            if token == model.get("unk_token"):
                types[i] = UNKNOWN
        scores, same = _scores(tokens, types, merges, vocab)
        exact &= everywhere and same
        out |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        out |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_space_prefix": prefix}
        if model.get("unk_token") in vocab:
            out["tokenizer.ggml.unknown_token_id"] = vocab[model["unk_token"]]
    out |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        content = token_text(config.get(f"{name}_token"))
        if content in vocab:
            out[f"tokenizer.ggml.{key}_token_id"] = vocab[content]
    before, after = _template_ids(tokenizer.get("post_processor"))
    for key, ids in (("bos", before), ("eos", after)):
        out[f"tokenizer.ggml.add_{key}_token"] = bool(ids)
        if ids:
            out.setdefault(f"tokenizer.ggml.{key}_token_id", ids[0])
    for name, text in chat_templates.items():
        out["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    named = [name for name in chat_templates if name != "default"]
    if named:
        out["tokenizer.chat_templates"] = named
    if not exact:
        out["tokenizer.huggingface.json"] = json.dumps(tokenizer, ensure_ascii=False)
    return out


def token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: text, or a dict with its content."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _flat(step: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return [leaf for part in step[children] for leaf in _flat(part, children)] if step["type"] == "Sequence" else [step]


def _splitting_name(steps: Sequence[Mapping[str, Any]], normalizer: Any, ignore_merges: bool) -> str:
    splits: list[str] = []
    digits = gpt2 = strange = False
    for step in steps:
        if step["type"] == "Split":
            splits.append(step["pattern"].get("Regex", ""))
            strange |= step["behavior"] != "Isolated" or step["invert"]
        elif step["type"] == "Digits":
            digits = True
            strange |= not step["individual_digits"]
        elif step["type"] == "ByteLevel":
            gpt2 = step.get("use_regex", True)
            strange |= step["add_prefix_space"]
        else:
            strange = True
    normal = [leaf["type"] for leaf in _flat(normalizer, "normalizers")]
    found = [
        (kind.ignore_merges != ignore_merges, name)
        for name, kind in SPLITTINGS.items()
        if kind.splits == tuple(splits) and (kind.digits, kind.gpt2, kind.nfc) == (digits, gpt2, normal == ["NFC"])
    ]
    if strange or normal not in ([], ["NFC"]) or not found:
        raise FileError(
            f"tokenizer.json: splits text in a way that GGUF has no known name for: {json.dumps(steps)[:300]}",
            fix=f"known are {', '.join(SPLITTINGS)}; keep this model in safetensors",
        )
    return min(found, key=lambda entry: entry[0])[1]


def _space_prefix(steps: Sequence[Mapping[str, Any]], normal: Sequence[Mapping[str, Any]]) -> tuple[bool, bool]:
    """Whether a space goes before text, and whether it does so as GGUF's key means it: before every piece of text."""
    kinds = [leaf["type"] for leaf in normal]
    if not steps and kinds in (["Prepend", "Replace"], ["Replace"]):
        return kinds[0] == "Prepend", True
    if [step["type"] for step in steps] == ["Metaspace"] and not kinds and not steps[0].get("split", True):
        return steps[0]["prepend_scheme"] != "never", steps[0]["prepend_scheme"] == "never"
    raise FileError(
        f"tokenizer.json: neither byte-level nor SentencePiece-style: {json.dumps([*normal, *steps])[:300]}",
        fix="keep this model in safetensors",
    )


def _scores(
    tokens: Sequence[str], types: np.ndarray, merges: Sequence[tuple[str, ...]], vocab: Mapping[str, int]
) -> tuple[np.ndarray, bool]:
    """Scores that rank pieces as the merges do, and whether they say exactly the same merges."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    scores = np.zeros(len(tokens), np.float32)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL:
            scores[i] = -rank.get(token, len(merges) + i)
    normal = {token: float(scores[i]) for i, token in enumerate(tokens) if types[i] == NORMAL}
    return scores, merges_from_scores(normal, vocab) == list(merges)


def _template_ids(post: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text."""
    before: list[int] = []
    after: list[int] = []
    for step in _flat(post, "processors"):
        if step["type"] == "TemplateProcessing":
            target = before
            for item in step["single"]:
                if "Sequence" in item:
                    target = after
                else:
                    target += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return before, after
