"""ViS4mer: the published size, the formula, pads, and the way of the released code."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.zoo import create_model, list_models, load_model, model_info, save_model
from seqzoo.zoo.vis4mer import halve

SMALL = {"encoder": {"name": "features", "dim": 16}, "dim": 16, "d_state": 4, "num_classes": 3}


def small(**options):
    torch.manual_seed(0)
    return create_model("vis4mer_tiny", **{**SMALL, **options}).eval().double()


def published_count(width, stages, states, classes):
    """Counted by hand for a causal S4D with B learned: norm, log dt, log Re A and Im A of N / 2 states, B and C as
    pairs of numbers, D, the linear map of S4, then the one that halves the width."""
    total = 0
    for _ in range(stages):
        norm = 2 * width
        space = width + 2 * (width * states // 2) + 2 * (width * states // 2 * 2) + width
        total += norm + space + width * width + width + width * (width // 2) + width // 2
        width //= 2
    return total + width * classes + classes


@pytest.mark.parametrize("classes", [4, 10])
def test_published_parameter_count(classes):
    with torch.device("meta"):
        model = create_model("vis4mer_base", num_classes=classes)
    number = sum(p.numel() for p in model.parameters())
    assert number == published_count(1024, 3, 64, classes)
    assert [stage.proj.out_features for stage in model.stages] == [512, 256, 128]
    assert isinstance(model.proj, torch.nn.Identity)  # features are as wide as the first stage
    with torch.device("meta"):
        other = create_model("vis4mer_base", num_classes=classes, encoder={"name": "features", "dim": 768})
    assert sum(p.numel() for p in other.parameters()) == number + 768 * 1024 + 1024


def test_the_formula_token_by_token():
    """The state space as a recurrence, everything else written out."""
    model = small()
    x = given = torch.randn(2, 8, 16, dtype=torch.float64)
    for stage in model.stages:
        z = F.layer_norm(x, x.shape[-1:], stage.norm.weight, stage.norm.bias, 1e-5)
        s4 = stage.mixer
        a = torch.complex(-torch.exp(s4.log_a_real), s4.a_imag)
        step = torch.exp(s4.log_dt)[:, None]
        b, c = torch.view_as_complex(s4.b.contiguous()), torch.view_as_complex(s4.c[0].contiguous())
        decay = torch.exp(step * a)
        gain = (decay - 1) / a * b
        state, out = torch.zeros(2, *a.shape, dtype=torch.complex128), []
        for t in range(x.shape[1]):
            state = decay * state + gain * z[:, t, :, None]
            out.append(2 * (c * state).sum(-1).real + s4.d * z[:, t])
        mixed = x + F.linear(F.gelu(torch.stack(out, 1)), s4.out_proj.weight, s4.out_proj.bias)
        pairs = (mixed[:, 0::2] + mixed[:, 1::2]) / 2
        x = F.gelu(F.linear(pairs, stage.proj.weight, stage.proj.bias))
    want = F.linear(x.mean(1), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(given).y, want, atol=1e-10, rtol=0)


def test_even_lengths_are_as_released():
    model, released = small(), small(parity=True)
    released.load_state_dict(model.state_dict())
    for length in (8, 16, 40):
        x = torch.randn(2, length, 16, dtype=torch.float64)
        torch.testing.assert_close(model(x).y, released(x).y, atol=1e-12, rtol=0)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert not torch.allclose(model(x).y, released(x).y)
    torch.testing.assert_close(released(x).y, released(x[:, :8]).y, atol=1e-12, rtol=0)  # an odd last token is dropped
    # missing frames are zeros that count
    mask = torch.arange(8) < 5
    zeros = x[:, :8].masked_fill(~mask[:, None], 0)
    torch.testing.assert_close(released(x[:, :8], mask[None]).y, released(zeros).y, atol=0, rtol=0)
    with pytest.raises(ValueError, match="need 8 tokens"):
        released(x[:, :7])


def test_pads_and_other_rows_change_nothing():
    model = small()
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    lengths = [11, 6, 1]
    mask = torch.arange(11) < torch.tensor(lengths).unsqueeze(1)
    y = model(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask).y
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y[row], model(x[row : row + 1, :n]).y[0], atol=1e-12, rtol=0)
    holes = torch.zeros(1, 14, 16, dtype=torch.float64)
    places = [0, 2, 3, 7, 8, 13]
    holes[0, places] = x[1, :6]
    real = torch.zeros(1, 14, dtype=torch.bool)
    real[0, places] = True
    torch.testing.assert_close(model(holes, real).y[0], y[1], atol=1e-12, rtol=0)


def test_halving_is_a_mean_of_real_neighbours():
    x = torch.tensor([[1.0, 3.0, 10.0, 100.0, 7.0]]).unsqueeze(-1)
    assert halve(x, None)[0].flatten().tolist() == [2.0, 55.0, 7.0]
    y, mask = halve(x, torch.tensor([[True, True, True, False, False]]))
    assert y.flatten().tolist() == [2.0, 10.0, 0.0] and mask.tolist() == [[True, True, False]]


def test_grids_are_tokens_frame_by_frame():
    model = small()
    x = torch.randn(1, 3, 2, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x).y, model(x.reshape(1, 24, 16)).y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_every_parameter_learns_and_a_saved_model_loads(causal, tmp_path):
    torch.manual_seed(0)
    model = create_model("vis4mer_tiny", **{**SMALL, "encoder": {"name": "features", "dim": 9}}, causal=causal)
    x = torch.randn(2, 9, 9)
    model(x).y.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
    save_model(model.eval(), tmp_path)
    assert torch.equal(load_model(tmp_path)(x).y, model(x).y)
    tagged = [p for n, p in model.named_parameters() if n.endswith(("log_dt", "log_a_real", "a_imag", "mixer.b"))]
    assert len(tagged) == 12  # the group of their own: see test_s4d


def test_recomputing_changes_no_gradient():
    model, x, grads = small(drop=0.0).train(), torch.randn(2, 9, 16, dtype=torch.float64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).y.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert [stage.grad_checkpointing for stage in model.stages] == [True] * 3


def test_names_and_refusals():
    assert list_models("vis4mer_*", task="video_classify") == [f"vis4mer_{s}" for s in ("base", "small", "tiny")]
    assert model_info("vis4mer_base").options["dim"] == 1024
    for options, message in (
        ({"dim": 20}, "multiple of 2"),
        ({"num_stages": 0}, "num_stages"),
        ({"num_classes": -1}, "num_cl"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    with pytest.raises(ValueError, match="expected bool"):
        small()(torch.zeros(1, 8, 16), torch.ones(1, 8))
