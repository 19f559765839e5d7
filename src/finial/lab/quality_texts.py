"""The texts of a verdict: sampled from the reference itself, a passage of this project's own, a person's file.

Knows tokenizers and windows of token ids; nothing of engines.

    passage_text(checkpoint.text(), window=512).windows     # lists of at most 512 ids, each scored by itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finial.errors import FileError, RequestError

PASSAGE = Path(__file__).with_name("passage.txt")  # 663 words, written for this project
WINDOW = 512
SAMPLED = 256
SHORTEST = 8  # ids; what is left of a text at its end is scored when it is no shorter


class Tokenizer(Protocol):
    """What makes ids of text."""

    def encode(self, text: str) -> list[int]:
        """With the model's own beginning of a text, where it has one."""


@dataclass(frozen=True)
class Text:
    """A text in ids.

    Attributes:
        name: "sampled", "passage", or the file's name; origin: a sentence that says where it is from.
        windows: its ids in pieces; each is scored from its own beginning, so positions restart with it.
    """

    name: str
    origin: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """How many ids there are."""
        return sum(len(window) for window in self.windows)


def passage_text(tokenizer: Tokenizer, window: int = WINDOW, limit: int | None = None) -> Text:
    """The package's own passage.

    Args:
        limit: use only so many ids.
    """
    ids = tokenizer.encode(PASSAGE.read_text(encoding="utf-8"))
    return Text("passage", "a passage written for this project", cut(ids[:limit], window))


def file_text(path: Path, tokenizer: Tokenizer, window: int = WINDOW, limit: int | None = None) -> Text:
    """A person's text file.

    Raises:
        FileError: it cannot be read as UTF-8; RequestError: it is too short to say anything.
    """
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: {error}", fix="give a text file in UTF-8") from error
    windows = cut(ids[:limit], window)
    if not windows:
        raise RequestError(f"{path} has {len(ids)} tokens", fix=f"give a text of at least {SHORTEST} tokens")
    return Text(path.name, f"the file {path.name}", windows)


def sampled_text(
    sample: Callable[[list[int], int, int], list[int]],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    count: int = SAMPLED,
    window: int = WINDOW,
    seed: int = 0,
) -> Text:
    """Text that the reference writes at temperature 1: likely to it, whatever it was trained on.

    Each window is a text of its own with a seed of its own.  It begins with the model's own beginning of a text; where
    it has none, with the passage's first token; without a tokenizer, with the id in the middle of the vocabulary.

    Args:
        sample: (ids, how many, seed) -> the ids that it continues with.
        count: ids in all.
    """
    start = [vocab_size // 2]
    if tokenizer is not None:
        start = tokenizer.encode("") or tokenizer.encode(PASSAGE.read_text(encoding="utf-8"))[:1]
    sizes = [min(window, count - at) for at in range(0, count, window)]
    windows = [
        (*start, *sample(start, size - len(start), seed + number))
        for number, size in enumerate(sizes)
        if size >= SHORTEST
    ]
    return Text("sampled", f"sampled from the reference, seed {seed}", tuple(windows))


def cut(ids: Sequence[int], window: int) -> tuple[tuple[int, ...], ...]:
    """Windows of so many ids; a rest of fewer than `SHORTEST` is left out."""
    pieces = (tuple(ids[at : at + window]) for at in range(0, len(ids), window))
    return tuple(piece for piece in pieces if len(piece) >= SHORTEST)
