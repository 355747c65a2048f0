"""Output distributions against independent formulas."""

import numpy as np
import pytest
import torch

from seqzoo.blocks.layers.distributions import (
    PointOutput,
    QuantileOutput,
    StudentTOutput,
    create_output,
    student_t_quantile,
)


def test_student_t_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    df = torch.tensor([2.0, 2.3, 3.0, 5.0, 17.0, 200.0, 1e5]).unsqueeze(-1)
    levels = (0.05, 0.1, 0.5, 0.9, 0.95)
    expected = stats.t.ppf(np.array(levels)[None], df.numpy())
    np.testing.assert_allclose(student_t_quantile(df, levels).numpy(), expected, atol=2e-5)


def test_student_t_loss_is_scipys_log_density():
    stats = pytest.importorskip("scipy.stats")
    output = StudentTOutput()
    params = output.constrain(torch.randn(4, 3, 3, dtype=torch.float64))
    target = torch.randn(4, 3, dtype=torch.float64)
    df, loc, scale = (p.double().numpy() for p in params.unbind(-1))
    expected = -stats.t.logpdf(target.numpy(), df, loc, scale).mean()
    assert output.loss(params, target).item() == pytest.approx(expected, rel=1e-5)


def test_affine_moves_quantiles_with_the_data():
    loc, scale = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    for output in (QuantileOutput((0.1, 0.5, 0.9)), StudentTOutput()):
        params = output.constrain(torch.randn(5, 4, output.num_params))
        moved = output.quantile(output.affine(params, loc, scale), (0.1, 0.5, 0.9))
        torch.testing.assert_close(moved, output.quantile(params, (0.1, 0.5, 0.9)) * 2 + 3, rtol=1e-5, atol=1e-5)


def test_quantiles_are_sorted_and_interpolated():
    output = QuantileOutput((0.1, 0.5, 0.9))
    params = torch.tensor([[9.0, 1.0, 5.0]])  # crossing
    assert output.quantile(params, (0.1, 0.3, 0.5, 0.9))[0].tolist() == pytest.approx([1.0, 3.0, 5.0, 9.0])
    with pytest.raises(ValueError, match="outside"):
        output.quantile(params, (0.05,))


def test_pinball_loss_is_minimal_at_the_quantile():
    samples = torch.randn(20_000)
    output = QuantileOutput((0.1, 0.5))
    best = torch.tensor([samples.quantile(0.1), samples.quantile(0.5)])
    at_best = output.loss(best.expand(20_000, 2), samples)
    for shift in (-0.3, 0.3):
        assert output.loss((best + shift).expand(20_000, 2), samples) > at_best


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "quantile", "student_t"])
def test_missing_targets_do_not_count(name):
    output = create_output(name)
    params = output.constrain(torch.randn(6, 4, output.num_params))
    target, observed = torch.randn(6, 4), torch.rand(6, 4) > 0.4
    garbage = torch.where(observed, target, torch.full_like(target, 1e6))
    torch.testing.assert_close(output.loss(params, target, observed), output.loss(params, garbage, observed))
    torch.testing.assert_close(
        output.loss(params[observed].unsqueeze(0), target[observed].unsqueeze(0)),
        output.loss(params, target, observed),
    )
    none = output.loss(params, target, torch.zeros_like(observed))
    assert none.item() == 0


def test_bad_names_and_levels():
    with pytest.raises(ValueError, match="Did you mean quantile"):
        create_output("quantiles")
    with pytest.raises(ValueError, match=r"must contain 0\.5"):
        QuantileOutput((0.1, 0.9))
    with pytest.raises(ValueError, match="increasing"):
        QuantileOutput((0.5, 0.1))
    with pytest.raises(ValueError, match="no quantiles"):
        PointOutput().quantile(torch.zeros(1, 1), (0.5,))
