"""The text of a continuation while its tokens come: whole characters, and nothing of a stop before it is decided."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import ByteTokenizer, Tokenizer

_UNDECIDED = 8  # tokens that may wait for the rest of a character
_REPLACED = "\ufffd".encode()


class Answer:
    """Bytes of one continuation, cut at the first of the stops to be complete, of two at one place the longer.

    prompt: the tokens before it. stops: looked for in the text, however the tokenizer cuts it into tokens. What might
    be the beginning of a stop waits until it is one or cannot be.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[bytes] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._exact = isinstance(tokenizer, ByteTokenizer)
        # Tokens that are text already, the last of them: what a token says may depend on those before.
        self._before = list(prompt)[-_UNDECIDED:]
        self._waiting: list[int] = []
        self._read, self._decided, self._taken = bytearray(), 0, 0
        self._begins: list[int] = []
        self.stopped = False

    def add(self, token: int) -> bool:
        """Take a token; True when it completed a stop."""
        if not self.stopped and token < self._tokenizer.vocab_size:  # a model may have more numbers than its tokenizer
            self._waiting.append(token)
            self._decide(last=False)
        return self.stopped

    def finish(self) -> None:
        """No token comes any more: what waited is text."""
        if not self.stopped:
            self._decide(last=True)
        if not self.stopped:
            self._decided = len(self._read)

    def take(self) -> bytes:
        """What was decided since the last call."""
        begin, self._taken = self._taken, self._decided
        return bytes(self._read[begin : self._decided])

    @property
    def text(self) -> bytes:
        """All that is decided, never any of a stop."""
        return bytes(self._read[: self._decided])

    @property
    def tokens(self) -> int:
        """How many tokens the text took."""
        return sum(begin < self._decided for begin in self._begins)

    def _decide(self, *, last: bool) -> None:
        new = self._new_bytes(last)
        if new is None:
            return
        begin = len(self._read)
        self._begins += [begin] * len(self._waiting)
        self._read += new
        complete = len(self._waiting) < _UNDECIDED
        self._before = (self._before + self._waiting)[-_UNDECIDED:] if complete and not self._exact else []
        self._waiting = []
        cut = self._met(begin)
        self.stopped = cut is not None
        self._decided = len(self._read) - self._held() if cut is None else cut

    def _new_bytes(self, last: bool) -> bytes | None:
        """What the waiting tokens say, None while a character is incomplete."""
        decode = self._tokenizer.decode
        if self._exact:
            return decode(self._waiting)
        text = decode(self._before + self._waiting)
        if text.endswith(_REPLACED) and len(self._waiting) < _UNDECIDED and not last:
            return None
        return text[len(decode(self._before)) :]

    def _met(self, begin: int) -> int | None:
        """Where the first stop to end after `begin` starts."""
        ends: list[tuple[int, int]] = []
        for stop in self._stops:
            place = self._read.find(stop, max(begin - len(stop) + 1, 0))
            if place >= 0:
                ends.append((place + len(stop), place))
        return min(ends)[1] if ends else None

    def _held(self) -> int:
        """Bytes at the end that might become a stop."""
        most = min(max(map(len, self._stops), default=1) - 1, len(self._read))
        for length in range(most, 0, -1):
            tail = bytes(self._read[len(self._read) - length :])
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
