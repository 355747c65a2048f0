"""Videos without labels: what is shuffled and hidden, what the losses are, clips cut in time, and a whole run."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.classify.module import create_video_net
from seqzoo.pipelines.video.pretrain import task as pretrain_task
from seqzoo.pipelines.video.pretrain.data import VideoPretrainData, pieces
from seqzoo.pipelines.video.pretrain.module import VideoPretrainModule
from seqzoo.pipelines.video.pretrain.pretexts import (
    LongShort,
    MaskedFrames,
    SegmentOrder,
    check_pretext,
    create_pretext,
    hidden_frames,
)
from seqzoo.zoo import create_model, load_model

pytest.importorskip("av")
from ..helpers.video_files import write_video

TASK = {"pretext": "order", "segments": 3, "mask_ratio": 0.4, "short_ratio": 0.5, "temperature": 0.2, "momentum": 0.9}
SCHEMA = {"sampling": [6, None, 256], "features": "packaged", "output": "pooled", "dim": 5}


def net(name="video_classifier_tiny", **options):
    torch.manual_seed(0)
    options = {"encoder": {"name": "features", "dim": 5}, "num_classes": 6, **options}
    return create_model(name, **options)


def batch(rows=4, frames=6, lengths=None):
    torch.manual_seed(1)
    mask = torch.ones(rows, frames, dtype=torch.bool)
    if lengths:
        mask = torch.arange(frames) < torch.tensor(lengths).unsqueeze(1)
    return {
        "frames": torch.randn(rows, frames, 5),
        "mask": mask,
        "times": torch.arange(float(frames)).expand(rows, -1),
    }


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def test_segments_are_shuffled_whole_and_the_label_is_their_order():
    pretext = SegmentOrder(net(), segments=3)
    frames = torch.arange(6.0)[None, :, None].expand(6, -1, 5)
    shuffled = pretext.shuffled(frames, torch.arange(6))[..., 0]
    for row, order in enumerate(itertools.permutations(range(3))):
        assert shuffled[row].tolist() == [value for segment in order for value in (2.0 * segment, 2.0 * segment + 1)]
    pretext.eval()
    found = pretext(batch(), drawn())
    chosen = torch.randint(6, (4,), generator=drawn())
    logits = pretext.net(pretext.shuffled(batch()["frames"], chosen)).y
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, chosen))
    assert found.guess == 1 / 6 and math.isclose(found.score, (logits.argmax(1) == chosen).float().mean())


def test_hidden_frames_are_real_and_not_all_of_them():
    real = torch.arange(20) < torch.tensor([20, 10, 2, 1] * 50).unsqueeze(1)
    hide = hidden_frames(real, 0.4, drawn())
    assert not (hide & ~real).any()
    assert hide.sum(1).tolist() == [8, 4, 1, 1] * 50
    assert (hide[::4].float().mean(0) - 0.4).abs().max() < 0.25  # anywhere
    assert hidden_frames(real, 0.99, drawn()).sum(1).tolist() == [19, 9, 1, 1] * 50


def test_what_is_hidden_is_not_seen_and_what_is_seen_is_not_asked_for():
    pretext = MaskedFrames(net(), 5, mask_ratio=0.5).double().eval()
    torch.nn.init.normal_(pretext.hidden)
    given = batch(lengths=[6, 4, 6, 3])
    given["frames"] = given["frames"].double().requires_grad_()
    found = pretext(given, drawn())
    hide = hidden_frames(given["mask"], 0.5, drawn())
    # by hand: the tokens of what is shown, the error at hidden frames, each a vector of mean 0 and variance 1
    frames = given["frames"].detach().clone()
    target = (frames - frames.mean(-1, keepdim=True)) / (frames.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    shown = frames.clone()
    shown[hide] = pretext.hidden.detach()
    tokens = pretext.net.encoder(shown, mask=given["mask"]).x
    errors, spreads = [], []
    for row, place in hide.nonzero().tolist():
        errors.append((pretext.out(tokens[row, place]) - target[row, place]).square().mean())
        seen = given["mask"][row] & ~hide[row]
        spreads.append((target[row][seen].mean(0) - target[row, place]).square().mean())
    error, spread = torch.stack(errors).mean(), torch.stack(spreads).mean()
    torch.testing.assert_close(found.loss.double(), error, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.score.double(), 1 - error / spread, atol=1e-5, rtol=1e-5)
    # another picture at a hidden frame changes no token
    other = {**given, "frames": torch.where(hide.unsqueeze(-1), 9.0, frames)}
    taken = []
    hook = pretext.net.encoder.register_forward_hook(lambda *got: taken.append(got[2].x))
    pretext({**given, "frames": frames}, drawn())
    pretext(other, drawn())
    hook.remove()
    assert torch.equal(*taken)


def test_a_short_clip_is_a_run_of_the_long_one():
    pretext = LongShort(net(), 64, short_ratio=0.5, momentum=0.9)
    seen = []
    pretext.contrast.forward = lambda long, short, **_: (
        seen.extend([long, short]),
        (torch.ones(()), {"right": torch.ones(())}),
    )[1]
    for seed in range(20):
        pretext({**batch(), "frames": torch.arange(6.0)[None, :, None].expand(4, -1, 5)}, drawn(seed))
    starts = {int(row[0]) for short in seen[1::2] for row in short[..., 0]}
    assert starts == {0, 1, 2, 3} and all((short[..., 0].diff(dim=1) == 1).all() for short in seen[1::2])
    assert all(short.shape == (4, 3, 5) for short in seen[1::2])


@pytest.mark.parametrize("pretext", ["order", "masked", "lsmcl"])
def test_every_pretext_trains_what_a_classifier_takes_over(pretext):
    task = {**TASK, "pretext": pretext}
    module = VideoPretrainModule(
        {"name": "video_classifier_tiny", "mixer": "softmax"},
        task,
        {"name": "adamw", "lr": 1e-3},
        {"name": "none"},
        SCHEMA,
    )
    found = module.pretext(batch(), drawn())
    found.loss.backward()
    for key, parameter in module.net.named_parameters():
        assert key.startswith("head.") or (parameter.grad is not None and parameter.grad.any()), key
    labelled = create_video_net({"name": "video_classifier_tiny", "mixer": "softmax"}, SCHEMA, None, num_classes=9)
    own, other = module.net.state_dict(), labelled.state_dict()
    assert list(own) == list(other)
    assert all(own[key].shape == other[key].shape for key in own if not key.startswith("head."))
    again = module.pretext.eval()(batch(), drawn(3))
    assert torch.equal(again.loss, module.pretext(batch(), drawn(3)).loss)


def test_selective_s4_learns_by_long_short_contrast():
    selective = net("selective_s4_tiny", dim=16, num_stages=2, d_state=4)
    pretext = create_pretext(selective, {**TASK, "pretext": "lsmcl"}, SCHEMA).train()
    assert pretext.contrast.projector[0].in_features == 4
    pretext(batch(), drawn()).loss.backward()
    assert selective.mask_generator.out[0].weight.grad.any()


@pytest.mark.parametrize(
    ("task", "schema", "message"),
    [
        ({"pretext": "ordr"}, {}, "order"),
        ({"segments": 4}, {}, "4 frames would do"),
        ({"segments": 6}, {}, "from 2 to 5"),
        ({}, {"sampling": [None, 2.0, 9]}, "data.num_frames in place of"),
        ({"mask_ratio": 1.0}, {}, "task.mask_ratio=1.0"),
        ({"pretext": "masked"}, {"features": None}, "data.features"),
        ({"pretext": "masked"}, {"output": "grid"}, "data.output=pooled"),
    ],
)
def test_bad_settings_are_refused(task, schema, message):
    with pytest.raises(UserError, match=message):
        check_pretext({**TASK, **task}, {**SCHEMA, **schema})


def test_hidden_frames_need_a_token_each():
    for model in (net("vis4mer_tiny"), net(layout="joint")):
        with pytest.raises(UserError, match="a token for each frame"):
            create_pretext(model, {**TASK, "pretext": "masked"}, SCHEMA)


def test_videos_are_cut_in_time_and_no_two_parts_share_a_frame(tmp_path, monkeypatch):
    monkeypatch.setattr("seqzoo.pipelines.video.classify.data.load_image_encoder", lambda *_, **__: Colours())
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", 100 + 100 * number)
    (tmp_path / "notes.txt").write_text("no video")
    data = VideoPretrainData(tmp_path, clip_seconds=1.0, split_ratio=(0.6, 0.2, 0.2), gap=0.2, num_frames=4, cache_gb=0)
    data.setup("fit")
    spans = [(c.path.name, c.start, c.end, stage) for stage, clips in data.sets.items() for c in clips]
    for name, seconds in (("0.mp4", 4.0), ("1.mp4", 8.0)):
        own = sorted((start, end, stage) for file, start, end, stage in spans if file == name)
        assert [stage for *_, stage in own] == sorted((s for *_, s in own), key=["train", "val", "test"].index)
        for before, after in itertools.pairwise(own):
            assert math.isclose(after[0] - before[1], 0.2 * (before[2] != after[2]), abs_tol=1e-9)
        assert own[0][0] == 0 and math.isclose(own[-1][1], seconds)
    assert len(data.sets["train"]) == 2 + 5 and data.schema()["labels"] == [""]
    given = next(iter(data.train_dataloader()))
    assert given["frames"].shape == (16, 4, 3) and given["mask"].all()
    assert pieces(data.sets["train"], None) == data.sets["train"]
    with pytest.raises(UserError, match="clip_seconds"):
        VideoPretrainData(tmp_path, clip_seconds=0)
    short = VideoPretrainData(tmp_path, gap=5.0, cache_gb=0)
    with pytest.raises(UserError, match="too short"):
        short.setup("fit")


class Colours:
    """In place of a network: the mean colour of a frame."""

    key, size, dim, grid = "colours", (32, 60), 3, None

    def __call__(self, frames):
        return frames.float().mean((1, 2)) / 255


def test_a_run_learns_the_order_of_what_changes(tmp_path, monkeypatch):
    """A video that turns from green to red, again and again: the order of its segments can be seen."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from seqzoo.pipelines import run

    monkeypatch.setattr("seqzoo.pipelines.video.classify.data.load_image_encoder", lambda *_, **__: Colours())
    monkeypatch.setattr(run, "validate_names", lambda cfg: None)
    frames = [np.full((32, 60, 3), (20 + 14 * n, 230 - 14 * n, 60), np.uint8) for n in [*range(16)] * 12]
    write_video(tmp_path / "turning.mp4", frames, rate=8)
    GlobalHydra.instance().clear()
    options = {
        **{"data.path": tmp_path, "data.clip_seconds": 2.0, "data.num_frames": 8, "data.cache_gb": 0, "data.gap": 0},
        **{"data.split_ratio": "[0.5,0.25,0.25]", "data.jitter": "false", "data.batch_size": 16, "data.steps": 10},
        **{"task.segments": 2, "model": "video_classifier_tiny", "model.dim": 16, "model.depth": 1},
        **{"trainer.max_epochs": 10, "trainer.accelerator": "cpu", "optimizer.lr": 0.01, "callbacks.progress": "none"},
        "paths.runs": tmp_path / "runs",
    }
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        overrides = [f"{key}={value}" for key, value in options.items()]
        cfg = compose("config", overrides=["experiment=video/pretrain", *overrides])
    found = run.execute("fit", OmegaConf.to_container(cfg, resolve=True), tmp_path / "run")
    assert found["test/accuracy"] > 0.9 and found["test/guess"] == 0.5
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["rows"][1]["method"] == "guessing"
    exported = load_model(tmp_path / "run" / "model")
    assert exported.encoder.frame_encoder.dim == 3 and exported.num_classes == 2
    with pytest.raises(UserError, match="no answers of its own"):
        pretrain_task.predict(None, None, {}, tmp_path)
