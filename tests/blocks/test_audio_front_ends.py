"""Audio front ends: torchaudio's own results, pieces against the whole, pads, times, gradients, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqzoo.blocks.layers.feature_norm import FeatureNorm
from seqzoo.blocks.layers.waveform import ConvStem, WaveformPatches, receptive_field
from seqzoo.blocks.protocol import detach_state, reset_rows, select_rows

RATE = 8000


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_mel(**options):
    pytest.importorskip("torchaudio", reason="spectrograms need the extra audio")
    from seqzoo.blocks.layers.spectrogram import LogMel

    return LogMel(RATE, **{"num_mels": 20, "n_fft": 256, "win_length": 200, "hop_length": 80, **options})


def mfcc(**options):
    pytest.importorskip("torchaudio", reason="spectrograms need the extra audio")
    from seqzoo.blocks.layers.spectrogram import MFCC

    return MFCC(RATE, **{"num_mfcc": 7, "num_mels": 20, "n_fft": 256, "hop_length": 80, **options})


def patches(**options):
    return WaveformPatches(6, **{"sample_rate": RATE, "patch_len": 64, **options})


def overlapping(**options):
    return patches(patch_len=50, stride=21, **options)


def stem(**options):
    return ConvStem(
        6, **{"sample_rate": RATE, "channels": 5, "kernel_sizes": (10, 3, 2), "strides": (5, 2, 2), **options}
    )


BUILDERS = [log_mel, mfcc, patches, overlapping, stem]


def stream(front, samples, sizes, lengths=None):
    """Features and numbers of frames of the samples given in pieces, then flushed, rows put together."""
    rows = samples.shape[0]
    state, parts, start = front.init_state(rows, dtype=samples.dtype), [[] for _ in range(rows)], 0
    for size in [*sizes, None]:
        if size is None:
            out = front.flush(state)
            assert out.state is None
        else:
            own = None if lengths is None else (lengths - start).clamp(0, size)
            out = front(samples[:, start : start + size], lengths=own, state=state)
            state, start = out.state, start + size
        for row in range(rows):
            parts[row].append(out.features[row, : out.lengths[row]])
            assert not out.features[row, out.lengths[row] :].any()
    assert start == samples.shape[1]
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("mel_scale, mel_norm", [("htk", None), ("slaney", "slaney")])
@pytest.mark.parametrize("compression", ["log", "db", "none"])
def test_log_mel_is_torchaudios(mel_scale, mel_norm, compression):
    transforms = pytest.importorskip("torchaudio.transforms")
    front, x = log_mel(compression=compression, mel_scale=mel_scale, mel_norm=mel_norm), draw(2, 1234)
    mel = transforms.MelSpectrogram(
        RATE, n_fft=256, win_length=200, hop_length=80, n_mels=20, center=False, norm=mel_norm, mel_scale=mel_scale
    )(x)
    want = {"log": lambda: (mel + 1e-6).log(), "db": lambda: transforms.AmplitudeToDB()(mel), "none": lambda: mel}
    got = front(x)
    assert got.state is None and got.lengths.tolist() == [13, 13]
    assert torch.equal(got.features, want[compression]().transpose(1, 2))


@pytest.mark.parametrize(
    "rate, sizes",
    [(8000, (256, 200, 80)), (16000, (512, 400, 160)), (22050, (1024, 551, 220)), (48000, (2048, 1200, 480))],
)
def test_log_mels_defaults_serve_every_rate(rate, sizes):
    """25 ms in a power of two, every 10 ms, and no band without a bin; a size given alone is torchaudio's."""
    pytest.importorskip("torchaudio", reason="spectrograms need the extra audio")
    from seqzoo.blocks.layers.spectrogram import LogMel

    front = LogMel(rate)
    spectrogram = front.mel.spectrogram
    assert (spectrogram.n_fft, spectrogram.win_length, spectrogram.hop_length) == sizes
    assert (front.dim, front.frame_length, front.hop_length) == (80, sizes[0], sizes[2])
    assert LogMel(rate, n_fft=4096).mel.spectrogram.win_length == 4096
    assert LogMel(rate, win_length=600, num_mels=8).frame_length == 1024


def test_log_mel_is_its_formula():
    """In float64, from the definition: window, discrete Fourier transform as a matrix, triangles over mel."""
    front, x = log_mel(n_fft=64, win_length=None, hop_length=20, num_mels=5).double(), draw(1, 64, dtype=torch.float64)
    n, f = torch.arange(64).double(), torch.arange(33).double()
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * n / 64)
    spectrum = torch.exp(-2j * math.pi * f[:, None] * n / 64) @ (x[0] * window).to(torch.complex128)
    edges = torch.linspace(0, 2595 * math.log10(1 + 4000 / 700), 7).double()
    edges = 700 * (10 ** (edges / 2595) - 1)
    hertz = f * RATE / 64
    rise = (hertz[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - hertz[:, None]) / (edges[2:] - edges[1:-1])
    triangles = torch.minimum(rise, fall).clamp_min(0)
    want = torch.log(spectrum.abs().square() @ triangles + 1e-6)
    torch.testing.assert_close(front(x).features[0, 0], want, atol=1e-5, rtol=0)  # its window and bands are float32


def test_mfcc_is_torchaudios():
    transforms = pytest.importorskip("torchaudio.transforms")
    x = draw(2, 1234)
    theirs = transforms.MFCC(
        RATE, 7, log_mels=True, melkwargs={"n_fft": 256, "hop_length": 80, "n_mels": 20, "center": False}
    )
    assert torch.equal(mfcc()(x).features, theirs(x).transpose(1, 2))


def test_patches_are_a_matrix_of_the_samples():
    front, x = overlapping(), draw(2, 120)
    weight, bias = front.proj.weight, front.proj.bias
    want = torch.stack([x[:, i * 21 : i * 21 + 50] @ weight.T + bias for i in range(4)], 1)
    torch.testing.assert_close(front(x).features, want, atol=1e-6, rtol=0)


def test_stem_is_its_convolutions_on_each_frame():
    """A frame on its own gives what it gives in the recording, through torch's convolution in float64."""
    front, x = stem().double(), draw(1, 200, dtype=torch.float64)
    field, hop = receptive_field((10, 3, 2), (5, 2, 2))
    assert (field, hop) == (front.frame_length, front.hop_length) == (30, 20)
    got = front(x).features[0]
    assert got.shape == (9, 6)
    for i in range(9):
        y = x[:, i * hop : i * hop + field].unsqueeze(1)
        for conv, norm in zip(front.convs, front.norms, strict=True):
            y = F.conv1d(y, conv.weight, conv.bias, conv.stride)
            y = F.gelu(F.layer_norm(y.mT, y.shape[1:2], norm.weight, norm.bias).mT)
        assert y.shape == (1, 6, 1)
        torch.testing.assert_close(got[i], y[0, :, 0], atol=1e-12, rtol=0)


def test_the_stems_defaults_are_the_papers():
    assert receptive_field((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)) == (400, 320)
    assert ConvStem(4, sample_rate=16000).latency == 0.025


@pytest.mark.slow  # the import of transformers
def test_the_stem_is_the_encoder_of_wav2vec2():
    """transformers' weights give transformers' features, in its variant with layer norms."""
    theirs = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    from transformers import Wav2Vec2Config

    config = Wav2Vec2Config(conv_dim=(8,) * 7, feat_extract_norm="layer", conv_bias=True)
    encoder = theirs.Wav2Vec2FeatureEncoder(config).double().eval()
    front, x = ConvStem(8, sample_rate=16000).double(), draw(2, 3000, dtype=torch.float64)
    for layer, conv, norm in zip(encoder.conv_layers, front.convs, front.norms, strict=True):
        conv.load_state_dict(layer.conv.state_dict())
        norm.load_state_dict(layer.layer_norm.state_dict())
    torch.testing.assert_close(front(x).features, encoder(x).mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("build", BUILDERS)
def test_pieces_equal_the_whole(build, tail):
    front, x = build(tail=tail), draw(2, 1111)
    whole = front(x)
    assert torch.equal(whole.lengths, front.num_frames(torch.tensor([1111, 1111])))
    for sizes in ([1111], [1, 255, 0, 300, 1, 1, 553], [79] * 14 + [5], [500, 611]):
        for row, got in enumerate(stream(front, x, sizes)):
            torch.testing.assert_close(got, whole.features[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("build", BUILDERS)
def test_pads_are_never_read(build, tail):
    """Rows of different lengths, NaN beyond them, whole and in pieces, against each row alone."""
    front, x = build(tail=tail), draw(5, 700)
    lengths = torch.tensor([700, 431, 256, 13, 0])
    padded = x.masked_fill(torch.arange(700) >= lengths[:, None], math.nan)
    whole = front(padded, lengths=lengths)
    pieces = stream(front, padded, [100, 33, 400, 167], lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = front(x[row : row + 1, :length])
        number = alone.features.shape[1]
        assert whole.lengths[row] == alone.lengths[0] == number == front.num_frames(length)
        torch.testing.assert_close(whole.features[row, :number], alone.features[0], atol=1e-6, rtol=0)
        assert not whole.features[row, number:].any()
        torch.testing.assert_close(pieces[row], alone.features[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", range(0, 120, 3))
def test_numbers_of_frames_by_counting(length):
    """ "drop" counts the frames that fit; "pad" adds one when a sample is left that no frame has read."""
    fit = sum(i * 21 + 50 <= length for i in range(10))
    left = length > ((fit - 1) * 21 + 50 if fit else 0)
    assert overlapping().num_frames(length) == fit
    assert overlapping(tail="pad").num_frames(length) == fit + left
    assert overlapping(tail="pad")(torch.zeros(1, length)).features.shape[1] == fit + left


@pytest.mark.parametrize("patch_len, stride", [(1, 1), (5, 1), (5, 2), (5, 5)])
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_recordings_of_every_small_length(patch_len, stride, tail):
    """Whole, one sample at a time, and by counting: as many frames, with the same features."""
    front = patches(patch_len=patch_len, stride=stride, tail=tail)
    for length in range(14):
        x = draw(1, length)
        whole = front(x).features[0]
        fit = sum(i * stride + patch_len <= length for i in range(14))
        left = tail == "pad" and length > ((fit - 1) * stride + patch_len if fit else 0)
        assert len(whole) == fit + left == front.num_frames(length) == int(front.num_frames(torch.tensor(length)))
        (got,) = stream(front, x, [1] * length)
        torch.testing.assert_close(got, whole, atol=1e-6, rtol=0)


def test_states_reorder_reset_and_count_frames():
    front, x = overlapping(), draw(3, 200)
    first = front(x[:, :90], state=front.init_state(3)).state
    assert first.given.tolist() == [2, 2, 2] and first.held.tolist() == [48, 48, 48]
    kept = first.waiting.clone()
    turned = front(x[[2, 0], 90:], state=select_rows(first, torch.tensor([2, 0])))
    torch.testing.assert_close(turned.features, front(x).features[[2, 0], 2:], atol=1e-6, rtol=0)
    fresh = reset_rows(detach_state(first), torch.tensor([True, False, False]), front.init_state(3))
    again = front(x[:, 90:], state=fresh)
    number = front.num_frames(110)
    torch.testing.assert_close(again.features[0, :number], front(x[:1, 90:]).features[0], atol=1e-6, rtol=0)
    assert again.state.given.tolist() == [number, 8, 8]
    assert torch.equal(first.waiting, kept)


def test_times_are_the_centres_and_spans_touch():
    front = log_mel()  # frames of 256 samples every 80, at 8 kHz
    assert front.latency == 0.032
    assert front.times(3).dtype == torch.float64
    assert front.times(3).tolist() == [0.016, 0.026, 0.036]
    assert torch.equal(front.times(5)[3:], front.times(2, start=3))
    assert front.span(0, 0) == (0.011, 0.021)
    assert front.span(1, 3) == (0.021, 0.051)
    assert stem().span(0, 0) == (5 / RATE, 25 / RATE)
    # a click falls into the frame whose span holds it
    x = torch.zeros(1, 4000)
    x[0, 2000] = 1.0
    loudest = int(front(x).features[0].sum(1).argmax())
    start, end = front.span(loudest, loudest)
    assert start <= 2000 / RATE <= end


@pytest.mark.parametrize("build", BUILDERS)
def test_the_future_has_no_influence(build):
    front, x = build(), draw(1, 1000)
    y = x.clone()
    y[:, 600:] += 1e3
    known = front.num_frames(600)
    assert torch.equal(front(x).features[:, :known], front(y).features[:, :known])
    assert not torch.equal(front(x).features[:, known], front(y).features[:, known])


@pytest.mark.parametrize("build", [patches, overlapping, stem])
def test_gradients_reach_parameters_and_samples(build):
    front = build(norm=FeatureNorm(6, "affine")).double()
    x = draw(2, 100, dtype=torch.float64).requires_grad_()
    lengths = torch.tensor([100, 70])
    weight = draw(2, front.num_frames(100), 6, seed=3, dtype=torch.float64)
    whole = front(x, lengths=lengths).features
    want = torch.autograd.grad((whole * weight).sum(), (x, *front.parameters()))
    assert all(g.abs().sum() > 0 for g in want)
    assert not want[0][1, 70:].any()
    rows = stream(front, x, [40, 3, 57], lengths)
    loss = sum((row * weight[i, : len(row)]).sum() for i, row in enumerate(rows))
    for a, b in zip(torch.autograd.grad(loss, (x, *front.parameters())), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda s: front(s).features, x.detach()[:1, :64].clone().requires_grad_())


def test_fixed_statistics_measured_over_batches():
    front, x = patches(), draw(4, 640)
    lengths = torch.tensor([640, 300, 64, 10])
    out = front(x, lengths=lengths)
    rows = torch.cat([f[:n] for f, n in zip(out.features, out.lengths, strict=True)]).double()
    for kind in ("fixed", "affine"):
        norm = FeatureNorm(6, kind).measure((f[None], n[None]) for f, n in zip(out.features, out.lengths, strict=True))
        want = (rows - rows.mean(0)) / rows.std(0, correction=0)
        torch.testing.assert_close(norm(rows.float()[None])[0].double(), want, atol=1e-5, rtol=0)
    assert set(FeatureNorm(6).state_dict()) == {"mean", "std"}
    given = FeatureNorm(2, mean=[1.0, 2.0], std=4.0)
    assert given(torch.tensor([[[5.0, 6.0]]])).tolist() == [[[1.0, 1.0]]]
    with pytest.raises(ValueError, match="1 frames are too few"):
        FeatureNorm(6).measure([(torch.zeros(1, 1, 6), None)])


def test_the_norm_of_whole_recordings_ignores_pads_and_refuses_to_stream():
    front, x = patches(norm=FeatureNorm(6, "utterance", eps=0.0)), draw(2, 640)
    lengths = torch.tensor([640, 300])
    out = front(x, lengths=lengths)
    for row, number in enumerate(out.lengths.tolist()):
        one = out.features[row, :number].double()
        torch.testing.assert_close(one.mean(0), torch.zeros(6).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(one.std(0, correction=0), torch.ones(6).double(), atol=1e-5, rtol=0)
        assert not out.features[row, number:].any()
    with pytest.raises(ValueError, match='"fixed", "affine"'):
        front.init_state(2)
    with pytest.raises(ValueError, match="cannot stream"):
        front(x, state=patches().init_state(2))


def test_precision_is_that_of_the_module():
    front, x = log_mel(), draw(1, 800)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = front(x).features
    assert inside.dtype == torch.float32 and torch.equal(inside, front(x).features)
    assert front.double()(x).features.dtype == torch.float64
    assert front.init_state(1).waiting.dtype == torch.float64 and patches().init_state(1).waiting.dtype == torch.float32
    with pytest.raises(ValueError, match=r"call its float\(\)"):
        log_mel().bfloat16()(x)


@pytest.mark.parametrize(
    "build, options, message",
    [
        (patches, {"stride": 65}, "stride|hop_length=65 is above frame_length=64"),
        (patches, {"tail": "dorp"}, "Did you mean drop"),
        (patches, {"patch_len": 0}, "frame_length=0 must be a positive integer"),
        (patches, {"norm": FeatureNorm(5)}, "norm is of 5 features"),
        (stem, {"norm_layers": "group"}, "cannot stream; norms that can: layer, none"),
        (stem, {"norm_layers": "lyaer"}, "Did you mean layer"),
        (stem, {"activation": "gelo"}, "Did you mean gelu"),
        (stem, {"strides": (5, 2)}, "3 kernel_sizes and 2 strides"),
        (stem, {"strides": (11, 2, 2)}, "stride=11 must be between 1 and its kernel size 10"),
        (log_mel, {"compression": "bd"}, "Did you mean db"),
        (log_mel, {"mel_scale": "hkt"}, "Did you mean htk"),
        (log_mel, {"f_max": 4001.0}, r"<= 4000.0 Hz"),
        (log_mel, {"win_length": 257}, "win_length=257 must be between 1 and n_fft=256"),
        (log_mel, {"floor": 0.0}, "floor=0.0 must be above 0"),
        (log_mel, {"num_mels": 128}, "num_mels=128: .* hold no bin .* most that do: 86,"),
        (mfcc, {"num_mfcc": 21}, "num_mfcc=21 must be between 1 and num_mels=20"),
    ],
)
def test_bad_options(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_inputs():
    front = patches()
    for call, message in [
        (lambda: front(torch.zeros(1, 2, 100)), r"shape \(1, 2, 100\), expected \(B, T\), one channel"),
        (lambda: front(torch.zeros(1, 100, dtype=torch.int16)), r"torch.int16; expected floating-point .* \[-1, 1\]"),
        (lambda: front(torch.zeros(1, 100), lengths=torch.tensor([101])), "101, but rows have 100 samples"),
        (lambda: front(torch.zeros(1, 100), lengths=torch.tensor([[1]])), r"expected int64 \(1,\)"),
        (lambda: front(torch.zeros(1, 100), state=front.init_state(2)), r"\(2, 63\), expected \(1, 63\)"),
        (lambda: front(torch.zeros(1, 100), state=torch.zeros(1)), "expected the FrontEndState"),
        (lambda: FeatureNorm(3, "fixd"), "Did you mean fixed"),
        (lambda: FeatureNorm(3, mean=[0.0, 1.0]), "expected one number or 3"),
        (lambda: FeatureNorm(3, std=0.0), "must be above 0"),
        (lambda: FeatureNorm(3, "utterance").measure([]), "no statistics to measure"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_they_sit_in_a_model_and_load():
    model = nn.Sequential()
    model.front = stem(norm=FeatureNorm(6, mean=1.0, std=2.0))
    other = nn.Sequential()
    other.front = stem(norm=FeatureNorm(6))
    other.load_state_dict(model.state_dict())
    x = draw(1, 100)
    assert torch.equal(model.front(x).features, other.front(x).features)
