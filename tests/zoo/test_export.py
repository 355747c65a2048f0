"""Exported models: programs of torch's own operations that give what the model gives, at any length."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.blocks.registry import list_mixers
from seqzoo.zoo import _exported as exported
from seqzoo.zoo import create_model, export_model, list_models, load_model, model_info, save_exported, save_model
from seqzoo.zoo._export import PlainModel, inputs_of_length, length_axis, without_empty
from seqzoo.zoo._exported import TOLERANCE

LENGTHS = (2, 63, 128, 200)
SIZES = {"seq_len": 32, "pred_len": 8, "in_channels": 3}
QUICK_MIXERS = ("gla", "softmax")
QUICK_MODELS = ("classifier_tiny", "dlinear", "video_classifier_tiny")
MIXERS = {"softmax": {"name": "softmax", "num_heads": 2, "window_size": 70, "position": "rope"}}


def language(mixer, **options):
    torch.manual_seed(0)
    return create_model("language_tiny", mixer=mixer, dim=16, depth=1, ffn="none", **options).eval()


def build(name):
    torch.manual_seed(0)
    needed = any(v is inspect.Parameter.empty for v in model_info(name).options.values())
    return create_model(name, **(SIZES if needed else {})).eval()


def outputs(run, inputs):
    with torch.no_grad():
        found = run(*inputs)
    return found if isinstance(found, dict) else {"y": found}


def check_equal(model, program, trials):
    module = program.module()
    for inputs in trials:
        given, absent = without_empty(inputs)
        expected, found = outputs(PlainModel(model, absent), given), outputs(module, given)
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def operations(program):
    return {
        str(node.target)
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function"
    }


@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=[] if m in QUICK_MIXERS else pytest.mark.slow) for m in list_mixers()]
)
def test_every_mixer_for_any_length(mixer):
    causal = mixer != "prob_sparse"
    model = language(MIXERS.get(mixer, mixer), causal=causal)
    program = export_model(model)
    assert not any("seqzoo" in name for name in operations(program))
    trials = [inputs_of_length(model, n, b) for n, b in zip(LENGTHS, (1, 3, 2, 1), strict=True)]
    check_equal(model, program, trials)


def test_hashed_n_grams_for_any_length_and_batch():
    model = language("linear", ngrams=(2, 3), ngram_size=64, ngram_width=4).eval()
    program = export_model(model)
    for batch, length in ((1, 1), (3, 7), (6, 2)):
        tokens = torch.randint(256, (batch, length))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(tokens), model(tokens).y, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=[] if m in QUICK_MODELS else pytest.mark.slow) for m in list_models()]
)
def test_every_model_at_its_own_length(name):
    model = build(name)
    program = export_model(model, length=None, batch=2)
    assert not any("seqzoo" in operation for operation in operations(program))
    check_equal(model, program, [model.example_inputs(2)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models())
def test_every_model_for_any_length_or_a_reason(name):
    model = build(name)
    if length_axis(model) is None or name.startswith("audio_text"):
        with pytest.raises(ValueError, match="length"):
            export_model(model)
        check_equal(model, export_model(model, length=None), [model.example_inputs(b) for b in (1, 3)])
        return
    lengths = {"tokens": (2, 65, 300), "samples": (8000, 50_001)}.get(model.input_spec["kind"], (2, 65))
    check_equal(
        model, export_model(model), [inputs_of_length(model, n, b) for n, b in zip(lengths, (3, 1, 2), strict=False)]
    )


def test_a_number_fixes_the_length_and_learned_positions_bound_it():
    model = language("softmax", position="learned", max_len=40)
    program = export_model(model, length=12, batch=2)
    check_equal(model, program, [inputs_of_length(model, 12, 2)])
    with pytest.raises(Exception, match="12"):
        program.module()(*inputs_of_length(model, 13, 2))
    program = export_model(model)
    check_equal(model, program, [inputs_of_length(model, 40, 1)])
    with pytest.raises(Exception, match="40"):
        program.module()(*inputs_of_length(model, 41, 1))


def test_a_truncated_average_is_exported_for_shorter_and_longer_rows():
    model = language({"name": "mega", "truncation": 40, "chunk_size": 16})
    program = export_model(model)
    check_equal(model, program, [inputs_of_length(model, n, 2) for n in (2, 39, 40, 41, 90)])


def test_a_model_in_training_is_exported_in_evaluation_and_stays_in_training():
    model = language("softmax", proj_drop=0.5).train()
    program = export_model(model, length=6, batch=1)
    assert model.training
    first, second = (program.module()(*inputs_of_length(model, 6)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dlinear", {}, "'series', which have no length that could change; its weights are of seq_len"),
        ("vit_tiny", {"img_size": 32, "patch_size": 16}, "'image', which have no length .* grid of its patches"),
    ],
)
def test_a_length_that_cannot_change_is_refused_with_the_reason(name, options, message):
    model = build(name) if not options else create_model(name, **options)
    with pytest.raises(ValueError, match=f"length='dynamic': {name} takes inputs of kind {message}"):
        export_model(model)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": "long"}, {"batch": True}, {"batch": None}])
def test_wrong_sizes_are_refused(wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{key}={value!r} must be a positive number or 'dynamic'"):
        export_model(language("softmax"), **wrong)


def test_a_named_backend_that_only_this_package_has_is_refused():
    model = language({"name": "bi_level_routing", "num_heads": 2, "backend": "chunked"})
    with pytest.raises(ValueError, match=r"would hold seqzoo.*block_sparse.*backend='auto'"):
        export_model(model, length=12, batch=2)


def test_the_folder_runs_in_a_process_without_this_package(tmp_path: Path):
    source = save_model(language("softmax"), tmp_path / "saved", preprocessing={"labels": ["a"]})
    model = load_model(source)
    folder = save_exported(model, tmp_path / "out")
    record = json.loads((folder / "export.json").read_text())
    assert record["model"] == "language_tiny" and record["preprocessing"] == {"labels": ["a"]}
    assert record["inputs"] == [{"name": "input", "dtype": "int64", "shape": ["batch", "length"]}]
    assert record["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", "length", 256]}]
    assert record["sizes"] == {"batch": [1, None], "length": [2, None]}
    assert record["largest_difference"] <= TOLERANCE
    tokens = torch.arange(33).reshape(3, 11)
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = f"import torch\ninput = torch.load({str(tmp_path / 'tokens.pt')!r})\n{code}\n"
    code += "import sys\nassert 'seqzoo' not in sys.modules\ntorch.save(outputs, 'outputs.pt')\n"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(folder / "outputs.pt"), model(tokens).y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixer", ["softmax", "gla", pytest.param("mamba", marks=pytest.mark.slow)])
def test_onnxruntime_gives_what_the_model_gives_at_any_length(mixer, tmp_path: Path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = language(mixer)
    folder = save_exported(model, tmp_path / "out", format="onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["input"]
    for length in (2, 90):
        (tokens,) = inputs_of_length(model, length, 3)
        with torch.no_grad():
            expected = model(tokens).y
        torch.testing.assert_close(
            torch.from_numpy(session.run(["y"], {"input": tokens.numpy()})[0]), expected, atol=1e-4, rtol=0
        )


def test_what_onnxruntime_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its errors are of no class of Python's; the file is not kept."""
    pytest.importorskip("onnxscript")
    errors = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")

    def fail(*given):
        raise errors.Fail("[ONNXRuntimeError] : 1 : FAIL : a node\nand more")

    monkeypatch.setattr(exported, "run_exported", fail)
    message = r"an ONNX form that onnxruntime cannot run: .* a node; format='torch' exports it"
    with pytest.raises(ValueError, match=message):
        save_exported(language("softmax"), tmp_path / "out", length=16, batch=1, format="onnx")
    assert not list((tmp_path / "out").glob("*.onnx"))


def test_an_unknown_format_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"format='onx' is unknown.*onnx"):
        save_exported(language("softmax"), tmp_path, format="onx")


def test_clips_of_a_known_number_of_tokens():
    model = create_model("audio_text_tiny").eval()
    for number in (1, 2, 5, 24, 25, 26, 51, 130):
        row = model._clip_of(number, torch.tensor([number]))[0]
        assert model._clip_sizes(number) == torch.bincount(row).tolist(), number
