"""`predict task=features` on recordings and videos: vectors against the model called by hand, damage, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.features.task import predict
from seqzoo.zoo import create_model, load_model, save_model

from ..helpers.video_files import write_video

TASK = {"name": "features", "layer": -1, "norm": True, "pooling": "mean", "window": None, "stride": None}
RATE = 8000


def run(
    model: Path, path: Any, folder: Path, query: Any = None, data: dict[str, Any] | None = None, **task: Any
) -> Any:
    cfg = {
        "task": {**TASK, "batch_size": 3, **task},
        "model": {"pretrained": str(model)},
        "data": {"path": str(path), **(data or {})},
        "trainer": {"accelerator": "cpu"},
        "query": query,
        "ckpt_path": None,
    }
    folder.mkdir(exist_ok=True)
    predict(None, None, cfg, folder)
    return pq.read_table(folder / "features.parquet").to_pandas()


def close(frame: pd.DataFrame, wanted: list[torch.Tensor]) -> None:
    found = torch.from_numpy(np.stack(frame["features"].to_list()))
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)


def columns(frame: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    return list(frame[list(names)].itertuples(index=False, name=None))


# recordings -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    soundfile = pytest.importorskip("soundfile", reason="soundfile (seqzoo[audio]) is not installed")
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for name, seconds in (("a.wav", 2.6), ("b.flac", 0.5)):
        soundfile.write(folder / name, rng.uniform(-0.3, 0.3, round(seconds * RATE)), RATE, subtype="PCM_16")
    (folder / "spans.csv").write_text("path,start,end,label\nb.flac,0,0.5,two\na.wav,0.25,1.5,one\na.wav,1.5,2.0,two\n")
    return folder


def heard(model: Any, file: Path, start: float, end: float) -> torch.Tensor:
    """(L, D): the model's features of a span alone."""
    import soundfile

    samples = soundfile.read(file, dtype="float32")[0][round(start * RATE) : round(end * RATE)]
    return model.forward_features(torch.from_numpy(samples)[None])[0]


FRONT = {"name": "log_mel", "stack": 4, "norm": "fixed"}


def saved(folder: Path, name: str, schema: dict[str, Any], **options: Any) -> Path:
    torch.manual_seed(0)
    return save_model(create_model(name, **options), folder / name, preprocessing=schema)


def test_recordings_by_hand(sounds: Path, tmp_path: Path) -> None:
    options = {"sample_rate": RATE, "dim": 16, "depth": 2, "mixer": "linear", "front_end": FRONT}
    folder = saved(tmp_path, "audio_detector_tiny", {"window": 1.0, "sample_rate": RATE}, **options)
    model = load_model(folder)
    frame = run(folder, sounds, tmp_path / "x")
    a, b = str(sounds / "a.wav"), str(sounds / "b.flac")
    spans = [(a, 0.0, 1.0), (a, 1.0, 2.0), (a, 2.0, 2.6), (b, 0.0, 0.5)]
    assert columns(frame, "name", "start", "end") == spans and frame["label"].isna().all()
    close(frame, [heard(model, Path(name), start, end).mean(0) for name, start, end in spans])

    frame = run(folder, sounds / "a.wav", tmp_path / "x", window=1.6, stride=0.5, pooling="last", layer=0, norm=False)
    spans = [(a, 0.0, 1.6), (a, 0.5, 2.1), (a, 1.0, 2.6)]
    assert columns(frame, "name", "start", "end") == spans

    frame = run(folder, sounds, tmp_path / "x", pooling="none")
    each = [
        heard(model, Path(name), start, end) for name, start, end in ((a, 0, 1), (a, 1, 2), (a, 2, 2.6), (b, 0, 0.5))
    ]
    close(frame, list(torch.cat(each)))
    last = frame[(frame["name"] == a) & (frame["start"] == 2.0)]
    assert last["token"].tolist() == list(range(len(each[2])))
    centres = 2.0 + model.encoder.front_end.times(len(each[2])).numpy()
    np.testing.assert_allclose(last["time"], centres, atol=1e-12)


def test_spans_of_a_table_and_clips_of_a_model_of_texts(sounds: Path, tmp_path: Path) -> None:
    shared = {"sample_rate": RATE, "dim": 16, "depth": 1, "mixer": "linear", "front_end": FRONT}
    folder = saved(tmp_path, "audio_classifier_tiny", {"sample_rate": RATE, "max_seconds": None}, **shared)
    frame = run(folder, sounds / "spans.csv", tmp_path / "x")
    spans = [("a.wav", 0.25, 1.5, "one"), ("a.wav", 1.5, 2.0, "two"), ("b.flac", 0.0, 0.5, "two")]
    assert columns(frame, "name", "start", "end", "label") == [(str(sounds / name), *rest) for name, *rest in spans]
    model = load_model(folder)
    close(frame, [heard(model, sounds / name, start, end).mean(0) for name, start, end, _ in spans])

    folder = saved(tmp_path, "audio_text_tiny", {"sample_rate": RATE}, clip_seconds=0.8, text_dim=8, **shared)
    frame = run(folder, sounds / "a.wav", tmp_path / "x")
    assert columns(frame, "start", "end") == [(0.0, 0.8), (0.8, 1.6), (1.6, 2.4), (2.4, 2.6)]
    encoder = load_model(folder).encoder
    parts = torch.from_numpy(_samples(sounds / "a.wav")).split(round(0.8 * RATE))
    close(frame, [encoder(part[None]).y[0].mean(0) for part in parts])
    with pytest.raises(UserError, match=r"task\.window=2: audio_text_tiny hears clips of 0.8 seconds"):
        run(folder, sounds, tmp_path / "x", window=2)


def _samples(file: Path) -> np.ndarray:
    import soundfile

    return soundfile.read(file, dtype="float32")[0]


def test_recordings_that_are_none(sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, "audio_classifier_tiny", {"sample_rate": RATE}, sample_rate=RATE, dim=16, depth=1)
    (tmp_path / "notes.txt").write_text("no sound\n" * 50)
    (tmp_path / "empty").mkdir()
    for message, arguments in (
        (r"notes\.txt", {"path": tmp_path / "notes.txt"}),
        (r"empty has no audio file", {"path": tmp_path / "empty"}),
        (r"no such file or folder: .*a\.wv.*Did you mean a\.wav", {"path": sounds / "a.wv"}),
        (r"task\.window=0\.001 is less than one token", {"window": 0.001}),
        (
            r"data\.text_column is no option of the files that audio_classifier_tiny reads",
            {"data": {"text_column": "x"}},
        ),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, **{"path": sounds, "folder": tmp_path / "x", **arguments})
    # damaged behind its header: the others are there, and it is said
    content = (sounds / "a.wav").read_bytes()
    own = tmp_path / "own"
    own.mkdir()
    (own / "b.wav").write_bytes(content)
    flac = (sounds / "b.flac").read_bytes()
    (own / "a.flac").write_bytes(flac[: len(flac) // 2] + bytes(len(flac) // 2))
    with pytest.raises(UserError, match=r"1 file\(s\) could not be read to their end: .*a\.flac"):
        run(folder, own, tmp_path / "x")
    kept = pq.read_table(tmp_path / "x/features.parquet").to_pandas()
    assert kept["name"].tolist() == [str(own / "b.wav")] and "skipped: " in capsys.readouterr().err


# videos ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av", reason="PyAV (seqzoo[video]) is not installed")
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 50)  # two seconds
    write_video(folder / "b.mp4", 20)
    return folder


def test_videos_by_hand(videos: Path, tmp_path: Path) -> None:
    from seqzoo.pipelines.video.reader import open_video

    schema = {"sampling": [None, 10.0, 6], "features": None, "output": None, "encoder_key": None, "rate": None}
    options = {"encoder": {"name": "patches", "patch_size": 8, "tubelet": 2}, "layout": "factorised", "dim": 16}
    options |= {"depth": 2, "mixer": "linear", "space_mixer": "linear", "position": "sinusoidal"}
    folder = saved(tmp_path, "video_classifier_tiny", {**schema, "size": 16}, **options)
    model = load_model(folder)

    def seen(name: str, times: list[float]) -> torch.Tensor:
        with open_video(videos / name, size=(18, 18)) as reader:
            frames = reader.read_at(np.array(times)).frames[:, 1:17, 1:17]
        at = torch.tensor(times, dtype=torch.float64)[None]
        return model.forward_features(torch.from_numpy(frames.copy())[None], None, at - at[0, 0])[0]

    frame = run(folder, videos, tmp_path / "x", window=0.5)
    starts = [("a.mp4", 0.0), ("a.mp4", 0.5), ("a.mp4", 1.0), ("a.mp4", 1.5), ("b.mp4", 0.0), ("b.mp4", 0.5)]
    assert [(Path(name).name, start) for name, start in columns(frame, "name", "start")] == starts
    assert frame["end"].tolist() == pytest.approx([0.5, 1.0, 1.5, 2.0, 0.5, 0.8])
    tokens = []
    for name, start in starts:
        length = 0.3 if (name, start) == ("b.mp4", 0.5) else 0.5
        tokens.append(seen(name, [start + (i + 0.5) / 10 for i in range(round(length * 10))]))
    close(frame, [own.mean(0) for own in tokens])

    each = run(folder, videos, tmp_path / "x", window=0.5, pooling="none")
    close(each, list(torch.cat(tokens)))
    own = each[(each["start"] == 0.5) & each["name"].str.endswith("a.mp4")]
    assert own["time"].round(6).tolist() == [0.55] * 4 + [0.75] * 4 + [0.95] * 4  # 2 x 2 places, two frames a step
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none has no video"):
        run(folder, tmp_path / "none", tmp_path / "x")


def test_moments_need_a_query(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqzoo.pipelines.features import videos as module
    from seqzoo.pipelines.video.grounding.module import with_cosine

    class Scorer:
        key, size, dim = "means", (8, 8), 4

        def encode_frames(self, frames: np.ndarray) -> np.ndarray:
            own = frames.reshape(len(frames), 4, -1).mean(-1).astype(np.float32)
            return own / 100

        def encode_query(self, query: str) -> np.ndarray:
            return np.full(4, float(len(query)), np.float32)

    monkeypatch.setattr(module, "load_scorer", lambda name, options, cache=None: Scorer())
    schema = {"scorer": "means", "scorer_options": {}, "scorer_key": "means", "fps": 5.0, "window": 1.2}
    options = {"encoder": {"name": "features", "dim": 6}, "query_dim": 4, "dim": 16, "depth": 1, "mixer": "linear"}
    folder = saved(tmp_path, "video_grounder_tiny", schema, **options)
    with pytest.raises(UserError, match="query"):
        run(folder, videos, tmp_path / "x")
    frame = run(folder, videos / "a.mp4", tmp_path / "x", query=["a", "bcd"], data={"cache_gb": 0.0})
    assert frame["label"].tolist() == ["a", "bcd"] * 2 and frame["start"].tolist() == pytest.approx(
        [0.0, 0.0, 1.2, 1.2]
    )
    from seqzoo.pipelines.video.reader import open_video

    with open_video(videos / "a.mp4", size=(8, 8)) as reader:
        features = torch.from_numpy(Scorer().encode_frames(reader.read_at(np.arange(10) / 5).frames))
    model, wanted = load_model(folder), []
    for part in (slice(0, 6), slice(6, 10)):
        for text in ("a", "bcd"):
            query = torch.full((1, 4), float(len(text)))
            own = with_cosine(features[None, part], query)
            wanted.append(model.forward_features(own, query)[0].mean(0))
    close(frame, wanted)


def test_models_without_features_say_why(tmp_path: Path, videos: Path) -> None:
    folder = saved(tmp_path, "vis4mer_tiny", {}, dim=32)
    with pytest.raises(UserError, match="vis4mer_tiny has no features: its stages merge tokens"):
        run(folder, videos, tmp_path / "x")
