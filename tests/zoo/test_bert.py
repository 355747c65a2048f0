"""BERT of the zoo: published counts, heads, positions; equality with transformers is in test_convert_bert.py."""

import pytest
import torch

from seqzoo.zoo import create_model, load_model, save_model

TINY = {"dim": 16, "depth": 2, "num_heads": 2, "vocab_size": 31, "max_len": 12}


def tokens(batch=2, length=9, seed=1):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 109_514_298),  # bert-base-uncased with its masked head
        ({"head": "none"}, 108_891_648),  # without pooler
        ({"head": "classes"}, 109_483_778),  # with pooler and two classes
        ({"dim": 384, "depth": 6, "head": "none"}, 22_565_376),  # MiniLM-L6 without pooler
    ],
)
def test_published_parameter_counts(options, count):
    with torch.device("meta"):
        model = create_model("bert_base", **options)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_masked_head_is_its_formula():
    model = create_model("bert_base", **TINY).double().eval()
    head, table = model.model.head, model.model.embedding.word.weight
    with torch.no_grad():
        head.bias.normal_()
    x = model.model.forward_features(tokens()).y
    want = head.norm(torch.nn.functional.gelu(head.transform(x))) @ table.T + head.bias
    torch.testing.assert_close(model(tokens()).y, want, atol=1e-12, rtol=0)
    loose = create_model("bert_base", **TINY, tie_embeddings=False)
    assert set(loose.state_dict()) - set(model.state_dict()) == {"model.head.proj.weight"}


def test_heads():
    features = create_model("bert_base", **TINY, head="none").eval()
    assert features(tokens()).y.shape == (2, 9, 16)
    classes = create_model("bert_base", **TINY, head="classes", num_classes=5).eval()
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    y = classes(tokens(), mask=mask).y
    assert y.shape == (2, 5)
    torch.testing.assert_close(y[1:], classes(tokens()[1:, :4]).y)
    with pytest.raises(ValueError, match=r"head='mask' is not a choice.*masked"):
        create_model("bert_base", **TINY, head="mask")
    with pytest.raises(ValueError, match="num_classes=-1 must be positive"):
        create_model("bert_base", **TINY, head="classes", num_classes=-1)


def test_types_and_positions():
    model = create_model("bert_base", **TINY, head="none").eval()
    x, types = tokens(), torch.ones(2, 9, dtype=torch.int64)
    assert torch.equal(model(x, token_types=0 * types).y, model(x).y)
    assert not torch.allclose(model(x, token_types=types).y, model(x).y)
    assert not torch.allclose(model(x.flip(1)).y.flip(1), model(x).y)
    without = create_model("bert_base", **TINY, head="none", num_types=0)
    assert not any("token_type" in name for name in without.state_dict())
    with pytest.raises(ValueError, match="token_types were given to a model with num_types=0"):
        without(x, token_types=types)
    with pytest.raises(ValueError, match="position 12 is beyond max_len=12"):
        model(tokens(length=13))
    with pytest.raises(ValueError, match="num_types=-1"):
        create_model("bert_base", **TINY, num_types=-1)


def test_a_causal_one_streams():
    """Positions go on where the state stands."""
    model = create_model("bert_base", **TINY, causal=True).double().eval()
    x, mask = tokens(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    state, parts = model.init_state(2, dtype=torch.float64), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        out = model(x[:, begin:end], mask=mask[:, begin:end], state=state)
        state = out.state
        parts.append(out.y)
    want = model(x, mask=mask).y
    torch.testing.assert_close(torch.cat(parts, 1)[mask], want[mask], atol=1e-10, rtol=0)


@pytest.mark.parametrize("head", ["masked", "none", "classes"])
def test_saving_and_loading(head, tmp_path):
    model = create_model("bert_base", **TINY, head=head, ffn={"name": "gelu", "approximate": "tanh"}).eval()
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(again(tokens()).y, model(tokens()).y)
