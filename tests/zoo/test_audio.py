"""Audio models: pads and other rows change nothing, pieces give the whole, stacks of frames, heads of words."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.layers.front_ends import FRONT_ENDS, StackedFrames, create_front_end
from seqzoo.blocks.layers.spectrogram import LogMel
from seqzoo.blocks.registry import list_mixers
from seqzoo.zoo import create_model, load_model, save_model
from seqzoo.zoo._audio import AudioEncoder

RATE = 1000
FRONT = {"name": "log_mel", "num_mels": 6, "n_fft": 64, "hop_length": 20, "stack": 3}
OPTIONS = {
    "long_vq": {"codebook_size": 8, "chunk_size": 4},
    "mega": {"chunk_size": 4},
    "tcnca": {"chunk_size": 4, "kernel_size": 3, "dilation_factor": 2},
    "mamba2": {"head_dim": 8, "d_state": 8},
}


def samples(*lengths, seed=1):
    """Rows of noise of these lengths, with more noise behind, which nobody may hear."""
    state = torch.Generator().manual_seed(seed)
    rows = 0.1 * torch.randn(len(lengths), max(lengths) + 37, generator=state, dtype=torch.float64)
    return rows, torch.tensor(lengths)


def small(kind, mixer="softmax", **options):
    torch.manual_seed(0)
    if isinstance(mixer, str):
        mixer = {"name": mixer, **OPTIONS.get(mixer, {})}
    options = {"num_classes": 3, "sample_rate": RATE, "front_end": FRONT, "dim": 16, "depth": 2, **options}
    return create_model(f"audio_{kind}_tiny", mixer=mixer, **options).eval().double()


@pytest.mark.parametrize("mixer", list_mixers(pattern="self"))
def test_pads_and_other_rows_change_nothing(mixer):
    classifier, detector = small("classifier", mixer), small("detector", mixer)
    rows, lengths = samples(700, 333, 40)
    with torch.no_grad():
        together, frames = classifier(rows, lengths), detector(rows, lengths)
        for i, length in enumerate(lengths.tolist()):
            row = rows[i : i + 1, :length]
            torch.testing.assert_close(classifier(row).y[0], together.y[i], atol=1e-10, rtol=0, msg=mixer)
            alone = detector(row)
            assert alone.lengths[0] == frames.lengths[i] == alone.y.shape[1]
            torch.testing.assert_close(alone.y[0], frames.y[i, : alone.y.shape[1]], atol=1e-10, rtol=0, msg=mixer)
            assert not frames.y[i, alone.y.shape[1] :].any()


@pytest.mark.parametrize("mixer", list_mixers(streaming=True))
def test_pieces_of_any_size_give_the_whole(mixer):
    model = small("detector", mixer, causal=True, time_encoding={"frames_per_window": 2, "num_steps": 5})
    torch.nn.init.normal_(model.encoder.time_encoding.table)
    rows, lengths = samples(700, 333)
    cuts = [0, 1, 30, 31, 300, 333, 500, 700]
    with torch.no_grad():
        whole, parts = model(rows[:, :700], lengths), [[], []]
        state = model.init_state(2, dtype=torch.float64)
        for first, last in itertools.pairwise(cuts):
            own = (lengths - first).clamp(0, last - first)
            out = model(rows[:, first:last], own, state=state)
            state = out.state
            for row in range(2):
                parts[row].append(out.y[row, : out.lengths[row]])
        out = model.flush(state)
        for row in range(2):
            parts[row].append(out.y[row, : out.lengths[row]])
            found, wanted = torch.cat(parts[row]), whole.y[row, : whole.lengths[row]]
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0, msg=mixer)
    assert whole.lengths.tolist() == model.encoder.front_end.num_frames(lengths).tolist()


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_stack_is_its_frames_in_a_row(name):
    options = {"name": name, "n_fft": 64, "num_mels": 6, "num_mfcc": 4} if name == "mfcc" else {"name": name}
    options |= {"n_fft": 64, "num_mels": 6} if name == "log_mel" else {}
    torch.manual_seed(0)
    one = create_front_end({**options, "tail": "drop"}, sample_rate=RATE).double()
    three = StackedFrames(one.inner, 3)
    rows, _ = samples(4000)
    frames, stacks = one(rows).features, three(rows).features
    number = frames.shape[1] // 3
    assert stacks.shape == (1, number, 3 * one.dim) and number > 1
    torch.testing.assert_close(stacks, frames[:, : 3 * number].reshape(1, number, -1), atol=1e-12, rtol=0)
    # the centre of a stack is that of its middle frame
    torch.testing.assert_close(three.times(number), one.times(3 * number)[1::3])


def test_default_front_end_loses_no_sample():
    front = create_front_end("log_mel", sample_rate=8000)
    assert front.tail == "pad" and front.num_frames(1) == 1
    assert front.num_frames(front.frame_length + 1) == 2


def test_measured_features_have_mean_0_and_deviation_1():
    encoder = AudioEncoder(sample_rate=RATE, front_end={**FRONT, "norm": "fixed"}, dim=8, mixer="linear").double()
    rows, lengths = samples(900, 400, 650)
    encoder.measure([(0.3 * rows + 0.1, None)])  # of earlier statistics nothing stays
    encoder.measure([(rows, lengths), (2 * rows, None)])
    found = [encoder.features(rows, lengths), encoder.features(2 * rows)]
    values = torch.cat([out.features[i, : out.lengths[i]] for out in found for i in range(3)])
    torch.testing.assert_close(values.mean(0), torch.zeros(18).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(18).double(), atol=1e-6, rtol=0)


def test_time_encoding_starts_as_nothing_and_counts_from_start():
    plain, timed = small("detector"), small("detector", time_encoding={"frames_per_window": 2, "num_steps": 9})
    timed.load_state_dict(plain.state_dict(), strict=False)
    rows, _ = samples(700)
    assert torch.equal(plain(rows).y, timed(rows).y)
    torch.nn.init.normal_(timed.encoder.time_encoding.table)
    features = timed.encoder.features(rows)
    later = timed.detect(features.features, features.lengths, start=4).y
    assert not torch.allclose(later, timed(rows).y)
    shifted = timed.encoder.time_encoding.table.detach()[[3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]]
    with torch.no_grad():
        x = timed.encoder.proj(features.features)
        number = x.shape[1]
        y = timed.encoder.backbone(x + shifted[:number]).y
        torch.testing.assert_close(later, timed.out(y), atol=1e-12, rtol=0)


def test_token_merging_shortens_what_the_backbone_reads():
    merging = {"num_dominant": 3, "num_contextual": 1, "tokens_per_window": 8, "segments_per_window": 1}
    model = small("classifier", token_merging=merging)
    rows, lengths = samples(1200, 240)
    out = model(rows, lengths)
    tokens = model.encoder.front_end.num_frames(lengths).tolist()
    assert out.lengths.tolist() == [model.encoder.token_merging.num_tokens(n) for n in tokens]
    assert out.lengths[0] < tokens[0] and out.lengths[1] == tokens[1]
    alone = model(rows[1:, :240]).y[0]
    torch.testing.assert_close(out.y[1], alone, atol=1e-10, rtol=0)


def test_a_head_of_words_compares_directions():
    model = small("detector", head="text", text_dim=5)
    vectors = torch.randn(3, 5, dtype=torch.float64)
    model.set_label_vectors(4 * vectors)
    rows, _ = samples(500)
    with torch.no_grad():
        y = model.encoder(rows).y
        wanted = model.scale.exp() * F.cosine_similarity(model.out(y).unsqueeze(2), vectors, dim=-1) + model.bias
        torch.testing.assert_close(model(rows).y, wanted, atol=1e-10, rtol=0)
        other = torch.randn(2, 5, dtype=torch.float64)
        found = model.score(y, other)
        torch.testing.assert_close(
            found, model.scale.exp() * F.cosine_similarity(model.out(y).unsqueeze(2), other, dim=-1) + model.bias
        )
    assert math.isclose(torch.sigmoid(model.bias).item(), 0.03, rel_tol=1e-6)


def test_label_vectors_are_saved_with_the_model(tmp_path):
    model = create_model("audio_detector_tiny", num_classes=2, head="text", text_dim=4, sample_rate=8000)
    model.set_label_vectors(torch.tensor([[3.0, 0, 0, 4], [0, 1, 0, 0]]))
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.label_vectors.tolist() == [[pytest.approx(0.6), 0, 0, pytest.approx(0.8)], [0, 1, 0, 0]]
    rows = 0.1 * torch.randn(1, 4000)
    assert torch.equal(again.eval()(rows).y, model.eval()(rows).y)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"front_end='log_mell' is unknown.*log_mel"):
        small("detector", front_end="log_mell")
    with pytest.raises(ValueError, match=r"'log_mel' has no option 'num_mel'.*num_mels"):
        small("detector", front_end={"name": "log_mel", "num_mel": 6})
    with pytest.raises(ValueError, match=r"front_end.norm='fix' is unknown.*fixed"):
        small("detector", front_end={**FRONT, "norm": "fix"})
    with pytest.raises(ValueError, match="stack=0 must be a positive integer"):
        small("detector", front_end={**FRONT, "stack": 0})
    with pytest.raises(ValueError, match=r"pooling='mena'.*mean"):
        small("classifier", pooling="mena")
    with pytest.raises(ValueError, match=r"head='words'.*text"):
        small("detector", head="words")
    with pytest.raises(ValueError, match="num_classes=-1 must be a positive integer"):
        small("detector", num_classes=-1)
    with pytest.raises(ValueError, match='words can be asked for with head="text"'):
        small("detector").score(torch.zeros(1, 2, 16), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"normalised as a stack"):
        inner = LogMel(8000, norm=create_front_end({"name": "log_mel", "norm": "fixed"}, sample_rate=8000).norm)
        StackedFrames(inner, 2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "causal=True"),
        ({"mixer": "softmax", "causal": True, "front_end": {**FRONT, "norm": "utterance"}}, "whole recordings"),
    ],
)
def test_what_cannot_stream_says_why(options, why):
    with pytest.raises(ValueError, match=f"cannot stream.*{why}"):
        small("detector", **options).init_state(1)
