"""Every wrong input that the work was asked to name, in one table: a command line and what it says, or the test of it.

A command ends with status 2, one line on stderr that begins with "error: ", and no traceback.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from seqzoo.pipelines.cli import main

TESTS = Path(__file__).parents[1]
GOOD = "date,a\n" + "".join(f"2024-01-{1 + n // 24:02} {n % 24:02}:00,{n}\n" for n in range(100))
SMALL = ["data.seq_len=16", "data.pred_len=4", "data.split_ratio=[0.6,0.2,0.2]", "trainer.accelerator=cpu"]
SMALL += ["logger.tensorboard=false", "callbacks.progress=none", "model=patch_tiny", "mixer=linear"]
FIT = ["fit", "data=csv", *SMALL]


def _lines(**changed: str) -> str:
    """The good table with lines replaced: l5=... is line 5 of the file."""
    lines = GOOD.splitlines()
    for key, text in changed.items():
        lines[int(key[1:]) - 1] = text
    return "\n".join(line for line in lines if line != "-") + "\n"


FILES: dict[str, str | bytes] = {
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
    "pickle/config.json": "{}",
    "pickle/model.safetensors": b"\x80\x04K\x01.",
    "bare/notes.txt": "no weights",
    "new/config.json": '{"schema": 99, "name": "gla_tiny", "options": {}}',
    "new/model.safetensors": b"",
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
        r"(?=.*'a')(?=.*line 19)(?=.*broken)",
    ),
    ("duplicate timestamps", [*FIT, "data.path=double.csv"], r"line 19"),
    ("unsorted timestamps", [*FIT, "data.path=unsorted.csv"], r"line 20"),
    ("a gap", [*FIT, "data.path=gap.csv", "data.gaps=error"], r"(?i)(gap|missing).*data\.gaps=fill"),
    ("an infinity", [*FIT, "data.path=infinite.csv"], r"line 19"),
    ("shorter than the window", [*FIT, "data.path=short.csv"], r"seq_len"),
    ("horizon 0", [*FIT, "data.path=good.csv", "data.pred_len=0"], r"data\.pred_len=0 must be greater than 0"),
    ("a truncated checkpoint", ["predict", *FIT[1:], "data.path=good.csv", "ckpt_path=broken.ckpt"], r"broken\.ckpt"),
    ("no checkpoint", ["test", *FIT[1:], "data.path=good.csv"], r"test needs a checkpoint: give ckpt_path"),
    ("a checkpoint that is not there", [*FIT, "data.path=good.csv", "ckpt_path=no.ckpt"], r"no checkpoint at no\.ckpt"),
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
    ("dim not divisible", [*FIT, "data.path=good.csv", "model.dim=30", "mixer.num_heads=8"], r"30.*8"),
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
    ("empty corpus", ["fit", "task=text", "data=text", "data.path=empty", "model=language_tiny"], r"empty"),
    ("no such text", ["fit", "task=text", "data=text", "data.path=nowhere", "model=language_tiny"], r"no such file"),
    # issue 6
    ("a table with a missing file", ["fit", "experiment=audio/classify", "data.path=clips.csv"], r"missing\.wav"),
    (
        "zero-length audio",
        ["predict", "experiment=audio/find", "data.path=zero.wav", "query=x"],
        r"audio|zero|checkpoint",
    ),
    # issue 7
    ("an empty query", ["predict", "experiment=video/search", "data.path=words.mp4", "query=''"], r"query"),
    ("zero-byte video", ["predict", "experiment=video/search", "data.path=zero.mp4", "query=cab"], r"zero\.mp4|scorer"),
    (
        "text named .mp4",
        ["predict", "experiment=video/search", "data.path=words.mp4", "query=cab"],
        r"words\.mp4|scorer",
    ),
    ("no such video", ["predict", "experiment=video/search", "data.path=no.mp4", "query=cab"], r"no\.mp4"),
    ("fitting what only looks", ["fit", "experiment=video/search", "data.path=no.mp4", "query=cab"], r"trains nothing"),
    # issue 8
    ("no such saved model", [*FIT, "data.path=good.csv", "model.pretrained=nowhere"], r"model\.pretrained=nowhere"),
    ("a pickle renamed", [*FIT, "data.path=good.csv", "model.pretrained=./pickle"], r"pickle"),
    ("a folder without weights", [*FIT, "data.path=good.csv", "model.pretrained=./bare"], r"bare"),
    ("a newer schema", [*FIT, "data.path=good.csv", "model.pretrained=./new"], r"99|newer|schema"),
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

# What needs more than a command line is shown elsewhere: what the issue says, file, test.
ELSEWHERE = [
    ("NaN in the target at predict", "pipelines/test_data.py", "test_a_window_without_any_value_is_refused"),
    ("a checkpoint of another model", "pipelines/test_run.py", "test_a_checkpoint_of_another_model_or_data_is_refused"),
    ("a truncated checkpoint", "pipelines/test_run.py", "test_a_truncated_checkpoint_is_refused"),
    ("a full disk", "pipelines/test_run.py", "test_a_full_disk_keeps_the_earlier_checkpoint_and_ends_the_run"),
    ("grid, state, context of a mixer", "blocks/test_protocol.py", "test_inputs_outside_the_contract"),
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
    ("decord cannot decode", "pipelines/test_video_reader.py", "test_vp9_that_decord_fails_on"),
    ("a decoder that hangs", "pipelines/test_video_decoders.py", "test_decoder_that_hangs"),
    ("truncated safetensors", "zoo/test_files.py", "test_headers_that_lie"),
    ("wrong hash", "zoo/test_files.py", "test_wrong_hash_prints_both"),
    ("newer schema", "zoo/test_files.py", "test_newer_schema_and_targets_are_refused"),
    ("unknown mixer", "zoo/test_files.py", "test_an_unknown_mixer_is_named_and_not_imported"),
    ("a pickle renamed", "zoo/test_files.py", "test_a_pickle_renamed_is_not_opened"),
    ("no disk space", "zoo/test_hub.py", "test_a_full_disk"),
    ("no network", "zoo/test_hub.py", "test_no_network"),
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


@pytest.mark.parametrize(("file", "name"), [row[1:] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE])
def test_what_is_shown_elsewhere_is_there(file: str, name: str) -> None:
    text = (TESTS / file).read_text(encoding="utf-8")
    found = re.search(rf"^((?:@.*\n(?:[ )\]}}].*\n)*)*)def {name}\(", text, re.MULTILINE)
    assert found is not None, f"{file} has no test {name}"
    assert "pytest.mark.skip(" not in found[1]
