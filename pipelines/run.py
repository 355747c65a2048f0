"""One run: build data and module from the composed config, drive the Trainer, leave everything in the run folder."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from .checkpoints import AtomicCheckpointIO, SafeModelCheckpoint, load_checkpoint
from .context_parallel import check_context_parallel, is_context_parallel
from .errors import UserError, user_errors
from .failures.explain import explained
from .history import Continued, MetricsLog
from .instantiate import safe_instantiate
from .last_checkpoint import LastCheckpoint
from .loading import set_worker_timeout
from .progress import progress_callback
from .reports import export, report_fit, report_validation
from .results import write_metrics
from .saved import saved_checkpoint, saved_model_section
from .sharding import ShardedStrategy, create_strategy, whole_state
from .validate import task_package, trains, validate_names


def execute(command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Run `command` (fit, validate, test or predict) and return its metrics as plain numbers.

    cfg: the composed config as plain containers. Raises UserError, before anything is trained, for what is wrong in it.
    """
    if command != "fit" and (cfg.get("model") or {}).get("pretrained") and not cfg.get("ckpt_path"):
        cfg = {**cfg, "model": saved_model_section(cfg["model"]["pretrained"])}
    validate_names(cfg)
    name = cfg["task"]["name"]
    if command != "predict" and not trains(name):
        raise UserError(f"{command}: the task {name!r} trains nothing, it only looks: lightning predict ...")
    _quieten()
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with _one_voice(), explained(cfg, run_dir):
        return _execute(command, name, cfg, run_dir)


def _execute(command: str, name: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    task = task_package(name)
    with user_errors():
        set_worker_timeout(cfg.get("worker_timeout"))
    L.seed_everything(cfg["seed"], workers=True, verbose=False)
    if not trains(name):
        first = _first()  # of processes that torchrun or srun started; one looks for all
        metrics, trainer = task.predict(None, None, cfg, run_dir) if first else {}, None
    elif command == "fit":
        metrics, trainer = _fit(task, cfg, run_dir)
    else:
        metrics, trainer = _evaluate(task, command, cfg, run_dir), None
    if metrics and _first():
        metrics["objective"] = metrics.get("val/loss", metrics.get("test/mse"))
        write_metrics(run_dir, metrics)
    if trainer is not None:
        _refuse_silence(trainer)
    return metrics


def _first() -> bool:
    """Whether this process is the first of those that run together."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _one_voice() -> contextlib.AbstractContextManager[Any]:
    """What every process would print comes from the first one."""
    return contextlib.nullcontext() if _first() else contextlib.redirect_stdout(io.StringIO())


def _refuse_silence(trainer: L.Trainer) -> None:
    """After everything that can be saved is saved: say so when the newest state of the training is not."""
    failures = [c.failure for c in trainer.checkpoint_callbacks if isinstance(c, SafeModelCheckpoint) and c.failure]
    if failures:
        raise RuntimeError(
            f"training ended and its report is written, but the newest checkpoint is not: {failures[-1]}"
        )


def _quieten() -> None:
    """Lightning's advertisements and hints about its own internals are not results of the run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is summed over processes before
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")


def _fit(task: Any, cfg: dict[str, Any], run_dir: Path) -> tuple[dict[str, Any], L.Trainer]:
    resume = find_checkpoint(cfg["ckpt_path"], cfg, run_dir) if cfg.get("ckpt_path") else None
    shared = is_context_parallel(cfg)
    if shared and not getattr(task, "SHARES_SEQUENCES", False):
        raise UserError(
            f"trainer=context_parallel trains task=text alone, not {cfg['task']['name']!r}: use trainer=ddp or "
            "trainer=fsdp"
        )
    with user_errors():
        data = task.build_data(cfg)
        data.setup("fit")
        module = task.build_module(cfg, data)
        if shared:
            check_context_parallel(module.net, cfg["trainer"])
        continued = None
        if resume is not None:
            saved = load_checkpoint(resume)
            task.check_resume(saved, module, resume)
            continued = Continued.of(resume, saved)
            del saved
        trainer = build_trainer(cfg, run_dir, fitting=True, continued=continued)
    if trainer.is_global_zero:
        write_metrics(run_dir, environment(), name="environment")
        parameters = sum(p.numel() for p in module.net.parameters())
        print(f"{cfg['model']['name']}: {parameters:,} parameters; run folder {run_dir}", flush=True)
    if cfg["trainer"].get("compile"):
        module.net.compile()
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    # of a training that had ended there are none
    metrics = {} if continued is None else dict(continued.metrics)
    metrics |= {k: float(v) for k, v in trainer.callback_metrics.items()}
    if trainer.interrupted:
        raise KeyboardInterrupt
    best = _best_path(trainer)
    if isinstance(trainer.strategy, ShardedStrategy):
        whole = {"state_dict": whole_state(module), "hyper_parameters": dict(module.hparams)}
        module = task.load_module(whole, run_dir, cfg)
    if best is not None:
        weights = load_checkpoint(Path(best))["state_dict"]
        module.load_state_dict(weights)
    module.eval()  # reports run it outside of the trainer's loops: no dropout there
    if trainer.is_global_zero:
        export(module, run_dir)
        metrics.update(report_fit(trainer, module, run_dir))
    if cfg.get("test_after_fit") and not cfg["trainer"].get("fast_dev_run"):
        task.prepare_test(module, data)
        trainer.test(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            metrics.update(task.report(trainer, module, data, run_dir, cfg))
    return metrics, trainer


def _best_path(trainer: L.Trainer) -> str | None:
    """The best checkpoint, None when none was written (fast_dev_run, or a run shorter than one validation)."""
    callback = trainer.checkpoint_callback
    path = getattr(callback, "best_model_path", "")
    return path if path and Path(path).exists() else None


def _evaluate(task: Any, command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    path, checkpoint = _trained(command, cfg, run_dir)
    module = task.load_module(checkpoint, path, cfg).eval()
    trainer = build_trainer(cfg, run_dir, fitting=False)
    if command == "predict" and not (trainer.is_global_zero or getattr(task, "SHARES_PREDICTIONS", False)):
        return {}  # torchrun or srun started this process; the first one predicts for all
    if command == "predict":
        return task.predict(trainer, module, cfg, run_dir)
    data = task.build_data(cfg)
    data.setup("fit" if command == "validate" else "test")
    task.check_schema(module, data, path)
    if command == "validate":
        trainer.validate(module, datamodule=data, verbose=False)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            report_validation(metrics)
        return metrics
    task.prepare_test(module, data)
    trainer.test(module, datamodule=data, verbose=False)
    return task.report(trainer, module, data, run_dir, cfg) if trainer.is_global_zero else {}


def _trained(command: str, cfg: dict[str, Any], run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """What a command that trains nothing reads: a checkpoint, or the saved model of `model.pretrained`."""
    pretrained = (cfg.get("model") or {}).get("pretrained")
    if pretrained and not cfg.get("ckpt_path"):
        return Path(pretrained), saved_checkpoint(pretrained, cfg["task"])
    path = _checkpoint_of(command, cfg, run_dir)
    return path, load_checkpoint(path)


def _checkpoint_of(command: str, cfg: dict[str, Any], run_dir: Path) -> Path:
    """The checkpoint of a command that trains nothing. Where none is given `predict` takes the best one of the newest
    run of its name, and says so."""
    if cfg.get("ckpt_path"):
        return find_checkpoint(cfg["ckpt_path"], cfg, run_dir)
    choices = (
        "give ckpt_path=<file>, ckpt_path=last or best for the newest run, or a saved model, model.pretrained=NAME"
    )
    if command != "predict":
        raise UserError(f"{command} needs a checkpoint: {choices}")
    try:
        path = find_checkpoint("best", cfg, run_dir)
    except UserError:
        runs = cfg["paths"]["runs"]
        raise UserError(
            f"predict needs a checkpoint, and there is no run named {cfg['name']!r} under {runs}: fit one, or {choices}"
        ) from None
    print(f"checkpoint: {path}, the best of the newest run named {cfg['name']!r}", flush=True)
    return path


def find_checkpoint(choice: str, cfg: dict[str, Any], run_dir: Path) -> Path:
    """A checkpoint file from a path, or from "last" / "best": that of the newest run of the same name.

    Raises UserError naming what was looked for and, for a path, the nearest files.
    """
    if choice not in ("last", "best"):
        path = Path(choice).expanduser()
        if path.is_dir():
            path = path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            near = sorted(str(p) for p in path.parent.glob("*.ckpt"))[:3] if path.parent.is_dir() else []
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise UserError(f"no checkpoint at {path}.{hint}")
        return path
    runs = Path(cfg["paths"]["runs"])
    pattern = "last.ckpt" if choice == "last" else "best*.ckpt"
    found = [
        p
        for p in runs.glob(f"**/checkpoints/{pattern}")
        if run_dir.resolve() not in p.resolve().parents and _run_name(p.parent.parent) == cfg["name"]
    ]
    if not found:
        raise UserError(f"ckpt_path={choice}: no finished or interrupted run named {cfg['name']!r} under {runs}")
    return max(found, key=lambda p: p.stat().st_mtime)


def _run_name(folder: Path) -> str | None:
    import yaml

    path = folder / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):  # none, or not ours: not the run that is looked for
        return None
    return saved.get("name") if isinstance(saved, dict) else None


def build_trainer(
    cfg: dict[str, Any], run_dir: Path, *, fitting: bool, continued: Continued | None = None
) -> L.Trainer:
    """The Trainer of a run: every path it writes to lies in `run_dir`. continued: the run that it goes on with."""
    options = dict(cfg["trainer"])
    options.pop("compile", None)
    options["strategy"] = create_strategy(options.get("strategy", "auto"))
    return L.Trainer(
        **options,
        default_root_dir=str(run_dir),
        callbacks=_callbacks(cfg, run_dir, fitting=fitting),
        logger=_loggers(cfg, run_dir, continued) if fitting else False,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=cfg["callbacks"].get("progress", "auto") != "none",  # ours is among the callbacks
        enable_model_summary=False,
        enable_checkpointing=fitting and bool(cfg["callbacks"].get("checkpoint")),
    )


def _callbacks(cfg: dict[str, Any], run_dir: Path, *, fitting: bool) -> list[Callback]:
    options = cfg["callbacks"]
    callbacks: list[Callback] = []
    if fitting and options.get("checkpoint"):
        checkpoint = dict(options["checkpoint"])
        every = checkpoint.pop("every_n_train_steps", None)
        # "best" follows the validation metric; "last" is its own callback so that it can be written more often
        callbacks.append(
            SafeModelCheckpoint(
                dirpath=run_dir / "checkpoints",
                # one best file under one name; with several, the metric's epoch tells them apart
                filename="best" if checkpoint.get("save_top_k", 1) == 1 else "best-{epoch}-{step}",
                enable_version_counter=False,
                monitor=checkpoint["monitor"],
                mode=checkpoint.get("mode", "min"),
                save_top_k=checkpoint.get("save_top_k", 1),
                save_on_train_epoch_end=False,
            )
        )
        if checkpoint.get("save_last", True):
            callbacks.append(LastCheckpoint(run_dir / "checkpoints", every_n_train_steps=every))
    if fitting and options.get("early_stopping"):
        stopping = {"monitor": "val/loss", "mode": "min", **options["early_stopping"]}
        callbacks.append(EarlyStopping(**stopping, check_on_train_epoch_end=False))
    if fitting and (cfg["logger"].get("csv") or cfg["logger"].get("tensorboard")):
        callbacks.append(LearningRateMonitor())
    bar = progress_callback(options.get("progress", "auto"))
    if bar is not None:
        callbacks.append(bar)
    for node in (options.get("extra") or {}).values():
        callbacks.append(safe_instantiate(node, expected=Callback))
    return callbacks


def _loggers(cfg: dict[str, Any], run_dir: Path, continued: Continued | None) -> list[Logger]:
    options = cfg["logger"]
    loggers: list[Logger] = []
    if options.get("csv", True):
        loggers.append(MetricsLog(run_dir, continued))
    wanted = options.get("tensorboard", "auto")
    if wanted:
        if importlib.util.find_spec("tensorboard") is not None:
            step = None if continued is None else continued.step
            loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=step))
        elif wanted != "auto":
            raise UserError("logger.tensorboard=true, but tensorboard is not installed: pip install tensorboard")
    for node in (options.get("extra") or {}).values():
        loggers.append(safe_instantiate(node, expected=Logger))
    return loggers


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions, platform, and the commit of the working folder."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for name in ("seqzoo", "torch", "lightning", "hydra-core", "numpy", "pandas", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        commit = found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "git_commit": commit,
        "versions": versions,
    }
