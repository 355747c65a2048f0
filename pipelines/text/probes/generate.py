"""Text probes of a given length: one, a grid of depths and lengths, or documents to train on."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import UserError, nearest
from .text_tasks import END, SEPARATOR, TEXT_TASKS, Draft, Fresh, Probe, draft, find_task

SPLITS = ("train", "validation", "test")
EXAMPLE_UNITS = 4
TRIES = 100

CountTokens = Callable[[str], int]


def byte_count(text: str) -> int:
    """Bytes of the text in UTF-8; bytes that were no UTF-8 (surrogate escapes) count as they are."""
    return len(text.encode("utf-8", "surrogateescape"))


def draw_probe(
    rng: np.random.Generator,
    task: str,
    length: int,
    *,
    depth: float | None = None,
    essay: str | None = None,
    count_tokens: CountTokens = byte_count,
    reserve: int | None = None,
    example: bool = False,
    **options: Any,
) -> Probe:
    """A probe whose prompt and answer fit `length` tokens, and would not with one more sentence of haystack.

    task: a key of TEXT_TASKS. depth: of the needle, 0 to 1, at the nearest gap between sentences; None for a random
    gap, all equally likely. essay: the text that an essay haystack is made of, None for generated sentences.
    count_tokens: of a text, bytes by default. reserve: tokens kept for the answer, None for those of the right answer
    and a full stop. example: put a solved example of the task, with a few sentences of haystack, before it. options:
    fields of TextTask to change, such as haystack="noise", num_keys=8, num_hops=2.

    Every answer is in the prompt as often as the needles say it (once; a variable that is assigned on, twice), in any
    case of the letters. Raises UserError for an unknown task or option, a depth where several needles are asked, a
    length that is too short, an essay that holds no text or every answer.
    """
    spec = find_task(task, **options)
    if depth is not None:
        if not spec.one_needle:
            single = ", ".join(name for name, other in TEXT_TASKS.items() if other.one_needle)
            raise UserError(f"{task} asks for several needles, a depth is for one: leave it out, or take {single}")
        if not 0 <= depth <= 1:
            raise UserError(f"depth={depth} must lie between 0 (before the haystack) and 1 (after it)")
    for _ in range(TRIES):
        fresh = Fresh(rng)
        before = ""
        wanted: list[tuple[str, int]] = []
        if example:
            solved = draft(spec, rng, fresh, essay)
            units = list(itertools.islice(solved.units, EXAMPLE_UNITS))
            before = _render(solved, units, None) + " " + SEPARATOR.join(solved.answers) + END + "\n\n"
            wanted += [(answer, n + 1) for answer, n in zip(solved.answers, solved.counts, strict=True)]
        made = draft(spec, rng, fresh, essay)
        kept = count_tokens(" " + SEPARATOR.join(made.answers) + END) if reserve is None else reserve
        units, prompt = _fit(made, before, depth, length - kept, count_tokens, task, length)
        wanted += zip(made.answers, made.counts, strict=True)
        folded = prompt.casefold()
        if all(folded.count(answer.casefold()) == n for answer, n in wanted):
            break
    else:
        raise UserError(f"no answer to {task} could be found that its haystack does not hold, in {TRIES} tries")
    placed = _placed(made, len(units), depth)
    depths = tuple(gap / len(units) if units else 0.0 for gap, _, _ in placed[: len(made.evidence)])
    meta = {
        "task": task,
        "length": length,
        "depth": (depths[0] if depth is None else depth) if spec.one_needle else None,
        "depths": depths,
        "units": len(units),
        "tokens": count_tokens(prompt),
        "characters": len(prompt),
    }
    return Probe(prompt, made.answers, meta)


def make_probe(task: str, length: int, *, seed: int = 0, split: str = "test", index: int = 0, **kwargs: Any) -> Probe:
    """The probe of that number, a function of (task, seed, split, index) and of the options, those of `draw_probe`."""
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown.{nearest(split, SPLITS)}")
    # crc32: other tasks are other draws, in every process (hash() is not)
    rng = np.random.default_rng([seed, SPLITS.index(split), zlib.crc32(task.encode()), index])
    probe = draw_probe(rng, task, length, **kwargs)
    probe.meta.update(seed=seed, split=split, index=index)
    return probe


def probe_grid(
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float] | None = None,
    *,
    samples: int = 10,
    seed: int = 0,
    split: str = "test",
    **kwargs: Any,
) -> Iterator[Probe]:
    """`samples` probes for each length and depth, all with keys and values of their own.

    depths: 0 to 1; None for random ones, and for tasks that ask for several needles. kwargs: as `draw_probe`.
    """
    cells = itertools.product(lengths, [None] if depths is None else depths, range(samples))
    for index, (length, depth, _) in enumerate(cells):
        yield make_probe(task, length, seed=seed, split=split, index=index, depth=depth, **kwargs)


def probe_documents(
    rng: np.random.Generator, count: int, length: int, tasks: Sequence[str] = ("passkey", "needle"), **kwargs: Any
) -> list[bytes]:
    """`count` documents of at most `length` bytes, each a probe at a random depth with its answer and a full stop.

    A byte model that was trained on them knows the format that the probes of these tasks ask in. The task of each is
    drawn from `tasks`. kwargs: as `draw_probe`, for all of them.
    """
    if not tasks:
        raise UserError(f"tasks is empty.{nearest('', TEXT_TASKS)}")
    drawn = (tasks[int(rng.integers(len(tasks)))] for _ in range(count))
    return [draw_probe(rng, task, length, **kwargs).document.encode("utf-8", "surrogateescape") for task in drawn]


def _placed(made: Draft, units: int, depth: float | None) -> list[tuple[int, float, str]]:
    """(gap, order within the gap, text) of every needle, evidence first; gaps are 0 ... units, all equally likely."""
    placed = [(int(place * (units + 1)), place, text) for place, text in (*made.evidence, *made.others)]
    if depth is not None:
        gap = round(depth * units)  # the place drawn for it now only orders the needles of this gap
        placed[0] = (gap, (gap + made.evidence[0].place) / (units + 1), made.evidence[0].text)
    return placed


def _render(made: Draft, units: Sequence[str], depth: float | None) -> str:
    sentences: list[str] = []
    start = 0
    for gap, _, text in sorted(_placed(made, len(units), depth)):
        sentences += [*units[start:gap], text]
        start = gap
    sentences += units[start:]
    return f"{made.intro}\n{' '.join(sentences)}\n{made.question}"


def _fit(
    made: Draft, before: str, depth: float | None, budget: int, count_tokens: CountTokens, task: str, length: int
) -> tuple[list[str], str]:
    """The units of the longest prompt of at most `budget` tokens, and that prompt."""
    pulled: list[str] = []

    def pull(number: int) -> list[str]:
        pulled.extend(itertools.islice(made.units, max(0, number - len(pulled))))
        return pulled[:number]

    def prompt(number: int) -> str:
        return before + _render(made, pull(number), depth)

    def fits(number: int) -> bool:
        return count_tokens(prompt(number)) <= budget

    bare = count_tokens(prompt(0))
    if bare > budget:
        raise UserError(f"{task} needs {length + bare - budget} tokens before any haystack, got length={length}")
    # Tokens of a text are about those of its sentences: start from there, then step to the exact number.
    costs: dict[str, int] = {}
    number, left = 0, budget - bare
    while left > 0:
        number += 1
        unit = pull(number)[-1] if number > len(pulled) else pulled[number - 1]
        if unit not in costs:
            costs[unit] = max(1, count_tokens(" " + unit))
        left -= costs[unit]
    low, high, step = 0, number + 1, 1
    if fits(number):
        low = number
        while fits(high):
            low, step = high, 2 * step
            high = low + step
    else:
        high = number
        while high - step > 0 and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(0, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return pulled[:low], prompt(low)
