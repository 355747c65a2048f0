"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373): parallel branches, rotary positions of some channels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ._config import GELU, Config
from ._names import NameMap, Plan, Split
from ._registry import register_converter

_BLOCK, _OURS = "gpt_neox.layers.*.", "model.backbone.blocks.*."


@register_converter("gpt_neox")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """GPT-NeoX and Pythia: parallel branches, LayerNorm, partly rotary positions."""
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.only("is_decoder", False, True)  # causal either way
    rope = config.rope(base_keys=("rotary_emb_base",), share_keys=("rotary_pct",), share=0.25)
    bias, tied = config.flag("attention_bias", True), config.flag("tie_word_embeddings", False)

    def heads_of_three(fused: Tensor) -> tuple[Tensor, ...]:
        """Rows in the order of heads, in each its query, key and value."""
        return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (heads, 3, -1)).unbind(1))

    names: NameMap = {
        "gpt_neox.embed_in": "model.embedding",
        f"{_BLOCK}input_layernorm": f"{_OURS}norm_mixer",
        f"{_BLOCK}post_attention_layernorm": f"{_OURS}norm_ffn",
        f"{_BLOCK}attention.query_key_value": Split(
            tuple(f"{_OURS}mixer.{part}_proj" for part in "qkv"), heads_of_three
        ),
        f"{_BLOCK}attention.dense": f"{_OURS}mixer.out_proj",
        f"{_BLOCK}mlp.dense_h_to_4h": f"{_OURS}ffn.up_proj",
        f"{_BLOCK}mlp.dense_4h_to_h": f"{_OURS}ffn.down_proj",
        "gpt_neox.final_layer_norm": "model.backbone.norm",
        "embed_out": "model.head.proj",
        "lm_head": "model.head.proj",  # its name in memory, since version 5
    }
    options = {
        "vocab_size": config.integer("vocab_size"),
        "dim": dim,
        "depth": config.integer("num_hidden_layers"),
        "mixer": {
            "name": "softmax",
            "num_heads": heads,
            "position": "rope",
            "rope_base": rope.base,
            "rope_scaling": rope.scaling,
            "rotary_dim": int(dim // heads * rope.share),
            "qkv_bias": bias,
            "proj_bias": bias,
            "attn_drop": config.number("attention_dropout", 0.0),
        },
        "ffn": config.choice("hidden_act", GELU, "gelu"),
        "mlp_ratio": config.integer("intermediate_size") / dim,
        "norm": "layernorm",
        "norm_eps": config.number("layer_norm_eps", 1e-5),
        "parallel": config.flag("use_parallel_residual", True),
        "tie_embeddings": tied,
    }
    return Plan(
        "transformer_base",
        options,
        names,
        # masks and wavelengths that older versions saved
        ignored=(r".*\.attention\.(bias|masked_bias)", r".*\.rotary_emb\.inv_freq"),
        tied=dict.fromkeys(("embed_out.weight", "lm_head.weight"), "gpt_neox.embed_in.weight") if tied else {},
        prefix="gpt_neox.",
    )
