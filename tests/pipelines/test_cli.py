"""The command without its runs: help, listings, doctor, wrong words, exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import wave
from importlib import metadata
from pathlib import Path

import pytest

import seqzoo
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.pipelines import doctor
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.config_files import find_option, list_groups, read_keys
from seqzoo.zoo import list_models


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "seqzoo", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
        check=False,
    )


def test_help_lists_commands_groups_options_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["fit", "--help"], [], ["fit", "mixer=linear", "-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        for word in (
            "fit",
            "validate",
            "test",
            "predict",
            "mixers",
            "models",
            "doctor",
            "--config-dir",
            "-m",
        ):
            assert word in text
        for group, options in list_groups().items():
            assert f"\n{group}=" in text
            for option in options:
                assert option in text
        for key in read_keys(find_option("trainer", "default") or Path()):
            assert f"trainer.{key.name}" in text
    # the chosen option's keys, with their comments
    assert "mixer.feature_map=elu+1" in text and "elu+1 or relu" in text and "mixer.window_size" not in text


def test_help_for_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help", "optimizer"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.lr" in text and "trainer." not in text
    assert main(["fit", "--help", "optimiser"]) == 2
    assert "Did you mean optimizer" in capsys.readouterr().err


def test_help_shows_the_users_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shop.yaml").write_text("# Sales of our shop.\npath: shop.csv  # where\n")
    assert main(["fit", "--help", "data", "--config-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "shop" in text and "Sales of our shop." in text


def test_help_and_wrong_words_import_nothing_heavy() -> None:
    code = (
        "import sys; from seqzoo.pipelines.cli import main\n"
        "for words in (['--help'], ['fit', '--help'], ['--version'], ['fti'], ['fit', '--bogus']):\n"
        "    main(words)\n"
        "heavy = ('torch', 'lightning', 'hydra', 'omegaconf', 'yaml', 'numpy', 'pandas')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fti"], "unknown command 'fti'. Did you mean fit"),
        (["fit", "--bogus"], "unknown flag --bogus"),
        (["fit", "--mulitrun"], "Did you mean --multirun"),
        (["fit", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["fit", "--config-dir"], "--config-dir needs a value"),
        (["mixers", "--jason"], "takes --json only"),
    ],
)
def test_wrong_words_get_one_line_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err


def test_the_module_and_the_scripts_are_one_command() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"seqzoo {seqzoo.__version__}\n")
    assert run("fti").returncode == 2
    for name in ("lightning", "seqzoo"):
        points = [
            p for p in metadata.entry_points(group="console_scripts", name=name) if p.dist and p.dist.name == "seqzoo"
        ]
        assert points and points[0].value == "seqzoo.__main__:main"


def test_a_reader_that_stops_early_is_no_error() -> None:
    shell = f"{sys.executable} -P -m seqzoo --help | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: ") and done.stderr == ""


def test_mixers_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_mixers()
    for row in rows:
        info = mixer_info(row["name"])
        assert row["paper"] == info.paper and tuple(row["patterns"]) == info.patterns
        assert row["streaming"] == info.streaming and set(row["options"]) == set(info.options)
    assert main(["mixers"]) == 0
    text = capsys.readouterr().out
    for row in rows:
        assert row["name"] in text and row["paper"] in text
    assert "feature_map=elu+1" in text


def test_models_as_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list_models()
    assert rows["patch_small"]["mixer"] == "any" and rows["dlinear"]["mixer"] == "its own"
    assert rows["informer"]["options"]["num_heads"] == 8 and "seq_len" not in rows["informer"]["options"]
    assert main(["models"]) == 0
    assert "patch_small" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    versions = {row["what"]: row["found"] for row in found["versions"]}
    assert versions["torch"] == metadata.version("torch") and versions["seqzoo"] == seqzoo.__version__
    kernels = {(row["what"], row["backend"]): row["found"] for row in found["kernels"]}
    assert kernels[("linear_attention", "naive")] == "ok"
    assert {row["what"] for row in found["decoders"]} == {"decord", "av", "torchcodec", "soundfile"}
    assert {"seqzoo[samples]", "seqzoo[plot]", "seqzoo[video]"} <= {row["what"] for row in found["extras"]}
    assert [row["what"] for row in found["command"]] == ["lightning", "seqzoo"]
    assert "seqzoo" in found["command"][0]["declared by"]
    assert main(["doctor"]) == 0
    assert "decoders" in capsys.readouterr().out


def test_decoders_are_judged_by_what_they_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that imports and cannot decode is not usable; one that decodes wrongly is told apart."""
    doctor.write_audio(tmp_path / "a.wav")
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnframes(), file.getframerate()) == (800, 8000)
    fakes = {
        "av": "def open(path): raise RuntimeError('Could not load the library')\n",
        "soundfile": "def read(path): return [0.0] * 10, 8000\n",
        "decord": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n",
        "torchcodec": "",
    }
    for name, text in fakes.items():
        folder = tmp_path / "fakes" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    assert doctor.probe_decoder("av", tmp_path / "a.wav") == "fails: RuntimeError: Could not load the library"
    assert doctor.probe_decoder("soundfile", tmp_path / "a.wav") == "decodes wrongly: 10 samples at 8000 Hz"
    assert doctor.probe_decoder("decord", tmp_path / "a.wav") == "crashes: signal 9"
    assert doctor.probe_decoder("torchcodec", tmp_path / "a.wav").startswith("fails: ModuleNotFoundError")
    assert doctor._frames([40.0, 80.0, 120.0, 160.0]) == "ok"
    assert doctor._frames([40.0, 80.0, 120.0]).startswith("decodes wrongly: 3 of 4")
    assert doctor._frames([40.0, 40.0, 40.0, 40.0]).startswith("decodes wrongly")


@pytest.mark.parametrize("name", ["decord", "av"])
def test_the_generated_clip_decodes(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    doctor.write_video(tmp_path / "clip.y4m")
    assert doctor.probe_decoder(name, tmp_path / "clip.y4m") == "ok"


def test_doctor_names_another_owner_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "lightning"
    script.write_text("#!/usr/bin/python\nfrom lightning_sdk.cli.entrypoint import main_cli\nmain_cli()\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    row = doctor.command_rows()[0]
    assert "lightning_sdk.cli.entrypoint: not ours" in row["found"]
    assert "pip install --force-reinstall --no-deps seqzoo" in row["found"]
    script.write_text("#!/usr/bin/python\nfrom seqzoo.__main__ import main\nmain()\n")
    assert doctor.command_rows()[0]["found"].endswith("runs seqzoo.__main__")


def test_kernels_that_cannot_be_listed_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqzoo.kernels.dispatch", None)
    assert "ModuleNotFoundError" in doctor.kernel_rows()[0]["found"]


def test_words_of_the_cloud_client_go_on_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """lightning-sdk installs a command of the same name; with both there, its words still work."""
    said: list[list[str]] = []

    def main_cli() -> None:
        said.append(list(sys.argv))
        raise SystemExit(3)

    main_cli.commands = {"login": None}  # type: ignore[attr-defined]
    package = types.ModuleType("lightning_sdk")
    package.__spec__ = __import__("importlib.machinery", fromlist=["x"]).ModuleSpec("lightning_sdk", None)
    entry = types.ModuleType("lightning_sdk.cli.entrypoint")
    entry.main_cli = main_cli  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning_sdk", package)
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli", types.ModuleType("lightning_sdk.cli"))
    monkeypatch.setitem(sys.modules, "lightning_sdk.cli.entrypoint", entry)
    before = list(sys.argv)
    assert main(["login", "--help"]) == 3
    assert said == [["lightning", "login", "--help"]] and sys.argv == before
    assert main(["lgoin"]) == 2 and len(said) == 1
    assert "unknown command 'lgoin'" in capsys.readouterr().err
