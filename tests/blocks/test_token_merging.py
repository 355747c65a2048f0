"""Token merging of TimeAudio against a loop written from its description, and its time encoding."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.layers.time_encoding import AbsoluteTimeEncoding, windows_in
from seqzoo.blocks.layers.token_merging import TokenMerging
from seqzoo.blocks.parameters import parameter_groups


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(x, scores, dominant=22, contextual=4, window=88):
    """The description, one row and one token at a time, with Python lists."""
    length = len(x)
    if length <= window:
        return list(x)
    number = 2 * length // window
    size, out = length // number, []
    for s in range(number):
        places = list(range(s * size, length if s == number - 1 else (s + 1) * size))
        if len(places) <= dominant + contextual:
            out += [x[p] for p in places]
            continue
        kept = set(sorted(places, key=lambda p: (-float(scores[p]), p))[:dominant])
        rest = [p for p in places if p not in kept]
        targets = rest[:: len(rest) // contextual][:contextual]
        assigned = {t: [] for t in targets}
        for p in rest:
            if p not in targets:
                assigned[max(targets, key=lambda t: float(F.cosine_similarity(x[p], x[t], dim=0)))].append(p)
        out += [x[p] for p in sorted(kept)]
        out += [x[t] + (sum(x[p] for p in assigned[t]) / len(assigned[t]) if assigned[t] else 0) for t in targets]
    return out


def test_a_case_by_hand():
    """Ten tokens on a circle, two kept, two targets: 8 others, step 4, targets the 1st and 5th of them."""
    merging = TokenMerging(num_dominant=2, num_contextual=2, tokens_per_window=9, segments_per_window=1)
    x = torch.tensor(
        [[1, 0], [9, 9], [4, 1], [0, 2], [2, 0], [0, 3], [7, 7], [0, 6], [8, 2], [0, 3]], dtype=torch.float64
    )
    scores = torch.tensor([[0.1, 0.8, 0.2, 0.0, 0.3, 0.1, 0.9, 0.4, 0.5, 0.6]])
    out = merging(x.unsqueeze(0), scores=scores)
    # kept 1 and 6, in time order; others 0 2 3 4 5 7 8 9, targets 0 (to the right) and 5 (up);
    # 2, 4, 8 go right, mean (14/3, 1); 3, 7, 9 go up, mean (0, 11/3)
    want = [[9, 9], [7, 7], [1 + 14 / 3, 1], [0, 3 + 11 / 3]]
    torch.testing.assert_close(out.y[0], torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    assert out.source.tolist() == [[1, 6, 0, 5]]
    assert out.mask.all()


@pytest.mark.parametrize("length", [89, 131, 132, 176, 400])
def test_against_the_loop(length):
    merging, x, scores = TokenMerging(), draw(2, length, 5), draw(2, length, seed=2)
    out = merging(x, scores=scores)
    for row in range(2):
        want = torch.stack(by_hand(x[row], scores[row]))
        torch.testing.assert_close(out.y[row], want, atol=1e-12, rtol=0)
    number = 2 * length // 88
    assert out.y.shape[1] == 26 * number == merging.num_tokens(length)
    segments = merging.segments(length)
    assert [s for s, _ in segments[1:]] == [e for _, e in segments[:-1]] and segments[-1][1] == length
    assert len({e - s for s, e in segments[:-1]}) <= 1
    # 22 in time order in each segment, and sources inside their segment
    for i, (start, end) in enumerate(segments):
        source = out.source[:, 26 * i : 26 * (i + 1)]
        assert (source[:, :22].diff() > 0).all() and (source[:, 22:].diff() > 0).all()
        assert ((start <= source) & (source < end)).all()


@pytest.mark.parametrize("length", [0, 1, 26, 88])
def test_short_recordings_stay_as_they_are(length):
    x = draw(2, length, 5)
    out = TokenMerging()(x)
    assert torch.equal(out.y, x) and out.mask.all()
    assert out.source.tolist() == [list(range(length))] * 2 and TokenMerging().num_tokens(length) == length


def test_short_segments_stay_as_they_are():
    merging = TokenMerging(num_dominant=3, num_contextual=2, tokens_per_window=10)
    x = draw(1, 14, 3)  # segments of 7 tokens
    assert merging.segments(14) == [(0, 7), (7, 14)] and merging.num_tokens(14) == 10
    wider = TokenMerging(num_dominant=5, num_contextual=2, tokens_per_window=10)
    assert torch.equal(wider(x).y, x) and wider.num_tokens(14) == 14
    assert wider(draw(1, 15, 3)).y.shape[1] == 7 * 3 - 6  # 15 tokens are segments of 5


def test_pads_anywhere_are_left_out():
    merging, x = TokenMerging(), draw(4, 200, 5)
    mask = torch.zeros(4, 200, dtype=torch.bool)
    mask[0, :150] = True
    mask[1, 60:] = True
    mask[2] = torch.arange(200) % 3 > 0
    out = merging(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask=mask)
    for row in range(4):
        alone = merging(x[row, mask[row]].unsqueeze(0))
        number = alone.y.shape[1]
        assert out.mask[row].sum() == number == merging.num_tokens(int(mask[row].sum()))
        assert out.mask[row, :number].all() and not out.y[row, number:].any()
        torch.testing.assert_close(out.y[row, :number], alone.y[0], atol=1e-12, rtol=0)
        assert torch.equal(out.source[row, :number], mask[row].nonzero()[:, 0][alone.source[0]])
        assert (out.source[row, number:] == -1).all()


def attention_of(x, *, keys=17, seed=3):
    return (draw(*x.shape[:2], keys, seed=seed, dtype=x.dtype) * 2).softmax(-1)


def test_the_published_score_is_a_constant_and_the_others_are_not():
    x = draw(1, 100, 8)
    attention = attention_of(x)
    mean = TokenMerging(score="mean")._scores(x, None, None, attention)
    assert float(mean.max() - mean.min()) < 1e-15 and abs(float(mean[0, 0]) - 1 / 17) < 1e-15
    largest = TokenMerging(score="largest")._scores(x, None, None, attention)
    assert torch.equal(largest, attention.max(-1).values) and largest.std() > 0.01
    query = TokenMerging()._scores(x, None, None, None)
    want = (x[0] @ x[0].mean(0) / 8**0.5).softmax(0)
    torch.testing.assert_close(query[0].double(), want, atol=1e-6, rtol=0)
    assert query.std() > 1e-4
    chosen = {
        kind: TokenMerging(score=kind)(x, attention=attention).source[0, :22].tolist() for kind in ("largest", "query")
    }
    for kind, scores in (("largest", largest), ("query", query)):
        assert set(chosen[kind]) == set(scores[0, :50].topk(22).indices.tolist())
    # exact ties: the earlier token wins
    flat = torch.full_like(attention, 1 / 16)
    assert TokenMerging(score="mean")(x, attention=flat).source[0, :22].tolist() == list(range(22))


def test_a_query_decides_what_is_kept():
    x = torch.zeros(1, 100, 3)
    wanted = torch.arange(3, 47, 2)
    x[0, wanted, 0] = 1.0
    out = TokenMerging()(x, query=torch.tensor([[5.0, 0, 0]]))
    assert torch.equal(out.source[0, :22], wanted)


def test_gradients_reach_every_token():
    merging = TokenMerging(num_dominant=3, num_contextual=2, tokens_per_window=10)
    x, scores = draw(2, 17, 4).requires_grad_(), draw(2, 17, seed=2)
    (gradient,) = torch.autograd.grad(merging(x, scores=scores).y.square().sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    assert torch.autograd.gradcheck(lambda t: merging(t, scores=scores).y, x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TokenMerging(score="larges"), "Did you mean largest"),
        (lambda: TokenMerging(num_contextual=0), "num_contextual=0 must be an integer of at least 1"),
        (lambda: TokenMerging(segments_per_window=89), "segments_per_window=89 is above"),
        (lambda: TokenMerging(score="largest")(torch.zeros(1, 4, 2)), "needs attention"),
        (lambda: TokenMerging()(torch.zeros(4, 2)), r"expected \(B, L, D\)"),
        (lambda: TokenMerging()(torch.zeros(1, 4, 2), mask=torch.ones(1, 4)), r"expected bool \(1, 4\)"),
        (lambda: TokenMerging()(torch.zeros(1, 4, 2), scores=torch.ones(1, 5)), r"scores has shape \(1, 5\)"),
        (lambda: TokenMerging()(torch.zeros(1, 4, 2), attention=torch.ones(1, 4)), r"expected \(1, 4, S\)"),
        (lambda: AbsoluteTimeEncoding(4, num_steps=1), "num_steps=1 must be an integer of at least 2"),
        (lambda: AbsoluteTimeEncoding(4)(torch.zeros(1, 3, 5)), r"expected \(B, L, 4\)"),
        (lambda: AbsoluteTimeEncoding(4)(torch.zeros(1, 3, 4), start=torch.zeros(1)), "start is torch.float32"),
        (lambda: windows_in(5, 0), "sample_rate=0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def encoding(**options):
    layer = AbsoluteTimeEncoding(3, **options).double()
    with torch.no_grad():
        layer.table.copy_(torch.arange(layer.num_steps).double().unsqueeze(1) + torch.tensor([0.0, 0.25, 0.5]))
    return layer


def test_the_time_encoding_starts_as_nothing():
    layer, x = AbsoluteTimeEncoding(3), draw(2, 50, 3, dtype=torch.float32)
    assert layer.table.shape == (768, 3) and torch.equal(layer(x), x)
    (group,) = parameter_groups(layer, lr=1.0, weight_decay=0.1)
    assert group["weight_decay"] == 0.0


def test_the_row_of_each_frame():
    """Window i gets row i + 1, what lies beyond the recording's windows row 0, the far future the last row."""
    layer, x = encoding(num_steps=4, frames_per_window=5), torch.zeros(2, 23, 3, dtype=torch.float64)
    assert layer(x)[0, :, 0].tolist() == [1] * 5 + [2] * 5 + [3] * 13
    y = layer(x, num_windows=torch.tensor([1, 2]))
    assert y[:, :, 0].tolist() == [[1] * 5 + [0] * 18, [1] * 5 + [2] * 5 + [0] * 13]
    mask = torch.arange(23) < torch.tensor([[7], [23]])
    y = layer(x, mask=mask)
    assert y[0, :7, 0].tolist() == [1] * 5 + [2] * 2 and not y[0, 7:].any()
    assert torch.equal(y[1], layer(x)[1])


def test_pieces_get_the_rows_of_the_whole():
    layer, x = encoding(), draw(2, 100, 3)
    parts = [layer(x[:, i : i + 13], start=i) for i in range(0, 100, 13)]
    assert torch.equal(torch.cat(parts, 1), layer(x))
    start = torch.tensor([0, 34])
    assert torch.equal(layer(x, start=start)[1], layer(torch.cat((x[1:, :34], x[1:]), 1))[0, 34:])


def test_windows_are_counted_in_integers():
    """Every duration by exact fractions; 0.333333 in floats counts one too many where a third just fails to fit."""
    for samples in range(0, 50000, 7):
        third = 0
        while (third + 1) * 16000 <= samples * 3:
            third += 1
        assert windows_in(samples, 16000) == third
    hour = 3600 * 16000
    assert [windows_in(hour - 1, 16000), windows_in(hour, 16000)] == [10799, 10800]
    assert int((hour - 1) / 16000 / 0.333333) != 10799  # what floats make of it
    whole = AbsoluteTimeEncoding(2).index(17 * 256 * 3 + 17)
    assert whole[0, [0, 16, 17, 17 * 766 - 1, 17 * 766, -1]].tolist() == [1, 1, 2, 766, 767, 767]
