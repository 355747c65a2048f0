"""The one LightningModule base: parameter groups, schedules, gradient health."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn

from ..blocks.parameters import parameter_groups
from ..blocks.registry import did_you_mean
from ..zoo._layers import check_layer_decay, layer_scales
from .errors import UserError
from .failures.nonfinite import explain_loss, is_finite
from .loading import ResumableLoader
from .muon import create_muon
from .ranks import RankedModule
from .resume import RUN_STATE, load_run_state, save_run_state

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
_OURS = ("params", "module", "fused", "scales")  # arguments of optimizers that no config gives
SCHEDULERS = ("none", "cosine", "wsd", "informer")


def create_optimizer(module: nn.Module, options: dict[str, Any], *, fused: bool = True) -> torch.optim.Optimizer:
    """adam, adamw, muon or sgd over `parameter_groups(module)`; options: name, lr, weight_decay, betas or momentum.

    layer_decay, among the options: the rate of each layer over that of the next one, see `layer_scales`; None: all
    layers have the same. Raises UserError for one that is not in (0, 1], for a model without layers, and for options
    that the optimizer does not have.
    fused: one pass over the parameters instead of a dozen, the same numbers up to rounding; False under a gradient
    scaler, whose gradients could not be clipped.
    """
    options = dict(options)
    name, layer_decay = options.pop("name"), options.pop("layer_decay", None)
    scales = None
    if layer_decay is not None:
        with _option_errors():
            scales = layer_scales(module, layer_decay)
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "muon": create_muon,
        "sgd": torch.optim.SGD,
    }
    if name not in classes:
        raise UserError(f"unknown optimizer {name!r}.{did_you_mean(name, OPTIMIZERS)}")
    known = [key for key in inspect.signature(classes[name]).parameters if key not in _OURS]
    for option in options:
        if option not in known:
            raise UserError(
                f"optimizer {name!r} has no option {option!r}, which may be of the experiment's own optimizer: "
                f"~optimizer.{option} takes it out.{did_you_mean(option, known)}"
            )
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if name == "muon":
        return create_muon(module, **options, fused=fused, scales=scales)
    groups = parameter_groups(
        module, lr=options.pop("lr"), weight_decay=options.pop("weight_decay", 0.0), scales=scales
    )
    return classes[name](groups, fused=fused, **options)


@contextmanager
def _option_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"optimizer.{error}") from error


def schedule(options: dict[str, Any], total_steps: int) -> tuple[str, Callable[[int], float]] | None:
    """("step" or "epoch", factor of the base rate), or None for a constant rate.

    cosine: linear warm-up over `warmup_fraction`, then half a cosine to `min_ratio`. wsd: warm-up, constant, linear
    decay over the last `decay_fraction`. informer: epochs 1 and 2 at the full rate, then halved each epoch.
    """
    name = options.get("name", "none")
    if name == "none":
        return None
    if name == "informer":
        return "epoch", lambda epoch: 1.0 if epoch < 2 else 0.5 ** (epoch - 1)
    if name not in SCHEDULERS:
        raise UserError(f"unknown scheduler {name!r}.{did_you_mean(name, SCHEDULERS)}")
    warmup = int(options.get("warmup_fraction", 0.0) * total_steps)
    floor = options.get("min_ratio", 0.0)
    decay = int(options.get("decay_fraction", 0.2) * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if name == "cosine":
            done = (step - warmup) / max(total_steps - warmup, 1)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        left = total_steps - step
        return 1.0 if left >= decay else floor + (1 - floor) * max(left, 0) / max(decay, 1)

    return "step", factor


def _clip_by_norm(parameters: list[torch.Tensor], most: float) -> None:
    """`clip_grad_norm_`, but for gradients whose norm is not finite, which it would spoil altogether."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, most, torch.where(torch.isfinite(norm), norm, 0.0))


class TrainingModule(RankedModule):
    """Base of the tasks' modules. A subclass builds `self.net`, keeps its data's `schema` and defines the steps.

    schema: what the model needs to know of its data, plain values; exported beside it. loss_name: of the loss curves.

    hparams are plain containers only, so that checkpoints load with `weights_only=True`.
    """

    net: nn.Module
    schema: dict[str, Any]
    loss_name = "loss"

    def __init__(self, *, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
        super().__init__()
        self.optimizer_options = dict(optimizer)
        if self.optimizer_options.get("layer_decay") is not None:
            with _option_errors():
                check_layer_decay(self.optimizer_options["layer_decay"])
        self.scheduler_options = dict(scheduler)
        self._saved: dict[str, Any] = {}
        self._ranks: dict[str, Any] | None = None
        self._position: dict[str, int] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What Lightning keeps not (see `resume`). It keeps the loader's position, but forgets it when a schedule has
        asked for the number of steps before it was restored."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            checkpoint["data_position"] = loader.state_dict()
        save_run_state(self.trainer, checkpoint)
        self.save_ranks(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = {key: checkpoint[key] for key in RUN_STATE if key in checkpoint}
        self._position, self._ranks = checkpoint.get("data_position"), checkpoint.get("ranks")

    def on_train_start(self) -> None:
        loader = self.trainer.train_dataloader
        if self._position is not None and isinstance(loader, ResumableLoader):
            loader.load_state_dict(self._position)
        self._position = None
        if self._saved:  # not at loading: what is built in between draws numbers too
            load_run_state(self.trainer, self._saved)
            self._saved = {}
        self.start_ranks(self._ranks)
        self._ranks = None

    def configure_optimizers(self) -> Any:
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        # torch's fused SGD takes no weights of which a process holds a part
        fused = not scaled and not getattr(self.trainer.strategy, "sharded", False)
        optimizer = create_optimizer(self.net, self.optimizer_options, fused=fused)
        total = self.trainer.estimated_stepping_batches
        rule = schedule(self.scheduler_options, int(total) if math.isfinite(total) else 0)
        if rule is None:
            return optimizer
        interval, factor = rule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    def log_auxiliary(self, aux: dict[str, torch.Tensor], batch_size: int) -> None:
        """The auxiliary losses of a training batch by name, as they enter the loss; tables show the epoch's mean."""
        for name, value in aux.items():
            self.log(f"train/{name}", value.detach(), on_step=False, on_epoch=True, batch_size=batch_size)

    def on_train_epoch_end(self) -> None:
        """What parts of the model say of their training (`training_metrics`, a codebook's use), the mean by name."""
        found: dict[str, list[torch.Tensor]] = {}
        for part in self.net.modules():
            for name, value in getattr(part, "training_metrics", dict)().items():
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            self.log(f"train/{name}", torch.stack(values).mean())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Lightning refuses to clip for fused optimizers in mixed precision, because a gradient scaler would unscale
        inside them; bf16 has no scaler. Gradients without a finite norm stay as they are: which are not finite can be
        told then."""
        plugin = self.trainer.precision_plugin
        by_norm = GradClipAlgorithmType(gradient_clip_algorithm or "norm") == GradClipAlgorithmType.NORM
        if gradient_clip_val and by_norm and self.trainer.world_size == 1 and getattr(plugin, "scaler", None) is None:
            _clip_by_norm(list(plugin.main_params(optimizer)), float(gradient_clip_val))
            return
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def check_loss(self, loss: torch.Tensor, batch_index: int) -> torch.Tensor:
        """Stop with the first module, and what of it or of the batch, when the loss is not finite. Of several processes
        each must call this in every step: all of them stop where the loss of one is not."""
        if not is_finite(loss):
            raise explain_loss(self, loss, batch_index)
        return loss
