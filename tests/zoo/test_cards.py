"""Cards say what the records say, their lines run, and every set of weights that ships has one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.pipelines import ship as shipping
from seqzoo.pipelines.cli import main
from seqzoo.zoo import _cards as cards
from seqzoo.zoo import _weights as weights
from seqzoo.zoo import create_model, load_model, read_config, save_model, weights_info
from seqzoo.zoo._cards import card_texts, model_card, stale_cards, usage, write_cards

REPO = Path(__file__).parents[2]
ROWS = [
    {"method": "mamba2_tiny: rows", "bits per byte": 1.25, "loss": 0.87},
    {"method": "xz", "bits per byte": 2.5, "loss": None},
]
RECORD = {
    "tag": "stdlib",
    "license": "PSF-2.0",
    "data": "the Python standard library",
    "data_license": "PSF-2.0",
    "command": "lightning fit experiment=text/stdlib_bytes",
    "results": ROWS,
    "metric": "bits per byte",
    "purpose": "Continuing Python as bytes.",
    "limits": ["No chat model.", "Nothing but Python."],
    "environment": {"torch": "2.14.1"},
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.setattr(cards, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.setattr(weights, "_REGISTERED", {})
    return tmp_path / "weights"


@pytest.fixture
def shipped(home):
    model = create_model("mamba2_tiny", depth=1)
    save_model(model, home / "mamba2_tiny.stdlib", record={**RECORD, "input": model.input_spec})
    return home / "mamba2_tiny.stdlib"


def python_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_a_card_says_what_the_record_says(shipped):
    card = model_card(read_config(shipped), "mamba2_tiny.stdlib", shipped=True)
    assert "| mamba2_tiny: rows | 1.25 | 0.87 |" in card and "| xz | 2.5 |  |" in card
    assert "lower is better" in card and "- No chat model.\n- Nothing but Python." in card
    assert "```sh\nlightning fit experiment=text/stdlib_bytes\n```" in card
    config = json.loads((shipped / "config.json").read_text())
    assert config["sha256"] in card and f"{config['num_parameters']:,}" in card
    assert 'seqzoo.create_model("mamba2_tiny.stdlib", pretrained=True)' in python_of(card)
    assert "vocab_size 256" in card and "https://arxiv.org/abs/2405.21060" in card


def test_the_front_matter_is_that_of_the_hub(shipped):
    """Read by the hub's own classes, which know the fields."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (seqzoo[hub]) is not installed")
    data = hub.ModelCard((shipped / "README.md").read_text()).data
    assert data.license == "PSF-2.0" and data.library_name == "seqzoo" and data.pipeline_tag == "text-generation"
    assert {"seqzoo", "text", "mamba2"} <= set(data.tags) and data.datasets == ["the Python standard library"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"bits per byte": 1.25, "loss": 0.87} and data.model_name == "mamba2_tiny.stdlib"
    assert data.to_dict()["training_command"] == RECORD["command"]


def test_odd_words_do_not_break_the_front_matter(home):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (seqzoo[hub]) is not installed")
    odd = {**RECORD, "data": 'a: "b" # c\n- d', "license": "yes", "command": "lightning fit 'x: y' # z"}
    folder = save_model(create_model("mamba2_tiny", depth=1), home / "mamba2_tiny.stdlib", record=odd)
    data = hub.ModelCard((folder / "README.md").read_text()).data
    assert data.datasets == [odd["data"]] and data.license == "yes"
    assert data.to_dict()["training_command"] == odd["command"]


@pytest.mark.parametrize(
    ("name", "options", "preprocessing"),
    [
        ("mamba2_tiny", {"depth": 1}, {}),
        ("prob_sparse_tiny", {"depth": 1}, {}),
        ("classifier_tiny", {"num_classes": 3}, {"labels": ["a", "b", "c"]}),
        ("audio_classifier_tiny", {"num_classes": 2}, {"labels": ["a", "b"]}),
        ("audio_detector_tiny", {}, {"labels": ["a", "b"]}),
        ("audio_text_tiny", {}, {}),
        ("patch_tiny", {"seq_len": 32, "pred_len": 8, "in_channels": 2}, {}),
        ("video_grounder_tiny", {}, {}),
        ("vit_tiny", {"img_size": 32, "dim": 48, "depth": 1}, {}),
    ],
)
def test_the_lines_of_a_card_run(home, tmp_path, name, options, preprocessing):
    """Of weights that ship, and of a folder; as they stand, in a namespace of their own."""
    model = create_model(name, **options)
    record = {**RECORD, "tag": "t", "input": model.input_spec}
    folder = save_model(model, home / f"{name}.t", preprocessing=preprocessing, record=record)
    for code in (usage(read_config(folder), "", shipped=True), usage(read_config(folder), str(folder))):
        assert len(code.splitlines()) == 5
        exec(code, {})
    own = {**record, "usage": "print(model.config)"}
    save_model(model, home / f"{name}.t", preprocessing=preprocessing, record=own)
    assert usage(read_config(folder), "x").splitlines()[-1] == "print(model.config)"


def test_cards_are_written_and_stale_ones_are_named(shipped, home, tmp_path):
    folder = tmp_path / "model_cards"
    folder.mkdir()
    assert stale_cards(folder) == ["mamba2_tiny.stdlib.md"], "weights without a card"
    (path,) = write_cards(folder)
    assert stale_cards(folder) == [] and path.read_text() == card_texts()["mamba2_tiny.stdlib.md"]
    path.write_text(path.read_text().replace("1.25", "1.24"))
    assert stale_cards(folder) == ["mamba2_tiny.stdlib.md"], "a number that is not the record's"
    write_cards(folder)
    (folder / "gla_tiny.gone.md").write_text("a card without weights")
    assert stale_cards(folder) == ["gla_tiny.gone.md"]
    write_cards(folder)
    assert stale_cards(folder) == [] and [p.name for p in folder.iterdir()] == ["mamba2_tiny.stdlib.md"]


def test_the_cards_of_the_repository_are_current():
    """Every set of weights that ships has its card, and it is what its record makes."""
    assert stale_cards(REPO / "model_cards") == [], "python docs/tables.py writes them anew"


def test_the_lines_of_the_cards_that_ship_run(tmp_path):
    """All of them in one process, each in a namespace of its own."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((REPO / "model_cards").glob("*.md"))]
    code = "".join(f"exec({python_of(text)!r}, {{}})\n" for text in texts)
    result = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def run(tmp_path):
    """A run folder as `lightning fit` leaves it, of a classifier."""
    folder = tmp_path / "runs" / "documents" / "1"
    model = create_model("classifier_tiny", num_classes=3, dim=16, depth=1)
    save_model(model, folder / "model", preprocessing={"labels": ["a", "b", "c"], "scaler": [1.5]})
    (folder / "test.csv").write_text(
        'method,accuracy,macro_f1,loss\n"classifier_tiny, softmax",0.9,0.8,0.5\nmajority,0.4,0.2,1.0\nchance,0.3,,1.1\n'
    )
    (folder / "config.yaml").write_text(
        "# seqzoo fit experiment=documents/labelled model.mixer=[{name: mamba2, d_state: 64}, softmax] "
        "paths.runs=/tmp/r callbacks.progress=plain optimizer.lr=1e-3\ntask: {}\n"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "versions": {"torch": "2.14.1"}}))
    return folder


GIVEN = ["license=CC0-1.0", "data=letters", "purpose=Telling letters apart.", "limits=No words.; No pictures."]


def command(run, home, tmp_path, *more):
    return main(["ship", str(run), "classifier_tiny.letters", *GIVEN, f"weights={home}", f"cards={tmp_path}", *more])


def test_ship(run, home, tmp_path, capsys):
    assert command(run, home, tmp_path, "default=true") == 0, capsys.readouterr().err
    folder = home / "classifier_tiny.letters"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    record = weights_info("classifier_tiny")
    assert record.name == "classifier_tiny.letters" and record.default and record.license == "CC0-1.0"
    assert record.metrics == {"accuracy": 0.9, "macro_f1": 0.8, "loss": 0.5} and record.metric == "accuracy"
    assert [row["method"] for row in record.results] == ["classifier_tiny, softmax", "majority", "chance"]
    assert record.limits == ["No words.", "No pictures."] and record.input["vocab_size"] == 256
    assert record.command == (
        "lightning fit experiment=documents/labelled 'model.mixer=[{name: mamba2, d_state: 64}, softmax]' "
        "optimizer.lr=1e-3"
    )
    assert record.environment == {"seqzoo": None, "torch": "2.14.1", "python": "3.11.7"}
    loaded, trained = load_model("classifier_tiny.letters"), load_model(run / "model")
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded.preprocessing == trained.preprocessing == {"labels": ["a", "b", "c"], "scaler": [1.5]}
    assert stale_cards(tmp_path) == [], "the card is the one that docs/tables.py writes"
    assert command(run, home, tmp_path, "dtype=bfloat16", "metric=loss", "beats=majority") == 0
    assert weights_info("classifier_tiny").dtype == "bfloat16" and weights_info("classifier_tiny").metric == "loss"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["metric=f1"], "metric='f1' is no column of numbers"),
        (["beats=minority"], "no row of the table. Did you mean majority"),
        (["dtype=int8"], "dtype='int8' is not a choice"),
        (["licence=MIT"], "has no option 'licence=MIT'. Did you mean license"),
        (["data=/home/me/letters"], "record.data names a place on this machine"),
        (["command=lightning fit data.path=/home/me"], "record.command names a place"),
    ],
)
def test_what_ship_refuses(run, home, tmp_path, capsys, more, message):
    assert command(run, home, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not (home / "classifier_tiny.letters").exists()


def test_ship_refuses_runs_that_lack_something(run, home, tmp_path, capsys, monkeypatch):
    def error(*words):
        assert main(["ship", *words]) == 2
        return capsys.readouterr().err

    where = [f"weights={home}", f"cards={tmp_path}"]
    assert "needs a run folder and MODEL.TAG" in error(str(run), "license=x")
    assert "needs license=... and data=... and purpose=... and limits=..." in error(str(run), "classifier_tiny.a")
    assert "must be MODEL.TAG" in error(str(run), "classifier_tiny", *GIVEN)
    assert "trained 'classifier_tiny', not 'gla_tiny'" in error(str(run), "gla_tiny.a", *GIVEN, *where)
    assert "has no model/" in error(str(tmp_path), "classifier_tiny.a", *GIVEN, *where)
    table = (run / "test.csv").read_text()
    (run / "test.csv").write_text(table.replace("majority,0.4", "majority,0.9"))
    assert "accuracy is 0.9, no better than 0.9 of majority: not shipped" in error(
        str(run), "classifier_tiny.a", *GIVEN, *where
    )
    (run / "test.csv").unlink()
    assert "no table of a test beside its baselines" in error(str(run), "classifier_tiny.a", *GIVEN, *where)
    (run / "test.csv").write_text(table)
    (run / "config.yaml").write_text("# seqzoo fit ckpt_path=last\n")
    assert "resumed another run" in error(str(run), "classifier_tiny.a", *GIVEN, *where)
    (run / "config.yaml").write_text("task: {}\n")
    assert "does not say which command" in error(str(run), "classifier_tiny.a", *GIVEN, *where)
    monkeypatch.setattr(shipping, "MAX_BYTES", 1000)
    assert "bytes in bfloat16, more than the 1,000 of" in error(
        str(run), "classifier_tiny.a", *GIVEN, *where, "command=lightning fit"
    )


def test_a_forecasting_run_has_its_rows(tmp_path):
    """test.json of the forecasting pipeline: a row for every method, scaled scores over everything."""
    overall = {"mse": 0.25, "mae": 0.3, "rmse": 0.5, "count": 7}
    units = {"scaled": {"overall": overall}, "original": {"overall": {"mase": 0.8}}}
    naive = {"scaled": {"overall": {**overall, "mse": 0.5}}, "original": {"overall": {"mase": 1.1}}}
    (tmp_path / "test.json").write_text(json.dumps({"test": {"patch_tiny": units, "seasonal naive": naive}}))
    (tmp_path / "test.csv").write_text("name,value\ntest/x,1\n")
    rows = shipping.read_results(tmp_path)
    assert [row["method"] for row in rows] == ["patch_tiny", "seasonal naive"]
    assert rows[0]["mse"] == 0.25 and rows[1]["mase"] == 1.1
    shipping.check_better(rows, "patch_tiny", "mse", ())


def test_the_best_of_several_rows_of_the_model_stands_first():
    """A text is read row by row, and carried on: both are the model's, and no baseline of it."""
    rows = [
        {"method": "hybrid_tiny: rows of 1024", "bits per byte": 1.5},
        {"method": "hybrid_tiny: carried on", "bits per byte": 1.25},
        {"method": "hybrid_tiny_elder", "bits per byte": 1.375},
        {"method": "xz", "bits per byte": 2.0},
    ]
    found = shipping.own_first(rows, "hybrid_tiny", "bits per byte")
    assert [row["bits per byte"] for row in found] == [1.25, 1.5, 1.375, 2.0]
    shipping.check_better(found, "hybrid_tiny", "bits per byte", ())
    up = [
        {"method": "m, a", "accuracy": 0.5},
        {"method": "m, b", "accuracy": 0.75},
        {"method": "guess", "accuracy": 0.6},
    ]
    assert [row["accuracy"] for row in shipping.own_first(up, "m", "accuracy")] == [0.75, 0.5, 0.6]
    with pytest.raises(shipping.UserError, match=r"0\.5, no better than 0\.6 of guess"):
        shipping.check_better([up[0], up[2]], "m", "accuracy", ())
