"""Llama (arXiv:2302.13971), Mistral (arXiv:2310.06825), Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388).

One frame: RMSNorm, rotary positions, grouped key heads, SwiGLU. They differ in biases, in a norm of query and key heads
(Qwen3) and in a window (Mistral).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ._config import Config
from ._names import Plan
from ._registry import register_converter

_BLOCK, _OURS = "model.layers.*.", "model.backbone.blocks.*."
NAMES = {
    "model.embed_tokens": "model.embedding",
    **{f"{_BLOCK}self_attn.{part}_proj": f"{_OURS}mixer.{part}_proj" for part in "qkv"},
    f"{_BLOCK}self_attn.o_proj": f"{_OURS}mixer.out_proj",
    f"{_BLOCK}self_attn.q_norm": f"{_OURS}mixer.q_norm",
    f"{_BLOCK}self_attn.k_norm": f"{_OURS}mixer.k_norm",
    **{f"{_BLOCK}mlp.{part}_proj": f"{_OURS}ffn.{part}_proj" for part in ("gate", "up", "down")},
    f"{_BLOCK}input_layernorm": f"{_OURS}norm_mixer",
    f"{_BLOCK}post_attention_layernorm": f"{_OURS}norm_ffn",
    "model.norm": "model.backbone.norm",
    "lm_head": "model.head.proj",
}
_QK_NORM_EPS = 1e-6  # of the norm of heads in our softmax attention


@register_converter("llama", "mistral", "qwen2", "qwen3")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """Llama, Mistral, Qwen2 and Qwen3: rotary positions, grouped key heads, SwiGLU, RMSNorm."""
    kind = config.get("model_type")
    config.only("hidden_act", "silu", "swish")
    config.only("pretraining_tp", 1, None)
    config.only("num_local_experts", None, 0, 1)
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    rope = config.rope()
    if rope.share != 1.0:
        raise ValueError(f"{config.where} has partial_rotary_factor={rope.share}; only 1.0 can be converted")
    own_bias = config.flag("attention_bias", False) if kind in ("llama", "qwen3") else False
    eps = config.number("rms_norm_eps", 1e-6)
    if kind == "qwen3" and eps != _QK_NORM_EPS:
        raise ValueError(f"{config.where} has rms_norm_eps={eps}; for qwen3 only {_QK_NORM_EPS} can be converted")
    wide = kind == "qwen3" or config.get("head_dim") is not None
    mixer: dict[str, Any] = {
        "name": "softmax",
        "num_heads": heads,
        "num_kv_heads": config.integer("num_key_value_heads", _default_kv_heads(config, kind, heads)),
        "head_dim": config.integer("head_dim", 128) if wide else None,
        "position": "rope",
        "rope_base": rope.base,
        "rope_scaling": rope.scaling,
        "window_size": _window(config, kind),
        "qkv_bias": True if kind == "qwen2" else own_bias,
        "proj_bias": own_bias,
        "qk_norm": kind == "qwen3",
        "attn_drop": config.number("attention_dropout", 0.0),
    }
    tied = config.flag("tie_word_embeddings", False)
    options = {
        "vocab_size": config.integer("vocab_size"),
        "dim": dim,
        "depth": config.integer("num_hidden_layers"),
        "mixer": mixer,
        "ffn": {"name": "swiglu", "bias": config.flag("mlp_bias", False) if kind == "llama" else False},
        "mlp_ratio": config.integer("intermediate_size") / dim,
        "norm": "rmsnorm",
        "norm_eps": eps,
        "tie_embeddings": tied,
    }
    return Plan(
        "transformer_base",
        options,
        NAMES,
        ignored=(r".*\.rotary_emb\.inv_freq",),
        tied={"lm_head.weight": "model.embed_tokens.weight"} if tied else {},
        prefix="model.",
    )


def _default_kv_heads(config: Config, kind: str, heads: int) -> int:
    """What the class of transformers takes where the config is silent; null is as many as there are of queries."""
    return heads if "num_key_value_heads" in config else {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, heads)


def _window(config: Config, kind: str) -> int | None:
    """Mistral has one window for all layers. Raises ValueError for Qwen's, which only some layers have."""
    if kind == "mistral":
        window = config.get("sliding_window", 4096)
        return None if window is None else config.integer("sliding_window", 4096)
    if config.get("use_sliding_window"):
        raise ValueError(f"{config.where} has use_sliding_window=True: windows in some layers cannot be converted")
    layers = set(config.get("layer_types") or ())
    if layers - {"full_attention"}:
        raise ValueError(f"{config.where} has layer_types {sorted(layers)}; only full_attention can be converted")
    return None
