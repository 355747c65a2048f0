"""`predict task=features` on texts and series: vectors against the model called by hand, windows, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.features.reading import windows
from seqzoo.pipelines.features.task import predict
from seqzoo.zoo import create_model, load_model, save_model

TASK = {"name": "features", "layer": -1, "norm": True, "pooling": "mean", "window": None, "stride": None}
BYTES = {"tokenizer": "bytes", "tokenizer_key": "bytes", "vocab_size": 256, "separator": 0}


def run(model: Path, path: Any, folder: Path, data: dict[str, Any] | None = None, **task: Any) -> pd.DataFrame:
    cfg = {
        "task": {**TASK, "batch_size": 3, **task},
        "model": {"name": "patch_small", "pretrained": str(model)},
        "data": {"path": str(path), **(data or {})},
        "trainer": {"accelerator": "cpu"},
        "ckpt_path": None,
    }
    folder.mkdir(exist_ok=True)
    found = predict(None, None, cfg, folder)
    table = pq.read_table(folder / "features.parquet")
    assert (found["rows"], found["dim"]) == (table.num_rows, table.schema.field("features").type.list_size)
    return table.to_pandas()


def vectors(frame: pd.DataFrame) -> torch.Tensor:
    return torch.from_numpy(np.stack(frame["features"].to_list()))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, size in (("a.txt", 50), ("sub/b.md", 16), ("c.txt", 0), ("d.txt", 33)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.integers(1, 256, size).astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("language_tiny", mixer="linear", dim=16, depth=3, causal=False)
    torch.nn.init.normal_(model.backbone.norm.weight)
    return save_model(model, tmp_path_factory.mktemp("m") / "language", preprocessing={**BYTES, "seq_len": 16})


def test_windows() -> None:
    assert list(windows(10, 4, None)) == [(0, 4), (4, 8), (8, 10)]
    assert list(windows(8, 4, None)) == [(0, 4), (4, 8)]
    assert list(windows(10, 4, 2)) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert list(windows(10, 2, 6)) == [(0, 2), (6, 8)]
    assert list(windows(3, 4, 1)) == list(windows(3, None, 1)) == [(0, 3)]
    assert list(windows(0, 4, None)) == [(0, 0)]
    assert list(windows(1.5, 1.0, 0.5)) == [(0, 1.0), (0.5, 1.5)]
    assert list(windows(1.0000001, 0.5, None)) == [(0, 0.5), (0.5, 1.0000001)]  # no sliver of a rounding error
    assert list(windows(1.0000001, 0.25, 0.5)) == [(0, 0.25), (0.5, 0.75)]


def test_texts_by_hand(texts: Path, language: Path, tmp_path: Path) -> None:
    frame = run(language, texts, tmp_path / "x")
    model = load_model(language)
    order = [("a.txt", 0, 16), ("a.txt", 16, 32), ("a.txt", 32, 48), ("a.txt", 48, 50), ("c.txt", 0, 0)]
    order += [("d.txt", 0, 16), ("d.txt", 16, 32), ("d.txt", 32, 33), ("sub/b.md", 0, 16)]
    assert list(frame[["name", "start", "end"]].itertuples(index=False, name=None)) == order
    assert frame["features"].isna().tolist() == [stop == start for _, start, stop in order]  # no token, no vector
    for kind, how in (("mean", lambda x: x.mean(0)), ("last", lambda x: x[-1]), ("max", lambda x: x.amax(0))):
        frame = run(language, texts, tmp_path / "x", pooling=kind).dropna(subset="features")
        for row, found in zip(frame.itertuples(), vectors(frame), strict=True):
            tokens = np.frombuffer((texts / row.name).read_bytes(), np.uint8)[row.start : row.end].astype(np.int64)
            close(found, how(model.forward_features(torch.from_numpy(tokens)[None])[0]))


@pytest.mark.parametrize(("layer", "norm"), [(0, False), (-2, True), (2, False)])
def test_layers(layer: int, norm: bool, texts: Path, language: Path, tmp_path: Path) -> None:
    frame = run(language, texts / "a.txt", tmp_path / "x", layer=layer, norm=norm, window=7, stride=5, pooling="last")
    model, stored = load_model(language), (texts / "a.txt").read_bytes()
    assert frame["start"].tolist() == list(range(0, 50, 5))[: len(frame)] and frame["end"].iloc[-1] == 50
    for row, found in zip(frame.itertuples(), vectors(frame), strict=True):
        tokens = torch.tensor([list(stored[row.start : row.end])])
        close(found, model.forward_intermediates(tokens, indices=[layer], norm=norm, intermediates_only=True)[0][0, -1])
    metadata = {k.decode(): v.decode() for k, v in pq.read_schema(tmp_path / "x/features.parquet").metadata.items()}
    assert metadata["layer"] == str(layer) and metadata["norm"] == str(norm).lower() and metadata["pooling"] == "last"
    assert metadata["module"] == f"model.backbone.blocks.{layer % 3}" and metadata["unit"] == "tokens"
    assert metadata["sha256"] == json.loads((language / "config.json").read_text())["sha256"]
    assert (metadata["model"], metadata["task"]) == ("language_tiny", "text")


def test_a_row_for_each_token(texts: Path, language: Path, tmp_path: Path) -> None:
    frame = run(language, texts, tmp_path / "x", pooling="none", window=20)
    assert len(frame) == 50 + 16 + 33
    own = frame[frame["name"] == "d.txt"]
    assert own["time"].tolist() == list(range(33)) and own["token"].tolist() == [*range(20), *range(13)]
    tokens = torch.tensor([list((texts / "d.txt").read_bytes())])
    model = load_model(language)
    wanted = torch.cat([model.forward_features(part)[0] for part in (tokens[:, :20], tokens[:, 20:])])
    close(vectors(own), wanted)


def test_a_table_of_texts_and_a_tokenizer_of_words(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    from seqzoo.pipelines.text.tokenizer import train_bpe

    tokenizer = train_bpe([b"one two three two one"] * 20, tmp_path / "words.json", vocab_size=300)
    model = create_model("language_tiny", mixer="linear", dim=16, depth=1, vocab_size=tokenizer.vocab_size).eval()
    schema = {"tokenizer": "tokenizer.json", "tokenizer_key": tokenizer.key, "seq_len": 64}
    files = {"tokenizer.json": tmp_path / "words.json"}
    folder = save_model(model, tmp_path / "m", preprocessing=schema, files=files)
    table = tmp_path / "t.csv"
    table.write_text("body,label\none two,x\nthree one two,y\n")
    frame = run(folder, table, tmp_path / "x", {"field": "body"})
    assert frame["label"].tolist() == ["x", "y"] and frame["name"].tolist() == ["t.csv:2", "t.csv:3"]
    for text, found in zip((b"one two", b"three one two"), vectors(frame), strict=True):
        tokens = torch.from_numpy(np.asarray(tokenizer.encode(text)).astype(np.int64))[None]
        close(found, model.forward_features(tokens)[0].mean(0))


@pytest.mark.parametrize("towers", [1, 2])
def test_documents_by_hand(towers: int, texts: Path, tmp_path: Path) -> None:
    """A classifier of pairs reads each of an odd number of documents by itself."""
    model = create_model("classifier_tiny", mixer="linear", dim=16, depth=2, towers=towers).eval()
    schema = {**BYTES, "source": "labelled", "max_len": 40, "longest": 40, "towers": towers}
    folder = save_model(model, tmp_path / "m", preprocessing=schema)
    frame = run(folder, texts, tmp_path / "x", batch_size=5)
    assert len(frame) == 5 and frame["end"].tolist() == [40, 50, 0, 33, 16]
    alone = create_model("classifier_tiny", mixer="linear", dim=16, depth=2).eval()
    alone.backbone.load_state_dict(model.backbone.state_dict())
    alone.embedding.load_state_dict(model.embedding.state_dict())
    frame = frame.dropna(subset="features")
    for row, found in zip(frame.itertuples(), vectors(frame), strict=True):
        tokens = torch.tensor([list((texts / row.name).read_bytes()[row.start : row.end])])
        close(found, alone.forward_features(tokens)[0].mean(0))


def test_what_cannot_be(texts: Path, language: Path, tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds/a.wav").write_bytes(b"RIFF")
    for message, arguments in (
        (r"no such file or folder: data.path=.*a.txtt.*Did you mean a.txt", {"path": texts / "a.txtt"}),
        (r"a.wav is no text, and language_tiny reads texts", {"path": tmp_path / "sounds"}),
        (r"task.layer=3: language_tiny has 3 blocks, 0 to 2", {"layer": 3}),
        (r"task.layer=-4: language_tiny has 3 blocks", {"layer": -4}),
        (r"task.layer=True must be a whole number", {"layer": True}),
        (r"task.pooling='meen' is not a choice. Did you mean mean", {"pooling": "meen"}),
        (r"task.window=0 must be a number above 0 \(tokens\)", {"window": 0}),
        (r"task.stride=1.5 must be a number above 0 \(tokens\)", {"stride": 1.5}),
        (r"task.batch_size=0 must be a whole number of at least 1", {"batch_size": 0}),
        (r"data.max_seconds is no option of the files that language_tiny reads", {"data": {"max_seconds": 1.0}}),
        (r"model.pretrained=.*nowhere: .*no such folder", {"model": tmp_path / "nowhere"}),
        (r"no_tokenizer has no tokenizer for files of your own", {"model": _saved(tmp_path, "language_tiny", {})}),
        (r"dlinear has no features: its linear maps", {"model": _saved(tmp_path, "dlinear", {})}),
        (r"no pipeline reads files for models of the task 'image'", {"model": _saved(tmp_path, "vit_tiny", {})}),
    ):
        given = {"model": language, "path": texts, "folder": tmp_path / "x", **arguments}
        with pytest.raises(UserError, match=message):
            run(**given)
        assert not (tmp_path / "x/features.parquet").exists()


def _saved(folder: Path, name: str, schema: dict[str, Any]) -> Path:
    options = {"dlinear": {"seq_len": 8, "pred_len": 2, "in_channels": 1}, "vit_tiny": {"depth": 1}}
    target = folder / ("no_tokenizer" if name == "language_tiny" else name)
    return save_model(create_model(name, **options.get(name, {})), target, preprocessing=schema)


def test_learned_positions_bound_the_window(texts: Path, tmp_path: Path) -> None:
    model = create_model("bert_tiny", dim=16, depth=1, max_len=12, head="none").eval()
    folder = save_model(model, tmp_path / "m", preprocessing={**BYTES, "seq_len": 512})
    assert run(folder, texts / "sub", tmp_path / "x")["end"].tolist() == [12, 16]
    with pytest.raises(UserError, match=r"task\.window=13: bert_tiny has 12 learned positions"):
        run(folder, texts / "sub", tmp_path / "x", window=13)


def test_what_is_there_when_it_breaks_is_kept(
    texts: Path, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from seqzoo.pipelines.features import task as module

    whole, made = run(language, texts, tmp_path / "x"), []

    def stopping(*arguments: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(extract(*arguments))
        return made[-1]

    extract = module.extract
    monkeypatch.setattr(module, "extract", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(language, texts, tmp_path / "y")
    assert [p.name for p in (tmp_path / "y").iterdir()] == ["features.partial.parquet"]
    assert "the first 6 rows are in" in capsys.readouterr().out
    part = pq.read_table(tmp_path / "y/features.partial.parquet").to_pandas()
    pd.testing.assert_frame_equal(part, whole.iloc[:6])


# series ---------------------------------------------------------------------------------------------------------------

ROWS, SEQ = 60, 24


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, parts = np.random.default_rng(1), []
    for name, rows in (("north", ROWS), ("south", 40)):
        times = pd.date_range("2024-01-01", periods=rows, freq="h")
        own = pd.DataFrame({"unique_id": name, "ds": times, "a": rng.normal(5, 2, rows), "b": rng.normal(-1, 3, rows)})
        parts.append(own)
    path = tmp_path_factory.mktemp("series") / "two.csv"
    pd.concat(parts).to_csv(path, index=False)
    return path


def forecaster(series: Path, folder: Path, **options: Any) -> tuple[Any, Path, dict[str, Any]]:
    from seqzoo.pipelines.forecasting.data import ForecastData

    data = ForecastData(series, seq_len=SEQ, pred_len=4, split_ratio=(0.6, 0.2, 0.2), short_series="skip")
    data.setup()
    schema, name = data.schema(), options.pop("name", "patch_tiny")
    torch.manual_seed(0)
    model = create_model(name, seq_len=SEQ, pred_len=4, in_channels=2, num_time_features=4, **options).eval()
    return model, save_model(model, folder / "m", preprocessing=schema), schema


def test_series_by_hand(series: Path, tmp_path: Path) -> None:
    model, folder, schema = forecaster(series, tmp_path, patch_len=8, stride=4, depth=2, mixer="linear")
    table = pd.read_csv(series, parse_dates=["ds"])
    scale = {name: dict(zip(("mean", "std"), own, strict=True)) for name, own in _scales(schema).items()}

    def by_hand(name: str, last: int) -> torch.Tensor:
        own = table[table["unique_id"] == name].iloc[last - SEQ : last]
        x = torch.tensor(own[["a", "b"]].to_numpy())
        x = ((x - torch.tensor(scale[name]["mean"])) / torch.tensor(scale[name]["std"])).float()[None]
        return model.forward_features({"past_target": x})  # (2, patches, D), the channels apart

    frame = run(folder, series, tmp_path / "x")
    assert frame["name"].tolist() == ["north"] * 2 + ["south"] * 2 and frame["channel"].tolist() == ["a", "b"] * 2
    assert frame["end"].tolist() == [pd.Timestamp("2024-01-03 11:00")] * 2 + [pd.Timestamp("2024-01-02 15:00")] * 2
    assert (frame["end"] - frame["start"] == pd.Timedelta(hours=SEQ - 1)).all()
    close(vectors(frame), torch.cat([by_hand("north", ROWS), by_hand("south", 40)]).mean(1))

    frame = run(folder, series, tmp_path / "x", stride=10, batch_size=5)
    ends = [24 + 6, 40, 50, 60], [30, 40]
    assert len(frame) == 2 * 6
    wanted = [by_hand(name, end).mean(1) for name, own in zip(("north", "south"), ends, strict=True) for end in own]
    close(vectors(frame), torch.cat(wanted))

    each = run(folder, series, tmp_path / "x", pooling="none")
    first = each[(each["name"] == "south") & (each["channel"] == "b")]
    close(vectors(first), by_hand("south", 40)[1])
    hours = (first["time"] - pd.Timestamp("2024-01-01 16:00")) / pd.Timedelta(hours=1)
    assert hours.tolist() == [0, 4, 8, 12, 16, 20]


def _scales(schema: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    scaler = schema["scaler"]
    ids = scaler.get("unique_ids") or scaler["ids"]
    return {name: (scaler["mean"][i], scaler["std"][i]) for i, name in enumerate(ids)}


def test_an_informer_reads_its_calendar(series: Path, tmp_path: Path) -> None:
    from seqzoo.pipelines.forecasting.data import ForecastData

    model, folder, schema = forecaster(series, tmp_path, name="informer", dim=16, num_heads=2, attention="softmax")
    frame = run(folder, series, tmp_path / "x")
    assert frame["channel"].isna().all() and frame["name"].tolist() == ["north", "south"]
    data = ForecastData.for_prediction(series, schema)
    close(vectors(frame), model.forward_features(data.dataset("predict")[np.arange(2)]).mean(1))


def test_series_that_do_not_fit(series: Path, tmp_path: Path) -> None:
    _, folder, _ = forecaster(series, tmp_path, depth=1)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"a\.wav is no table of series, and patch_tiny reads series"):
        run(folder, tmp_path / "a.wav", tmp_path / "x")
    with pytest.raises(UserError, match=r"task\.window=12: patch_tiny reads 24 steps"):
        run(folder, series, tmp_path / "x", window=12)
    other = tmp_path / "other.csv"
    pd.DataFrame({"ds": pd.date_range("2024", periods=40, freq="h"), "z": range(40)}).to_csv(other, index=False)
    with pytest.raises(UserError, match="'a'"):
        run(folder, other, tmp_path / "x")


# the command ----------------------------------------------------------------------------------------------------------


def test_a_run_of_ours_by_the_command(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit with layer-wise rates; features from its checkpoint, its folder and its exported model are the same."""
    monkeypatch.chdir(tmp_path)
    common = [f"data.path={series}", "paths.runs=runs", "trainer.accelerator=cpu", "callbacks.progress=none"]
    fit = ["data.seq_len=24", "data.pred_len=4", "data.short_series=skip", "data.split_ratio=[0.6,0.2,0.2]"]
    fit += ["model=patch_tiny", "model.patch_len=8", "model.stride=4", "optimizer.layer_decay=0.5", "seed=3"]
    fit += [
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1",
        "data.steps=2",
        "test_after_fit=false",
        "hydra.run.dir=runs/one",
    ]
    assert main(["fit", *common, *fit]) == 0
    rates = (tmp_path / "runs/one/logs/metrics.csv").read_text().splitlines()[0]
    assert rates.count("lr-AdamW/pg") >= 4  # embedding, block and head, with and without decay
    words = ["predict", "task=features", *common]
    tables = []
    for number, source in enumerate(
        ("model.pretrained=runs/one", "model.pretrained=runs/one/model", "ckpt_path=runs/one/checkpoints/last.ckpt")
    ):
        assert main([*words, source, f"hydra.run.dir=runs/p{number}"]) == 0
        tables.append(pq.read_table(f"runs/p{number}/features.parquet").to_pandas())
    assert "4 rows of 32 features in" in capsys.readouterr().out
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    assert main([*words, "hydra.run.dir=runs/p9"]) == 2
    assert "features needs a model: model.pretrained=NAME" in capsys.readouterr().err
    assert main([*words, "model.pretrained=runs/one", "data.time_colum=x", "hydra.run.dir=runs/p9"]) == 2
    assert "time_column" in capsys.readouterr().err and not (tmp_path / "runs/p9").exists()
    assert main(["fit", *common, *fit[:-1], "optimizer.layer_decay=2", "hydra.run.dir=runs/two"]) == 2
    assert "optimizer.layer_decay=2 must be" not in capsys.readouterr().out
