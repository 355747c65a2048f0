"""BERT (arXiv:1810.04805) and MiniLM (arXiv:2002.10957): the encoder, its masked language model, or its classes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ._config import GELU, Config
from ._names import Plan, with_prefix
from ._registry import register_converter

_BLOCK, _OURS = "bert.encoder.layer.*.", "model.backbone.blocks.*."
_TABLES = {"word_embeddings": "word", "position_embeddings": "position.table", "token_type_embeddings": "token_type"}
ENCODER = {
    **{f"bert.embeddings.{theirs}": f"model.embedding.{ours}" for theirs, ours in _TABLES.items()},
    **{f"{_BLOCK}attention.self.{word}": f"{_OURS}mixer.{word[0]}_proj" for word in ("query", "key", "value")},
    f"{_BLOCK}attention.output.dense": f"{_OURS}mixer.out_proj",
    f"{_BLOCK}intermediate.dense": f"{_OURS}ffn.up_proj",
    f"{_BLOCK}output.dense": f"{_OURS}ffn.down_proj",
}
_DECODER = "cls.predictions.decoder"
_MASKED = {
    "cls.predictions.transform.dense": "model.head.transform",
    "cls.predictions.bias": "model.head.bias",
    f"{_DECODER}.weight": "model.head.proj.weight",
}
_CLASSES = {"bert.pooler.dense": "model.head.pooler", "classifier": "model.head.proj"}
_NORMS = {
    "bert.embeddings.LayerNorm": "model.embedding.norm",
    f"{_BLOCK}attention.output.LayerNorm": f"{_OURS}norm_mixer",
    f"{_BLOCK}output.LayerNorm": f"{_OURS}norm_ffn",
}


def _norms(table: Mapping[str, str]) -> dict[str, str]:
    """Norms under the names of their two parameters, old and new."""
    leaves = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    return {f"{key}.{old}": f"{ours}.{new}" for key, ours in table.items() for old, new in leaves.items()}


@register_converter("bert")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """BERT and MiniLM: post-norm encoder, learned positions; masked head, classes, or features."""
    config.absent("is_decoder", "add_cross_attention")
    config.only("position_embedding_type", "absolute")
    dim, tied = config.integer("hidden_size"), config.flag("tie_word_embeddings", True)
    names = with_prefix(tensors, "bert.")
    masked = any(name.startswith("cls.predictions.") for name in names)
    classes = names.get("classifier.weight") if not masked else None
    if classes is not None and "bert.pooler.dense.weight" not in names:
        raise ValueError(f"{config.where}: the classifier reads no pooled token; that of single tokens is not ours")
    options = {
        "vocab_size": config.integer("vocab_size"),
        "dim": dim,
        "depth": config.integer("num_hidden_layers"),
        "num_heads": config.integer("num_attention_heads"),
        "ffn": config.choice("hidden_act", GELU, "gelu"),
        "mlp_ratio": config.integer("intermediate_size") / dim,
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "max_len": config.integer("max_position_embeddings"),
        "num_types": config.integer("type_vocab_size", 2),
        "head": "masked" if masked else "none" if classes is None else "classes",
        "tie_embeddings": tied,
    }
    if classes is not None:
        options["num_classes"] = len(classes)
    norms = {**_NORMS, **({"cls.predictions.transform.LayerNorm": "model.head.norm"} if masked else {})}
    # The pooler and the next-sentence head are left out where nothing of ours reads them.
    unread = [] if classes is not None else [r"bert\.pooler\..*", r"cls\.seq_relationship\..*"]
    ties, head = {}, _MASKED
    if tied or f"{_DECODER}.bias" not in names:
        ties[f"{_DECODER}.bias"] = "cls.predictions.bias"
    else:  # a decoder of its own reads its own bias, and the other one is idle
        head = {**_MASKED, f"{_DECODER}.bias": "model.head.bias"}
        unread.append(r"cls\.predictions\.bias")
    if tied:
        ties[f"{_DECODER}.weight"] = "bert.embeddings.word_embeddings.weight"
    return Plan(
        "bert_base",
        options,
        {**ENCODER, **_norms(norms), **(head if masked else _CLASSES if classes is not None else {})},
        ignored=(r"bert\.embeddings\.(position_ids|token_type_ids)", *unread),
        tied=ties,
        prefix="bert.",
    )
