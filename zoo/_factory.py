"""From a name to a model, with weights or without."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks.registry import did_you_mean
from ._features import FeatureExtractor
from ._registry import model_info
from ._weights import split_name, weights_info


def create_model(
    name: str,
    pretrained: bool = False,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a registered model; `overrides` replace options of its class.

    name: "<model>", or "<model>.<tag>", which takes the options that these weights were trained with. pretrained: load
    the weights of the tag, of the default one without. Where an override changes the shape of the head (num_classes,
    vocab_size, pred_len, loss), the backbone keeps its weights and the head starts anew, which is said; any other
    tensor that does not fit is an error that names it. num_classes=0 takes the head of a classifier away.
    features_only: a `FeatureExtractor`, which returns the list of what the blocks of out_indices give.

    The model remembers `config = {"name", "options"}`, from which `save_model` writes it, and with weights their
    `preprocessing`. Raises ValueError for an unknown name, tag or option, naming the nearest.
    """
    if pretrained:
        from ._loading import load_weights

        model = load_weights(weights_info(name), overrides)
    else:
        options = dict(overrides)
        if split_name(name)[1] is not None:
            options = {**weights_info(name).options, **options}
        model = build_model(split_name(name)[0], options)
    if out_indices is not None and not features_only:
        raise ValueError("out_indices chooses among intermediates: give it with features_only=True")
    return FeatureExtractor(model, indices=out_indices) if features_only else model


def build_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model without weights. Raises ValueError as `create_model`."""
    info = model_info(name)
    valid = info.options
    for key in options:
        if key not in valid:
            raise ValueError(f"model {name!r} has no option {key!r}.{did_you_mean(key, valid)}")
    given = dict(options)
    headless = given.get("num_classes") == 0 and not isinstance(given["num_classes"], bool)
    if headless:  # built with a head, which is taken away: classes need not know the case
        del given["num_classes"]
    missing = [k for k, v in valid.items() if v is inspect.Parameter.empty and k not in given]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(missing)}")
    model: Any = info.build(**{**info.defaults, **given})
    model.config = {"name": name, "options": dict(options)}
    if headless:
        model.reset_classifier(0)
    return model
