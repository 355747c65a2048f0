"""What is found in recordings of any length: the spans of the whole, tables, pictures, and what cannot be heard."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

from seqzoo.blocks.layers.spectrogram import LogMel  # noqa: E402
from seqzoo.pipelines.audio.events import predict as finding  # noqa: E402
from seqzoo.pipelines.audio.events.module import AudioEventModule  # noqa: E402
from seqzoo.pipelines.audio.events.recordings import FileRecording  # noqa: E402
from seqzoo.pipelines.audio.overview import Overview  # noqa: E402
from seqzoo.pipelines.audio.reader import AudioReader  # noqa: E402
from seqzoo.pipelines.audio.streaming import FileSource  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402

RATE = 4000
SCHEMA = {
    "labels": ["high", "low", "other"],
    "sample_rate": RATE,
    "window": 3.0,
    "active": [0.1, 0.1, 0.1],
    "conditions": [""],
}
TASK = {"name": "audio_events", "window_overlap": 1.0, "windows_at_once": 2, "threshold": 0.5}
TRAINER = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))


def detector(**options: Any) -> AudioEventModule:
    """Untrained, but of scores around its threshold, so that it finds this and that."""
    torch.manual_seed(0)
    model = {
        "name": "audio_detector_tiny",
        "mixer": {"name": "softmax", "num_heads": 2, "window_size": 3},
        "position": "none",
        "dim": 16,
        "front_end": {"name": "log_mel", "stack": 2, "num_mels": 16, "norm": "fixed"},
        **options,
    }
    module = AudioEventModule(model, dict(TASK), {"name": "adamw", "lr": 1e-3}, {"name": "none"}, dict(SCHEMA)).eval()
    module.net.encoder.measure([(0.1 * torch.randn(4, 2 * RATE), None)])
    if module.net.text:
        torch.nn.init.zeros_(module.net.bias)
        module.net.set_label_vectors(torch.randn(3, 384))
    else:
        torch.nn.init.zeros_(module.net.out.bias)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "talks"
    root.mkdir()
    for number, (name, seconds) in enumerate((("a.flac", 11.3), ("b.wav", 2.1))):
        level = np.sin(np.arange(round(seconds * RATE)) / RATE) ** 2
        soundfile.write(root / name, 0.3 * level * np.random.default_rng(number).standard_normal(len(level)), RATE)
    return root


def config(path: Path, query: Any = None, **task: Any) -> dict[str, Any]:
    return {"data": {"path": str(path)}, "task": {**TASK, **task}, "query": query}


def found_in(run: Path) -> list[dict[str, str]]:
    with (run / "events.csv").open(newline="") as file:
        return list(csv.DictReader(file))


CAUSAL = {"mixer": {"name": "gla", "num_heads": 2}, "causal": True}


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["windows", "state"])
def test_what_is_found_in_pieces_is_found_in_the_whole(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    module = detector(**options)
    found = finding.predict(TRAINER, module, config(folder), tmp_path)
    rows = found_in(tmp_path)
    assert found["events"] == len(rows) > 10 and found["seconds"] == pytest.approx(13.4)
    for name in ("a.flac", "b.wav"):
        recording = FileRecording(folder / name, RATE)
        samples = torch.from_numpy(recording.samples(0, recording.frames))[None]
        with torch.no_grad():
            scores = module._placed(module.net(samples).y[0])
        whole = [(s.start, s.end, SCHEMA["labels"][s.label]) for s in module.decode(scores)]
        own = [(float(r["start"]), float(r["end"]), r["label"]) for r in rows if r["recording"].endswith(name)]
        assert len(own) == len(whole) > 0
        for one, other in zip(own, sorted(whole), strict=True):
            assert one == (pytest.approx(other[0], abs=1e-3), pytest.approx(other[1], abs=1e-3), other[2])
    if pytest.importorskip("matplotlib"):
        assert {"a.png", "b.png"} <= {path.name for path in tmp_path.iterdir()}


def test_one_label_is_asked_for(folder: Path, tmp_path: Path) -> None:
    module = detector()
    finding.predict(TRAINER, module, config(folder), tmp_path / "all")
    finding.predict(TRAINER, module, config(folder / "a.flac", query="low"), tmp_path / "low")
    wanted = [r for r in found_in(tmp_path / "all") if r["label"] == "low" and r["recording"].endswith("a.flac")]
    assert found_in(tmp_path / "low") == wanted != []
    with pytest.raises(UserError, match=r"query='lwo' is no label of the model. Did you mean low.*head=text"):
        finding.predict(TRAINER, module, config(folder, query=["high", "lwo"]), tmp_path)
    with pytest.raises(UserError, match=r"query is empty"):
        finding.predict(TRAINER, module, config(folder, query=" "), tmp_path)


def test_words_are_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that have the vector of a label find what the label finds."""
    module = detector(head="text")
    monkeypatch.setattr(finding, "text_vectors", lambda texts: module.net.label_vectors[[1 for _ in texts]])
    finding.predict(TRAINER, module, config(folder, query="low"), tmp_path / "label")
    finding.predict(TRAINER, module, config(folder, query="a deep tone"), tmp_path / "words")
    one, other = found_in(tmp_path / "label"), found_in(tmp_path / "words")
    assert [(r["start"], r["end"]) for r in one] == [(r["start"], r["end"]) for r in other] != []
    assert {r["label"] for r in other} == {"a deep tone"}


def test_what_cannot_be_heard(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = detector()
    with pytest.raises(UserError, match=r"data.path is missing"):
        finding.predict(TRAINER, module, {"data": {}, "task": TASK}, tmp_path)
    with pytest.raises(UserError, match=r"no such file or folder.*Did you mean talks"):
        finding.predict(TRAINER, module, config(folder.parent / "talk"), tmp_path)
    with pytest.raises(UserError, match=r"give the name of a \.csv file"):
        finding.predict(TRAINER, module, config(folder) | {"output": str(tmp_path)}, tmp_path)
    (folder / "c.wav").write_text("no sound")
    with pytest.raises(UserError, match=r"c\.wav"):
        finding.predict(TRAINER, module, config(folder), tmp_path / "none")
    assert not (tmp_path / "none" / "events.csv").exists()  # said before anything is heard
    samples = np.zeros(9 * RATE)
    samples[-5] = np.nan
    soundfile.write(folder / "c.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"1 of 3 recording\(s\) could not be heard to their end: .*c\.wav holds NaN"):
        finding.predict(TRAINER, module, config(folder), tmp_path / "two")
    assert {Path(row["recording"]).name for row in found_in(tmp_path / "two")} == {"a.flac", "b.wav"}
    assert "skipped:" in capsys.readouterr().err


def test_names_of_pictures_are_their_own(folder: Path) -> None:
    files = [folder / "x" / "a.wav", folder / "y" / "a.wav", folder / "b.wav"]
    assert [finding._unique(file, files) for file in files] == ["a-1", "a-2", "b"]


# the overview ---------------------------------------------------------------------------------------------------------


def test_the_overview_is_the_mean_energy_of_each_column(folder: Path) -> None:
    """Whatever the pieces, those that overlap too; its columns are those of the recording's spectrogram."""
    whole = AudioReader(folder / "a.flac").read()
    overview = Overview(FileSource(AudioReader(folder / "a.flac")), 2, step=0.05, columns=10)
    for start, stop in ((0, 9000), (7000, 20000), (19000, 19500), (19400, len(whole))):
        np.testing.assert_array_equal(overview.samples(start, stop), whole[start:stop])
    mel = LogMel(RATE, num_mels=overview._mel.dim, win_length=160, hop_length=80, compression="none")
    energy = mel(torch.from_numpy(whole)[None]).features[0].double().numpy()
    column = (mel.times(len(energy)).numpy() / (len(whole) / RATE) * 10).astype(int)
    for number in range(10):
        mean = 10 * np.log10(energy[column == number].mean(0))
        np.testing.assert_allclose(overview.spectrogram[:, number], mean, atol=1e-3)
    overview.scored(0, np.array([[0.1, 0.2], [0.3, 0.1]]))
    overview.scored(224, np.array([[0.9, 0.4]]))
    np.testing.assert_allclose(overview.scores[[0, -1]], [[0.3, 0.2], [0.9, 0.4]], rtol=1e-6)
    assert not overview.scores[1:-1].any()


def test_a_query_can_be_given_on_the_command_line() -> None:
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        for task in ("audio_events", "audio_retrieval"):
            cfg = compose("config", overrides=[f"task={task}", "query=[rain, a door]"])
            assert list(cfg.query) == ["rain", "a door"]
