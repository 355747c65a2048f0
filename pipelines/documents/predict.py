"""Labels of new documents from a trained model."""

from __future__ import annotations

from typing import Any

from ..classification import answered
from ..errors import UserError
from ..ranks import predicted
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
    found = predicted(trainer, module, data.evaluation(documents))
    names = [documents.name(row) for row in range(len(documents))]
    return answered(found, names, given, schema["labels"], item="document")


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
