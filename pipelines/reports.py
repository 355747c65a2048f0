"""What every fit leaves behind, whatever its task: the exported model and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..zoo import save_model
from .results import print_table
from .saved import module_preprocessing
from .training import TrainingModule


def export(module: TrainingModule, run_dir: Path) -> None:
    """Write the model as a folder that `seqzoo.load_model` reads; it can only name mixers of the registry. The file of
    a tokenizer goes with it: the loaded model has it in `files`."""
    schema, files = dict(module.schema), {}
    tokenizer = schema.get("tokenizer")
    if isinstance(tokenizer, str) and tokenizer != "bytes" and Path(tokenizer).expanduser().is_file():
        schema["tokenizer"] = "tokenizer.json"
        files["tokenizer.json"] = Path(tokenizer).expanduser()
    try:
        preprocessing = module_preprocessing(schema, module.hparams["task"], module)
        save_model(module.net, run_dir / "model", preprocessing=preprocessing, files=files)
    except ValueError as error:
        print(f"model not exported: {error}", flush=True)


def report_fit(trainer: Any, module: TrainingModule, run_dir: Path) -> dict[str, Any]:
    """Loss curves in the run folder; epochs and steps as figures."""
    from .pictures import plot_loss_curves

    log = run_dir / "logs" / "metrics.csv"
    if log.is_file():
        plot_loss_curves(log, run_dir / "loss.png", loss=module.loss_name)
    return {"epochs": trainer.current_epoch, "steps": trainer.global_step}


def report_validation(metrics: dict[str, Any]) -> None:
    """Print the scores of `lightning validate`."""
    print_table([{"metric": k, "value": v} for k, v in metrics.items()], title="validation")
