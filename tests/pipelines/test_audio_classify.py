"""Clips in, labels out, through the command's function: fit, test, predict, resume, bad files."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from seqzoo.pipelines.audio.augmenting import Augmentation, step_generator
from seqzoo.pipelines.audio.classify.data import AudioClipData
from seqzoo.pipelines.checkpoints import load_checkpoint
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.zoo import create_model, load_model

RATE = 2000
SMALL = [
    "task=audio_classify",
    "data=audio_clips",
    f"data.sample_rate={RATE}",
    "mixer=softmax",
    "mixer.num_heads=2",
    "model=audio_classifier_tiny",
    "+model.front_end.num_mels=8",
    "model.dim=16",
    "model.depth=1",
    "task.augment.shift_seconds=0.01",
    "data.batch_size=8",
    "data.steps=15",
    "optimizer.lr=1.0e-2",
    "trainer.log_every_n_steps=5",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "callbacks.progress=none",
]


def tone(hertz: float, seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    noise = 0.02 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(len(noise)) / rate) + noise


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low, middle and high tones of 0.2 to 0.6 seconds, of two sample rates."""
    root = tmp_path_factory.mktemp("tones")
    random = np.random.default_rng(0)
    for label, hertz in (("high", 800), ("low", 150), ("middle", 400)):
        (root / label).mkdir()
        for i in range(20):
            rate = RATE if i % 2 else 4000
            samples = tone(hertz * random.uniform(0.9, 1.1), random.uniform(0.2, 0.6), seed=i, rate=rate)
            soundfile.write(root / label / f"{i:02}.wav", samples, rate)
    return root


def composed(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)  # type: ignore[return-value]


def run(command: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    cfg = composed(*SMALL, f"paths.runs={run_dir.parent}", *overrides)
    run_dir.mkdir(parents=True, exist_ok=True)
    if command == "fit":
        (run_dir / "config.yaml").write_text(yaml.safe_dump(cfg))
    return execute(command, cfg, run_dir)


@pytest.fixture(scope="module")
def fitted(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    return run_dir, run("fit", run_dir, f"data.path={tones}")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_leaves_scores_beside_the_majority(fitted: tuple[Path, dict[str, Any]]) -> None:
    run_dir, metrics = fitted
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert {"checkpoints/best.ckpt", "model/model.safetensors", "test.csv", "confusion.png", "loss.png"} <= names
    assert metrics["test/accuracy"] > 0.9 and metrics["test/majority"] == pytest.approx(1 / 3)
    assert metrics["test/clips"] == 6


@pytest.mark.parametrize("size", [1, 4])
def test_scores_do_not_depend_on_the_batch(
    fitted: tuple[Path, dict[str, Any]], tones: Path, size: int, tmp_path: Path
) -> None:
    path = fitted[0] / "checkpoints" / "best.ckpt"
    again = run("test", tmp_path / "t", f"data.path={tones}", f"ckpt_path={path}", f"data.eval_batch_size={size}")
    for name in ("test/accuracy", "test/macro_f1", "test/loss"):
        assert again[name] == pytest.approx(fitted[1][name], rel=1e-5), name


def test_features_are_normalised_by_the_training_clips(fitted: tuple[Path, dict[str, Any]], tones: Path) -> None:
    model = load_model(fitted[0] / "model")
    data = AudioClipData("files", tones, sample_rate=RATE)
    data.setup("fit")
    found = []
    for samples, lengths in data.measured():
        out = model.encoder.features(samples, lengths)
        found += [out.features[i, : out.lengths[i]] for i in range(len(samples))]
    values = torch.cat(found)
    torch.testing.assert_close(values.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(values.std(0), torch.ones(32), atol=2e-2, rtol=0)


def test_prediction_of_new_recordings(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A folder of any rate and one file, as the exported model gives them; labels of folders stand beside."""
    new = tmp_path / "new"
    new.mkdir()
    soundfile.write(new / "b.flac", tone(800, 0.4, rate=8000), 8000)
    soundfile.write(new / "a.wav", np.stack([tone(150, 0.3), tone(150, 0.3)], 1), RATE)
    options = [f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"]
    run("predict", tmp_path / "p", *options, f"data.path={new}")
    found = rows(tmp_path / "p" / "predictions.csv")
    assert [(Path(row["clip"]).name, row["label"]) for row in found] == [("a.wav", "low"), ("b.flac", "high")]
    assert "given" not in found[0]
    model = load_model(fitted[0] / "model").eval()
    from seqzoo.pipelines.audio.reader import AudioReader

    with torch.no_grad():
        chance = model(torch.from_numpy(AudioReader(new / "b.flac", sample_rate=RATE).read())[None]).y.softmax(1).max()
    assert float(found[1]["probability"]) == pytest.approx(float(chance), abs=1e-4)
    run("predict", tmp_path / "one", *options, f"data.path={new / 'a.wav'}")
    assert [row["label"] for row in rows(tmp_path / "one" / "predictions.csv")] == ["low"]
    (tmp_path / "labelled" / "low").mkdir(parents=True)
    shutil.copy(new / "b.flac", tmp_path / "labelled" / "low")
    metrics = run("predict", tmp_path / "known", *options, f"data.path={tmp_path / 'labelled'}")
    assert metrics["accuracy"] == 0.0 and rows(tmp_path / "known" / "predictions.csv")[0]["given"] == "low"


def test_a_resumed_run_ends_as_an_uninterrupted_one(tones: Path, tmp_path: Path) -> None:
    """Augmentation is a function of seed and step."""
    options = [f"data.path={tones}", "data.steps=3", "test_after_fit=false", "model.head_drop=0.1"]
    options += ["scheduler=none", "task.augment.mixup=0.2"]
    run("fit", tmp_path / "whole", *options, "trainer.max_epochs=2")
    run("fit", tmp_path / "half", *options, "trainer.max_epochs=1")
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    run("fit", tmp_path / "rest", *options, "trainer.max_epochs=2", f"ckpt_path={last}")
    one, other = (load_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt")["state_dict"] for n in ("whole", "rest"))
    assert all(torch.equal(one[key], other[key]) for key in one)


# bad files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tones: Path, tmp_path: Path) -> Path:
    """The tones, where every label has more: 60 training files would be 48."""
    root = tmp_path / "damaged"
    shutil.copytree(tones, root)
    return root


def training(root: Path, **options: Any) -> AudioClipData:
    data = AudioClipData("files", root, sample_rate=RATE, batch_size=8, **options)
    data.setup("fit")
    return data


def test_bad_training_files_are_skipped_and_counted(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = training(damaged)
    victims = [Path(clip.name) for clip in data.sets["train"][:2]]
    victims[0].write_text("this is no sound")
    samples, rate = soundfile.read(victims[1])
    samples[len(samples) // 2] = np.nan
    soundfile.write(victims[1], samples, rate, subtype="FLOAT")
    data = training(damaged)
    assert len(data.sets["train"]) == 47  # the text at once, NaN only when it is read
    seen = [number for batch in data.train_dataloader() for number in batch["clip"].tolist()]
    assert len(seen) == 47 and len(set(seen)) == 46
    assert data.bad is not None and data.bad.causes == {"not audio": 1, "not finite": 1}
    assert "2 of 48 audio files were skipped: 1 not audio, 1 not finite" in data.bad.report()
    err = capsys.readouterr().err
    assert err.count("skipped:") == 2 and str(victims[0]) in err and str(victims[1]) in err


def test_more_than_one_in_twenty_stops_the_run(damaged: Path) -> None:
    for clip in training(damaged).sets["train"][:3]:
        Path(clip.name).write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 48 audio files were skipped: 3 empty, more than 5%"):
        training(damaged)


def test_a_bad_file_that_is_evaluated_is_an_error(damaged: Path) -> None:
    path = Path(training(damaged).sets["val"][0].name)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=f"{path}.*cut off"):
        training(damaged)


def test_a_bad_file_is_named_before_anything_is_predicted(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    soundfile.write(tmp_path / "new" / "a.wav", tone(150, 0.3), RATE)
    (tmp_path / "new" / "b.wav").write_text("text")
    checkpoint = f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"
    with pytest.raises(UserError, match=r"b\.wav"):
        run("predict", tmp_path / "p", checkpoint, f"data.path={tmp_path / 'new'}")
    with pytest.raises(UserError, match=r"no such file or folder.*Did you mean new"):
        run("predict", tmp_path / "p", checkpoint, f"data.path={tmp_path / 'nwe'}")


# wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "file"}, r"data.source='file' is not a choice. Did you mean files"),
        ({"sample_rate": 10}, "data.sample_rate=10 must be a whole number of at least 100"),
        ({"max_seconds": 0}, "data.max_seconds=0 must be above 0"),
        ({"split_ratio": (0.0, 1, 0)}, "data.split_ratio"),
        ({"source": "digits"}, "data.path is missing"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AudioClipData(**options).setup("fit")


def test_one_label_is_nothing_to_tell_apart(tones: Path, tmp_path: Path) -> None:
    shutil.copytree(tones / "low", tmp_path / "one" / "low")
    with pytest.raises(UserError, match="one label only, 'low'"):
        training(tmp_path / "one")


def test_a_model_refuses_other_labels_and_rates(
    fitted: tuple[Path, dict[str, Any]], tones: Path, tmp_path: Path
) -> None:
    checkpoint = f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"
    with pytest.raises(UserError, match=f"trained at {RATE} Hz, here it is data.sample_rate=4000"):
        run("test", tmp_path / "t", checkpoint, f"data.path={tones}", "data.sample_rate=4000")
    shutil.copytree(tones, tmp_path / "more")
    (tmp_path / "more" / "low").rename(tmp_path / "more" / "lower")
    with pytest.raises(UserError, match=r"the label 'lower', which the model does not know. Did you mean low"):
        run("test", tmp_path / "t", checkpoint, f"data.path={tmp_path / 'more'}")


def test_fewer_training_clips_are_of_all_labels(tones: Path) -> None:
    data = training(tones, limit=12)
    assert len(data.sets["train"]) == 12 and (data.counts("train") > 0).all()
    assert [clip.name for clip in data.sets["train"]] == [clip.name for clip in training(tones, limit=12).sets["train"]]


def test_clips_of_one_recording_are_told_apart(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.concatenate([tone(150, 0.4), tone(800, 0.4)]), RATE)
    (tmp_path / "spans.csv").write_text("path,start,end,label\na.wav,0,0.4,low\na.wav,0.4,0.8,high\n")
    checkpoint = f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"
    metrics = run("predict", tmp_path / "p", checkpoint, f"data.path={tmp_path / 'spans.csv'}")
    found = rows(tmp_path / "p" / "predictions.csv")
    assert [row["clip"].removeprefix(str(tmp_path)) for row in found] == ["/a.wav 0-0.4", "/a.wav 0.4-0.8"]
    assert metrics["accuracy"] == 1.0


def test_clips_are_cut_at_max_seconds(tones: Path) -> None:
    data = training(tones, max_seconds=0.25)
    batch = next(iter(data.val_dataloader()))
    assert int(batch["lengths"].max()) == round(0.25 * RATE)


# augmentation ---------------------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    model = create_model("audio_classifier_tiny", sample_rate=8000, dim=16, depth=1)
    augment = Augmentation.create({"gain_db": 6, "shift_seconds": 0.01, "noise_snr_db": [5, 10], "time_masks": 1,
                                   "freq_masks": 1, "mixup": 0.3})  # fmt: skip
    samples, lengths = torch.randn(4, 4000), torch.tensor([4000, 3000, 4000, 2000])

    def drawn(seed: int, step: int) -> list[torch.Tensor]:
        generator = step_generator(seed, step)
        heard, shift = augment.samples(samples, lengths, 8000, generator)
        heard, targets = augment.mixed(heard, torch.eye(4), lengths, generator)
        front = model.encoder.features(heard, lengths)
        return [
            heard,
            shift,
            targets,
            augment.features(front.features, front.lengths, model.encoder.front_end, generator),
        ]

    one, same, other, third = drawn(0, 5), drawn(0, 5), drawn(0, 6), drawn(1, 5)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    for different in (other, third):
        assert not torch.equal(one[0], different[0]) and not torch.equal(one[3], different[3])
    quiet = Augmentation.create({})
    heard, shift = quiet.samples(samples, lengths, 8000, step_generator(0, 0))
    assert heard is samples and not shift.any()


def test_hidden_frames_and_bands_of_a_stack_are_those_of_its_frames() -> None:
    """A band is hidden in every frame of a stack, a frame in all its bands."""
    model = create_model("audio_classifier_tiny", sample_rate=8000, dim=16, depth=1)
    front, features = model.encoder.front_end, torch.ones(3, 50, 320)
    lengths = torch.tensor([50, 40, 30])
    bands = Augmentation.create({"freq_masks": 1, "max_freq_share": 0.5})
    hidden = bands.features(features, lengths, front, step_generator(0, 0)).view(3, 200, 80) == 0
    for row, length in enumerate(4 * lengths):
        assert (hidden[row, :length] == hidden[row, 0]).all() and not hidden[row, length:].any()
    frames = Augmentation.create({"time_masks": 1, "max_time_seconds": 0.3})
    hidden = frames.features(features, lengths, front, step_generator(0, 3)).view(3, 200, 80) == 0
    assert (hidden == hidden[:, :, :1]).all() and 0 < hidden[:, :, 0].sum(1).max() <= 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 3}, "unknown key task.augment.gain. Did you mean gain_db"),
        ({"noise_snr_db": [10, 5]}, r"noise_snr_db=\[10, 5\] must be \[lowest, highest\]"),
        ({"gain_db": -1}, "task.augment.gain_db=-1 must be at least 0"),
        ({"max_freq_share": 1.5}, "max_freq_share=1.5 must be from 0 to 1"),
    ],
)
def test_augmentation_that_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmentation.create(options)
