"""Recordings and texts as a task: ranks by brute force, pairs and splits, a run that learns, what bad input says."""

from __future__ import annotations

import csv
import itertools
import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
pytest.importorskip("torchaudio", reason="needs seqzoo[audio]")

from seqzoo.pipelines.audio.classify.data import durations
from seqzoo.pipelines.audio.clips import Clip
from seqzoo.pipelines.audio.retrieval import data as data_module
from seqzoo.pipelines.audio.retrieval.data import AudioPairData, match_groups
from seqzoo.pipelines.audio.retrieval.predict import _clip_vectors, check_queries
from seqzoo.pipelines.audio.retrieval.scores import chance, check_recall_at, places, ranks, recall_at, retrieval_scores
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.text_vectors import TextVectors
from seqzoo.zoo import load_model

RATE = 4000
WORDS = {"low": 200, "middle": 500, "high": 1100, "top": 1700}  # a tone for each word, in Hz


# ranks ----------------------------------------------------------------------------------------------------------------


def brute_force(scores: np.ndarray, right: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """Recall@k and ranks as means over every order of the items that leaves higher scores first."""
    hits, rank = [], []
    for values, good in zip(scores, right, strict=True):
        orders = [o for o in itertools.permutations(range(len(values))) if (np.diff(values[list(o)]) <= 0).all()]
        firsts = [next(place for place, item in enumerate(o) if good[item]) for o in orders]
        hits.append(np.mean([first < k for first in firsts]))
        rank.append(np.mean(firsts) + 1)
    return float(np.mean(hits)), np.array(rank)


def test_recall_and_ranks_are_means_over_the_orders_of_equal_scores():
    random = np.random.default_rng(0)
    scores = random.integers(0, 3, (12, 6)).astype(float)  # many ties
    right = random.random((12, 6)) < 0.3
    right[np.arange(12), random.integers(0, 6, 12)] = True
    found = places(scores, right)
    for k in (1, 2, 5, 6):
        hits, rank = brute_force(scores, right, k)
        assert recall_at(found, k) == pytest.approx(hits, abs=1e-12)
        np.testing.assert_allclose(ranks(found), rank, atol=1e-12)
    summary = retrieval_scores(scores, right, [2])
    assert summary["median_rank"] == pytest.approx(np.median(rank)) and summary["recall@2"] == recall_at(found, 2)


def test_without_ties_the_rank_is_the_place():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3]])
    assert ranks(places(scores, np.eye(3, dtype=bool))).tolist() == [3, 2, 1]


def test_chance_is_k_of_n_and_what_a_constant_model_reaches():
    own = np.eye(40, dtype=bool)
    found = chance(own, [1, 5, 10])
    assert [found[f"recall@{k}"] for k in (1, 5, 10)] == pytest.approx([1 / 40, 5 / 40, 10 / 40])
    assert found["median_rank"] == 20.5
    assert retrieval_scores(np.full((40, 40), 0.7), own, [1, 5, 10]) == found


def test_scores_that_cannot_be_ranked_are_refused():
    own = np.eye(3, dtype=bool)
    with pytest.raises(ValueError, match="k=4 is above the 3 items"):
        retrieval_scores(np.zeros((3, 3)), own, [1, 4])
    with pytest.raises(ValueError, match="not finite"):
        places(np.full((3, 3), np.nan), own)
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        places(np.zeros((2, 3)), np.array([[True, False, False], [False] * 3]))
    with pytest.raises(UserError, match=r"task\.recall_at has 10, but val has 7 recordings; take at most 7"):
        check_recall_at([1, 10], {"val": 7})
    for wrong in ([], 5, [0], ["1"]):
        with pytest.raises(UserError, match=r"task\.recall_at"):
            check_recall_at(wrong, {})


# pairs ----------------------------------------------------------------------------------------------------------------


def fake_encoder(texts: list[str], path: Any = None) -> TextVectors:
    """A vector of each text and its words, the same for the same word: no weights needed."""
    tokens = []
    for text in texts:
        rows = [np.random.default_rng(sum(map(ord, word))).normal(size=16) for word in text.lower().split()]
        tokens.append(torch.tensor(np.array(rows), dtype=torch.float32))
    vectors = [row.mean(0) / row.mean(0).norm() for row in tokens]
    return TextVectors(torch.stack(vectors) if vectors else torch.zeros(0, 16), tokens)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "encode_texts", fake_encoder)
    monkeypatch.setattr("seqzoo.pipelines.audio.retrieval.predict.encode_texts", fake_encoder)


def write(path: Path, frequencies: list[float], seconds: float = 0.3) -> Path:
    """Tones one after the other."""
    time = np.arange(round(seconds * RATE)) / RATE
    samples = np.concatenate([0.5 * np.sin(2 * np.pi * hertz * time) for hertz in frequencies])
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Every pair of two of the words, and every one twice: again with a capital, in a recording of another length."""
    rows = []
    for number, (one, other) in enumerate(itertools.permutations(WORDS, 2)):
        name = f"{number}.wav"
        write(tmp_path / name, [WORDS[one], WORDS[other]], 0.42 - 0.02 * number)
        rows.append({"path": name, "text": f"{one} {other}"})
        write(tmp_path / f"again{number}.wav", [WORDS[one], WORDS[other]], 0.25)
        rows.append({"path": f"again{number}.wav", "text": f"{one}  {other}".capitalize()})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_data(table: Path, **options: Any) -> AudioPairData:
    return AudioPairData(path=table, sample_rate=RATE, split_ratio=(0.5, 0.25, 0.25), **options)


def test_equal_texts_stay_together_and_nothing_is_lost(table: Path, encoder: None):
    data = pair_data(table)
    data.setup("fit")
    texts = {stage: {" ".join(clip.label.lower().split()) for clip in clips} for stage, clips in data.sets.items()}
    assert {stage: len(clips) for stage, clips in data.sets.items()} == {"train": 12, "val": 6, "test": 6}
    assert not (texts["train"] & texts["val"]) | (texts["train"] & texts["test"]) | (texts["val"] & texts["test"])
    assert sum(map(len, texts.values())) == 12
    groups = match_groups(data.sets["val"])
    assert sorted(np.bincount(groups).tolist()) == [2, 2, 2]
    again = pair_data(table)
    again.setup("fit")
    assert again.sets == data.sets


def test_a_recording_with_two_texts_answers_both(table: Path, encoder: None):
    with table.open("a") as file:
        file.write(json.dumps({"path": "0.wav", "text": "two tones"}) + "\n")
    data = pair_data(table)
    data.setup("fit")
    clips = [clip for clips in data.sets.values() for clip in clips]
    assert len(clips) == 25
    numbers = {clip.label: group for clip, group in zip(clips, match_groups(clips).tolist(), strict=True)}
    assert numbers["two tones"] == numbers["low middle"] == numbers["Low  middle"] != numbers["low high"]
    assert len({clip.split for clip in clips if clip.label in ("two tones", "low middle")}) == 1


def test_a_batch_has_samples_texts_and_words(table: Path, encoder: None):
    data = pair_data(table, eval_batch_size=6, max_seconds=0.6)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    lengths = batch["lengths"].tolist()
    assert lengths == sorted(lengths) and max(lengths) <= 0.6 * RATE
    for row, clip in enumerate(data.sets["val"]):
        expected = fake_encoder([clip.label])
        torch.testing.assert_close(batch["text"][row], expected.vectors[0])
        torch.testing.assert_close(batch["tokens"][row][batch["token_mask"][row]], expected.tokens[0])
        assert not batch["samples"][row, lengths[row] :].any() and batch["samples"][row, : lengths[row]].any()
    assert batch["clip"].tolist() == list(range(6))
    data.words = False
    assert "tokens" not in next(iter(data.val_dataloader()))


def test_what_replaces_a_bad_recording_has_its_own_text(table: Path, encoder: None):
    """A file that breaks after the split is counted; the next one stands in its row, with its text and number."""
    data = pair_data(table)
    data.setup("fit")
    assert data.bad is not None
    path = Path(data.sets["train"][4].name)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"1 of 12 audio files were skipped: 1 cut off, more than 5%"):
        data.batches("train", data.bad)[np.array([4])]
    data.bad.most = 0.5
    batch = data.batches("train", data.bad)[np.array([3, 4])]
    assert batch["clip"].tolist() == [3, 5] and data.bad.causes == {"cut off": 1}
    for row, number in enumerate((3, 5)):
        torch.testing.assert_close(batch["text"][row], fake_encoder([data.sets["train"][number].label]).vectors[0])
        assert batch["group"][row] == match_groups(data.sets["train"])[number]


def test_joined_rows_are_recordings_one_after_the_other_with_their_texts(table: Path, encoder: None):
    data = pair_data(table, join=3, max_seconds=1.6)
    data.setup("fit")
    single, joined = data.batches("train"), data.batches("train", join=3)
    seen = set()
    for seed in range(8):
        index = np.random.default_rng(seed).permutation(12)[:5]
        batch, again = joined[index], joined[index]
        assert all(torch.equal(batch[key], again[key]) for key in batch)
        for row, number in enumerate(index.tolist()):
            length, words = int(batch["lengths"][row]), batch["tokens"][row][batch["token_mask"][row]]
            assert batch["clip"][row] == number and length <= 1.6 * RATE
            own = single[np.array([number])]
            first = int(own["lengths"][0])
            assert torch.equal(batch["samples"][row, :first], own["samples"][0])
            torch.testing.assert_close(words[:2], own["tokens"][0])
            count = len(words) // 2
            seen.add(count)
            # what follows is whole recordings of the set, in the order of their words
            begin = first
            for place in range(1, count):
                own_words = words[2 * place : 2 * place + 2]
                part = next(
                    p for p in (single[np.array([n])] for n in range(12))
                    if torch.equal(p["tokens"][0], own_words)
                    and torch.equal(batch["samples"][row, begin : begin + int(p["lengths"][0])], p["samples"][0])
                )  # fmt: skip
                begin += int(part["lengths"][0])
            assert begin == length
            parts = words.unflatten(0, (count, 2)).mean(1)
            mean = torch.nn.functional.normalize(parts, dim=-1).mean(0)
            torch.testing.assert_close(batch["text"][row], mean / mean.norm())
    assert seen == {1, 2, 3}


def test_equal_sets_of_joined_texts_are_one_group(table: Path, encoder: None):
    data = pair_data(table, join=2)
    data.setup("fit")
    batches = data.batches("train", join=2)
    one = batches._group([0, 5])
    assert one == batches._group([5, 0]) != batches._group([0, 1])
    assert batches._group([3]) == batches.groups[3] < one


def test_pairs_that_are_wrong_name_their_row(table: Path, encoder: None, tmp_path: Path):
    lines = table.read_text().splitlines()

    def broken(row: dict[str, Any]) -> AudioPairData:
        path = tmp_path / "broken.jsonl"
        path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[2:]]))
        return pair_data(path)

    with pytest.raises(UserError, match=r"broken\.jsonl, line 3: the column 'text' is empty"):
        broken({"path": "0.wav", "text": "  "}).setup("fit")
    with pytest.raises(UserError, match=r"broken\.jsonl, line 3: no such file: .*00\.wav"):
        broken({"path": "00.wav", "text": "low"}).setup("fit")
    with pytest.raises(UserError, match=r"has no column 'caption' \(label\)"):
        pair_data(table, text_column="caption").setup("fit")
    with pytest.raises(UserError, match=r"data\.source='pair' is not a choice\. Did you mean pairs"):
        AudioPairData("pair")
    with pytest.raises(UserError, match=r"data\.path is missing"):
        AudioPairData().setup("fit")
    with pytest.raises(UserError, match=r"data\.batch_size=1 must be a whole number of at least 2"):
        pair_data(table, batch_size=1)


def test_a_table_for_a_test_alone(table: Path, encoder: None):
    rows = [{**json.loads(line), "split": "test"} for line in table.read_text().splitlines()]
    table.write_text("\n".join(map(json.dumps, rows)))
    data = pair_data(table)
    data.setup("test")
    assert len(data.sets["test"]) == 24 and data.schema()["text_dim"] == 16
    with pytest.raises(UserError, match=r"0 text\(s\) for train, two are needed"):
        data.setup("fit")


def test_queries_that_are_wrong():
    assert check_queries("a bell") == ["a bell"] and check_queries(["a", "b"]) == ["a", "b"]
    for missing in (None, []):
        with pytest.raises(UserError, match=r"query is missing"):
            check_queries(missing)
    for empty in ("", " ", ["a bell", ""]):
        with pytest.raises(UserError, match=r"query has an empty text"):
            check_queries(empty)


class Listening:
    """In the place of a trainer: a "vector" of each piece, its length in samples."""

    def predict(self, module: Any, dataloaders: Any, return_predictions: bool) -> list[Any]:
        return [(batch["clip"], [length.view(1, 1) for length in batch["lengths"]]) for batch in dataloaders]


def test_long_recordings_are_read_in_pieces_of_whole_clips(tmp_path: Path):
    clips = [
        Clip(write(tmp_path / "long.wav", [300], 5.1), 0.0, None, ""),
        Clip(tmp_path / "long.wav", 0.1, 4.96, "a span"),  # 0.06 seconds beyond six pieces: less than half a clip
        Clip(write(tmp_path / "short.wav", [300], 0.03), 0.0, None, ""),
    ]
    data, module = AudioPairData(sample_rate=RATE), SimpleNamespace(net=SimpleNamespace(clip_seconds=0.2))
    found = _clip_vectors(Listening(), module, data, clips, durations(clips), 0.9)  # type: ignore[arg-type]
    pieces = [[(round(start, 3), int(length)) for start, length in parts] for parts in found]
    whole = [(0.0, 3200), (0.8, 3200), (1.6, 3200), (2.4, 3200), (3.2, 3200), (4.0, 3200)]
    assert pieces == [[*whole, (4.8, 1200)], [*whole[:-1], (4.0, 3440)], [(0.0, 120)]]
    with pytest.raises(UserError, match=r"task\.window_seconds=0\.1 must be at least model\.clip_seconds=0\.2"):
        _clip_vectors(Listening(), module, data, clips, durations(clips), 0.1)  # type: ignore[arg-type]


def test_a_dataset_with_audio_and_texts(tmp_path: Path, encoder: None):
    datasets = pytest.importorskip("datasets", reason="needs seqzoo[text]")
    path = write(tmp_path / "a.wav", [300])
    features = datasets.Features({"sound": datasets.Audio(), "caption": datasets.Value("string")})
    rows = {"sound": [{"bytes": path.read_bytes(), "path": None}] * 8, "caption": [f"tone {i}" for i in range(8)]}
    # not by from_dict, which wants torchcodec
    datasets.Dataset(pa.Table.from_pydict(rows, features.arrow_schema)).save_to_disk(str(tmp_path / "set"))
    options = {"sample_rate": RATE, "split_ratio": (0.5, 0.25, 0.25), "text_column": "caption"}
    data = AudioPairData("hub", tmp_path / "set", **options)
    data.setup("fit")
    assert sorted(clip.label for clips in data.sets.values() for clip in clips) == rows["caption"]
    (batch,) = data.val_dataloader()
    assert batch["samples"].shape == (2, round(0.3 * RATE))
    with pytest.raises(UserError, match=r"no column 'text' \(label_column\)"):
        AudioPairData("hub", tmp_path / "set", sample_rate=RATE).setup("fit")


def test_prompts_are_split_by_their_texts(encoder: None):
    data = AudioPairData("prompts", sample_rate=8000, split_ratio=(0.7, 0.1, 0.2))
    try:
        data.setup("fit")
    except UserError as error:
        pytest.skip(str(error))
    sizes = {stage: len(clips) for stage, clips in data.sets.items()}
    assert sum(sizes.values()) == 568 and abs(sizes["test"] - 114) < 3
    assert "digits 7" in {clip.label for clips in data.sets.values() for clip in clips}


# runs -----------------------------------------------------------------------------------------------------------------

SMALL = f"""
    experiment=audio/retrieval data=audio_pairs data.sample_rate={RATE} data.split_ratio=[0.5,0.25,0.25]
    data.batch_size=8 data.steps=40 data.join=2 mixer.num_heads=2 model.dim=16 model.depth=1 model.embed_dim=16
    model.clip_seconds=0.2 model.head_drop=0 +model.front_end.num_mels=16 task.recall_at=[1,3] task.augment={{}}
    optimizer.lr=2.0e-2 trainer.max_epochs=2 trainer.accelerator=cpu trainer.log_every_n_steps=10
    logger.tensorboard=false callbacks.progress=none
""".split()


def composed(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=[*SMALL, *overrides]), resolve=True)  # type: ignore[return-value]


@pytest.fixture
def fitted(table: Path, encoder: None, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    run = tmp_path / "run"
    return run, execute("fit", composed(f"data.path={table}"), run)


def test_a_run_learns_scores_and_finds(
    fitted: tuple[Path, dict[str, Any]], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, metrics = fitted
    # six recordings of three texts: the texts are new, their words are not
    assert metrics["test/chance/recall@1"] == pytest.approx(1 / 3)
    assert metrics["test/text_to_audio/recall@1"] > 0.6 and metrics["test/audio_to_text/recall@1"] > 0.6
    rows = list(csv.DictReader((run / "test.csv").open()))
    assert [row["method"].split(": ")[-1] for row in rows] == ["text to audio", "audio to text", "a fair guess"]
    pairs = list(csv.DictReader((run / "pairs.csv").open()))
    assert len(pairs) == 6 and np.mean([float(row["rank_of_recording"]) <= 1.5 for row in pairs]) > 0.6
    record = json.loads((run / "scores.json").read_text())
    assert record["test"]["pairs"] == 6 and record["train_pairs"] == 12
    assert load_model(run / "model").score.scores == ("global", "attention", "token")

    checkpoint = f"ckpt_path={run}/checkpoints/best.ckpt"
    again = execute("test", composed(f"data.path={table}", checkpoint, "data.eval_batch_size=1"), tmp_path / "again")
    for key in ("test/loss", "test/mean_recall", "test/text_to_audio/mean_rank"):
        assert again[key] == pytest.approx(metrics[key], abs=1e-5)

    # a folder: the recordings with a tone, one of them long, read in pieces of 0.8 seconds
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "low.wav", [WORDS["low"]] * 3)
    write(folder / "long.wav", [WORDS["low"]] * 10 + [WORDS["top"]] * 2 + [WORDS["low"]] * 5)
    options = [checkpoint, f"data.path={folder}", "query=top", "task.window_seconds=0.8"]
    found = execute("predict", composed(*options), tmp_path / "found")
    assert found["recordings"] == 2 and found["queries"] == 1
    first, second = csv.DictReader((tmp_path / "found" / "predictions.csv").open())
    assert first["recording"].endswith("long.wav") and first["rank"] == "1" and second["rank"] == "2"
    assert 2.9 <= float(first["start"]) < float(first["end"]) <= 3.7
    assert "'top'" in capsys.readouterr().out
    whole = execute("predict", composed(*options[:3], "query=[top, low top]"), tmp_path / "whole")
    assert whole["queries"] == 2
    first = next(csv.DictReader((tmp_path / "whole" / "predictions.csv").open()))
    assert first["recording"].endswith("long.wav") and 2.9 <= float(first["start"]) < 3.7


def test_what_a_run_cannot_do_is_said_before_it_begins(table: Path, encoder: None, tmp_path: Path):
    for overrides, message in (
        (["task.recall_at=[1,50]"], r"task\.recall_at has 50, but val has 6 recordings; take at most 6"),
        (["model.scores=[global,tokens]"], "scores has 'tokens', which is unknown.*Did you mean token"),
        (["+task.augment.mixup=0.4"], r"data\.join puts recordings"),
        (["data.split_ratio=[1,0,0]"], r"0 text\(s\) for val"),
    ):
        with pytest.raises(UserError, match=message):
            execute("fit", composed(f"data.path={table}", *overrides), tmp_path / "run")
