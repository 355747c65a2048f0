"""SlowFast tokens: their number and order, against loops; repeats for short videos."""

import numpy as np
import pytest
import torch

from seqzoo.blocks.layers.slow_fast import SlowFastPool, spread


def loops(x, number, s):
    """One video (N, h, w, D), value by value."""
    n, height, width, dim = x.shape
    frames = [x[int(np.round(i * (n - 1) / (number - 1)))] for i in range(number)] if number > 1 else [x[0]]
    out = [frame.reshape(-1, dim).sum(0) / (height * width) for frame in frames]
    for j in range(s * s):
        frame = frames[int(np.round(j * (number - 1) / (s * s - 1)))] if s > 1 else frames[0]
        for row in range(0, height, s):
            for column in range(0, width, s):
                out.append(frame[row : row + s, column : column + s].reshape(-1, dim).mean(0))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("number", "s", "n", "grid"), [(10, 2, 25, (4, 6)), (7, 3, 3, (3, 9)), (4, 1, 9, (2, 3)), (1, 1, 5, (1, 1))]
)
def test_fast_then_slow_frame_by_frame_row_by_row(number, s, n, grid):
    torch.manual_seed(0)
    x = torch.randn(2, n, *grid, 5, dtype=torch.float64)
    pool = SlowFastPool(number, s)
    y = pool(x)
    assert y.shape == (2, pool.num_tokens(*grid), 5) and pool.num_tokens(*grid) == number + grid[0] * grid[1]
    for row in range(2):
        torch.testing.assert_close(y[row], loops(x[row], number, s), atol=1e-12, rtol=0)


def test_published_sizes_and_frames():
    pool = SlowFastPool()
    assert pool.num_tokens(16, 16) == 356
    fast, slow = pool.frames(torch.tensor([100, 1000, 7]))
    assert fast[0].tolist() == list(range(100)) and slow[0].tolist() == [0, 33, 66, 99]
    assert (fast[1, 0], fast[1, -1], slow[1].tolist()) == (0, 999, [0, 333, 666, 999])
    assert sorted(set(fast[2].tolist())) == list(range(7)) and (fast[2].diff() >= 0).all()


def test_places_are_those_of_a_rounded_linspace():
    for length in range(1, 60):
        for number in (2, 3, 10, 33):
            want = np.linspace(0, length - 1, number)
            away = np.abs(want - np.floor(want) - 0.5) > 1e-9  # halves depend on rounding
            found = spread(torch.tensor([length]), number)[0].numpy()
            assert (found[away] == np.round(want)[away]).all() and np.abs(found - want).max() <= 0.5 + 1e-9


def test_padded_videos_give_what_they_give_alone():
    x = torch.randn(2, 9, 2, 2, 3, dtype=torch.float64)
    pool = SlowFastPool(5, 2)
    together = pool(x, torch.tensor([9, 4]))
    assert torch.equal(together[1:], pool(x[1:, :4])) and torch.equal(together[:1], pool(x[:1]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="pool=2 does not divide the grid 3 x 4"):
        SlowFastPool(4, 2)(torch.zeros(1, 4, 3, 4, 2))
    with pytest.raises(ValueError, match="num_frames=0"):
        SlowFastPool(0)
    with pytest.raises(ValueError, match="expected"):
        SlowFastPool(4)(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ValueError, match="from 1 to 4"):
        SlowFastPool(4)(torch.zeros(1, 4, 2, 2, 1), torch.tensor([5]))
