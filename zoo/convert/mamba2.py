"""Mamba-2 (arXiv:2405.21060), in the form of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ._config import Config
from ._names import Plan
from ._registry import register_converter
from .mamba import frame, mixer_options

_NORM_EPS = 1e-5  # of the norm inside our layer


@register_converter("mamba2")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """Mamba-2: state space duality, one decay per head."""
    dim, head_dim, heads = config.integer("hidden_size"), config.integer("head_dim", 64), config.integer("num_heads")
    expand = config.number("expand", 2)
    if heads * head_dim != int(expand * dim):
        raise ValueError(
            f"{config.where} has num_heads={heads} of head_dim={head_dim}, together not expand * hidden_size = "
            f"{int(expand * dim)}"
        )
    eps = config.number("layer_norm_epsilon", _NORM_EPS)
    if eps != _NORM_EPS:
        raise ValueError(f"{config.where} has layer_norm_epsilon={eps}; only {_NORM_EPS} can be converted")
    low, high = (_limit(v, config) for v in config.get("time_step_limit") or (0.0, math.inf))
    mixer = {
        "name": "mamba2",
        "d_state": config.integer("state_size", 128),
        "expand": expand,
        "head_dim": head_dim,
        "num_groups": config.integer("n_groups", 8),
        "dt_limit_low": low,
        "dt_limit_high": None if math.isinf(high) else high,
        **mixer_options(config),
    }
    names = {
        "in_proj": "in_proj",
        "conv1d": "scan.conv",
        "dt_bias": "scan.dt_bias",
        "A_log": "scan.a_log",
        "D": "scan.d",
        "norm": "norm",
        "out_proj": "out_proj",
    }
    return frame(config, mixer, names, "mamba2_base", tied=False)


def _limit(value: object, config: Config) -> float:
    """A number, or infinity in the words that JSON files have for it."""
    if isinstance(value, dict):
        value = value.get("__float__")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{config.where} has {value!r} in time_step_limit, expected a number") from None
