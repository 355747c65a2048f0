"""What a fit exports: the model with its preprocessing, a tokenizer's file among it."""

from pathlib import Path
from types import SimpleNamespace

from seqzoo.pipelines.reports import export
from seqzoo.zoo import create_model, load_model

TASK = {"name": "documents", "label_smoothing": 0.1}


def exported(tmp_path: Path, schema: dict):
    net = create_model("classifier_tiny", dim=16, depth=1)
    module = SimpleNamespace(net=net, schema=schema, hparams={"task": TASK}, state_dict=dict)
    export(module, tmp_path)
    return load_model(tmp_path / "model")


def test_a_tokenizer_s_file_goes_with_the_model(tmp_path):
    source = tmp_path / "my own bpe.json"
    source.write_text('{"model": {"type": "BPE"}}')
    schema = {"tokenizer": str(source), "tokenizer_key": "k", "seq_len": 8}
    model = exported(tmp_path, schema)
    source.unlink()
    assert model.preprocessing == {"tokenizer": "tokenizer.json", "tokenizer_key": "k", "seq_len": 8, "task": TASK}
    assert model.files["tokenizer.json"].read_text() == '{"model": {"type": "BPE"}}'
    assert schema["tokenizer"] == str(source), "the module's own is left as it is"


def test_bytes_need_no_file(tmp_path):
    model = exported(tmp_path, {"tokenizer": "bytes", "labels": ["a"]})
    assert model.preprocessing == {"tokenizer": "bytes", "labels": ["a"], "task": TASK} and model.files == {}
    assert exported(tmp_path / "b", {"labels": ["a"]}).files == {}
