"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

HALF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character yet."""


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that reads ids."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """The text of one answer, piece by piece.

    Args:
        stop: The text ends before the first of these.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(one for one in stop if one)
        self._ids: list[int] = []
        self._shown, self._read = 0, 0
        """Ids before `_read` are text already; those from `_shown` on are decoded again, for a tokenizer may write a
        token in another way when it stands first."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self._pieces: list[str] = []
        self.stopped = False
        """A stop string came."""

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._shown : self._read])
        now = self._tokenizer.decode(self._ids[self._shown :])
        if len(now) <= len(known) or now.endswith(HALF):
            return ""
        self._shown, self._read = self._read, len(self._ids)
        return self._give(self._held + now[len(known) :])

    def end(self) -> str:
        """What was held back, once no token follows. Bytes that are no whole character are left out."""
        rest, self._held = self._held, ""
        if rest:
            self._pieces.append(rest)
        return rest

    def _give(self, text: str) -> str:
        found = [place for one in self._stop if (place := text.find(one)) >= 0]
        if found:
            self.stopped = True
            given, self._held = text[: min(found)], ""
        else:
            keep = max((_beginning(text, one) for one in self._stop), default=0)
            given, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if given:
            self._pieces.append(given)
        return given


def _beginning(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
