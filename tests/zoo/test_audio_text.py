"""Recordings and texts in one space: clips are means of their tokens, pads change nothing, every parameter learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

from seqzoo.blocks.layers.contrastive import SCORES
from seqzoo.zoo import create_model, list_models, load_model, model_info, save_model

RATE = 1000
# tokens of 40 samples, one after the other
FRONT = {"name": "patches", "patch_len": 40, "dim": 12}
SMALL = {
    "sample_rate": RATE,
    "front_end": FRONT,
    "embed_dim": 10,
    "text_dim": 6,
    "clip_seconds": 0.2,
    "context": "recording",
}


def build(**options):
    return create_model("audio_text_tiny", **{**SMALL, **options}).eval()


def tokens_of(model, samples: Tensor) -> Tensor:
    """What the encoder gives for one recording, (L, D)."""
    return model.encoder(samples.unsqueeze(0)).y[0]


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        (1, [1]),  # one sample is one token, filled with silence
        (200, [5]),
        (400, [5, 5]),
        (480, [5, 7]),  # two tokens, less than half a clip, stay with the clip before
        (520, [5, 5, 3]),  # three are more than half
        (1000, [5] * 5),
    ],
)
def test_a_clip_is_the_mean_of_its_tokens(length: int, parts: list[int]):
    model = build()
    samples = torch.randn(length)
    out = model(samples.unsqueeze(0))
    tokens = tokens_of(model, samples)
    expected = torch.stack([model.audio_proj(part.mean(0)) for part in tokens.split(parts)])
    assert out.mask.all() and out.y.shape == (1, len(parts), 10)
    torch.testing.assert_close(out.y[0], expected, rtol=1e-5, atol=1e-5)


def test_overlapping_frames_go_where_their_centres_are():
    front = {"name": "log_mel", "num_mels": 8, "win_length": 64, "hop_length": 40}
    model = build(front_end=front, clip_seconds=0.17)
    samples = torch.randn(700)
    tokens, out = tokens_of(model, samples), model(samples.unsqueeze(0))
    clip = (model.encoder.front_end.times(len(tokens)) / 0.17).floor()
    assert out.y.shape[1] == 4 and clip.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 5
    expected = torch.stack([model.audio_proj(tokens[clip == number].mean(0)) for number in range(4)])
    torch.testing.assert_close(out.y[0], expected, rtol=1e-5, atol=1e-5)


def test_a_clip_by_itself_is_as_if_the_others_were_not_there():
    model = build(context="clip")
    samples, lengths = torch.randn(2, 720), torch.tensor([720, 280])  # 18 tokens, 7 tokens
    out = model(samples, lengths)
    assert out.mask.tolist() == [[True] * 4, [True, False, False, False]]
    for row, parts in ((0, [5, 5, 5, 3]), (1, [7])):
        features = model.encoder.features(samples[row : row + 1, : lengths[row]]).features[0]
        for place, part in enumerate(features.split(parts)):
            alone = model.audio_proj(model.encoder.encode(part.unsqueeze(0)).y[0].mean(0))
            torch.testing.assert_close(out.y[row, place], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(build(context="recording")(samples, lengths).y, out.y, atol=1e-3)


@pytest.mark.parametrize("context", ["recording", "clip"])
def test_neither_pads_nor_other_recordings_change_a_recording(context: str):
    model = build(context=context)
    lengths = torch.tensor([1000, 130, 470])
    samples = torch.randn(3, 1000)
    out = model(samples, lengths)
    assert out.mask.sum(1).tolist() == [5, 1, 2]
    assert not out.y[~out.mask].any()
    for row, length in enumerate(lengths.tolist()):
        alone = model(samples[row : row + 1, :length])
        torch.testing.assert_close(out.y[row][out.mask[row]], alone.y[0], rtol=1e-5, atol=1e-5)
    samples[1, 130:] = torch.nan
    torch.testing.assert_close(model(samples, lengths).y, out.y, rtol=0, atol=0)


@pytest.mark.parametrize(("fusion", "context"), [("mean", "recording"), ("learned", "clip")])
@pytest.mark.parametrize("name", [n for n in list_models(task="audio_retrieval") if n.endswith("_tiny")])
def test_every_parameter_learns(name: str, fusion: str, context: str):
    model = create_model(name, **{**SMALL, "fusion": fusion, "context": context}).train()
    out = model(torch.randn(4, 600), torch.tensor([600, 400, 500, 200]))
    text, tokens = model.embed_texts(torch.randn(4, 6), torch.randn(4, 3, 6))
    similarity = model.score(out.y, text, tokens, clip_mask=out.mask)
    assert similarity.shape == (4, 4) and float(similarity.detach().abs().max()) <= 1
    model.score.loss(similarity).backward()
    # a bias of the keys moves all scores of a query alike
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [n for n in still if not n.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("scores", [["global"], ["attention", "global"], ["token"]])
def test_scores_decide_which_texts_are_needed(scores: list[str]):
    model = build(scores=scores)
    out = model(torch.randn(2, 400))
    text, tokens = model.embed_texts(torch.randn(3, 6), torch.randn(3, 2, 6))
    assert (tokens is not None) == ("token" in scores) == (model.token_proj is not None)
    assert model.score(out.y, text, tokens, clip_mask=out.mask).shape == (2, 3)


def test_a_saved_model_gives_the_same(tmp_path):
    model = build(mixer={"name": "mamba2", "d_state": 8, "head_dim": 16}, scores=["attention"])
    again = load_model(save_model(model, tmp_path / "model"))
    samples = torch.randn(2, 500)
    assert torch.equal(again(samples).y, model(samples).y)
    assert again.score.scores == ("attention",)


def test_spans_of_clips():
    model = build(clip_seconds=0.5)
    assert model.clip_spans(3, 1.6) == [(0.0, 0.5), (0.5, 1.0), (1.0, 1.6)]
    assert model.clip_spans(1, 0.2) == [(0.0, 0.2)]


def test_registered_sizes():
    names = list_models("audio_text_*")
    assert names == ["audio_text_small", "audio_text_tiny"]
    for name in names:
        info = model_info(name)
        assert info.task == "audio_retrieval" and info.paper == "arXiv:2410.02271"
        assert tuple(info.options["scores"]) == SCORES


def test_what_is_wrong_is_named():
    for value in (0.03, float("nan")):
        with pytest.raises(ValueError, match=r"clip_seconds=.* is less than one token, 0\.04 seconds"):
            build(clip_seconds=value)
    with pytest.raises(ValueError, match="Did you mean token"):
        build(scores=["tokens"])
    with pytest.raises(ValueError, match="fusion='sum'"):
        build(fusion="sum")
    with pytest.raises(ValueError, match=r"context='clips' is not a choice\. Did you mean clip"):
        build(context="clips")
    with pytest.raises(ValueError, match="recording 1 of the batch has no samples"):
        build()(torch.randn(2, 400), torch.tensor([400, 0]))
