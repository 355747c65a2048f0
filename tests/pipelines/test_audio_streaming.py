"""Recordings through a model in pieces: the whole, whatever the pieces, in memory that does not grow."""

import numpy as np
import pytest
import soundfile
import torch

from seqzoo.pipelines.audio.reader import AudioReader
from seqzoo.pipelines.audio.streaming import FileSource, stream
from seqzoo.pipelines.errors import UserError
from seqzoo.zoo import create_model

RATE = 1000
FRONT = {"name": "log_mel", "num_mels": 6, "n_fft": 64, "hop_length": 20, "stack": 2}


@pytest.fixture
def recording(tmp_path):
    """9.13 seconds, which no piece divides."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(9130)
    soundfile.write(tmp_path / "noise.wav", samples, RATE, subtype="FLOAT")
    return tmp_path / "noise.wav"


def detector(mixer, **options):
    torch.manual_seed(0)
    options = {"num_classes": 3, "sample_rate": RATE, "front_end": FRONT, "dim": 16, "position": "none", **options}
    return create_model("audio_detector_tiny", mixer=mixer, **options).eval()


def collected(model, reader, **options):
    pieces = list(stream(model.encoder, model.out, FileSource(reader), **options))
    assert [piece.first for piece in pieces] == list(np.cumsum([0, *[len(p.values) for p in pieces[:-1]]]))
    return torch.cat([piece.values for piece in pieces]), len(pieces)


@torch.no_grad()
def whole(model, reader):
    return model(torch.from_numpy(reader.read())[None]).y[0]


@pytest.mark.parametrize("seconds", [0.03, 0.5, 3.1, 100.0])
@pytest.mark.parametrize("mixer", ["gla", {"name": "mamba2", "head_dim": 8, "d_state": 8}])
def test_a_causal_model_gives_what_the_whole_gives(recording, mixer, seconds):
    model, reader = detector(mixer, causal=True, time_encoding={}), AudioReader(recording)
    torch.nn.init.normal_(model.encoder.time_encoding.table)
    found, _ = collected(model, reader, piece_seconds=seconds)
    torch.testing.assert_close(found, whole(model, reader), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("seconds", [0.5, 1.7, 100.0])
def test_windows_give_the_whole_where_no_token_sees_further_than_their_context(recording, seconds, batch_size):
    """Two blocks that see 3 tokens to either side each: 6 tokens of 40 ms are context enough, 5 are not."""
    model = detector({"name": "softmax", "num_heads": 2, "position": "rope", "window_size": 4}, time_encoding={})
    torch.nn.init.normal_(model.encoder.time_encoding.table)
    reader, wanted = AudioReader(recording), whole(model, AudioReader(recording))
    found, pieces = collected(model, reader, piece_seconds=seconds, context_seconds=0.24, batch_size=batch_size)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert pieces == -(-len(wanted) // round(seconds / 0.04))
    less, _ = collected(model, reader, piece_seconds=seconds, context_seconds=0.2, batch_size=batch_size)
    assert (pieces == 1) == bool(torch.allclose(less, wanted, atol=1e-5))


def test_windows_of_a_model_that_sees_everything_come_near_with_context(recording):
    model = detector({"name": "mamba2", "head_dim": 8, "d_state": 8})
    reader, wanted = AudioReader(recording), whole(model, AudioReader(recording))
    errors = [
        float((collected(model, reader, piece_seconds=1.0, context_seconds=c)[0] - wanted).abs().max())
        for c in (0.0, 1.0, 4.0)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_only_one_piece_of_the_recording_is_held(recording, monkeypatch):
    """Never more samples at once than a window with its context and a block of the reader."""
    largest = 0
    model = detector({"name": "softmax", "num_heads": 2, "window_size": 4})
    plain = model.encoder.features

    def features(samples, lengths=None):
        nonlocal largest
        largest = max(largest, samples.numel())
        return plain(samples, lengths)

    monkeypatch.setattr(model.encoder, "features", features)
    collected(model, AudioReader(recording), piece_seconds=1.0, context_seconds=0.4)
    assert largest <= 1000 + 2 * 400 + 64 + 40


def test_what_is_refused(recording):
    model = detector("linear")
    with pytest.raises(UserError, match=r"the model hears 1000 Hz, .* is read at 2000 Hz"):
        collected(model, AudioReader(recording, sample_rate=2000))
    with pytest.raises(UserError, match="piece_seconds=0 must be above 0"):
        collected(model, AudioReader(recording), piece_seconds=0)
    with pytest.raises(UserError, match="context_seconds=-1"):
        collected(model, AudioReader(recording), context_seconds=-1)


def test_a_file_is_read_forwards(recording):
    whole = AudioReader(recording, sample_rate=8000).read()
    source = FileSource(AudioReader(recording, sample_rate=8000))
    for start, stop in ((0, 10), (5, 7), (7, 50_000), (49_990, 50_010), (72_000, len(whole))):
        assert np.array_equal(source.samples(start, stop), whole[start:stop])
    with pytest.raises(ValueError, match="read forwards: 3 is before 72000"):
        source.samples(3, 5)
