"""What the command does for documents: build, check, report and classify."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints import saved_parameters
from ..errors import UserError
from ..instantiate import mixer_class
from ..results import print_table, write_csv, write_metrics
from .data import DocumentData
from .module import DocumentModule
from .scores import baselines

Data = DocumentData


def build_data(cfg: dict[str, Any]) -> DocumentData:
    """The data module of a config."""
    data = DocumentData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: DocumentData) -> DocumentModule:
    """The module of a config, for the labels and tokens of the data; says what the data have."""
    model, schema = dict(cfg["model"]), data.schema()
    module = DocumentModule(
        model, cfg["task"], cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    sizes = ", ".join(f"{len(documents):,} {name}" for name, documents in data.sets.items())
    print(f"{schema['title']}: {sizes} documents in {len(data.labels)} classes", *data.notes, sep="\n", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> DocumentModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of documents."""
    saved = saved_parameters(checkpoint, "documents", path)
    module = DocumentModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: DocumentModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    saved, own = checkpoint.get("hyper_parameters", {}), dict(module.hparams)
    for key in ("model", "task", "schema"):
        there, here = saved.get(key, {}), own[key]
        changed = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        if changed:
            section = "data" if key == "schema" else key
            detail = ", ".join(f"{section}.{k}={here.get(k)!r} here, {there.get(k)!r} there" for k in changed)
            raise UserError(f"{path} is of another run, it cannot be resumed: {detail}")


def check_schema(module: DocumentModule, data: DocumentData, path: Path) -> None:
    """Number the labels as the checkpoint does. Raises UserError when it was trained on another kind of data."""
    own = data.schema()
    for key, name in (("tokenizer_key", "tokenizer"), ("towers", "source")):
        if module.schema[key] != own[key]:
            raise UserError(f"{path} was trained with data.{name}={module.schema[name]!r}, here it is {own[name]!r}")
    if module.longest is not None and own["longest"] > module.longest:
        raise UserError(
            f"{path} has {module.longest} learned positions, but a document has {own['longest']} tokens: "
            f"data.max_len={module.longest} cuts it"
        )
    data.use_labels(module.schema["labels"])


def prepare_test(module: DocumentModule, data: DocumentData) -> None:
    """Nothing to choose."""


def report(
    trainer: Any, module: DocumentModule, data: DocumentData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write accuracy beside the majority label and chance, and the confusion matrix."""
    from ..pictures import plot_confusion

    found = module.test_sums.compute()
    labels = module.schema["labels"]
    train, test = module.schema["train_counts"], data.sets["test"].counts(len(labels))
    name = module.hparams["model"]["name"]
    columns = ("accuracy", "macro_f1", "loss")
    rows = [{"method": f"{name}, {mixer_name(module.hparams['model'])}", **{key: found[key] for key in columns}}]
    rows += baselines(np.array(train), test, labels)
    print_table(rows, title=f"test: {data.schema()['title']}, {found['documents']:,} documents, {len(labels)} classes")
    write_csv(run_dir / "test.csv", rows)
    confusion = [
        {"label": label, **dict(zip(labels, line, strict=True))}
        for label, line in zip(labels, found["confusion"], strict=True)
    ]
    write_csv(run_dir / "confusion.csv", confusion)
    plot_confusion(
        np.array(found["confusion"]),
        labels,
        run_dir / "confusion.png",
        title=f"{data.schema()['title']}: {found['accuracy']:.1%} right, majority {rows[1]['accuracy']:.1%}",
    )
    scores = {key: found[key] for key in (*columns, "documents")}
    record = {
        "title": data.schema()["title"],
        "test": scores,
        "majority": rows[1]["accuracy"],
        "chance": rows[2]["accuracy"],
        "train_documents": sum(train),
        "parameters": sum(p.numel() for p in module.net.parameters()),
    }
    write_metrics(run_dir, record, "scores")
    print(f"tables and pictures in {run_dir}", flush=True)
    values = {f"test/{key}": value for key, value in scores.items()}
    return {**values, "test/majority": rows[1]["accuracy"], "test/chance": rows[2]["accuracy"]}


def mixer_name(model: dict[str, Any]) -> str:
    """What mixes, as a word: "s4d", or "mamba2 + softmax" for a hybrid."""
    mixer = model.get("mixer", "softmax")
    parts = mixer if isinstance(mixer, (list, tuple)) else [mixer]
    names = [part if isinstance(part, str) else str(part.get("name", part.get("_target_"))) for part in parts]
    return " + ".join(dict.fromkeys(names))


def predict(trainer: Any, module: DocumentModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Label the documents of `data.path`, into predictions.csv."""
    from .predict import check_output, classify

    output = check_output(cfg.get("output") or run_dir / "predictions.csv")
    rows = classify(trainer, module, build_data(cfg))
    write_csv(output, rows)
    counts = Counter(row["label"] for row in rows)
    print_table([{"label": label, "documents": counts[label]} for label in module.schema["labels"]], title="predicted")
    print(f"{len(rows):,} document(s) in {output}", flush=True)
    known = [row for row in rows if row.get("given") is not None]
    found: dict[str, Any] = {"documents": len(rows)}
    if known:
        found["accuracy"] = sum(row["label"] == row["given"] for row in known) / len(known)
        print(f"{found['accuracy']:.1%} of the {len(known):,} labels that the documents have", flush=True)
    return found
