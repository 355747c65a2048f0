"""Small made-up data for every pipeline, and what to train on them; no weights and no files of others are needed."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

RATE = 4000
COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "grey": (120, 120, 120)}
TONES = {"low": 200, "middle": 500, "high": 1100, "top": 1700}


class Case(NamedTuple):
    """overrides: of the command. data: the file or folder of `fill`. answers: whether `predict` is shared out. what: is
    special about it. cut: whether a row may be cut (trainer=context_parallel)."""

    name: str
    overrides: str
    data: str
    what: str
    answers: bool = False
    cut: bool = False


_TINY = "model.dim=16 model.depth=1 model.proj_drop=0"
_VIDEO = f"model=video_classifier_tiny mixer=softmax mixer.num_heads=2 {_TINY} data.num_frames=4 data.backend=av"
_PRETRAIN = f"task=video_pretrain data=video_folder {_VIDEO} data.clip_seconds=1 data.gap=0 data.rate=10"
_TEXT = f"task=text data=text model=language_tiny {_TINY} data.seq_len=16 data.split_ratio=[0.6,0.2,0.2]"
CASES = [
    Case(
        "forecasting",
        f"task=forecasting data=csv model=patch_tiny mixer=gla mixer.num_heads=2 {_TINY} data.seq_len=24 "
        "data.pred_len=8 data.gaps=fill",
        "series.csv",
        "targets are missing",
    ),
    Case(
        "forecasting: Informer",
        "task=forecasting data=csv model=informer model.attention=softmax model.dim=16 model.num_heads=2 model.drop=0 "
        "data.seq_len=24 data.pred_len=8 data.gaps=fill",
        "series.csv",
        "batch norm",
    ),
    Case(
        "text",
        f"{_TEXT} mixer=long_vq mixer.codebook_size=8 mixer.chunk_size=8 mixer.kmeans_init=true "
        "mixer.threshold_ema_dead_code=0.5 mixer.commitment_weight=0.01",
        "texts",
        "codebooks, k-means, dead codes; packed rows of uneven documents",
    ),
    Case(
        "text: masked",
        f"{_TEXT} mixer=softmax mixer.num_heads=2 +model.causal=false task.objective=masked",
        "texts",
        "masked tokens",
    ),
    Case(
        "text: whole rows",
        f"{_TEXT} data.seq_len=17 data.whole_rows=true model=hybrid_tiny model.depth=4 +model.ngram_size=64 "
        "trainer.accumulate_grad_batches=2 task.test_protocols=[rows]",
        "texts",
        "Mamba-2, softmax, n-grams; parts of 9 and 8 tokens; two batches a step",
        cut=True,
    ),
    Case(
        "text: masked whole rows",
        f"{_TEXT} data.seq_len=17 data.whole_rows=true mixer=gla mixer.num_heads=2 +model.causal=false "
        "task.objective=masked",
        "texts",
        "a mixer from both ends, masked tokens; parts of 9 and 8 tokens",
        cut=True,
    ),
    Case(
        "documents",
        f"task=documents data=labelled model=classifier_tiny model.norm=batchnorm mixer=softmax mixer.num_heads=2 "
        f"{_TINY}",
        "labelled",
        "masked batch norm; batches of similar lengths",
        answers=True,
    ),
    Case(
        "audio_classify",
        f"task=audio_classify data=audio_clips data.sample_rate={RATE} model=audio_classifier_tiny mixer=gla "
        f"mixer.num_heads=2 {_TINY} +model.front_end.num_mels=8 task.augment=null",
        "clips",
        "clips of uneven lengths",
        answers=True,
    ),
    Case(
        "audio_events",
        f"task=audio_events data=audio_spans data.sample_rate={RATE} data.window=2 model=audio_detector_tiny "
        f"mixer=softmax mixer.num_heads=2 {_TINY} +model.front_end.num_mels=8 task.augment=null "
        "task.window_overlap=0.5 callbacks.checkpoint.monitor=val/loss data.split_ratio=[0.4,0.2,0.4]",
        "events/spans.csv",
        "one recording to validate on: the other process has none",
    ),
    Case(
        "audio_retrieval",
        f"task=audio_retrieval data=audio_pairs data.sample_rate={RATE} model=audio_text_tiny mixer=softmax "
        f"mixer.num_heads=2 {_TINY} model.embed_dim=8 model.clip_seconds=0.2 +model.front_end.num_mels=8 "
        "task.augment=null task.recall_at=[1,3] data.split_ratio=[0.6,0.2,0.2]",
        "pairs.jsonl",
        "contrast of the pairs of both processes",
    ),
    Case(
        "video_classify",
        f"task=video_classify data=video_clips {_VIDEO} data.features=null data.size=16 model.encoder.name=patches "
        "+model.encoder.patch_size=8 data.split_ratio=[0.5,0.2,0.3]",
        "colours",
        "pictures, drawn by clip",
        answers=True,
    ),
    Case("video_pretrain: order", f"{_PRETRAIN} task.pretext=order task.segments=2", "films", "drawn orders"),
    Case("video_pretrain: masked", f"{_PRETRAIN} task.pretext=masked", "films", "hidden frames"),
    Case("video_pretrain: lsmcl", f"{_PRETRAIN} task.pretext=lsmcl", "films", "contrast; a momentum copy"),
    Case(
        "video_grounding",
        f"task=video_grounding data=video_spans data.fps=4 data.window=4 task.window_overlap=1 data.cache_gb=0 "
        f"data.backend=av model=video_grounder_tiny mixer=gla mixer.num_heads=2 {_TINY}",
        "films/spans.csv",
        "windows with and without a span",
    ),
]


def fill(root: Path) -> Path:
    """Write all of the data into a folder, the same at every call."""
    rng = np.random.default_rng(0)
    _series(root / "series.csv", rng)
    words = ["one", "two", "three", "four", "seven"]
    for number in range(53):
        text = " ".join(rng.choice(words, int(rng.integers(2, 40))))
        _write(root / "texts" / f"{number:02}.txt", text)
        _write(root / "labelled" / ("even", "odd")[number % 2] / f"{number:02}.txt", text + " end" * (number % 2))
        low = number % 2 == 0
        _tone(root / "clips" / ("low" if low else "high") / f"{number:02}.wav", [200 if low else 900], rng)
    pairs = []
    for number in range(42):
        own = [str(word) for word in rng.choice(list(TONES), 3)]
        _tone(root / f"pair{number}.wav", [TONES[word] for word in own], rng)
        pairs.append({"path": f"pair{number}.wav", "text": " ".join(own)})
    _write(root / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in pairs))
    rows = ["path,start,end,label"]
    for number in range(5):
        _tone(root / "events" / f"{number}.wav", [0, 300, 0, 1100, 0], rng, seconds=1.0 + 0.1 * number)
        length = 1.0 + 0.1 * number
        rows += [f"{number}.wav,{length * k:.2f},{length * (k + 1):.2f},{name}" for k, name in ((1, "low"), (3, "up"))]
    _write(root / "events" / "spans.csv", "\n".join(rows) + "\n")
    for label in ("red", "green"):
        for number in range(9):
            _film(root / "colours" / label / f"{number}.mp4", [(label, 8 + number)])
    rows = ["path,start,end,text,split"]
    for number in range(7):
        red = 10 + 3 * number
        _film(root / "films" / f"{number}.mp4", [("grey", red), ("red", 15), ("grey", 10), ("blue", 20), ("grey", 25)])
        split = ("train",) * 3 + ("val",) + ("test",) * 3
        rows += [f"{number}.mp4,{red / 10},{red / 10 + 1.5},red,{split[number]}"]
        rows += [f"{number}.mp4,{red / 10 + 2.5},{red / 10 + 4.5},blue,{split[number]}"]
    _write(root / "films" / "spans.csv", "\n".join(rows) + "\n")
    return root


def replace_encoders() -> None:
    """Stand-ins for the encoders of texts, frames and queries, whose weights come with other packages."""
    from seqzoo.pipelines.audio.retrieval import data as pairs
    from seqzoo.pipelines.audio.retrieval import predict as search
    from seqzoo.pipelines.text_vectors import TextVectors
    from seqzoo.pipelines.video.classify import data as videos
    from seqzoo.pipelines.video.grounding import data as moments

    def encode_texts(texts: list[str], path: Any = None) -> TextVectors:
        words = [[np.random.default_rng(sum(map(ord, word))).normal(size=16) for word in t.split()] for t in texts]
        tokens = [torch.tensor(np.array(rows), dtype=torch.float32) for rows in words]
        return TextVectors(torch.stack([torch.nn.functional.normalize(t.mean(0), dim=0) for t in tokens]), tokens)

    pairs.encode_texts = search.encode_texts = encode_texts  # type: ignore[assignment]
    videos.load_image_encoder = lambda *args, **options: _Means()  # type: ignore[assignment]
    moments.load_scorer = lambda *args, **options: _Colours()  # type: ignore[assignment]


class _Means:
    """The mean colour of each quarter of a frame, in place of an image encoder."""

    key, size, dim, grid = "means", (16, 16), 12, None

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        quarters = frames.float().unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
        return quarters.flatten(1) / 255


class _Colours:
    """Which of four colours a frame has, in place of a scorer."""

    key, size, dim = "colours", (16, 16), 8

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        mean = frames.reshape(len(frames), -1, 3).mean(1)
        nearest = np.abs(mean[:, None] - np.array(list(COLOURS.values()))).sum(-1).argmin(1)
        return np.eye(self.dim, dtype=np.float32)[nearest]

    def encode_query(self, query: Any) -> np.ndarray:
        return np.eye(self.dim, dtype=np.float32)[list(COLOURS).index(str(query))]


def _series(path: Path, rng: np.random.Generator) -> None:
    rows = ["time,a,b"]
    for hour in range(400):
        values = [f"{np.sin(hour / (4 + k)) + 0.1 * rng.normal():.4f}" if rng.random() < 0.7 else "" for k in range(2)]
        day, hours = divmod(hour, 24)
        rows.append(f"2026-01-{day + 1:02} {hours:02}:00,{','.join(values)}")
    _write(path, "\n".join(rows) + "\n")


def _tone(path: Path, hertz: list[int], rng: np.random.Generator, seconds: float | None = None) -> None:
    """One tone after the other; 0 is silence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round((rng.uniform(0.2, 0.6) if seconds is None else seconds) * RATE)) / RATE
    samples = np.concatenate([0.4 * np.sin(2 * np.pi * h * time) for h in hertz])
    samples += 0.02 * rng.normal(size=len(samples))
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def _film(path: Path, pieces: list[tuple[str, int]]) -> None:
    """A video of one colour after the other, so many frames of each, ten a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for colour, frames in pieces:
            picture = np.ascontiguousarray(np.broadcast_to(np.array(COLOURS[colour], np.uint8), (16, 16, 3)))
            for number in range(frames):
                picture[:8, : 2 * (number % 4)] = 250  # a corner that changes
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
