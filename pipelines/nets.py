"""From the section `model` of a config to a model of the zoo, with a mixer of the user's own where one is named.

`model.pretrained` starts it from a saved model: "<model>.<tag>", a folder or "org/name@revision". With
`model.frozen=true` only what it does not bring is trained, the head at least; `model.lora=8` also trains updates of
rank 8 of the linear layers (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..blocks.layers.lora import add_lora
from ..blocks.protocol import Mixer
from ..zoo import create_model
from ..zoo._loading import start_from
from .errors import UserError
from .instantiate import resolve_mixer_target

# Keys of the section `model` that are no options of the model.
TRANSFER = ("pretrained", "frozen", "lora")
NetT = TypeVar("NetT", bound=nn.Module)


def mixer_class(model: dict[str, Any], cfg: dict[str, Any]) -> type[Mixer] | None:
    """The class of a user's own mixer (`mixer._target_`) in a model's options, None when it is one of the registry."""
    mixer = model.get("mixer")
    if not isinstance(mixer, dict) or "_target_" not in mixer:
        return None
    return resolve_mixer_target(
        mixer["_target_"],
        command_line_targets=cfg.get("command_line_targets", ()),
    )


def mixer_name(model: dict[str, Any]) -> str:
    """What mixes, as a word: "s4d", or "mamba2 + softmax" for a hybrid."""
    mixer = model.get("mixer", "softmax")
    parts = mixer if isinstance(mixer, (list, tuple)) else [mixer]
    names = [part if isinstance(part, str) else str(part.get("name", part.get("_target_"))) for part in parts]
    return " + ".join(dict.fromkeys(names))


def _with_class(mixer: dict[str, Any], own: type[Mixer]) -> Callable[..., Mixer]:
    """A factory of a user's own mixer class with the options that stand beside `_target_`."""
    options = {k: v for k, v in mixer.items() if k not in ("_target_", "name")}
    return lambda dim, **more: own(dim, **{**options, **more})


def create_net(
    name: str, options: dict[str, Any], mixer_class: type[Mixer] | None, expected: type[NetT], what: str
) -> NetT:
    """The zoo model of a task's module. options: of the model; those that the data decide among them. mixer_class: of a
    user's own mixer, whose options stand under "mixer". Raises UserError, saying what was wanted, for another model."""
    options = dict(options)
    pretrained, frozen, rank = (options.pop(key, None) for key in TRANSFER)
    if mixer_class is not None:
        options = {**options, "mixer": _with_class(options.get("mixer", {}), mixer_class)}
    net: Any = create_model(name, **options)
    if not isinstance(net, expected):
        raise UserError(f"model {name!r} is no {what}")
    if mixer_class is not None:  # a class and not a factory: what is exported must name it
        config: Any = net.config
        config["options"]["mixer"] = mixer_class
    _transfer(net, pretrained, frozen, rank)
    return net


def _transfer(net: Any, pretrained: str | None, frozen: bool | None, rank: int | None) -> None:
    """Weights to start from, and what of them is trained. Raises UserError for what does not go together."""
    if pretrained is None:
        if frozen or rank:
            raise UserError("model.frozen and model.lora need weights to start from: model.pretrained=NAME")
        return
    try:
        new = start_from(net, pretrained)
    except ValueError as error:
        raise UserError(f"model.pretrained={pretrained}: {error}") from error
    trained = tuple(dict.fromkeys([*net.heads, *new]))
    if rank:
        add_lora(net, rank=int(rank), trained=trained)
    elif frozen:
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        if not any(parameter.requires_grad for parameter in net.parameters()):
            raise UserError(f"model.frozen=true leaves nothing to train of {type(net).__name__}")
