"""Every wrong input that the work was asked to name, in one table: a command line and what it says, or the test of it.

A command ends with status 2, one line on stderr that begins with "error: ", and no traceback.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seqzoo.blocks.registry import create_mixer
from seqzoo.pipelines.cli import main

TESTS = Path(__file__).parents[1]
GOOD = "date,a\n" + "".join(f"2024-01-{1 + n // 24:02} {n % 24:02}:00,{n}\n" for n in range(100))
SMALL = ["data.seq_len=16", "data.pred_len=4", "data.split_ratio=[0.6,0.2,0.2]", "trainer.accelerator=cpu"]
SMALL += ["logger.tensorboard=false", "callbacks.progress=none", "model=patch_tiny", "mixer=linear"]
FIT = ["fit", "data=csv", *SMALL]
HEAR = ["predict", "experiment=audio/classify", "model.pretrained=audio_classifier_small.digits"]
START = [*FIT, "data.path=good.csv"]
SEE = ["predict", "experiment=video/search", "query=cab"]


def _lines(**changed: str) -> str:
    """The good table with lines replaced: l5=... is line 5 of the file."""
    lines = GOOD.splitlines()
    for key, text in changed.items():
        lines[int(key[1:]) - 1] = text
    return "\n".join(line for line in lines if line != "-") + "\n"


def _saved(weights: bytes, **changed: object) -> dict[str, str | bytes]:
    """The two files of a saved model whose config names the hash of its weights."""
    config = {"schema_version": 2, "name": "patch_tiny", "options": {}, "sha256": hashlib.sha256(weights).hexdigest()}
    return {"config.json": json.dumps({**config, **changed}), "model.safetensors": weights}


_PICKLE, _CUT, _NOTHING = b"\x80\x04K\x01.", *(n.to_bytes(8, "little") + b"{}" for n in (100, 2))
_MODELS: dict[str, dict[str, str | bytes]] = {
    "pickle": _saved(_PICKLE),
    "cut": _saved(_CUT),
    "hash": _saved(_CUT, sha256="0" * 64),
    "new": _saved(_CUT, schema_version=99),
    "nobody": _saved(_NOTHING, name="patch_tny"),
}
FILES: dict[str, str | bytes] = {
    **{f"{folder}/{name}": content for folder, files in _MODELS.items() for name, content in files.items()},
    "good.csv": GOOD,
    "empty.csv": "",
    "text.csv": _lines(l19="2024-01-01 17:00,broken"),
    "double.csv": _lines(l19="2024-01-01 16:00,17"),
    "unsorted.csv": _lines(l19="2024-01-01 18:00,17", l20="2024-01-01 17:00,18"),
    "gap.csv": _lines(l19="-"),
    "infinite.csv": _lines(l19="2024-01-01 17:00,inf"),
    "short.csv": "\n".join(GOOD.splitlines()[:9]) + "\n",
    "broken.ckpt": b"PK\x03\x04" + b"\0" * 100,
    "empty/keep.md": "",
    "zero.wav": b"",
    "words.wav": "these are words",
    "zero.mp4": b"",
    "words.mp4": "these are words",
    "clips.csv": "file,label\nmissing.wav,a\n",
    "bare/config.json": _MODELS["cut"]["config.json"],
    "other/notes.txt": "no config",
}

# What the issue says; the command; a pattern of what is said.
COMMANDS: list[tuple[str, list[str], str]] = [
    # issue 2
    ("unknown command", ["fti"], r"unknown command 'fti'.*fit"),
    ("unknown flag", ["fit", "--bogus"], r"unknown flag --bogus"),
    ("unknown key", ["fit", "trainer.max_epoch=1"], r"trainer\.max_epoch.*max_epochs"),
    ("unknown group option", ["fit", "mixer=sofmax"], r"sofmax.*softmax"),
    ("unknown model", ["fit", "model=patch_smal"], r"patch_smal.*patch_small"),
    ("unknown mixer", ["fit", "mixer.name=softmx"], r"softmx.*softmax"),
    ("a type", ["fit", "trainer.max_epochs=ten"], r"trainer\.max_epochs='ten' must be a whole number"),
    ("missing file", [*FIT, "data.path=nowhere.csv"], r"no file nowhere\.csv"),
    ("a near file", [*FIT, "data.path=goood.csv"], r"goood\.csv.*good\.csv"),
    ("empty file", [*FIT, "data.path=empty.csv"], r"empty\.csv is empty"),
    ("no such column", [*FIT, "data.path=good.csv", "data.targets=[aa]"], r"no column 'aa'.*a"),
    (
        "text in a numeric column",
        [*FIT, "data.path=text.csv", "data.targets=[a]"],
        r"text\.csv line 19, column 'a': 'broken' is not a number",
    ),
    ("duplicate timestamps", [*FIT, "data.path=double.csv"], r"double\.csv line 19: dupl.*line 18.*data\.id_column"),
    ("unsorted timestamps", [*FIT, "data.path=unsorted.csv"], r"unsorted\.csv line 20.*sort the file by time"),
    ("a gap", [*FIT, "data.path=gap.csv", "data.gaps=error"], r"gap\.csv line 19: a gap.*set data\.gaps=fill"),
    ("an infinity", [*FIT, "data.path=infinite.csv"], r"infinite\.csv line 19, column 'a': inf is infinite"),
    ("shorter than the window", [*FIT, "data.path=short.csv"], r"short\.csv has 8 rows.*34.*shorten data\.seq_len or"),
    ("horizon 0", [*FIT, "data.path=good.csv", "data.pred_len=0"], r"data\.pred_len=0 must be greater than 0"),
    (
        "a truncated checkpoint",
        ["predict", *FIT[1:], "data.path=good.csv", "ckpt_path=broken.ckpt"],
        r"broken\.ckpt is truncated",
    ),
    ("no checkpoint", ["test", *FIT[1:], "data.path=good.csv"], r"test needs a checkpoint: give ckpt_path"),
    (
        "a checkpoint that is not there",
        [*FIT, "data.path=good.csv", "ckpt_path=no.ckpt"],
        r"no checkpoint at no\.ckpt\. Nearest: broken\.ckpt",
    ),
    # issue 3
    (
        "unsupported pattern",
        [
            "fit",
            "task=text",
            "data=text",
            "data.path=good.csv",
            "model=language_tiny",
            "mixer=prob_sparse",
            "data.split_ratio=[0.4,0.3,0.3]",
        ],
        r"ProbSparseAttention does not support the pattern 'causal'.*linear",
    ),
    (
        "dim not divisible",
        [*FIT, "data.path=good.csv", "model.dim=30", "mixer.num_heads=8"],
        r"dim=30 is not divisible by num_heads=8; give head_dim",
    ),
    (
        "a mixer that the model does not read",
        ["fit", "model=mamba_small", "mixer=linear", "task=text", "data=stdlib"],
        r"mixer=linear has no effect: the model 'mamba_small' has its own mixer \(mamba\).*model=language_small.*"
        r"model\.mixer=linear",
    ),
    (
        "a model without mixers",
        ["fit", "model=dlinear", "mixer.num_heads=4"],
        r"mixer\.num_heads=4 has no effect: the model 'dlinear'.*model=patch_",
    ),
    # issue 5
    (
        "empty corpus",
        ["fit", "task=text", "data=text", "data.path=empty", "model=language_tiny"],
        r"data\.path=empty holds no text",
    ),
    ("no such text", ["fit", "task=text", "data=text", "data.path=nowhere", "model=language_tiny"], r"no such file"),
    # issue 6
    (
        "a table with a missing file",
        ["fit", "experiment=audio/classify", "data.path=clips.csv"],
        r"clips\.csv, line 2.*missing\.wav.*words\.wav",
    ),
    ("zero-length audio", [*HEAR, "data.path=zero.wav"], r"zero\.wav is empty \(0 bytes\): copy.*again.*WAV, FLAC"),
    ("text named .wav", [*HEAR, "data.path=words.wav"], r"words\.wav is a text file.*'these are words'.*WAV, FLAC"),
    ("no such audio", [*HEAR, "data.path=word.wav"], r"no such file.*word\.wav.*Did you mean words\.wav"),
    (
        "audio without a model",
        ["predict", "experiment=audio/classify", "data.path=zero.wav"],
        r"no run named 'audio_classify'.*fit one, or give ckpt_path=.*model\.pretrained=NAME",
    ),
    # issue 7
    (
        "an empty query",
        ["predict", "experiment=video/search", "data.path=words.mp4", "query=''"],
        r"the query is empty.*such as query=",
    ),
    ("zero-byte video", [*SEE, "data.path=zero.mp4"], r"zero\.mp4 is empty \(0 bytes\): copy.*again.*MP4, MKV, WebM"),
    ("text named .mp4", [*SEE, "data.path=words.mp4"], r"words\.mp4 is a text file.*'these are words'.*MP4, MKV, WebM"),
    ("no such video", [*SEE, "data.path=word.mp4"], r"no such file.*word\.mp4.*Did you mean words\.mp4"),
    ("fitting what only looks", ["fit", "experiment=video/search", "data.path=no.mp4", "query=cab"], r"trains nothing"),
    # issue 8
    (
        "no such saved model",
        [*FIT, "data.path=good.csv", "model.pretrained=nowhere"],
        r"model\.pretrained=nowhere.*no such folder.*weights that ship: ",
    ),
    ("a pickle renamed", [*START, "model.pretrained=./pickle"], r"pickle/model\.safetensors is a pickle.*save_model"),
    (
        "truncated weights",
        [*START, "model.pretrained=./cut"],
        r"cut/model\.safetensors is cut off.*100 bytes.*10; fetch",
    ),
    (
        "wrong hash",
        [*START, "model.pretrained=./hash"],
        rf"hash/model\.safetensors has sha256 {hashlib.sha256(_CUT).hexdigest()}.*says 0{{64}}.*fetch it again",
    ),
    (
        "a folder without weights",
        [*START, "model.pretrained=./bare"],
        r"bare has no model\.safetensors: copy the whole",
    ),
    (
        "a folder without a model",
        [*START, "model.pretrained=./other"],
        r"other is not a saved.*no config\.json; save_model",
    ),
    (
        "a newer schema",
        [*START, "model.pretrained=./new"],
        r"new/config\.json has schema version 99, this seqzoo reads up to 2: pip install -U seqzoo",
    ),
    ("an unknown model in a config", [*START, "model.pretrained=./nobody"], r"nobody.*patch_tny.*patch_tiny"),
    ("frozen without weights", [*FIT, "data.path=good.csv", "model.frozen=true"], r"need weights to start from"),
    ("converting nothing", ["convert", "nowhere"], r"takes SOURCE and TARGET"),
    ("exporting nothing", ["export", "--bogus", "a", "b"], r"no option '?--bogus"),
    ("shipping nothing", ["ship", "runs"], r"needs a run folder"),
    # issue 9
    ("a time-out below zero", [*FIT, "data.path=good.csv", "worker_timeout=-1.0"], r"worker_timeout=-1\.0 must be"),
    (
        "checkpointing of no blocks",
        ["fit", "data=csv", *SMALL[:-2], "model=dlinear", "data.path=good.csv", "task.grad_checkpointing=true"],
        r"no blocks",
    ),
]

# What the issue says; a mixer and its options; what it is given; a pattern of what is said. All mixers are asked so by
# the conformance suite.
CALLS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # issue 3
    ("unsupported pattern", {"name": "prob_sparse", "causal": True}, {}, r"'causal' \(it supports self.*: agent, bi_"),
    ("dim not divisible", {"name": "mamba2", "head_dim": 5}, {}, r"head_dim=5 does not divide.*nearest that does: 4"),
    ("a grid of other tokens", {"name": "agent"}, {"grid": (2, 7)}, r"grid=\(2, 7\) holds 14 tokens, x has 6"),
    (
        "a state of another mixer",
        {"name": "gla", "causal": True},
        {"state": ("mamba", 2)},
        r"state is a MambaState of another mixer, expected that of init_state",
    ),
    (
        "a state of another batch",
        {"name": "linear", "causal": True},
        {"state": ("linear", 3)},
        r"state is of 3 rows, but there are 2 sequences",
    ),
    ("no context", {"name": "softmax", "cross": True}, {}, r"the pattern 'cross' needs a context"),
    # issue 4
    ("an unknown backend", {"name": "linear", "backend": "tritn"}, {}, r"tritn.*triton"),
]

# What needs more than a command line is shown elsewhere: what the issue says, file, test.
ELSEWHERE = [
    ("NaN in the target at predict", "pipelines/test_data.py", "test_a_window_without_any_value_is_refused"),
    ("a checkpoint of another model", "pipelines/test_run.py", "test_a_checkpoint_of_another_model_or_data_is_refused"),
    ("a truncated checkpoint", "pipelines/test_run.py", "test_a_truncated_checkpoint_is_refused"),
    ("a full disk", "pipelines/test_run.py", "test_a_full_disk_keeps_the_earlier_checkpoint_and_ends_the_run"),
    ("grid, state, context of a mixer", "blocks/test_protocol.py", "test_inputs_outside_the_contract"),
    ("grid, state, context of every mixer", "blocks/test_conformance.py", "test_mixer_conforms"),
    ("a forced backend that cannot run", "kernels/test_dispatch.py", "test_a_forced_backend_runs_or_raises"),
    ("unsupported pattern", "blocks/test_registry.py", "test_a_refused_pattern_names_the_mixers_that_can"),
    ("invalid UTF-8", "pipelines/test_text_input.py", "test_names_and_contents_need_not_be_text"),
    ("a document longer than memory", "pipelines/test_text_corpus.py", "test_long_documents_are_tokenised_in_parts"),
    ("another tokenizer", "pipelines/test_text_run.py", "test_a_checkpoint_of_another_tokenizer_is_refused"),
    ("a prompt too long", "pipelines/test_text_input.py", "test_a_prompt_longer_than_the_positions_is_refused"),
    ("a stop never met", "pipelines/test_text_predict.py", "test_a_stop_that_is_never_met_is_text"),
    ("bad audio files", "pipelines/test_audio_reader.py", "test_bad_files"),
    ("truncated audio", "pipelines/test_audio_reader.py", "test_cut_off_while_reading"),
    ("NaN samples", "pipelines/test_audio_reader.py", "test_samples_that_are_no_numbers"),
    ("4 channels", "pipelines/test_audio_reader.py", "test_channels"),
    ("384 kHz", "pipelines/test_audio_reader.py", "test_sizes_that_pipes_and_ultrasound_leave"),
    ("spans beyond the end", "pipelines/test_audio_sources.py", "test_spans_against_their_files"),
    ("overlapping spans", "pipelines/test_audio_sources.py", "test_overlaps"),
    ("bad files in training", "pipelines/test_audio_classify.py", "test_bad_training_files_are_skipped_and_counted"),
    ("more than 5 % bad", "pipelines/test_audio_classify.py", "test_more_than_one_in_twenty_stops_the_run"),
    ("truncated video", "pipelines/test_video_faults.py", "test_samples_cut_off"),
    ("text named .mp4", "pipelines/test_video_faults.py", "test_not_a_video"),
    ("no video stream", "pipelines/test_video_faults.py", "test_no_video_stream"),
    ("rotation", "pipelines/test_video_reader.py", "test_rotation"),
    ("1 frame", "pipelines/test_video_find.py", "test_one_frame_and_a_budget_above_the_frames"),
    ("10 hours", "pipelines/test_video_find.py", "test_ten_hours_are_looked_at_less_often"),
    ("scorers", "pipelines/test_video_find.py", "test_scorers_and_their_options_are_checked"),
    ("scorer weights missing", "pipelines/test_video_scoring.py", "test_missing_weights_say_what_to_install"),
    ("decord cannot decode", "pipelines/test_video_reader.py", "test_vp9_that_decord_fails_on"),
    ("a decoder that hangs", "pipelines/test_video_decoders.py", "test_decoder_that_hangs"),
    ("truncated safetensors", "zoo/test_files.py", "test_headers_that_lie"),
    ("wrong hash", "zoo/test_files.py", "test_wrong_hash_prints_both"),
    ("newer schema", "zoo/test_files.py", "test_newer_schema_and_targets_are_refused"),
    ("shape mismatches by name", "zoo/test_files.py", "test_other_mismatches_are_listed_by_name"),
    ("unknown mixer", "zoo/test_files.py", "test_an_unknown_mixer_is_named_and_not_imported"),
    ("a pickle renamed", "zoo/test_files.py", "test_a_pickle_renamed_is_not_opened"),
    ("no disk space", "zoo/test_hub.py", "test_a_full_disk"),
    ("no network", "zoo/test_hub.py", "test_no_network"),
    ("changed weights of the hub", "zoo/test_hub.py", "test_weights_that_were_changed_are_refused"),
    (
        "a length that cannot change",
        "zoo/test_export.py",
        "test_a_length_that_cannot_change_is_refused_with_the_reason",
    ),
    ("a model no better than its baseline", "zoo/test_cards.py", "test_ship_refuses_runs_that_lack_something"),
    ("a target in a saved config", "house/test_hostile_models.py", "test_a_target_anywhere_in_a_saved_config"),
    (
        "a target in a checkpoint",
        "house/test_hostile_models.py",
        "test_a_target_in_a_checkpoints_hyper_parameters_is_not_imported",
    ),
    ("a checkpoint that is a pickle", "house/test_hostile_models.py", "test_a_checkpoint_with_a_payload_is_not_read"),
    ("YAML with tags", "house/test_hostile.py", "test_yaml_with_python_tags_in_a_config_folder"),
    ("names of data files", "house/test_hostile.py", "test_the_name_of_a_data_file_is_only_a_name"),
    ("paths that lead out", "zoo/test_files.py", "test_names_that_lead_out_of_the_folder"),
    ("a header of exabytes", "house/test_hostile_models.py", "test_a_header_of_exabytes_costs_nothing"),
    ("what the fuzzer found", "house/test_hostile_data.py", "test_what_the_fuzzer_found"),
    ("Ctrl-C and SIGTERM", "pipelines/test_resume.py", "test_a_signal_ends_the_batch_saves_and_says_how_to_go_on"),
    ("out of memory", "pipelines/test_failures.py", "test_out_of_memory_in_training"),
    ("NaN loss", "pipelines/test_failures.py", "test_a_parameter_that_is_not_finite"),
    ("a dead or hanging worker", "pipelines/test_failures.py", "test_a_worker_is_named_with_its_file"),
    ("versions", "pipelines/test_versions.py", "test_requirements"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


@pytest.mark.parametrize(("arguments", "said"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS])
def test_a_wrong_command_line(
    arguments: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("SEQZOO_RUN_DIR", "SEQZOO_ALLOW", "HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["/bin/lightning"])
    monkeypatch.chdir(folder)
    runs = [f"paths.runs={tmp_path / 'runs'}"] if arguments[0] in ("fit", "test", "predict") else []
    assert main([*arguments, *runs]) == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]) and "Traceback" not in err, err
    assert re.search(said, lines[0]), lines[0]
    assert not list((tmp_path / "runs").rglob("*.yaml")), "wrong input leaves no run folder"


@pytest.mark.parametrize(("mixer", "given", "said"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS])
def test_a_wrong_call(mixer: dict[str, Any], given: dict[str, Any], said: str) -> None:
    x = torch.zeros(2, 6, 16)
    with pytest.raises(ValueError, match=said):
        options = dict(mixer)
        built = create_mixer(options.pop("name"), 16, **options)
        if "state" in given:
            name, rows = given["state"]
            given = {"state": create_mixer(name, 16, causal=True).init_state(rows)}
        built(x, **given)


@pytest.mark.parametrize(("file", "name"), [row[1:] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE])
def test_what_is_shown_elsewhere_is_there(file: str, name: str) -> None:
    text = (TESTS / file).read_text(encoding="utf-8")
    found = re.search(rf"^((?:@.*\n(?:[ )\]}}].*\n)*)*)def {name}\(", text, re.MULTILINE)
    assert found is not None, f"{file} has no test {name}"
    assert "pytest.mark.skip(" not in found[1]
