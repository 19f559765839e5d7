"""Text to token ids and back: a model's tokenizer, from a directory or from GGUF metadata, and streaming of its output.

Encoding is the `tokenizers` library's.  Decoding is done here, as bytes: each token has its bytes, and text is what
they are in UTF-8, so a stream can be decoded token by token and gives exactly what decoding everything at once gives.
Knows nothing of models; the ids of a model's output beyond the vocabulary (padded rows) have no text.

    text = Text.from_directory(Path("model")); text.decode(text.encode("Hello"))
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from finial.errors import FileError, RequestError
from finial.files.chat import ChatTemplate
from finial.files.gguf_tokenizer import SPLITTINGS, byte_level_bpe, parse_tokenizer, read_gguf_tokenizer, token_text

MAX_FILE = 1 << 28  # bytes; the largest published tokenizer.json has about 35 million
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level BPE (GPT-2): printable Latin-1 bytes as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_letters()


@dataclass(frozen=True)
class _Decoding:
    """What a tokenizer's decoder does, as far as it matters for bytes."""

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()  # in a token's text
    byte_fallback: bool = False  # tokens written <0x0A> are that byte
    strip: int = 0  # leading spaces taken from the text

    def token(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[letter] for letter in token)
            except KeyError:  # an added token, written as itself
                return token.encode()
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass  # text that only looks like a byte
        for old, new in self.replace:
            token = token.replace(old, new)
        return token.encode()


def _decoding(decoder: Any, origin: str) -> _Decoding:
    """Reads a decoder of the `tokenizers` library; a kind that is not known is a FileError."""
    steps = [{"type": "none"}] if decoder is None else [json.loads(decoder.__getstate__())]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [leaf for step in steps for leaf in (step["decoders"] if step["type"] == "Sequence" else [step])]
    replace: list[tuple[str, str]] = []
    byte_fallback = False
    strip = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"} if len(steps) == 1:
                return _Decoding(byte_level=True)
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replace.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                strip = start
            case {"type": "Metaspace", "replacement": str(old)}:
                replace.append((old, " "))
                strip = int(step.get("prepend_scheme", "always") != "never")
            case _:
                raise FileError(
                    f"{origin}: the tokenizer's decoder {str(step)[:200]} is not known",
                    fix="use a model with a byte-level or SentencePiece-style BPE tokenizer",
                )
    return _Decoding(False, tuple(replace), byte_fallback, strip)


class Detokenizer:
    """Text out of a stream of token ids; a character appears when its last byte does.

    The pieces joined, with `finish()`, equal `Text.decode` of all the ids; each push takes time in its own token only.
    """

    def __init__(self, text: Text, skip_special: bool, continues: bool) -> None:
        self._text = text
        self._skip = skip_special
        self._strip = 0 if continues else text.leading_spaces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        if self._skip and self._text.is_special(token):
            return ""
        data = self._text.token_bytes(token)
        while self._strip and data:
            if not data.startswith(b" "):
                self._strip = 0
                break
            data = data[1:]
            self._strip -= 1
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never ended."""
        return self._utf8.decode(b"", final=True)


class Text:
    """A model's tokenizer, its special tokens and its chat template.

    Args:
        tokenizer: of the `tokenizers` library.
        bos_id, eos_ids: begin of text; the tokens that end an answer.
        before, after: ids that `encode` puts around a text when `add_special` is set.
        chat_template: if the model has one.
        origin: where it came from, for error messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        before: Iterable[int] = (),
        after: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        origin: str = "tokenizer",
    ) -> None:
        # A tokenizer.json may carry the truncation and padding of somebody's training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.chat_template = chat_template
        self.origin = origin
        self._tokenizer = tokenizer
        self._literal: Tokenizer | None = None
        self._before, self._after = list(before), list(after)
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._decoding = _decoding(tokenizer.decoder, origin)
        self._bytes: dict[int, bytes] = {}
        self.leading_spaces = self._decoding.strip

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id; asks for the whole vocabulary, 0.1 s for 150,000 entries."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @staticmethod
    def from_directory(path: Path) -> Text:
        """The tokenizer of a model directory in transformers' layout.

        Reads tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json, special_tokens_map.json,
        chat_template.jinja and the end tokens of generation_config.json.

        Raises:
            FileError: no tokenizer there, or a damaged file.
        """
        path = Path(path)
        config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
        tokenizer = _load(path, config)
        _add_tokens(tokenizer, config, path)
        variables: dict[str, Any] = {}
        for name in NAMED_TOKENS:
            token = token_text(config.get(name))
            if token is not None:
                variables[name] = token
        before, after = _around(tokenizer)
        bos, eos = (tokenizer.token_to_id(variables.get(name, "")) for name in ("bos_token", "eos_token"))
        if not (
            path / "tokenizer.json"
        ).exists():  # a tokenizer.json says it itself; transformers ignores the flags then
            before = [bos] if config.get("add_bos_token") and bos is not None else []
            after = [eos] if config.get("add_eos_token") and eos is not None else []
        more = _read_json(path / "generation_config.json").get("eos_token_id")
        ends = [eos, *(more if isinstance(more, list) else [more])]
        templates = _templates(path, config)
        return Text(
            tokenizer,
            bos_id=bos,
            eos_ids=dict.fromkeys(i for i in ends if isinstance(i, int) and i >= 0),
            before=before,
            after=after,
            chat_template=ChatTemplate(templates, variables, str(path)) if templates else None,
            origin=str(path),
        )

    @staticmethod
    def from_gguf(metadata: Mapping[str, Any], origin: str = "GGUF metadata") -> Text:
        """The tokenizer in a GGUF file's metadata; a FileError names the key that is missing or wrong."""
        read = read_gguf_tokenizer(metadata, origin)
        templates: dict[str, str] = {}
        for key, value in metadata.items():
            if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
                if not isinstance(value, str):
                    raise FileError(f"{origin}: {key} is of type {type(value).__name__}, expected a string")
                templates[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value
        return Text(
            read.tokenizer,
            bos_id=read.bos_id,
            eos_ids=read.eos_ids,
            before=[read.bos_id] if read.add_bos and read.bos_id is not None else [],
            after=[read.eos_ids[0]] if read.add_eos else [],
            chat_template=ChatTemplate(templates, read.variables, origin) if templates else None,
            origin=origin,
        )

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            add_special: put the tokens around it that the model expects (begin of text).
            parse_special: "<|im_end|>" in the text is that token; otherwise it is plain characters, which is the
                right choice for text of somebody who is not to be trusted.
        """
        if not isinstance(text, str):
            raise RequestError(f"text is of type {type(text).__name__}, expected a string")
        tokenizer = self._tokenizer if parse_special else self._literal_tokenizer()
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("the text contains half of a surrogate pair", fix="pass valid Unicode") from None
        return [*self._before, *ids, *self._after] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            skip_special: leave out tokens such as <|im_end|>.
            continues: the ids follow others, so a SentencePiece tokenizer's leading space is part of the text.
        """
        stream = self.detokenizer(skip_special, continues)
        return "".join(stream.push(token) for token in ids) + stream.finish()

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """A decoder for one stream of ids; arguments as in `decode`."""
        return Detokenizer(self, skip_special, continues)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for an id without a token."""
        data = self._bytes.get(token)
        if data is None:
            if token < 0:
                raise RequestError(f"token id {token} is negative")
            name = self._tokenizer.id_to_token(token) if token < 1 << 31 else None  # the library's ids are unsigned
            data = self._bytes[token] = b"" if name is None else self._decoding.token(name)
        return data

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as "<|im_end|>"."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def is_special(self, token: int) -> bool:
        """Whether `skip_special` leaves this token out."""
        return token in self._special

    def _literal_tokenizer(self) -> Tokenizer:
        if self._literal is None:  # the switch is part of a tokenizer's state, and other threads use the first one
            literal = Tokenizer.from_str(self._tokenizer.to_str())
            literal.encode_special_tokens = True
            self._literal = literal
        return self._literal


def _read_text(path: Path) -> str | None:
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise FileError(f"{path}: {size:,} bytes, over the limit of {MAX_FILE:,}", fix="fetch it again")
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 at byte {error.start}", fix="fetch it again") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}", fix="check the file and its permissions") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when the file is not there."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: damaged: {error}", fix="fetch it again") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: holds a {type(value).__name__}, expected a JSON object", fix="fetch it again")
    return value


def _load(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    text = _read_text(path / "tokenizer.json")
    if text is not None:
        return parse_tokenizer(text, str(path / "tokenizer.json"))
    vocab, merges = _read_json(path / "vocab.json"), _read_text(path / "merges.txt")
    if vocab and merges is not None:
        return _old_style(path, vocab, merges, config)
    if (path / "tokenizer.model").exists():
        raise FileError(
            f"{path}: there is a tokenizer.model, but no tokenizer.json",
            fix="make one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    raise FileError(f"{path}: no tokenizer.json", fix="fetch the model again with its tokenizer files")


# The splitting that transformers gives these classes, which vocab.json and merges.txt do not say.
_OLD_STYLE = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}


def _old_style(path: Path, vocab: dict[str, Any], merges: str, config: Mapping[str, Any]) -> Tokenizer:
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if name not in _OLD_STYLE:
        raise FileError(
            f"{path}: vocab.json without tokenizer.json, and tokenizer_class {name!r} does not say how to split text",
            fix=f"add tokenizer.json, or one of {sorted(_OLD_STYLE)} as tokenizer_class in tokenizer_config.json",
        )
    for token, i in vocab.items():
        if not isinstance(i, int) or not 0 <= i < 1 << 31:
            raise FileError(f"{path / 'vocab.json'}: token {token!r} has the id {i!r}", fix="fetch it again")
    pairs = []
    for number, line in enumerate(merges.split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FileError(f"{path / 'merges.txt'}: line {number} joins tokens not in vocab.json: {line!r}"[:300])
        pairs.append((left, right))
    return byte_level_bpe(vocab, pairs, SPLITTINGS[_OLD_STYLE[name]])


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Adds what tokenizer_config.json knows and tokenizer.json does not; ids must come out as the file says."""
    listed = config.get("added_tokens_decoder")
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    entries = sorted(_added(listed).items())
    for number, entry in entries:
        if entry["content"] in known:
            continue
        flags = {
            k: entry[k] for k in ("lstrip", "rstrip", "single_word", "normalized") if isinstance(entry.get(k), bool)
        }
        tokenizer.add_tokens([AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
        if tokenizer.token_to_id(entry["content"]) != int(number):
            raise FileError(
                f"{path / 'tokenizer_config.json'}: token {entry['content']!r} has the id {number}, "
                f"but the vocabulary makes it {tokenizer.token_to_id(entry['content'])}",
                fix="fetch the tokenizer files again, all of one revision",
            )
    for name in NAMED_TOKENS:
        token = token_text(config.get(name))
        if token and tokenizer.token_to_id(token) is not None:
            added = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
            if token not in added:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])


def _added(listed: Any) -> dict[int, dict[str, Any]]:
    """`added_tokens_decoder` by id, without entries of another shape: the ids in tokenizer.json are what counts."""
    if not isinstance(listed, dict):
        return {}
    return {
        int(key): entry
        for key, entry in listed.items()
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids a tokenizer's post-processor puts before and after a text, found by asking it."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files win over tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    listed = config.get("chat_template")
    if isinstance(listed, str):
        found["default"] = listed
    elif isinstance(listed, list):
        for entry in listed:
            if not (isinstance(entry, dict) and isinstance(entry.get("template"), str)):
                raise FileError(f"{path / 'tokenizer_config.json'}: chat_template holds {entry!r}"[:300])
            found[str(entry.get("name", "default"))] = entry["template"]
    elif listed is not None:
        raise FileError(f"{path / 'tokenizer_config.json'}: chat_template is of type {type(listed).__name__}")
    main = _read_text(path / "chat_template.jinja")
    if main is not None:
        found["default"] = main
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _read_text(file) or ""
    return found
