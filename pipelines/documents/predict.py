"""Labels of new documents from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..text.tokenizer import saved_tokenizer
from .data import DocumentData
from .labelled import LABELLED, load_unlabelled
from .module import DocumentModule
from .sets import LabelledSet


def classify(trainer: Any, module: DocumentModule, data: DocumentData) -> list[dict[str, Any]]:
    """One record per document, in their order: document, label, its probability, and the label that the data give.

    data: its `path` names new documents, labelled or not; a task of Long Range Arena gives its test documents.
    """
    schema = module.schema
    documents, given = _documents(data, schema)
    limits = [limit for limit in (schema["max_len"], module.longest) if limit is not None]
    documents, longer, lost = documents.cut(min(limits, default=None))
    if longer:
        print(f"{longer:,} document(s) are cut at {min(limits)} tokens, as in training, {lost:,} tokens", flush=True)
    found = trainer.predict(module, dataloaders=data.evaluation(documents), return_predictions=True)
    numbers = np.concatenate([number.numpy() for number, _ in found])
    chances = np.concatenate([chance.numpy() for _, chance in found])[np.argsort(numbers, kind="stable")]
    labels, known = schema["labels"], any(label is not None for label in given)
    rows = []
    for row, (chance, label) in enumerate(zip(chances, given, strict=True)):
        best = int(chance.argmax())
        record = {"document": documents.name(row), "label": labels[best], "probability": float(chance[best])}
        rows.append({**record, "given": label} if known else record)
    return rows


def _documents(data: DocumentData, schema: dict[str, Any]) -> tuple[LabelledSet, list[str | None]]:
    if (data.source == LABELLED) != (schema["source"] == LABELLED):
        raise UserError(f"the model was trained with data.source={schema['source']}, here it is {data.source}")
    if data.source != LABELLED:
        data.setup("test")
        documents = data.sets["test"]
        return documents, [data.labels[label] for label in documents.labels]
    if data.path is None:
        raise UserError("data.path is missing: a folder of documents, or a CSV or JSONL table of texts")
    tokenizer = saved_tokenizer(schema)
    return load_unlabelled(data.path, tokenizer, columns=data.columns, cache_dir=data.cache_dir)


def check_output(path: str | Path) -> Path:
    """The path, or UserError before any work is done if no table could be written there."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() != ".csv":
        raise UserError(f"cannot write predictions to {path}: give the name of a .csv file")
    return path
