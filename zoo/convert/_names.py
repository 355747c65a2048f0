"""Name maps: a table from the names of a public checkpoint to those of a model of the zoo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHOWN = 8  # names in an error


class Split(NamedTuple):
    """A tensor that several of ours are made of. names: ours. split: the tensor -> one part for each."""

    names: tuple[str, ...]
    split: Callable[[Tensor], Iterable[Tensor]]


NameMap = Mapping[str, str | Split]


class Plan(NamedTuple):
    """What a checkpoint becomes.

    name, options: of the model of the zoo. names: the table. A name is looked up whole, then without its last part
    ("weight", "bias"), which is carried over; `*` stands for the number of a block. ignored: patterns (regular
    expressions, matched whole) of tensors that the model has no use for. tied: tensors that must equal another one and
    are not kept. prefix: of the names of a model with head, which the model without lacks. preprocessing: plain values
    that belong to the artefact.
    """

    name: str
    options: dict[str, Any]
    names: NameMap
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = {}
    prefix: str = ""
    preprocessing: dict[str, Any] = {}

    def translate(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """`tensors` under our names and in our layout, and the names of those left out: parameters, or their
        gradients. Raises ValueError naming those that no rule knows and copies that differ from their original."""
        tensors = with_prefix(tensors, self.prefix)
        made: dict[str, Tensor] = {}
        unknown, left_out = [], []
        for name, tensor in tensors.items():
            if any(re.fullmatch(pattern, name) for pattern in self.ignored):
                left_out.append(name)
                continue
            if name in self.tied:
                original = tensors.get(self.tied[name])
                if original is not None and not torch.equal(tensor, original):
                    raise ValueError(
                        f"{name} differs from {self.tied[name]}, which the config ties it to (tie_word_embeddings)"
                    )
                left_out.append(name)
                continue
            parts = self._look_up(name, tensor)
            if parts is None:
                unknown.append(name)
            else:
                made.update(parts)
        if unknown:
            raise ValueError(f"tensors that {self.name} has no place for: {shorten(unknown)}")
        return made, left_out

    def _look_up(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        number = re.search(r"\.(\d+)\.", name)
        pattern = name if number is None else f"{name[: number.start()]}.*.{name[number.end() :]}"
        stem, _, leaf = pattern.rpartition(".")
        for key, end in ((pattern, ""), (stem, f".{leaf}")):
            if key not in self.names:
                continue
            rule = self.names[key]
            targets, parts = ((rule,), (tensor,)) if isinstance(rule, str) else (rule.names, rule.split(tensor))
            block = "" if number is None else number.group(1)
            return {t.replace("*", block) + end: part for t, part in zip(targets, parts, strict=True)}
        return None

    def source_name(self, ours: str) -> str:
        """The name in the checkpoint of one of our tensors, for messages."""
        number = re.search(r"\.(\d+)\.", ours)
        pattern = ours if number is None else f"{ours[: number.start()]}.*.{ours[number.end() :]}"
        stem, _, leaf = pattern.rpartition(".")
        for source, rule in self.names.items():
            targets = (rule,) if isinstance(rule, str) else rule.names
            for key, end in ((pattern, ""), (stem, f".{leaf}")):
                if key in targets:
                    return source.replace("*", "" if number is None else number.group(1)) + end
        return f"(our {ours})"


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """The same with `prefix` before every name, unless a name has it: a base model without its head lacks it."""
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check_fit(plan: Plan, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError unless `state` has the names and shapes of `wanted`, the state dict of the model; what is wrong
    is named as the checkpoint names it."""
    missing = dict.fromkeys(plan.source_name(name) for name in wanted if name not in state)
    wrong = {
        plan.source_name(name): f"{plan.source_name(name)} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    }
    extra = [plan.source_name(name) for name in state if name not in wanted]
    parts = [
        f"{label}: {shorten(list(found))}"
        for label, found in (("missing", missing), ("unexpected", extra), ("misshaped", wrong.values()))
        if found
    ]
    if parts:
        raise ValueError(f"{where} does not fit its config: {'; '.join(parts)}")


def shorten(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
