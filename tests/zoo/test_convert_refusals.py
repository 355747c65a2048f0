"""What cannot be converted is refused by name, before anything is written; hostile folders."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from seqzoo.zoo.convert import convert, converter_info, list_converters, make_plan, register_converter

LLAMA = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NEOX = {**LLAMA, "model_type": "gpt_neox"}
MAMBA = {"model_type": "mamba", "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 3}
MAMBA2 = {**MAMBA, "model_type": "mamba2", "num_heads": 4, "head_dim": 4, "n_groups": 2}


def weights():
    """Of a Llama as the config says, by hand."""
    block = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    block |= {
        "self_attn.q_proj": (8, 8),
        "self_attn.o_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
    }
    block |= {"mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12)}
    shapes = {"model.embed_tokens": (13, 8), "model.norm": (8,), "lm_head": (13, 8)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path, config=None, tensors=None):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    if tensors is not None:
        save_file(tensors, str(path / "model.safetensors"))
    return path


def test_the_weights_of_these_tests_fit():
    assert sum(p.numel() for p in convert(weights(), config=LLAMA).parameters()) == sum(
        t.numel() for t in weights().values()
    )


def test_converters_are_listed():
    assert list_converters() == ["bert", "gpt_neox", "llama", "mamba", "mamba2", "timm_vit"]
    for name in list_converters():
        assert converter_info(name).summary.endswith(".") and converter_info(name).model_types
    assert converter_info("llama").model_types == ("llama", "mistral", "qwen2", "qwen3")
    with pytest.raises(ValueError, match=r"unknown converter 'lama'\. Did you mean llama"):
        converter_info("lama")
    with pytest.raises(ValueError, match=r"\['llama'\] already have the converter 'llama'"):
        register_converter("llama", "mine")(lambda config, tensors: None)


CONFIGS = [
    ({**LLAMA, "model_type": "lama"}, "model_type='lama', which has no converter. Did you mean llama"),
    ({**LLAMA, "model_type": "mixtral"}, "model_type='mixtral', which has no converter"),
    ({**LLAMA, "model_type": "falcon_mamba"}, "model_type='falcon_mamba', which has no converter"),
    ({k: v for k, v in LLAMA.items() if k != "model_type"}, "names no model_type; known: bert"),
    ({**LLAMA, "quantization_config": {"bits": 4}}, "has quantization_config: quantised weights"),
    ({**LLAMA, "rope_scaling": {"type": "linear"}}, "positions of the type 'linear' without factor"),
    ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' without low_freq_factor"),
    ({**LLAMA, "rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling of the type 'longrope'; only"),
    ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rope_parameters of the type 'yarn'"),
    ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one set of values for all layers"),
    ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; only 1.0"),
    ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' or 'swish'"),
    ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8; only None"),
    ({**LLAMA, "pretraining_tp": 2}, "pretraining_tp=2"),
    ({**LLAMA, "model_type": "qwen2", "use_sliding_window": True}, "windows in some layers cannot be converted"),
    ({**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "only full_attention"),
    ({**LLAMA, "model_type": "qwen3", "rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05; for qwen3 only 1e-06"),
    ({**LLAMA, "attention_bias": "yes"}, "attention_bias='yes', expected true or false"),
    ({**LLAMA, "rms_norm_eps": "small"}, "rms_norm_eps='small', expected a number"),
    ({**LLAMA, "hidden_size": 8.5}, "hidden_size=8.5, expected a positive integer"),
    ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "the config has no hidden_size"),
    ({**LLAMA, "num_attention_heads": 3}, "num_heads=3 does not divide dim=8"),
    ({**NEOX, "hidden_act": "relu"}, "hidden_act='relu'; only gelu"),
    ({**NEOX, "rope_scaling": {"type": "dynamic"}}, "rope_scaling of the type 'dynamic'"),
    ({**MAMBA, "hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' or 'swish'"),
    ({**MAMBA, "time_step_init_scheme": "odd"}, "time_step_init_scheme='odd'; only random or constant"),
    ({**MAMBA2, "layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; only 1e-05"),
    ({**MAMBA2, "num_heads": 5}, "num_heads=5 of head_dim=4, together not expand"),
    ({**MAMBA2, "time_step_limit": [0.0, "much"]}, "'much' in time_step_limit"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS, ids=lambda value: value if isinstance(value, str) else "")
def test_configs(config, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        convert(weights(), tmp_path / "target", config=config)
    assert not (tmp_path / "target").exists()


def test_null_is_the_default():
    config = {**LLAMA, **dict.fromkeys(("attention_dropout", "head_dim", "mlp_bias", "rms_norm_eps", "rope_scaling"))}
    assert make_plan(weights(), config=config) == make_plan(weights(), config=LLAMA)
    for kind, silent in (("llama", 2), ("mistral", 8), ("qwen2", 32)):
        config = {**LLAMA, "model_type": kind, "num_key_value_heads": None}
        assert make_plan(weights(), config=config).options["mixer"]["num_kv_heads"] == 2  # as many as of queries
        config.pop("num_key_value_heads")
        assert make_plan(weights(), config=config).options["mixer"]["num_kv_heads"] == silent  # of the class
    with pytest.raises(ValueError, match="the config has no hidden_size"):
        make_plan(weights(), config={**LLAMA, "hidden_size": None})


def changed(**changes):
    """The weights with tensors replaced, or left out where None."""
    state = {**weights(), **changes}
    return {k: v for k, v in state.items() if v is not None}


TENSORS = [
    ({"model.layers.1.mlp.up_proj.weight": None}, r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"),
    ({"lm_head.weight": None}, r"missing: lm_head\.weight$"),
    ({"score.weight": torch.ones(2, 8)}, r"no place for: score\.weight$"),
    (
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(8)},
        r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias$",
    ),
    ({"model.layers.2.mlp.up_proj.weight": torch.ones(12, 8)}, r"unexpected: model\.layers\.2\.mlp\.up_proj\.weight$"),
    (
        {"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 8)},
        r"misshaped: model\.layers\.0\.self_attn\.k_proj\.weight \(8, 8\) instead of \(4, 8\)$",
    ),
    (
        {"model.layers.0.mlp.up_proj.weight": torch.ones(12, 8, dtype=torch.int8)},
        r"quantised .*up_proj\.weight \(int8\)",
    ),
    ({"model.norm.weight": torch.ones(8).to(torch.float8_e4m3fn)}, r"quantised .*norm\.weight \(float8_e4m3fn\)"),
]


@pytest.mark.parametrize(("changes", "message"), TENSORS)
def test_tensors(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(changed(**changes), tmp_path / "target", config=LLAMA)
    assert not (tmp_path / "target").exists()


def test_tied_tables_must_be_equal():
    tied = {**LLAMA, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, .*tie_word"):
        convert(weights(), config=tied)
    same = changed(**{"lm_head.weight": weights()["model.embed_tokens.weight"]})
    plan = make_plan(same, config=tied)
    assert plan.translate(same)[1] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_not_read(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    source = folder(tmp_path / "source")
    (source / name).write_bytes(pickle.dumps({"lm_head.weight": Trap()}))
    with pytest.raises(ValueError, match=f"{name} but no model.safetensors: .* pickles.* nothing is unpickled"):
        convert(source, tmp_path / "target")
    (source / name).rename(source / "model.safetensors")  # a pickle under another name
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "target").exists()


def test_truncated_weights(tmp_path):
    source = folder(tmp_path / "source", tensors=weights())
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        convert(source)


def test_folders(tmp_path):
    for source, message in (
        (tmp_path / "nowhere", "no such folder"),
        ("org/name", "hf download org/name --local-dir name"),
        (folder(tmp_path / "empty"), "has neither model.safetensors nor"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path / "bare")
    source = folder(tmp_path / "source", tensors=weights())
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert(source)
    (source / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not an object"):
        convert(source)


def index(path, places):
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_parts(tmp_path):
    source = folder(tmp_path / "source")
    state = weights()
    first, second = dict(list(state.items())[:9]), dict(list(state.items())[9:])
    save_file(first, str(source / "a.safetensors"))
    save_file(second, str(source / "b.safetensors"))
    places = {**dict.fromkeys(first, "a.safetensors"), **dict.fromkeys(second, "b.safetensors")}
    index(source, places)
    x = torch.tensor([[1, 5, 12]])
    assert torch.equal(convert(source)(x).y, convert(state, config=LLAMA)(x).y)
    for change, message in (
        ({"lm_head.weight": "../../b.safetensors"}, r"'\.\./\.\./b\.safetensors'; expected .* the same folder"),
        ({"lm_head.weight": "b.bin"}, r"'b\.bin'; expected \.safetensors files"),
        ({"lm_head.weight": "c.safetensors"}, r"names c\.safetensors, which is not there"),
        (
            {"lm_head.weight": "b.safetensors"},
            r"(a|b)\.safetensors is not as its index says: it (also has|lacks) lm_head",
        ),
        ({"extra.weight": "a.safetensors"}, r"it lacks extra\.weight"),
        ({"lm_head.weight": 3}, "has no weight_map"),
    ):
        index(source, {**places, **change})
        with pytest.raises(ValueError, match=message):
            convert(source)
    index(source, {})
    with pytest.raises(ValueError, match="has no weight_map"):
        convert(source)


def test_targets(tmp_path):
    source = folder(tmp_path / "source", tensors=weights())
    before = sorted(p.name for p in source.iterdir())
    with pytest.raises(ValueError, match="target is the source"):
        convert(source, tmp_path / "source" / ".." / "source", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        convert(source, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files; give another folder, or overwrite=True"):
        convert(source, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    convert(source, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="is a model of seqzoo already"):
        convert(tmp_path / "mine", tmp_path / "again")
    assert sorted(p.name for p in source.iterdir()) == before


def test_arguments():
    for source, config, message in (
        (weights(), None, "a state dict needs config="),
        (weights(), 3, "config is a int; expected a dict"),
        (3, None, "source is a int"),
        ({"a": 3}, LLAMA, "other things than tensors: a"),
        ("folder", LLAMA, "a folder has its own config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, config=config)
