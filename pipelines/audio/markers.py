"""Times as words of a language model: the temporal markers of TimeAudio, arXiv:2511.11039.

Twenty tokens, anchors <a_0> .. <a_9> for the digits of the whole seconds and offsets <f_0> .. <f_9> for the tenth:
12.3 s is <a_1><a_2><f_3>. Times are counted in tenths of a second, as integers, from 0.0 to 999.9.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation

import torch
from torch import Tensor

from ..errors import UserError

ANCHORS = tuple(f"<a_{digit}>" for digit in range(10))
OFFSETS = tuple(f"<f_{digit}>" for digit in range(10))
MARKERS = ANCHORS + OFFSETS
LARGEST = 9999  # tenths of a second

_MARKED = re.compile(r"((?:<a_\d>){1,3})<f_(\d)>")
_NUMBER = r"\d{1,3}(?:\.\d+)?"
# Not inside a longer number, a word or a date: 2024-05-06 and 1-2-3 are no ranges.
_RANGE = re.compile(rf"(?<![\w.\-–])({_NUMBER})(\s*[-–]\s*)({_NUMBER})(?![\w\-–]|\.\d)")
_MARKED_RANGE = re.compile(rf"{_MARKED.pattern}\s*[-–]\s*{_MARKED.pattern}")


def tenths(seconds: float | str | Decimal) -> int:
    """Tenths of a second, halves rounded up, the value taken as it is written: 0.25 is 3. Raises UserError for what is
    no number or outside 0.0 to 999.9 s."""
    try:
        value = Decimal(str(seconds))
        number = int((value * 10).to_integral_value(ROUND_HALF_UP))
    except (InvalidOperation, ValueError, OverflowError):
        raise UserError(f"{seconds!r} is no time in seconds") from None
    if value < 0 or number > LARGEST:
        raise UserError(f"{seconds} s is outside what markers can say, 0.0 to {LARGEST / 10} s")
    return number


def encode_time(seconds: float | str | Decimal) -> str:
    """The markers of a time: 5 gives "<a_5><f_0>". Raises what `tenths` does."""
    return "".join(MARKERS[index] for index in time_indices(seconds))


def time_indices(seconds: float | str | Decimal) -> list[int]:
    """The same as places in `MARKERS`, two to four of them: ids of a model whose markers follow each other."""
    whole, tenth = divmod(tenths(seconds), 10)
    return [*(int(digit) for digit in str(whole)), 10 + tenth]


def decode_time(markers: str) -> float:
    """Seconds from the markers of one time. Raises UserError for anything else."""
    found = _MARKED.fullmatch(markers.strip())
    if found is None:
        raise UserError(f"{markers!r} is no time in markers, such as {encode_time(12.3)}")
    return _seconds(found[1], found[2])


def encode_ranges(text: str) -> str:
    """The text with each range "x - y" of seconds, x <= y, written in markers; other numbers stay as they are."""

    def rewrite(found: re.Match[str]) -> str:
        try:
            start, end = tenths(found[1]), tenths(found[3])
        except UserError:  # 999.97 rounds to what markers cannot say
            return found[0]
        if start > end:
            return found[0]
        return f"{encode_time(found[1])}{found[2]}{encode_time(found[3])}"

    return _RANGE.sub(rewrite, text)


def decode_text(text: str) -> str:
    """The text with every time in markers written as seconds with one decimal; a lone marker stays as it is."""
    return _MARKED.sub(lambda found: f"{_seconds(found[1], found[2]):.1f}", text)


def find_ranges(text: str) -> list[tuple[float, float]]:
    """Start and end, in seconds, of each range in markers, in their order in the text. One that ends before it starts
    is left out."""
    spans = [(_seconds(m[1], m[2]), _seconds(m[3], m[4])) for m in _MARKED_RANGE.finditer(text)]
    return [(start, end) for start, end in spans if start <= end]


def marker_embeddings(table: Tensor, digit_ids: Sequence[int], point_id: int) -> Tensor:
    """First embeddings of the twenty markers, (20, D): of an anchor that of its digit, of an offset the mean of those
    of "." and its digit. table: (V, D). digit_ids: the ids of "0" to "9". Raises UserError for other
    numbers of them and ids that the table does not have."""
    if len(digit_ids) != 10:
        raise UserError(f"{len(digit_ids)} digit_ids, expected 10, those of 0 to 9")
    if table.dim() != 2 or not all(0 <= i < len(table) for i in (*digit_ids, point_id)):
        raise UserError(f"digit_ids and point_id must be below the {len(table)} rows of the table (V, D)")
    digits = table[torch.as_tensor(digit_ids, device=table.device)]
    return torch.cat((digits, (digits + table[point_id]) / 2))


def extend_tables(
    embedding: Tensor, head: Tensor, digit_ids: Sequence[int], point_id: int
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Input and output tables (V, D) with twenty rows more, (V + 20, D), and the ids of the markers, V .. V + 19.

    The rows of the output are those of the input embedding, as published. Raises UserError for tables of two shapes.
    """
    if embedding.shape != head.shape:
        raise UserError(f"embedding {tuple(embedding.shape)} and head {tuple(head.shape)} must have one shape (V, D)")
    rows = marker_embeddings(embedding, digit_ids, point_id)
    ids = {marker: len(embedding) + place for place, marker in enumerate(MARKERS)}
    return torch.cat((embedding, rows)), torch.cat((head, rows.to(head))), ids


def _seconds(anchors: str, tenth: str) -> float:
    return (int("".join(re.findall(r"\d", anchors))) * 10 + int(tenth)) / 10
