"""The text probes: their table, the sentences they are made of, and the needles of one example.

Ruler-like, never RULER: the tasks follow the published ones (Hsieh et al., arXiv:2404.06654; passkey: Mohtashami and
Jaggi, arXiv:2305.16300; needle in a haystack: Kamradt, 2023), the words, the generated haystack and the seeds are ours,
so that scores are comparable with each other and not with published tables.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ...errors import UserError, nearest
from .haystacks import essay, noise
from .words import ADJECTIVES, NOUNS


class Format(NamedTuple):
    """The sentences of a form: before the haystack, in it, and the two after it that the answer follows."""

    intro: str
    needle: str
    question: str
    answer_prefix: str


FORMATS = {
    "passkey": Format(
        "A pass key is hidden in this text. Remember it.",
        "The pass key is {value}. Remember it.",
        "What is the pass key?",
        "The pass key is",
    ),
    "needle": Format(
        "Some special magic {kind} are hidden in this text. Remember them.",
        "One of the special magic {kind} for {key} is: {value}.",
        "What are all the special magic {kind} for {key}?",
        "The special magic {kind} for {key} are:",
    ),
    "variables": Format(
        "Variables are assigned in this text. Remember which has which value.",
        "VAR {key} = {value}.",
        "Which variables have the value {value}?",
        "The variables with the value {value} are:",
    ),
}
SEPARATOR, END = ", ", "."  # between answers, after the last
OPTIONS = {
    "passkey": ("haystack",),
    "needle": ("haystack", "keys", "values", "num_keys", "num_values", "num_queries"),
    "variables": ("haystack", "num_chains", "num_hops"),
}
CHOICES = {"haystack": ("noise", "essay", "needles"), "keys": ("words", "uuids"), "values": ("numbers", "uuids")}


@dataclass(frozen=True)
class Probe:
    """A prompt and the strings that a right answer holds, in the order in which a teacher would write them.

    meta: task, length (the budget), tokens (of the prompt), characters, depth (of the needle: 0 before the first
    sentence of the haystack, 1 after the last; None where several are asked), depths (a tuple, of each needle that the
    answer needs, in the order of the answers), units (sentences of the haystack); `make_probe` adds seed, split, index.
    """

    prompt: str
    answers: tuple[str, ...]
    meta: dict[str, Any]

    @property
    def continuation(self) -> str:
        """What should follow the prompt, from its blank on, without the full stop."""
        return " " + SEPARATOR.join(self.answers)

    @property
    def document(self) -> str:
        """Prompt and answer as one text, to train on."""
        return self.prompt + self.continuation + END


@dataclass(frozen=True)
class TextTask:
    """What is hidden and asked.

    haystack: see haystacks.py. num_keys, num_values, num_queries: needles are num_keys keys with num_values values
    each, of which the values of num_queries keys are asked. num_chains, num_hops: of variables; the first chain is
    asked. diffusion, scope: how hard the evidence is to find and how much of it there is, after Goldman et al.,
    arXiv:2407.00402.
    """

    form: Literal["passkey", "needle", "variables"] = "needle"
    haystack: Literal["noise", "essay", "needles"] = "essay"
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    num_chains: int = 1
    num_hops: int = 4
    diffusion: Literal["low", "medium", "high"] = "low"
    scope: Literal["low", "medium", "high"] = "low"

    @property
    def one_needle(self) -> bool:
        """Whether the answer is one sentence, whose depth can be chosen."""
        return self.form != "variables" and self.num_values * self.num_queries == 1


TEXT_TASKS: dict[str, TextTask] = {
    "passkey": TextTask("passkey", "noise"),
    "needle_noise": TextTask(haystack="noise"),
    "needle": TextTask(),
    "needle_uuid": TextTask(values="uuids"),
    "multikey": TextTask(num_keys=4, diffusion="high"),
    "multikey_needles": TextTask(haystack="needles", diffusion="high"),
    "multikey_uuid": TextTask(haystack="needles", keys="uuids", values="uuids", diffusion="high"),
    "multivalue": TextTask(num_values=4, scope="medium"),
    "multiquery": TextTask(num_keys=4, num_queries=4, scope="medium"),
    "variables": TextTask("variables", "noise", diffusion="high", scope="medium"),
}


def find_task(name: str, **changes: Any) -> TextTask:
    """The task of that name with some of its fields changed; wrong ones are a UserError with the nearest valid."""
    if name not in TEXT_TASKS:
        raise UserError(f"there is no text probe {name!r}.{nearest(name, TEXT_TASKS)}")
    task = TEXT_TASKS[name]
    for option, value in changes.items():
        if option not in OPTIONS[task.form]:
            raise UserError(f"{name} has no option {option!r}.{nearest(option, OPTIONS[task.form])}")
        if option in CHOICES and value not in CHOICES[option]:
            raise UserError(f"{option}={value!r} is unknown.{nearest(value, CHOICES[option])}")
        if option.startswith("num_") and (not isinstance(value, int) or value < 1):
            raise UserError(f"{option}={value!r} must be a positive integer")
    task = dataclasses.replace(task, **changes)
    if task.form != "needle" and task.haystack == "needles":
        raise UserError(f"{name} has no haystack of needles: take noise or essay")
    # as many keys as are asked for
    return dataclasses.replace(task, num_keys=max(task.num_keys, task.num_queries))


class Needle(NamedTuple):
    """A sentence and where it goes, in [0, 1) of the gaps between the units of the haystack."""

    place: float
    text: str


@dataclass(frozen=True)
class Draft:
    """One example before its haystack is cut to length.

    evidence: the needles that the answer needs, in the order of the answers. others: the rest. counts: how often each
    answer must be in the prompt. units: the endless haystack.
    """

    intro: str
    evidence: list[Needle]
    others: list[Needle]
    question: str
    answers: tuple[str, ...]
    counts: tuple[int, ...]
    units: Iterator[str]


class Fresh:
    """Random keys, values and names from `rng`, none twice."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.taken: set[str] = set()

    def number(self, digits: int) -> str:
        return self._new(lambda: str(self.rng.integers(10 ** (digits - 1), 10**digits)))

    def identifier(self) -> str:
        return self._new(lambda: str(uuid.UUID(bytes=self.rng.bytes(16), version=4)))

    def name(self) -> str:
        """Five capital letters."""
        return self._new(lambda: "".join(chr(65 + letter) for letter in self.rng.integers(0, 26, 5)))

    def words(self) -> str:
        """adjective-noun; with two adjectives once many are taken, so that a draw is rarely one of those."""
        pairs = len(ADJECTIVES) * len(NOUNS)
        number = 1 if len(self.taken) < pairs // 2 else 2

        def draw() -> str:
            *adjectives, noun = self.rng.integers(0, 2**31, number + 1).tolist()
            return "-".join([*(ADJECTIVES[a % len(ADJECTIVES)] for a in adjectives), NOUNS[noun % len(NOUNS)]])

        return self._new(draw)

    def _new(self, draw: Callable[[], str]) -> str:
        value = draw()
        while value in self.taken:
            value = draw()
        self.taken.add(value)
        return value


def draft(task: TextTask, rng: np.random.Generator, fresh: Fresh, text: str | None) -> Draft:
    """The needles, question and answers of one example. text: of the essay, None for generated sentences."""
    make = {"passkey": _passkey, "needle": _needles, "variables": _variables}[task.form]
    return make(task, rng, fresh, _units(task, rng, fresh, text))


def _passkey(task: TextTask, rng: np.random.Generator, fresh: Fresh, units: Iterator[str]) -> Draft:
    form, value = FORMATS["passkey"], fresh.number(5)
    evidence = [Needle(rng.random(), form.needle.format(value=value))]
    return Draft(form.intro, evidence, [], f"{form.question} {form.answer_prefix}", (value,), (1,), units)


def _needles(task: TextTask, rng: np.random.Generator, fresh: Fresh, units: Iterator[str]) -> Draft:
    keys = [_key(task, fresh) for _ in range(task.num_keys)]
    values = [[_value(task, fresh) for _ in range(task.num_values)] for _ in keys]
    places = np.sort(rng.random((task.num_keys, task.num_values)), axis=1)  # the values of a key in text order
    sentences = [
        [Needle(p, _sentence(task, key, value)) for p, value in zip(row, column, strict=True)]
        for key, row, column in zip(keys, places, values, strict=True)
    ]
    evidence = [needle for row in sentences[: task.num_queries] for needle in row]
    others = [needle for row in sentences[task.num_queries :] for needle in row]
    answers = tuple(value for row in values[: task.num_queries] for value in row)
    form, asked = FORMATS["needle"], _listed(keys[: task.num_queries])
    question = f"{form.question} {form.answer_prefix}".format(kind=task.values, key=asked)
    return Draft(form.intro.format(kind=task.values), evidence, others, question, answers, (1,) * len(answers), units)


def _variables(task: TextTask, rng: np.random.Generator, fresh: Fresh, units: Iterator[str]) -> Draft:
    form, chains, names = FORMATS["variables"], [], []
    for _ in range(task.num_chains):
        chain = [fresh.name() for _ in range(task.num_hops + 1)]
        sources = [fresh.number(5), *(f"VAR {name}" for name in chain[:-1])]
        places = np.sort(rng.random(len(chain)))  # the order of a chain is the order of the text
        statements = [form.needle.format(key=key, value=value) for key, value in zip(chain, sources, strict=True)]
        chains.append([Needle(p, text) for p, text in zip(places, statements, strict=True)])
        names.append((tuple(chain), sources[0]))
    answers, value = names[0]
    question = f"{form.question} {form.answer_prefix}".format(value=value)
    counts = (*(2 for _ in answers[:-1]), 1)
    return Draft(form.intro, chains[0], [n for chain in chains[1:] for n in chain], question, answers, counts, units)


def _units(task: TextTask, rng: np.random.Generator, fresh: Fresh, text: str | None) -> Iterator[str]:
    if task.haystack == "noise":
        return noise()
    if task.haystack == "essay":
        return essay(rng, text)
    return iter(lambda: _sentence(task, _key(task, fresh), _value(task, fresh)), "")


def _key(task: TextTask, fresh: Fresh) -> str:
    return fresh.words() if task.keys == "words" else fresh.identifier()


def _value(task: TextTask, fresh: Fresh) -> str:
    return fresh.number(7) if task.values == "numbers" else fresh.identifier()


def _sentence(task: TextTask, key: str, value: str) -> str:
    return FORMATS["needle"].needle.format(kind=task.values, key=key, value=value)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"
