"""What every model of the zoo answers beside `forward`: its features, its head, and how it is trained.

The names are timm's. Features are what the last norm gives before pooling and head; intermediates are what the blocks
give. Both are read with forward hooks on one pass of the model, so a model has nothing to write for them as long as it
holds a `Backbone`. Where a family has no sense of a part of this, it says so in `no_features` or in an override.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone
from ..blocks.layers.norm import normalize
from ..blocks.parameters import parameter_groups
from ._factorised import FactorisedBackbone
from ._layers import parameter_layers


class Call(NamedTuple):
    """One call of a module: what went in and what came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Trunk(NamedTuple):
    """end: the module whose output are the features. blocks: by name, those that give the intermediates. widths: their
    channels. tokens: (a block's output, the call of `end`) -> the layout of the features. norm: the same -> normed;
    None where the last norm fits the last block alone."""

    end: nn.Module
    blocks: dict[str, nn.Module]
    widths: tuple[int, ...]
    tokens: Callable[[Tensor, Call], Tensor] = lambda x, call: x
    norm: Callable[[Tensor, Call], Tensor] | None = None


class FeatureInfo(list[dict[str, Any]]):
    """A row for every intermediate: `module`, its name; `num_chs`, its channels; `reduction`, how many samples, pixels
    (along a side), steps or frames of the input are one token of it. The methods are those of timm's class."""

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self]

    def reduction(self) -> list[int]:
        return [row["reduction"] for row in self]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self]


class ZooModel(nn.Module):
    """Base of the models of the zoo.

    no_features: why a family has no features, None where it has. classifier: the attribute that holds the head. heads:
    prefixes of the parameters that depend on what is predicted and start anew where weights do not fit them. mixers:
    names of the mixers of a family that has no option `mixer`. config, preprocessing: set by `create_model` and
    `load_model`; files: what lies beside the weights of a loaded model, by name.
    """

    no_features: ClassVar[str | None] = None
    classifier: ClassVar[str] = "head"
    heads: ClassVar[tuple[str, ...]] = ("head.",)
    mixers: ClassVar[tuple[str, ...]] = ()
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    files: dict[str, Path]

    def _trunk(self) -> Trunk:
        return find_trunk(self)

    def _run_trunk(self, *args: Any, **kwargs: Any) -> Any:
        """The part of `forward` up to the features; a family whose head is costly overrides it."""
        return self(*args, **kwargs)

    @property
    def feature_reduction(self) -> int:
        """Samples, pixels, steps or frames of the input that are one token."""
        return 1

    @property
    def input_spec(self) -> dict[str, Any]:
        """What the model takes, as plain values: `kind` and its measures. It goes into the record and the card."""
        return {}

    def example_inputs(self, batch_size: int = 1) -> tuple[Any, ...]:
        """Positional arguments of `forward` that this model takes, random but the same every time."""
        raise NotImplementedError(f"{type(self).__name__} defines no example_inputs")

    @property
    def feature_info(self) -> FeatureInfo:
        """One row for every intermediate; empty for a model without features."""
        if self.no_features is not None:
            return FeatureInfo()
        trunk = self._trunk()
        rows = zip(trunk.blocks, trunk.widths, self._reductions(len(trunk.blocks)), strict=True)
        return FeatureInfo({"module": name, "num_chs": width, "reduction": r} for name, width, r in rows)

    def _reductions(self, number: int) -> list[int]:
        return [self.feature_reduction] * number

    def forward_features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The features before pooling and head, of the arguments of `forward`: (B, L, D), zero at pads; (B, D, h, w) of
        a pyramid; one row for each of what the mixers see apart (channels, clips, the documents of a pair). Raises
        ValueError for a model without."""
        trunk = _trunk_of(self)
        return _tensor(_calls(self, [trunk.end], args, kwargs)[0].output)

    def forward_intermediates(
        self,
        *args: Any,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """(features, [what the blocks of `indices` gave]) of the arguments of `forward`.

        indices: numbers of blocks, negative ones from the end; a number takes that many last ones; None takes all.
        norm: apply the last norm to them (in a pyramid to the last alone). intermediates_only: return the list alone.
        Raises ValueError for an index outside the depth and for a model without features.
        """
        trunk = _trunk_of(self)
        blocks = list(trunk.blocks.values())
        places = feature_indices(indices, len(blocks))
        end, *calls = _calls(self, [trunk.end, *(blocks[i] for i in places)], args, kwargs)
        found = []
        for place, call in zip(places, calls, strict=True):
            x = trunk.tokens(_tensor(call.output), end)
            if norm and trunk.norm is not None:
                x = trunk.norm(x, end)
            elif norm and place == len(blocks) - 1:
                x = _tensor(end.output)
            found.append(x)
        return found if intermediates_only else (_tensor(end.output), found)

    @property
    def is_classifier(self) -> bool:
        """Whether the head gives logits of classes, so that `reset_classifier` can change their number."""
        return "num_classes" in inspect.signature(type(self).__init__).parameters

    def get_classifier(self) -> nn.Module:
        """The head. Raises ValueError for a model that is no classifier."""
        _check_classifier(self)
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int) -> None:
        """A new last layer for `num_classes`, started as the family starts it; 0 takes the whole head away, so that the
        output is what it read. `config` remembers it. Raises ValueError for a model that is no classifier."""
        _check_classifier(self)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes={num_classes!r} must be positive, or 0 for features instead of logits")
        head = self.get_submodule(self.classifier)
        if num_classes == 0:
            if not isinstance(head, nn.Identity):
                self.__dict__["_former_head"] = head  # no submodule, so no entry of the state dict
            new: nn.Module = nn.Identity()
        else:
            former = self.__dict__.get("_former_head") if isinstance(head, nn.Identity) else head
            if former is None:
                raise ValueError(f"this {type(self).__name__} was built without a head; build it with num_classes")
            new = self._with_classes(former, num_classes)
        self.set_submodule(self.classifier, new)
        if hasattr(self, "num_classes"):
            self.num_classes = num_classes
        if "options" in getattr(self, "config", {}):
            self.config = {**self.config, "options": {**self.config["options"], "num_classes": num_classes}}

    def _with_classes(self, head: nn.Module, num_classes: int) -> nn.Module:
        """A copy of a head with another last layer."""
        name, last = [(n, part) for n, part in head.named_modules() if isinstance(part, nn.Linear)][-1]
        place = next(self.parameters(), last.weight)
        layer = nn.Linear(last.in_features, num_classes, bias=last.bias is not None).to(place.device, place.dtype)
        self._start_classifier(layer)
        if not name:
            return layer
        new = copy.deepcopy(head).to(place.device)
        new.set_submodule(name, layer)
        return new.train(self.training)

    def _start_classifier(self, layer: nn.Linear) -> None:
        """How the family starts its last layer; torch's way by default."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations. Raises ValueError for a model
        without blocks."""
        parts = [part for part in self.modules() if hasattr(part, "grad_checkpointing")]
        if not parts and enable:
            raise ValueError(f"{type(self).__name__} has no blocks whose activations could be recomputed")
        for part in parts:
            part.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Names of the trainable parameters that take no weight decay, as `parameter_groups` has it."""
        groups = parameter_groups(self, lr=1.0, weight_decay=1.0)
        spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        return {name for name, parameter in self.named_parameters() if id(parameter) in spared}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter by its name, 0 before the blocks and the head's last, as timm's functions take it.
        coarse: part of their signature, without effect."""
        return parameter_layers(self)[0].__getitem__


INTERFACE = (
    *("no_features", "classifier", "heads", "mixers", "feature_reduction", "input_spec", "feature_info"),
    *("_trunk", "_run_trunk", "_reductions", "example_inputs", "forward_features", "forward_intermediates"),
    *("is_classifier", "get_classifier", "reset_classifier", "_with_classes", "_start_classifier"),
    *("set_grad_checkpointing", "no_weight_decay", "group_matcher"),
)


def give_interface(cls: type[nn.Module]) -> None:
    """Give a class that is no `ZooModel` the parts of one that it does not define: what `register_model` does."""
    for name in INTERFACE:
        if not hasattr(cls, name):
            setattr(cls, name, inspect.getattr_static(ZooModel, name))


class FeatureExtractor(nn.Module):
    """A model that returns the list of its intermediates, what `create_model(..., features_only=True)` gives.

    indices: as of `forward_intermediates`. norm: the last norm on them. The head of a classifier is taken away. The
    model is `model`, the rows of the chosen ones are `feature_info`.
    """

    def __init__(self, model: nn.Module, *, indices: int | Sequence[int] | None = None, norm: bool = False) -> None:
        super().__init__()
        inner: Any = model
        rows = inner.feature_info
        if not rows:
            raise ValueError(f"{type(model).__name__} has no features: {inner.no_features}")
        self.indices, self.norm = feature_indices(indices, len(rows)), norm
        if inner.is_classifier:
            inner.reset_classifier(0)
        self.model = model
        self.feature_info = FeatureInfo(rows[i] for i in self.indices)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """The arguments of the model's `forward`."""
        inner: Any = self.model
        return inner.forward_intermediates(
            *args, indices=self.indices, norm=self.norm, intermediates_only=True, **kwargs
        )


def feature_indices(indices: int | Sequence[int] | None, number: int) -> list[int]:
    """Which of `number` blocks: all for None, the last so many for a number, else these (negative: from the end)."""
    if indices is None:
        return list(range(number))
    if isinstance(indices, int):
        if not 1 <= indices <= number:
            raise ValueError(f"indices={indices} asks for the last {indices} of {number} blocks")
        return list(range(number - indices, number))
    for i in indices:
        if not -number <= i < number:
            raise ValueError(f"indices contains {i}, the model has {number} blocks")
    return [i % number for i in indices]


def find_trunk(model: nn.Module) -> Trunk:
    """The first `Backbone` or `FactorisedBackbone` in a model, as a trunk. Raises ValueError where there is none."""
    for name, part in model.named_modules():
        if isinstance(part, Backbone):
            blocks: dict[str, nn.Module] = {f"{name}.blocks.{i}": block for i, block in enumerate(part.blocks)}
            return Trunk(part, blocks, (part.dim,) * part.depth, norm=_norm_of(part))
        if isinstance(part, FactorisedBackbone):
            blocks = {f"{name}.within.{i}": block for i, block in enumerate(part.within)}
            width = next(p.dim for p in model.modules() if getattr(p, "backbone", None) is part)
            return Trunk(part, blocks, (int(width),) * len(blocks), _frames, _norm_of(part))  # type: ignore[arg-type]
    raise ValueError(f"{type(model).__name__} holds no Backbone; let it override `_trunk`, or say `no_features`")


def find_backbone(model: nn.Module) -> Backbone:
    """The `Backbone` of a model. Raises ValueError where there is none."""
    for part in model.modules():
        if isinstance(part, Backbone):
            return part
    raise ValueError(f"{type(model).__name__} holds no Backbone; load_model gives the whole model")


def token_features(
    model: nn.Module, *args: Any, index: int = -1, norm: bool = True, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the block `index` gives for the arguments of `forward`, (R, L, D), and which of it are real tokens, bool
    (R, L), None when all are. norm: the last norm on it; with the last block these are the model's `forward_features`.

    R is B, or more where mixers see channels or documents apart. Raises ValueError as `forward_intermediates`.
    """
    inner: Any = model
    trunk = _trunk_of(inner)
    blocks = list(trunk.blocks.values())
    (place,) = feature_indices([index], len(blocks))
    end, call = _calls(inner, [trunk.end, blocks[place]], args, kwargs)
    x = trunk.tokens(_tensor(call.output), end)
    if norm and place == len(blocks) - 1:
        x = _tensor(end.output)
    elif norm and trunk.norm is not None:
        x = trunk.norm(x, end)
    mask = _token_mask(trunk.end, end)
    return (x.flatten(2).mT if x.dim() == 4 else x), mask


def _token_mask(end: nn.Module, call: Call) -> Tensor | None:
    """Which tokens are real, bool (B, L), of a call of a backbone; None when all are."""
    if isinstance(end, FactorisedBackbone):
        mask, (_, height, width) = call.args[1], call.args[2]
        return None if mask is None else mask.repeat_interleave(height * width, 1)
    return call.kwargs.get("mask")


def _norm_of(backbone: nn.Module) -> Callable[[Tensor, Call], Tensor]:
    def norm(x: Tensor, call: Call) -> Tensor:
        mask = _token_mask(backbone, call)
        y = normalize(backbone.norm, x, mask)  # type: ignore[arg-type]
        return y if mask is None else torch.where(mask.unsqueeze(-1), y, y.new_zeros(()))

    return norm


def _frames(x: Tensor, call: Call) -> Tensor:
    """What a block within frames gave, (real frames, places, D), as (B, L, D) with zeros for pads."""
    _, mask, (steps, height, width) = call.args
    if mask is None:
        return x.unflatten(0, (-1, steps)).flatten(1, 2)
    whole = x.new_zeros(*mask.shape, height * width, x.shape[-1])
    return whole.index_put(mask.nonzero(as_tuple=True), x).flatten(1, 2)


def _trunk_of(model: Any) -> Trunk:
    if model.no_features is not None:
        raise ValueError(f"{type(model).__name__} has no features: {model.no_features}")
    return model._trunk()


def _calls(model: Any, parts: Sequence[nn.Module], args: Any, kwargs: Any) -> list[Call]:
    """Run the model up to its features; the calls of `parts`, which it makes on its way."""
    calls: dict[nn.Module, Call] = {}

    def note(part: nn.Module, given: Any, named: Any, output: Any) -> None:
        calls[part] = Call(given, named, output)

    handles = [part.register_forward_hook(note, with_kwargs=True) for part in set(parts)]
    try:
        model._run_trunk(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not all(part in calls for part in parts):
        raise ValueError("no features were seen: a compiled model hides them, take them from the one before compile()")
    return [calls[part] for part in parts]


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.y


def _check_classifier(model: Any) -> None:
    if not model.is_classifier:
        raise ValueError(
            f"this {type(model).__name__} is no classifier, there are no classes to change; another horizon, loss or "
            "vocabulary is an option of create_model(name, pretrained=True, ...), which keeps the backbone's weights"
        )
