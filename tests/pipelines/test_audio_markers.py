"""Temporal markers: every time there and back, ranges in text, the first embeddings."""

import re

import pytest
import torch

from seqzoo.pipelines.audio import markers
from seqzoo.pipelines.errors import UserError


def test_there_are_twenty_and_the_papers_example():
    assert len(set(markers.MARKERS)) == 20
    assert markers.MARKERS[0] == "<a_0>" and markers.MARKERS[19] == "<f_9>"
    assert markers.encode_time(12.3) == "<a_1><a_2><f_3>"
    assert markers.encode_time(5) == "<a_5><f_0>" and markers.encode_time("0.07") == "<a_0><f_1>"


def test_every_time_there_and_back():
    """All ten thousand, through text and through token numbers; the numbers are those of the decimal notation."""
    for number in range(10000):
        seconds = number / 10
        text = markers.encode_time(seconds)
        assert markers.decode_time(text) == seconds
        written = f"{number // 10}.{number % 10}"
        assert re.findall(r"\d", text) == list(written.replace(".", ""))
        assert re.findall("[af]", text) == ["a"] * (len(written) - 2) + ["f"]
        assert "".join(markers.MARKERS[i] for i in markers.time_indices(written)) == text
        assert markers.decode_text(text) == written


@pytest.mark.parametrize("value, want", [(0.25, 3), (0.15, 2), (0.35, 4), (1.0049, 10), ("999.94", 9999), (2.675, 27)])
def test_halves_round_up_as_written(value, want):
    """0.15 in binary is a little less than 0.15, 0.35 too: what counts is how they are written."""
    assert markers.tenths(value) == want


@pytest.mark.parametrize("value", [-0.1, 999.95, 1000, "nan", "inf", float("nan"), "12:30", None])
def test_times_outside(value):
    with pytest.raises(UserError, match=r"0\.0 to 999\.9 s|is no time in seconds"):
        markers.encode_time(value)


def test_ranges_in_text_and_back():
    text = "A dog barks at 3.25 - 12.0, then rain from 100-250.5. It stops."
    marked = markers.encode_ranges(text)
    assert marked == (
        "A dog barks at <a_3><f_3> - <a_1><a_2><f_0>, "
        "then rain from <a_1><a_0><a_0><f_0>-<a_2><a_5><a_0><f_5>. It stops."
    )
    assert markers.find_ranges(marked) == [(3.3, 12.0), (100.0, 250.5)]
    assert markers.decode_text(marked) == "A dog barks at 3.3 - 12.0, then rain from 100.0-250.5. It stops."
    assert markers.encode_ranges(marked) == marked


@pytest.mark.parametrize(
    "text",
    [
        "three dogs, 12.5 seconds",
        "on 2024-05-06",
        "1-2-3",
        "9 - 3",
        "1000 - 2000",
        "1.5.2 - 3",
        "1 - 2.3.4",
        "room B2 - 3",
        "12 - 3rd",
        "999.97 - 999.99",
        "",
    ],
)
def test_what_is_no_range_stays(text):
    assert markers.encode_ranges(text) == text
    assert markers.find_ranges(text) == []


def test_every_pair_of_some_times_there_and_back():
    some = [0.0, 0.1, 9.9, 10.0, 99.9, 100.0, 456.7, 999.9]
    pairs = [(a, b) for a in some for b in some if a <= b]
    text = "; ".join(f"{a} - {b}" for a, b in pairs)
    assert markers.find_ranges(markers.encode_ranges(text)) == pairs
    assert markers.decode_text(markers.encode_ranges(text)) == text


def test_broken_markers():
    for text in ("<a_1>", "<f_1>", "<a_1><a_2><a_3><a_4><f_5>", "12.3", "<a_1><f_2><f_3>"):
        with pytest.raises(UserError, match="is no time in markers, such as <a_1><a_2><f_3>"):
            markers.decode_time(text)
    assert markers.decode_text("<a_1> and <f_2>") == "<a_1> and <f_2>"
    assert markers.find_ranges("<a_9><f_0> - <a_3><f_0>") == []


def test_first_embeddings_are_those_of_digits_and_point():
    """With bytes as tokens: digits are 48 to 57, the point is 46."""
    table, head = torch.randn(256, 4), torch.randn(256, 4)
    new, out, ids = markers.extend_tables(table, head, list(range(48, 58)), 46)
    assert new.shape == out.shape == (276, 4)
    assert torch.equal(new[:256], table) and torch.equal(out[:256], head)
    for digit in range(10):
        assert torch.equal(new[ids[f"<a_{digit}>"]], table[48 + digit])
        assert torch.equal(new[ids[f"<f_{digit}>"]], (table[46] + table[48 + digit]) / 2)
    assert torch.equal(out[256:], new[256:])
    assert list(ids.values()) == list(range(256, 276))
    for call in (
        lambda: markers.marker_embeddings(table, [1, 2], 46),
        lambda: markers.marker_embeddings(table, list(range(250, 260)), 46),
        lambda: markers.extend_tables(table, head[:5], list(range(48, 58)), 46),
    ):
        with pytest.raises(UserError):
            call()
