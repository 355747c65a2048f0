"""Documents as rows: files of a folder or texts of a table, in windows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ...blocks.layers.positions import LearnedPosition
from ..audio.sources import KIND as SOUND
from ..documents.data import DocumentData
from ..documents.readers import Example, find_parts, part_files, read_part
from ..errors import UserError
from ..text.data import TextData
from ..text.tokenizer import ByteTokenizer, saved_tokenizer
from ..video.sources import KIND as VIDEO
from .reading import Rows, check_window, data_options, groups, windows
from .trained import Trained


class _Window(NamedTuple):
    name: str
    label: str | None
    start: int
    tokens: np.ndarray


class TextReader:
    """Texts for a language model, or documents for a classifier of documents, one after another; of a long one a window
    is in memory where tokens are bytes.

    Start and end count tokens. A classifier of pairs reads each document by itself. Raises UserError for files that are
    no texts, and for a model that was saved without its tokenizer.
    """

    def __init__(self, trained: Trained, cfg: dict[str, Any]) -> None:
        net: Any = trained.net
        documents = trained.task == "documents"
        data = data_options(cfg, trained, DocumentData if documents else TextData)
        if data.get("path") is None:
            raise UserError("data.path is missing: a text file, a folder of them, or a CSV or JSONL table of texts")
        schema = trained.schema
        if schema.get("tokenizer") is None or schema.get("source", "labelled") != "labelled":
            raise UserError(
                f"{trained.source} has no tokenizer for files of your own: it reads {schema.get('source', 'tokens')!r}"
            )
        self.tokenizer = saved_tokenizer(schema)
        window, self.stride = check_window(cfg["task"], whole=True, what="tokens")
        positions = [part.max_len for part in net.modules() if isinstance(part, LearnedPosition)]
        limit = min(positions, default=None)
        if window is not None and limit is not None and window > limit:
            raise UserError(f"task.window={window}: {trained.model} has {limit} learned positions")
        trained_on = [n for n in (schema.get("seq_len"), schema.get("max_len"), limit) if n is not None]
        self.window = window or min(trained_on, default=None)
        self.pairs = getattr(net, "towers", 1) == 2
        names = {key: data.get(f"{key}_column") for key in ("text", "file", "label")}
        if data.get("field", "text") != "text":
            names["text"] = data["field"]
        self.names = {**names, "split": None}
        self.parts = find_parts(str(data["path"]), labelled=False)
        self.columns = {"name": pa.string(), "label": pa.string(), "start": pa.int64(), "end": pa.int64()}
        self.time, self.unit = pa.int64(), "tokens"
        self.failed: list[str] = []
        # what is wrong with the files is said before anything is computed
        for file in (file for _, part in self.parts for file in part_files(part)):
            if file.suffix.lower() in {*SOUND.suffixes, *VIDEO.suffixes}:
                raise UserError(f"{file} is no text, and {trained.model} reads texts")
        if next(self._examples(), None) is None:
            raise UserError(f"data.path={data['path']} has no documents")

    def _examples(self) -> Iterator[Example]:
        for split, part in self.parts:
            yield from read_part(split, part, self.names, labelled=False)

    def _windows(self) -> Iterator[_Window]:
        for example in self._examples():
            content = example.content
            if isinstance(content, Path) and isinstance(self.tokenizer, ByteTokenizer):
                size = content.stat().st_size
                stored = np.memmap(content, np.uint8, "r") if size else np.zeros(0, np.uint8)
            else:
                text = content.read_bytes() if isinstance(content, Path) else content
                stored = np.asarray(self.tokenizer.encode(text))
            for start, stop in windows(len(stored), self.window, self.stride):
                yield _Window(example.name, example.label, start, stored[start:stop].astype(np.int64))

    def batches(self, size: int) -> Iterator[Rows]:
        for group in groups(self._windows(), size):
            yield self._batch(group)

    def _batch(self, group: list[_Window]) -> Rows:
        ids = [{"name": w.name, "label": w.label, "start": w.start, "end": w.start + len(w.tokens)} for w in group]
        spare = len(group) % 2 if self.pairs else 0
        rows = group + group[-1:] * spare
        lengths = np.array([len(w.tokens) for w in rows])
        tokens: np.ndarray = np.zeros((len(rows), max(int(lengths.max()), 1)), dtype=np.int64)
        for row, w in enumerate(rows):
            tokens[row, : len(w.tokens)] = w.tokens
        args: torch.Tensor = torch.from_numpy(tokens)
        kwargs: dict[str, torch.Tensor] = {}
        if (lengths < tokens.shape[1]).any():
            kwargs["mask"] = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None])
        if self.pairs:
            args, kwargs = args.unflatten(0, (-1, 2)), {k: v.unflatten(0, (-1, 2)) for k, v in kwargs.items()}
        starts = [w.start for w in group]
        return Rows(ids, (args,), kwargs, lambda length: [start + np.arange(length) for start in starts], spare)
