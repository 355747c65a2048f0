"""Time in the tokens: timestamps between frames and their positions, relative time words, a vector for a time."""

import numpy as np
import pytest
import torch

from seqzoo.blocks.layers.time_tokens import FrameTimeEncoding, RelativeTimeTokenizer
from seqzoo.blocks.layers.timestamps import (
    VideoPart,
    extract_timestamps,
    frame_stamp,
    inject_timestamps,
    number_tokens,
    prefix_timestamps,
    time_stamp,
)

VIDEO = 7


def tokenize(text):
    """A token for each character, numbers in pairs, so that lengths differ from the text's."""
    return [1000 + ord(c) for c in text]


def decode(ids):
    return "".join(chr(i - 1000) if i > 1000 else "?" for i in ids)


def by_hand(parts, stamps):
    """The rule of the issue, token by token: (id, t, h, w). stamps: whether times are written."""
    out, last = [], -1  # last: the number that text would go on from
    for part in parts:
        if not isinstance(part, VideoPart):
            for token in part:
                last += 1
                out.append((token, last, last, last))
            continue
        (steps, height, width), base, temporal = part.grid, last + 1, last
        for step in range(steps):
            temporal += 1
            group = [(VIDEO, temporal, base + r, base + c) for r in range(height) for c in range(width)]
            out += group
            if not stamps:
                continue
            if step + 1 == steps:
                temporal = max(max(line[1:]) for line in group)
            for token in tokenize(f"<{round(float(part.times[step * (len(part.times) // steps)]), 1)}s>"):
                temporal += 1
                out.append((token, temporal, temporal, temporal))
        last = temporal if stamps else max(max(line[1:]) for line in out)
    return out


def lines(stream):
    return list(zip(stream.ids.tolist(), *stream.positions.tolist(), strict=True))


PARTS = [
    [[1, 2, 3], VideoPart((3, 2, 4), (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)), [4, 5]],
    [VideoPart((1, 5, 1), (61.04,))],
    [[1], VideoPart((2, 1, 1), (10.0, 12.46)), VideoPart((2, 3, 2), (100.0, 0.25, 200.06, 0.35)), [9] * 4],
    [[3, 3], VideoPart((4, 1, 9), (0, 1, 2, 3)), [8], VideoPart((1, 1, 1), (5,))],
]


@pytest.mark.parametrize("parts", PARTS)
def test_injected_timestamps_follow_the_rule(parts):
    stream = inject_timestamps(parts, tokenize, video_token=VIDEO)
    assert lines(stream) == by_hand(parts, True)
    videos = [p for p in parts if isinstance(p, VideoPart)]
    text = sum(len(p) for p in parts if not isinstance(p, VideoPart))
    stamps = sum(len(tokenize(time_stamp(t))) for v in videos for t in v.step_times())
    assert len(stream.ids) == sum(np.prod(v.grid) for v in videos) + text + stamps
    # text has the same number in all rows, tokens of videos are counted through
    on_text = stream.visual < 0
    assert (stream.positions[:, on_text] == stream.positions[0, on_text]).all()
    assert stream.visual[~on_text].tolist() == list(range(sum(int(np.prod(v.grid)) for v in videos)))


def test_time_numbers_rise_from_step_to_step_and_text_goes_on_from_the_largest():
    part = VideoPart((5, 3, 2), [float(i) for i in range(10)])
    stream = inject_timestamps([[1, 2], part, [3]], tokenize, video_token=VIDEO)
    time = stream.positions[0, stream.visual >= 0].unflatten(0, (5, 6))
    assert (time == time[:, :1]).all() and (time[1:, 0] > time[:-1, 0]).all()
    assert (
        stream.positions[1:, stream.visual >= 0].unflatten(1, (5, 6)) == stream.positions[1:, 2:8].unsqueeze(1)
    ).all()
    # a grid that is larger than what was numbered before it: the text behind must not fall into it
    wide = inject_timestamps([VideoPart((1, 1, 50), (1.0,)), [3]], tokenize, video_token=VIDEO)
    assert wide.positions[0, 50:].tolist() == list(range(50, 50 + 6 + 1))


@pytest.mark.parametrize("parts", PARTS)
def test_without_timestamps_the_numbers_are_the_stock_ones(parts):
    stock = number_tokens(parts, video_token=VIDEO)
    assert lines(stock) == by_hand(parts, False)
    # taking the times out of the text and numbering again gives it back
    stream = inject_timestamps(parts, tokenize, video_token=VIDEO)
    grids = [p.grid for p in parts if isinstance(p, VideoPart)]
    back = extract_timestamps(stream.ids, grids, decode, tokenize=tokenize, video_token=VIDEO)
    assert lines(number_tokens(back, video_token=VIDEO)) == lines(stock)
    found = [p for p in back if isinstance(p, VideoPart)]
    for video, given in zip(found, (p for p in parts if isinstance(p, VideoPart)), strict=True):
        assert list(video.times) == [round(float(t), 1) for t in given.step_times()]
        # each video has its own times: again the same stream
    assert lines(inject_timestamps(back, tokenize, video_token=VIDEO)) == lines(stream)


def test_frames_with_their_time_before_them():
    part = VideoPart((3, 2, 2), (0.0, 1.5, 12.0))
    stream = prefix_timestamps([[1], part, [2]], tokenize, video_token=VIDEO)
    want, last = [(1, 0, 0, 0)], 0
    for text in ("0.0s", "1.5s", "12.0s"):
        for token in tokenize(text):
            last += 1
            want.append((token, last, last, last))
        start = last + 1
        want += [(VIDEO, start, start + r, start + c) for r in (0, 1) for c in (0, 1)]
        last = start + 1
    assert lines(stream) == [*want, (2, last + 1, last + 1, last + 1)]
    assert frame_stamp(12) == "12.0s" and time_stamp(12.54) == "<12.5s>"


def test_streams_that_are_not_of_the_form_are_refused():
    with pytest.raises(ValueError, match="3 steps came with 2 times"):
        inject_timestamps([VideoPart((3, 1, 1), (0.0, 1.0))], tokenize, video_token=VIDEO)
    with pytest.raises(ValueError, match="at least 1"):
        number_tokens([VideoPart((1, 0, 2))], video_token=VIDEO)
    stock = number_tokens([VideoPart((2, 1, 2)), [1]], video_token=VIDEO)
    with pytest.raises(ValueError, match="no time such as"):
        extract_timestamps(stock.ids, [(2, 1, 2)], decode, tokenize=tokenize, video_token=VIDEO)
    with pytest.raises(ValueError, match="fewer than 9"):
        extract_timestamps(stock.ids, [(1, 3, 3)], decode, tokenize=tokenize, video_token=VIDEO)
    stream = inject_timestamps([VideoPart((1, 1, 2), (0.0,))] * 2, tokenize, video_token=VIDEO)
    with pytest.raises(ValueError, match="more videos"):
        extract_timestamps(stream.ids, [(1, 1, 2)], decode, tokenize=tokenize, video_token=VIDEO)
    assert number_tokens([], video_token=VIDEO).positions.shape == (3, 0)


@pytest.mark.parametrize(("number", "duration"), [(100, 37.2), (2, 1.0), (7, 0.001), (100, 36000.0)])
def test_relative_times_err_by_no_more_than_half_a_word(number, duration):
    tokenizer = RelativeTimeTokenizer(number)
    times = np.linspace(0, duration, 1001)
    back = np.array([tokenizer.decode(tokenizer.encode(t, duration), duration) for t in times])
    bound = duration / (2 * (number - 1))
    assert np.abs(back - times).max() <= bound * (1 + 1e-9) and np.abs(back - times).max() > 0.9 * bound
    assert [tokenizer.encode(tokenizer.decode(t, duration), duration) for t in range(number)] == list(range(number))
    assert (tokenizer.encode(-1, duration), tokenizer.encode(duration + 1, duration)) == (0, number - 1)
    assert len(tokenizer.tokens) == number and tokenizer.tokens[-1] == f"<t{number - 1}>"


def test_answers_are_read_by_their_first_two_times():
    tokenizer = RelativeTimeTokenizer(101)
    assert tokenizer.write(25.2, 50.0, 100.0) == "<t25> <t50>"
    assert tokenizer.read("From <t25> to <t50>, not <t90>.", 200.0) == (50.0, 100.0)
    assert tokenizer.read("<t50> <t25>", 100.0) == (25.0, 50.0)
    assert tokenizer.read("<t30> <t999>", 100.0) == (30.0, 100.0)  # within the video
    for text in ("", "at <t5> only", "<t> <tx>"):
        assert tokenizer.read(text, 60.0) == (0.0, 60.0)
    with pytest.raises(ValueError, match="duration=0"):
        tokenizer.read("", 0)
    with pytest.raises(ValueError, match="num_tokens=1"):
        RelativeTimeTokenizer(1)


def test_time_of_a_frame_is_counted_in_whole_microseconds():
    layer = FrameTimeEncoding(4, num_steps=10, seconds_per_step=0.1)
    assert not layer(torch.rand(2, 3)).any()  # starts at zero
    torch.nn.init.normal_(layer.table)
    times = torch.tensor([[0.0, 0.099999, 0.1, 0.7, 0.8999999, 1e9, -3.0, float("nan")]], dtype=torch.float64)
    assert layer.index(times).tolist() == [[1, 1, 2, 8, 9, 9, 1, 0]]
    # every border of every step, however it is rounded in binary
    border = torch.arange(8, dtype=torch.float64) / 10
    assert layer.index(border).tolist() == layer.index(border.float()).tolist() == list(range(1, 9))
    assert torch.equal(layer(times)[0, 3], layer.table[8])
    layer(times).sum().backward()
    assert layer.table.grad.abs().sum() > 0
    for options in ({"num_steps": 1}, {"seconds_per_step": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FrameTimeEncoding(4, **options)
