"""The forecasting models: counts, shapes, what they read, agreement with independent code."""

import pytest
import torch

from seqzoo.blocks.registry import list_mixers
from seqzoo.zoo import create_model, list_models, model_info


def make_batch(size=3, seq_len=48, pred_len=12, channels=2, past=0, future=0, static=0, time=4, missing=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    observed = torch.ones(size, seq_len, channels, dtype=torch.bool)
    values = draw(size, seq_len, channels)
    if missing:
        observed = torch.rand(size, seq_len, channels, generator=generator) > 0.3
        values = values * observed
    return {
        "past_target": values,
        "past_observed": observed,
        "past_time": draw(size, seq_len, time) / 4,
        "future_time": draw(size, pred_len, time) / 4,
        "past_covariates": draw(size, seq_len, past),
        "future_covariates": draw(size, seq_len + pred_len, future),
        "static_covariates": draw(size, static),
    }


def test_informer_has_the_published_number_of_parameters():
    model = create_model("informer", seq_len=96, label_len=48, pred_len=24, in_channels=7, preset="original")
    assert sum(p.numel() for p in model.parameters()) == 11_330_055


@pytest.mark.parametrize("distil", [True, False])
@pytest.mark.parametrize("attention", ["prob_sparse", "softmax"])
@pytest.mark.parametrize("seq_len", [48, 31])
def test_informer_runs_and_every_parameter_learns(attention, distil, seq_len):
    model = create_model(
        "informer",
        seq_len=seq_len,
        label_len=16,
        pred_len=12,
        in_channels=2,
        dim=16,
        num_heads=2,
        attention=attention,
        distil=distil,
    )
    params = model(make_batch(seq_len=seq_len))
    assert params.shape == (3, 12, 2, 1)
    (params * torch.randn_like(params)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_informer_encoder_halves_the_length():
    model = create_model("informer", seq_len=31, pred_len=4, in_channels=1, dim=8, num_heads=1, encoder_depth=3)
    lengths = []
    for layer in model.distil:
        layer.register_forward_hook(lambda _, __, out: lengths.append(out.shape[1]))
    model(make_batch(seq_len=31, pred_len=4, channels=1))
    assert lengths == [16, 8]


def test_informer_distil_is_transformers():
    modeling = pytest.importorskip("transformers.models.informer.modeling_informer")
    from seqzoo.zoo.informer import Distil

    ours, theirs = Distil(8).eval(), modeling.InformerConvLayer(8).eval()
    theirs.downConv.load_state_dict(
        {k.removeprefix("conv."): v for k, v in ours.conv.conv.state_dict().items()}, strict=False
    )
    theirs.downConv.weight.data.copy_(ours.conv.conv.weight)
    theirs.downConv.bias.data.copy_(ours.conv.conv.bias)
    x = torch.randn(2, 13, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 13, 24])
def test_informer_circular_convolution_is_torch_own(length):
    from seqzoo.blocks.layers.embeddings import CircularConv

    layer = CircularConv(5, 7)
    x = torch.randn(2, length, 5, requires_grad=True)
    cotangent = torch.randn(2, length, 7)
    inputs = [x, layer.conv.weight, layer.conv.bias]
    found, expected = layer(x), layer.conv(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(y, inputs, cotangent) for y in (found, expected))
    for ours, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("preset", ["clean", "original"])
def test_informer_steps_that_nobody_reads_change_nothing(preset, depth):
    """The last decoder layer computes the horizon alone: as if it had computed the start token too."""
    model = create_model(
        "informer", seq_len=24, pred_len=12, in_channels=2, dim=16, num_heads=2, preset=preset, decoder_depth=depth
    ).eval()
    batch = make_batch(seq_len=24)
    short = model(batch)
    layer = model.decoder[-1]
    run = layer.forward
    lengths = []

    def whole(x, context, last=None):
        y = run(x, context)
        lengths.append((last, y.shape[1]))
        return y

    layer.forward = whole
    torch.testing.assert_close(model(batch), short, rtol=1e-5, atol=1e-6)
    assert lengths == [(12, 24)]


def test_informer_decoder_never_sees_the_future_targets():
    model = create_model("informer", seq_len=24, pred_len=12, in_channels=2, dim=16, num_heads=2).eval()
    batch = make_batch(seq_len=24)
    before = model(batch)
    batch["future_target"] = torch.full((3, 12, 2), 1e3)
    assert torch.equal(model(batch), before)


@pytest.mark.parametrize("mixer", list_mixers(pattern="self"))
def test_patch_takes_every_mixer(mixer):
    model = create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer=mixer)
    params = model(make_batch())
    assert params.shape == (3, 12, 2, 1)
    params.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("loss", ["quantile", "student_t", "mse"])
def test_patch_reads_all_that_the_data_have(mixing, loss):
    model = create_model(
        "patch_tiny",
        seq_len=48,
        pred_len=12,
        in_channels=2,
        num_time_features=4,
        num_past_covariates=1,
        num_future_covariates=2,
        num_static_covariates=3,
        loss=loss,
        calendar=True,
        mask_channel=True,
        channel_embedding=True,
        channel_mixing=mixing,
    )
    batch = make_batch(past=1, future=2, static=3, missing=True)
    params = model(batch)
    assert params.shape == (3, 12, 2, model.output.num_params)
    (params * torch.randn_like(params)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    base = model(batch)
    for key in ("past_time", "future_time", "past_covariates", "future_covariates", "static_covariates"):
        changed = {**batch, key: batch[key] + 1}
        assert not torch.allclose(model(changed), base), f"{key} is not read"
    hidden = {
        **batch,
        "past_target": torch.where(batch["past_observed"], batch["past_target"], torch.tensor(7.0)),
    }
    torch.testing.assert_close(model(hidden), base, msg="what stands at a missing value must not matter")


def test_patch_with_independent_channels_keeps_them_apart():
    model = create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2).eval()
    batch = make_batch()
    base = model(batch)
    changed = {**batch, "past_target": batch["past_target"].clone()}
    changed["past_target"][:, :, 1] += torch.randn(48)
    assert torch.equal(model(changed)[:, :, 0], base[:, :, 0])
    assert not torch.allclose(model(changed)[:, :, 1], base[:, :, 1])


def test_revin_makes_the_forecast_follow_level_and_scale():
    model = create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, loss="quantile").eval()
    batch = make_batch()
    moved = {**batch, "past_target": batch["past_target"] * 50 + 1000}
    torch.testing.assert_close(model(moved), model(batch) * 50 + 1000, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("loss", ["mse", "quantile", "student_t"])
def test_linear_skip_starts_as_the_seasonal_naive_forecast(loss):
    model = create_model(
        "patch_tiny", seq_len=48, pred_len=12, in_channels=2, loss=loss, linear_skip=True, season=8, revin=False
    ).eval()
    torch.nn.init.zeros_(model.model.head.proj.weight)
    torch.nn.init.zeros_(model.model.head.proj.bias)
    batch = make_batch()
    expected = batch["past_target"][:, 40:].repeat(1, 2, 1)[:, :12]
    torch.testing.assert_close(model.output.point(model(batch)), expected)


def test_dlinear_is_two_linear_maps():
    model = create_model("dlinear", seq_len=48, pred_len=12, in_channels=2, kernel_size=5)
    assert sum(p.numel() for p in model.parameters()) == 2 * (48 * 12 + 12)
    batch = make_batch()
    x = batch["past_target"].double().numpy()
    import numpy as np

    padded = np.concatenate([np.repeat(x[:, :1], 2, 1), x, np.repeat(x[:, -1:], 2, 1)], axis=1)
    trend = np.stack([padded[:, i : i + 5].mean(1) for i in range(48)], axis=1)
    expected = sum(
        np.einsum("blc,hl->bhc", part, layer[0].weight.detach().double().numpy())
        + layer[0].bias.detach().numpy()[None, :, None]
        for part, layer in ((trend, model.trend), (x - trend, model.remainder))
    )
    np.testing.assert_allclose(model(batch)[..., 0].detach().numpy(), expected, atol=1e-5)


def test_dlinear_individual_keeps_channels_apart():
    model = create_model("dlinear", seq_len=48, pred_len=12, in_channels=2, individual=True, loss="quantile")
    assert model(make_batch()).shape == (3, 12, 2, 11)


@pytest.mark.parametrize("name", list_models(task="forecasting"))
@pytest.mark.parametrize("loss", ["mse", "quantile", "student_t"])
def test_every_forecaster_has_every_output(name, loss):
    options = {"dim": 16, "num_heads": 2} if name == "informer" else {}
    model = create_model(name, seq_len=48, pred_len=12, in_channels=2, loss=loss, **options)
    params = model(make_batch())
    assert params.shape == (3, 12, 2, model.output.num_params)
    assert model.output.point(params).shape == (3, 12, 2)
    assert isinstance(model_info(name).cls.uses, frozenset)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("patch_smal", {}, "Did you mean patch_small"),
        ("dlinear", {"kernel": 3}, "kernel_size"),
        ("dlinear", {"kernel_size": 4}, "odd"),
        ("dlinear", {"out_channels": 1}, "out_channels=1"),
        ("patch_tiny", {"patch_len": 64}, "longer than seq_len"),
        ("patch_tiny", {"stride": 0}, "stride=0"),
        ("patch_tiny", {"mixer": "linea"}, "Did you mean linear"),
        ("informer", {"label_len": 99}, "label_len=99"),
        ("informer", {"attention": "full"}, "prob_sparse or softmax"),
    ],
)
def test_bad_options_name_the_valid_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"seq_len": 48, "pred_len": 12, "in_channels": 2, **options})


def test_missing_options_are_named():
    with pytest.raises(ValueError, match="needs seq_len, pred_len, in_channels"):
        create_model("dlinear")
