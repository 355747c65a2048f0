"""Labelled spans of files, whatever their kind: overlaps, and splits that share no file and no group."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .documents.labelled import split_documents
from .errors import UserError

SPLITS = ("train", "val", "test")
# Seconds that a span may end after its file: tables are written with few digits.
ROUNDING = 1e-3


class LabelledClip(Protocol):
    """What audio's `Clip` and video's `VideoClip` have in common; both are named tuples. end: None for that of the
    file. group: what splits keep together. where: the row of a table, for messages."""

    @property
    def path(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float | None: ...
    @property
    def label(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def where(self) -> str: ...
    def _replace(self, *values: Any, **fields: Any) -> Any: ...


C = TypeVar("C", bound=LabelledClip)


def check_overlaps(clips: Sequence[C]) -> None:
    """For tasks where one thing happens at a time. Raises UserError with the two rows where spans of a file overlap."""
    by_file: dict[str, list[C]] = {}
    for clip in clips:
        by_file.setdefault(clip.name, []).append(clip)
    for name, found in by_file.items():
        found.sort(key=lambda clip: clip.start)
        for before, after in itertools.pairwise(found):
            if before.end is None or after.start < before.end:
                spans = " and ".join(
                    f"{clip.where or clip.label!r} ({clip.start:g} to {'the end' if clip.end is None else clip.end})"
                    for clip in (before, after)
                )
                raise UserError(f"spans of {name} overlap: {spans}; the task takes one label at a time")


def assign_splits(
    clips: Sequence[C], ratio: Sequence[float] = (0.8, 0.1, 0.1), *, seed: int = 0, every_label: bool = True
) -> list[C]:
    """The clips with their split: as given where all have one, otherwise seeded, by `ratio` of train, val and test.

    What shares a file or a group goes together. Without any groups each label is split by itself, so that all parts
    have all labels. Where the clips give train and test alone, val is taken from train.
    Raises UserError for too few groups, for clips that have a split beside others that have none, and for a label that
    no training clip has.
    """
    if len(ratio) != 3 or min(ratio) < 0 or not ratio[0] > 0:
        raise UserError(f"ratio={list(ratio)} must be three parts: train (above 0), val, test")
    bare = [clip for clip in clips if not clip.split]
    if bare and len(bare) < len(clips):
        raise UserError(f"{bare[0].where or bare[0].name} has no split, other clips have one; give all or none")
    if bare:
        found = _split(clips, ratio, seed, every_label)
    elif ratio[1] > 0 and not any(clip.split == "val" for clip in clips):
        training = [clip for clip in clips if clip.split == "train"]
        found = _split(training, (ratio[0], ratio[1], 0.0), seed, every_label) + [
            clip for clip in clips if clip.split != "train"
        ]
    else:
        found = list(clips)
    trained = {clip.label for clip in found if clip.split == "train"}
    for clip in found:
        if every_label and clip.label not in trained:
            raise UserError(f"no training clip has the label {clip.label!r}, but {clip.where or clip.name} has it")
    return found


def shared_between(clips: Sequence[C]) -> list[str]:
    """What given splits share, as notes: files and groups of the training clips that are evaluated too."""
    notes = []
    for what, keys in (("file", [clip.name for clip in clips]), ("group", [clip.group for clip in clips])):
        seen = {key for key, clip in zip(keys, clips, strict=True) if clip.split == "train" and key is not None}
        for split in SPLITS[1:]:
            here = {key for key, clip in zip(keys, clips, strict=True) if clip.split == split}
            if both := sorted(seen & here, key=str):
                notes.append(f"{len(both):,} {what}(s) of train are in {split} too, such as {both[0]}")
    return notes


def _split(clips: Sequence[C], ratio: Sequence[float], seed: int, every_label: bool) -> list[C]:
    keys = _components(clips)
    # a component with several labels cannot be split label by label
    alone = len({(key, clip.label) for key, clip in zip(keys, clips, strict=True)}) == len(set(keys))
    by_label = every_label and alone and all(clip.group is None for clip in clips)
    strata = [clip.label if by_label else "" for clip in clips]
    needed = 1 + sum(part > 0 for part in ratio[1:])
    for stratum, count in Counter(stratum for stratum, _ in set(zip(strata, keys, strict=True))).items():
        if count < needed:
            what = f"the label {stratum!r} has {count} file(s)" if by_label else f"there are {count} group(s)"
            raise UserError(f"{what}; a split into {needed} parts needs {needed}: give more, or splits of your own")
    stages = split_documents(keys, strata, ratio, seed)
    return [clip._replace(split=str(stage)) for clip, stage in zip(clips, stages, strict=True)]


def _components(clips: Sequence[C]) -> list[str]:
    """A name for each clip, the same for two clips that a chain of shared files and groups connects."""
    above: dict[tuple[str, str], tuple[str, str]] = {}
    files = [clip.path for clip in clips if isinstance(clip.path, Path)]
    root = os.path.commonpath([file.absolute().parent for file in files]) if files else ""

    def top(node: tuple[str, str]) -> tuple[str, str]:
        while above.setdefault(node, node) != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    def key(clip: C) -> tuple[str, str]:
        # below their folder, so that the same files elsewhere have the same split
        return "file", os.path.relpath(clip.path, root) if isinstance(clip.path, Path) else clip.name

    for clip in clips:
        if clip.group is not None:
            one, other = sorted((top(key(clip)), top(("group", clip.group))))
            above[one] = other
    return ["/".join(top(key(clip))) for clip in clips]
