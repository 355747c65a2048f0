"""What the command does for documents: build, check, report and classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import check_same_run, saved_parameters
from ..classification import check_output, report_classes, report_labels
from ..errors import UserError
from ..nets import mixer_class, mixer_name
from .data import DocumentData
from .module import DocumentModule

Data = DocumentData
# Every process answers for its part; the first one writes the answers of all.
SHARES_PREDICTIONS = True


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
    check_same_run(checkpoint, module.hparams, path)


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
    model = module.hparams["model"]
    return report_classes(
        module,
        data.sets["test"].counts(len(module.schema["labels"])),
        f"{model['name']}, {mixer_name(model)}",
        data.schema()["title"],
        run_dir,
        items="documents",
    )


def predict(trainer: Any, module: DocumentModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Label the documents of `data.path`, into predictions.csv."""
    from .predict import classify

    output = check_output(cfg.get("output") or run_dir / "predictions.csv")
    rows = classify(trainer, module, build_data(cfg))
    if not trainer.is_global_zero:
        return {}
    return report_labels(rows, module.schema["labels"], output, items="documents")
