"""Scores of recordings and texts: by hand in loops, the loss of transformers' CLAP and CLIP, tiles, pads, order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.blocks.layers.contrastive import MAX_SCALE, SCORES, ContrastiveScore, clip_text_scores, info_nce

CLOSE = {"rtol": 0, "atol": 1e-12}


def example(batch: int = 3, clips: int = 4, texts: int = 5, words: int = 6, dim: int = 7) -> dict[str, Tensor]:
    """Random recordings and texts in float64, of which some clips and words are pads."""
    random = torch.Generator().manual_seed(1)
    made = {
        "clips": torch.randn(batch, clips, dim, generator=random, dtype=torch.float64),
        "text": torch.randn(texts, dim, generator=random, dtype=torch.float64),
        "tokens": torch.randn(texts, words, dim, generator=random, dtype=torch.float64),
    }
    made["clip_mask"] = torch.arange(clips) < torch.tensor([[1 + b % clips] for b in range(batch)])
    made["token_mask"] = torch.arange(words) < torch.tensor([[1 + 2 * c % words] for c in range(texts)])
    return made


def by_hand(x: dict[str, Tensor], temperature: float) -> Tensor:
    """The formulas, a pair at a time, in Python numbers."""

    def cos(u: Tensor, v: Tensor) -> float:
        return float(u @ v) / math.sqrt(float(u @ u) * float(v @ v))

    def soft(values: list[float]) -> float:
        weights = [math.exp(v / temperature) for v in values]
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    found = torch.zeros(3, len(x["clips"]), len(x["text"]), dtype=torch.float64)
    for b in range(len(x["clips"])):
        own = [c for c, real in zip(x["clips"][b], x["clip_mask"][b], strict=True) if real]
        for c in range(len(x["text"])):
            words = [w for w, real in zip(x["tokens"][c], x["token_mask"][c], strict=True) if real]
            mean = torch.stack([a / a.norm() for a in own]).mean(0)
            found[0, b, c] = cos(mean, x["text"][c])
            found[1, b, c] = soft([cos(a, x["text"][c]) for a in own])
            found[2, b, c] = soft([max(cos(a, w) for a in own) for w in words])
    return found


def test_scores_are_the_formulas():
    x = example()
    found = clip_text_scores(**x, attention_temperature=0.3)
    torch.testing.assert_close(found, by_hand(x, 0.3), **CLOSE)
    alone = clip_text_scores(**x, scores=["token", "global"], attention_temperature=0.3)
    torch.testing.assert_close(alone, found[[2, 0]], **CLOSE)


def test_one_clip_and_one_word_give_the_cosine():
    x = example(clips=1, words=1)
    cosine = F.cosine_similarity(x["clips"], x["text"].unsqueeze(0), dim=-1)
    found = clip_text_scores(x["clips"], x["text"], x["text"].unsqueeze(1))
    torch.testing.assert_close(found, cosine.expand(3, -1, -1), **CLOSE)


def test_equal_clips_are_as_one():
    x = example(clips=1)
    many = {**x, "clips": x["clips"].expand(-1, 9, -1), "clip_mask": None}
    torch.testing.assert_close(clip_text_scores(**many), clip_text_scores(**x), **CLOSE)


def test_neither_the_order_of_clips_nor_of_words_matters():
    x = example()
    clips, words = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 4, 0, 2, 3])
    moved = {**x, "clips": x["clips"][:, clips], "clip_mask": x["clip_mask"][:, clips]}
    moved |= {"tokens": x["tokens"][:, words], "token_mask": x["token_mask"][:, words]}
    torch.testing.assert_close(clip_text_scores(**moved), clip_text_scores(**x), **CLOSE)


@pytest.mark.parametrize("score", SCORES)
def test_what_is_in_pads_changes_neither_scores_nor_gradients(score: str):
    results = []
    for garbage in (0.0, math.nan):
        x = example()
        x["clips"][~x["clip_mask"]] = garbage
        x["tokens"][~x["token_mask"]] = garbage
        inputs = [x[name].requires_grad_() for name in ("clips", "text", "tokens")]
        found = clip_text_scores(**x, scores=[score])
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
        (found * weights).sum().backward()
        results.append([found.detach(), *(v.grad if v.grad is not None else torch.zeros(()) for v in inputs)])
    for with_zeros, with_nan in zip(*results, strict=True):
        assert torch.isfinite(with_nan).all() and torch.equal(with_zeros, with_nan)


def test_recordings_without_clips_and_texts_without_words_have_no_score():
    x = example()
    x["clip_mask"][1], x["token_mask"][2] = False, False
    x["clips"].requires_grad_()
    found = clip_text_scores(**x)
    assert not found[:, 1].any() and not found[2, :, 2].any() and found[2, 0, 1] != 0
    found.sum().backward()
    assert torch.isfinite(x["clips"].grad).all()


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made within has; views cost nothing."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.size = max(self.size, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_tiles_give_the_same_and_hold_less():
    batch, clips, texts, words = 12, 5, 10, 8
    found, sizes = [], []
    for tile in (1, 1000, 1 << 22):
        x = example(batch, clips, texts, words)
        inputs = [x[name].requires_grad_() for name in ("clips", "text", "tokens")]
        with Largest() as largest:
            scores = clip_text_scores(**x, tile=tile)
            weights = torch.arange(scores.numel(), dtype=scores.dtype).view_as(scores).sin()
            gradients = torch.autograd.grad((scores * weights).sum(), inputs)
        found.append([scores, *gradients])
        sizes.append(largest.size)
    for other in found[:2]:
        for own, whole in zip(other, found[2], strict=True):
            torch.testing.assert_close(own, whole, **CLOSE)
    assert sizes[2] >= batch * clips * texts * words
    assert sizes[0] <= sizes[1] <= max(1000, batch * texts * words)


def test_what_is_kept_for_the_backward_pass_grows_without_the_clips():
    def kept(clips: int) -> int:
        x = example(8, clips, 8, 16, dim=4)
        storages = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda saved: storages.setdefault(saved.untyped_storage().data_ptr(), saved), lambda saved: saved
        )
        x["clips"].requires_grad_()
        with hooks:
            clip_text_scores(**x, scores=["token"], tile=500)
        return sum(saved.untyped_storage().nbytes() for saved in storages.values()) // 8

    # what grows are the clips themselves, once as they are and once of length 1
    assert kept(40) - kept(10) <= 2 * 8 * 30 * 4 + 8 * 30


def test_gradients_of_the_scores():
    x = example(batch=2, clips=3, texts=2, words=2, dim=3)
    masks = {name: x[name] for name in ("clip_mask", "token_mask")}
    inputs = tuple(x[name].requires_grad_() for name in ("clips", "text", "tokens"))
    assert torch.autograd.gradcheck(lambda *given: clip_text_scores(*given, **masks, tile=12), inputs)


# the loss -------------------------------------------------------------------------------------------------------------


def test_one_clip_and_one_word_have_the_loss_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers, the independent implementation")
    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 16, "max_position_embeddings": 20}
    audio = {"num_mel_bins": 8, "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1]}
    audio |= {"patch_embeds_hidden_size": 16, "num_attention_heads": [2, 2], "hidden_size": 32, "window_size": 4}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=12)
    clap = transformers.ClapModel(config).eval()
    spectrogram, numbers = torch.randn(6, 1, 32, 8), torch.randint(3, 50, (6, 7))
    longer = torch.zeros(6, 1, dtype=torch.bool)
    with torch.no_grad():
        out = clap(input_ids=numbers, input_features=spectrogram, is_longer=longer, return_loss=True)
    own = ContrastiveScore(temperature=1 / config.logit_scale_init_value)
    text_vectors = out.text_embeds
    similarity = own(out.audio_embeds.unsqueeze(1), text_vectors, text_vectors.unsqueeze(1))
    torch.testing.assert_close(own.logit_scale.exp() * similarity, out.logits_per_audio, rtol=1e-5, atol=1e-5)
    # CLAP is symmetric; ClapModel transposes the logits of the audio, so that its loss is twice that of the texts
    from transformers.models.clap.modeling_clap import contrastive_loss
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    other = contrastive_loss(out.logits_per_audio)
    assert abs(out.loss - other) > 0.01
    torch.testing.assert_close(own.loss(similarity), (out.loss + other) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        own.loss(similarity), image_text_contrastive_loss(out.logits_per_text), rtol=1e-5, atol=1e-5
    )


def test_pairs_with_the_same_text_are_right_answers_of_each_other():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.7, 0.6, 0.8]], dtype=torch.float64)
    unique = info_nce(similarity, 3.0, torch.tensor([5, 1, 2]))
    torch.testing.assert_close(unique, info_nce(similarity, 3.0), **CLOSE)

    def row(values: list[float], right: list[int]) -> float:
        total = math.log(sum(math.exp(3 * v) for v in values))
        return sum(total - 3 * values[place] for place in right) / len(right)

    rows = similarity.tolist(), similarity.mT.tolist()
    expected = sum(row(side[b], right) for side in rows for b, right in enumerate(([0, 2], [1], [0, 2]))) / 6
    assert float(info_nce(similarity, 3.0, torch.tensor([7, 4, 7]))) == pytest.approx(expected, abs=1e-12)


def test_the_scale_starts_at_its_temperature_and_comes_back_from_its_bound():
    own = ContrastiveScore(["global"], temperature=0.07)
    assert own.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        own.logit_scale.fill_(9.0)
    own.loss(torch.eye(4) - 0.5).backward()
    assert own.logit_scale.exp().item() == pytest.approx(MAX_SCALE, rel=1e-6)
    own.logit_scale.grad = None
    own.loss(0.01 * torch.randn(4, 4)).backward()
    assert float(own.logit_scale.grad.abs()) > 0


def test_learned_weights_start_as_the_mean_and_stay_convex():
    x = example()
    mean, learned = ContrastiveScore(), ContrastiveScore(fusion="learned")
    torch.testing.assert_close(mean(**x), clip_text_scores(**x).mean(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(learned(**x), mean(**x), rtol=0, atol=1e-7)
    with torch.no_grad():
        learned.fusion_logits.copy_(torch.tensor([0.0, -1e4, 0.0]))
    torch.testing.assert_close(learned(**x), clip_text_scores(**x)[[0, 2]].mean(0), rtol=0, atol=1e-7)
    learned(**x).sum().backward()
    assert learned.fusion_logits.grad.abs().sum() > 0
    assert [name for name, _ in mean.named_parameters()] == ["logit_scale"]


def test_half_precision_is_computed_in_single():
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in example().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clip_text_scores(**x)
    assert found.dtype == torch.float32
    exact = clip_text_scores(**{k: v.double() if v.is_floating_point() else v for k, v in x.items()})
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_the_clip_that_fits_is_found():
    x = example(clips=8, texts=3)
    clips, text = x["clips"], x["text"]
    clips[1, 6] = 40 * text[1]
    for scores in (["global"], ["attention"], list(SCORES)):
        found = ContrastiveScore(scores).clip_relevance(clips, text, x["tokens"], token_mask=x["token_mask"])
        assert found.shape == (3, 8) and int(found[1].argmax()) == 6
    single = ContrastiveScore(["attention"]).clip_relevance(clips, text)
    torch.testing.assert_close(single, F.cosine_similarity(clips, text.unsqueeze(1), dim=-1), rtol=0, atol=1e-7)


def test_what_is_wrong_is_named():
    x = example()
    for scores, message in (
        (["globl"], "globl.*Did you mean global"),
        ([], "must be a list"),
        ("token", "must be a list"),
        (["global", "global"], "different ones"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_text_scores(**x, scores=scores)
        with pytest.raises(ValueError, match=message):
            ContrastiveScore(scores)
    with pytest.raises(ValueError, match='"token" needs tokens'):
        clip_text_scores(x["clips"], x["text"])
    with pytest.raises(ValueError, match=r"expected \(B, n, D\), \(C, D\)"):
        clip_text_scores(x["clips"], x["text"][:, :2])
    with pytest.raises(ValueError, match=r"tokens have the shape \(4, 6, 7\), expected \(5, m, 7\)"):
        clip_text_scores(x["clips"], x["text"], x["tokens"][:4])
    with pytest.raises(ValueError, match=r"clip_mask is torch.bool \(3, 3\), expected bool \(3, 4\)"):
        clip_text_scores(**{**x, "clip_mask": x["clip_mask"][:, :3]})
    with pytest.raises(ValueError, match="attention_temperature=0 must be above 0"):
        clip_text_scores(**x, attention_temperature=0)
    with pytest.raises(ValueError, match=r"temperature=-1 must be above 0"):
        ContrastiveScore(temperature=-1)
    with pytest.raises(ValueError, match="fusion='median' is not a choice"):
        ContrastiveScore(fusion="median")
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(B, B\)"):
        info_nce(torch.zeros(2, 3), 1.0)
