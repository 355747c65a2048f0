"""The user's labelled documents as tokens on the disk, and their splits."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import cached_folder
from ..errors import UserError
from ..text.tokenizer import Tokenizer
from .readers import Example, find_parts, part_files, read_part
from .sets import LabelledSet

LABELLED = "labelled"
STAGES = ("train", "val", "test")
_FORMAT = 1


@dataclass(frozen=True)
class Labelled:
    """labels: their names in order. sets: by stage. title: of tables. notes: what the user should know."""

    labels: list[str]
    sets: dict[str, LabelledSet]
    title: str
    notes: list[str]


def load_labelled(
    path: str,
    tokenizer: Tokenizer,
    *,
    columns: Mapping[str, str | None],
    split_ratio: Sequence[float],
    seed: int,
    cache_dir: str | Path | None = None,
) -> Labelled:
    """Read and tokenise the documents of `path`, from the cache the second time, and split them.

    path: a folder whose sub-folders are labels, one with train, val and test (folders of labels, or tables), or a table
    (.csv, .tsv, .jsonl). columns: names for "text", "file", "label" and "split" of a table, None: the usual ones.
    split_ratio: parts of train, val and test by `split_documents` where the files do not say; where they give train and
    test alone, val is taken from train. Raises UserError, with file and row, for what cannot be read.
    """
    flat, begin, length, records = _tokens(path, tokenizer, columns, cache_dir, labelled=True)
    if not records["label"]:
        raise UserError(f"data.path={path} has no documents")
    labels = sorted(set(records["label"]), key=_natural)
    numbers = np.array([labels.index(label) for label in records["label"]], dtype=np.int64)
    given, notes = np.array(records["split"]), []
    stage = given.copy()
    if (given == "").all():
        stage = split_documents(records["key"], records["label"], split_ratio, seed)
    elif not (given == "val").any():
        train = np.flatnonzero(given == "train")
        ratio = (split_ratio[0], split_ratio[1], 0.0)
        chosen = split_documents([records["key"][i] for i in train], [records["label"][i] for i in train], ratio, seed)
        stage[train] = chosen
        notes.append(f"no val among the files: {int((chosen == 'val').sum()):,} of the training documents validate")
    unseen = sorted({records["label"][i] for i in np.flatnonzero(stage != "train")} - _labels_of(records, stage))
    if unseen:
        raise UserError(f"data.path={path}: no training document has the label {unseen[0]!r}, but others have it")
    repeated = sum(count - 1 for count in Counter(records["key"]).values() if count > 1)
    if repeated:
        notes.append(f"{repeated:,} documents repeat another's text")
    everything = LabelledSet(flat, begin, length, numbers, records["name"])
    # seeded order, so that data.limit takes of all labels
    order = np.array([_digest(seed, key) for key in records["key"]]).argsort(kind="stable")
    sets = {name: everything.select(order[stage[order] == name]) for name in STAGES}
    return Labelled(labels, sets, f"{path}", notes)


def load_unlabelled(
    path: str, tokenizer: Tokenizer, *, columns: Mapping[str, str | None], cache_dir: str | Path | None = None
) -> tuple[LabelledSet, list[str | None]]:
    """All documents of `path` in order, for predictions, and the labels that a table gives them."""
    flat, begin, length, records = _tokens(path, tokenizer, columns, cache_dir, labelled=False)
    if not records["name"]:
        raise UserError(f"data.path={path} has no documents")
    unknown = np.full(len(records["name"]), -1, dtype=np.int64)
    return LabelledSet(flat, begin, length, unknown, records["name"]), records["label"]


def split_documents(keys: Sequence[str], labels: Sequence[str], ratio: Sequence[float], seed: int) -> np.ndarray:
    """ "train", "val" or "test" for each document: within each label the documents are put into a seeded order, the
    first part is for the test, the next for validation. Documents of equal text (key) go together, those of several
    labels with the ones of the first of these.

    Every label has a document in each part of ratio above 0. Raises UserError for a label with too few.
    """
    stage = np.full(len(keys), "train", dtype="<U5")
    share = np.array([ratio[2], ratio[1]]) / sum(ratio)
    needed = 1 + int((share > 0).sum())
    by_label: dict[str, dict[str, list[int]]] = {label: {} for label in labels}
    first: dict[str, str] = {}
    for key, label in zip(keys, labels, strict=True):
        first[key] = min(first.get(key, label), label)
    for number, key in enumerate(keys):
        by_label[first[key]].setdefault(key, []).append(number)
    for label, groups in by_label.items():
        if len(groups) < needed:
            raise UserError(
                f"the label {label!r} has {len(groups)} different document(s) of its own; a split into {needed} parts "
                f"needs {needed}: give more, or splits of your own (folders or a split column), or data.split_ratio"
            )
        order = sorted(groups, key=lambda key: _digest(seed, key))
        test, val = (max(1, round(part * len(order))) if part > 0 else 0 for part in share)
        # a training document is left whatever the rounding
        val = min(val, len(order) - test - 1)
        for name, chosen in (("test", order[:test]), ("val", order[test : test + val])):
            for key in chosen:
                stage[groups[key]] = name
    return stage


def _labels_of(records: Mapping[str, Any], stage: np.ndarray) -> set[str]:
    return {records["label"][i] for i in np.flatnonzero(stage == "train")}


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in their order, before words."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label


def _digest(seed: int, key: str) -> str:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).hexdigest()


def _tokens(
    path: str,
    tokenizer: Tokenizer,
    columns: Mapping[str, str | None],
    cache_dir: str | Path | None,
    *,
    labelled: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """The tokens of all documents (memory-mapped), where each begins and how long it is, and their records."""
    parts = find_parts(path, labelled=labelled)
    files = [file for _, part in parts for file in part_files(part)]
    options = {
        "tokenizer": tokenizer.key,
        "columns": dict(columns),
        "labelled": labelled,
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "format": _FORMAT,
    }

    def build(folder: Path) -> None:
        records: dict[str, list[Any]] = {"name": [], "label": [], "split": [], "key": []}
        ends = [0]
        kind = (
            np.uint8 if tokenizer.vocab_size <= 1 << 8 else np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        )
        with (folder / "tokens.bin").open("wb") as out:
            for split, part in parts:
                for example in read_part(split, part, columns, labelled=labelled):
                    content = _content(example)
                    tokens = np.asarray(tokenizer.encode(content), dtype=kind)
                    out.write(tokens.tobytes())
                    ends.append(ends[-1] + len(tokens))
                    records["name"].append(example.name)
                    records["label"].append(example.label)
                    records["split"].append(example.split)
                    records["key"].append(hashlib.blake2b(content, digest_size=16).hexdigest())
        np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
        # surrogates: what the shell or the disk could not decode
        text = json.dumps({"kind": np.dtype(kind).name, **records})
        (folder / "records.json").write_text(text, encoding="utf-8")

    # a table that names files changes with them: it is read each time into a folder of its own state
    if any(part.is_file() for _, part in parts):
        options["named"] = _named_files(parts, columns, labelled)
    folder = cached_folder(Path(path), options, cache_dir, build, kind="documents")
    records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    ends = np.load(folder / "ends.npy", allow_pickle=False)
    size = int(ends[-1])
    kind = np.dtype(records.pop("kind"))
    flat = np.memmap(folder / "tokens.bin", dtype=kind, mode="r", shape=(size,)) if size else np.zeros(0, kind)
    return flat, ends[:-1, None], np.diff(ends)[:, None], records


def _named_files(parts: Sequence[tuple[str, Path]], columns: Mapping[str, str | None], labelled: bool) -> list[Any]:
    """The state of the files that tables name; nothing for tables of texts."""
    found = []
    for split, part in parts:
        for example in read_part(split, part, columns, labelled=labelled):
            if isinstance(example.content, bytes):
                break  # a column of texts
            state = example.content.stat()
            found.append([str(example.content), state.st_size, state.st_mtime_ns])
    return found


def _content(example: Example) -> bytes:
    if isinstance(example.content, bytes):
        return example.content
    try:
        content = example.content.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {example.content}: {error.strerror}") from None
    if not content:
        raise UserError(f"{example.content} is empty; remove it, or give it a text")
    return content
