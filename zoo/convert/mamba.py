"""Mamba (arXiv:2312.00752), in the form of transformers (`...-hf` on the Hub)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._config import Config
from ._names import Plan
from ._registry import register_converter

_MIXER, _OURS = "backbone.layers.*.mixer.", "model.backbone.blocks.*.mixer."


def frame(config: Config, mixer: dict[str, Any], names: Mapping[str, str], name: str, *, tied: bool) -> Plan:
    """What Mamba and Mamba-2 share around the mixer: norm -> mixer, a last norm, a head. tied: the default."""
    config.only("hidden_act", "silu", "swish")
    tied = config.flag("tie_word_embeddings", tied)
    options = {
        "vocab_size": config.integer("vocab_size"),
        "dim": config.integer("hidden_size"),
        "depth": config.integer("num_hidden_layers"),
        "mixer": mixer,
        "ffn": "none",
        "norm": "rmsnorm",
        "norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "tie_embeddings": tied,
    }
    table = {
        "backbone.embeddings": "model.embedding",
        "backbone.layers.*.norm": "model.backbone.blocks.*.norm_mixer",
        **{_MIXER + theirs: _OURS + ours for theirs, ours in names.items()},
        "backbone.norm_f": "model.backbone.norm",
        "lm_head": "model.head.proj",
    }
    ties = {"lm_head.weight": "backbone.embeddings.weight"} if tied else {}
    return Plan(name, options, table, tied=ties, prefix="backbone.")


def mixer_options(config: Config) -> dict[str, Any]:
    """Options that both layers have."""
    return {
        "d_conv": config.integer("conv_kernel", 4),
        "dt_min": config.number("time_step_min", 0.001),
        "dt_max": config.number("time_step_max", 0.1),
        "dt_init_floor": config.number("time_step_floor", 1e-4),
        "conv_bias": config.flag("use_conv_bias", True),
        "proj_bias": config.flag("use_bias", False),
    }


@register_converter("mamba")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """Mamba: selective state spaces behind short convolutions."""
    dim = config.integer("hidden_size")
    rank = config.get("time_step_rank", "auto")
    mixer = {
        "name": "mamba",
        "d_state": config.integer("state_size", 16),
        # transformers takes the width of the config where there is one, whatever expand says
        "expand": config.integer("intermediate_size", int(config.number("expand", 2) * dim)) / dim,
        "dt_rank": "auto" if rank == "auto" else config.integer("time_step_rank"),
        "dt_init": config.choice("time_step_init_scheme", {"random": "random", "constant": "constant"}, "random"),
        "dt_scale": config.number("time_step_scale", 1.0),
        **mixer_options(config),
    }
    names = {
        "in_proj": "in_proj",
        "conv1d": "scan.conv",
        "x_proj": "scan.x_proj",
        "dt_proj": "scan.dt_proj",
        "A_log": "scan.a_log",
        "D": "scan.d",
        "out_proj": "out_proj",
    }
    return frame(config, mixer, names, "mamba_base", tied=True)
