"""The text of one answer as its tokens come: whole characters only, and nothing that a stop string may begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """Give it tokens, it gives back what can be told by now; all pieces together are `said`.

    The stop string itself is never told. What `tokenizer.decode` makes of all tokens is what is told in the end.

    Args:
        tokenizer: a fast one.
        stop: strings that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded, self._held = "", ""
        self.said, self.stopped = "", False

    def add(self, token: int) -> str:
        """The text that may be told after one more token."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += piece
        return self._tell(piece)

    def end(self) -> str:
        """The rest, where no stop string came: what was held back, and half a character as decoding shows it."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        last = self._tell(rest)
        held, self._held = self._held, ""
        self.said += held
        return last + held

    def _tell(self, piece: str) -> str:
        """Take a piece of text; what of it, and of what was held back, may be told."""
        text = self._held + piece
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            text, self._held, self.stopped = text[: min(found)], "", True
        else:
            hold = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.said += text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
