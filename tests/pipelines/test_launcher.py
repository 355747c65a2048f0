"""Errors in one line, run folders and ranks; the work itself is replaced by a recorder."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from seqzoo.pipelines import launcher
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError, user_errors

EXECUTE = "seqzoo.pipelines.run"


# One run --------------------------------------------------------------------------------------------------


def test_fit_gets_a_plain_config_and_a_folder_of_its_own(execute: Any, tmp_path: Path) -> None:
    assert main(["fit", "seed=3", "trainer.max_epochs=2"]) == 0
    assert main(["fit"]) == 0
    (command, cfg, run_dir), (_, _, second) = execute.calls
    assert command == "fit" and cfg["seed"] == 3 and cfg["trainer"]["max_epochs"] == 2
    assert type(cfg) is dict and type(cfg["data"]) is dict and type(cfg["task"]["quantiles"]) is list
    assert cfg["command_line_targets"] == [] and "hydra" not in cfg
    assert run_dir.is_absolute() and run_dir != second
    assert run_dir.parent == tmp_path / "runs" / "forecasting"
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert saved == cfg
    assert Path.cwd() == tmp_path and {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert [p.name for p in run_dir.iterdir()] == ["config.yaml"]


def test_lightning_finds_a_plain_process_during_the_run(execute: Any) -> None:
    """What Lightning repeats to start another rank: command, overrides, run folder, and no Hydra."""
    before = list(sys.argv)
    assert main(["test", "mixer._target_=m.M", "mixer.rank=2", "seed=4", "hydra.run.dir=here"]) == 0
    assert execute.argv == [
        "/bin/lightning",
        "test",
        *["mixer=custom", "mixer._target_=m.M", "++mixer.rank=2", "seed=4"],
    ]
    assert execute.hydra_is_hidden
    assert execute.environment["SEQZOO_RUN_DIR"] == str(Path("here").absolute())
    assert execute.cfg["command_line_targets"] == ["m.M"] and execute.cfg["mixer"] == {
        "_target_": "m.M",
        "rank": 2,
    }
    assert "HYDRA_FULL_ERROR" not in execute.environment
    # and nothing of it stays
    assert sys.argv == before and "SEQZOO_RUN_DIR" not in os.environ and "SEQZOO_CWD" not in os.environ


def test_another_rank_composes_the_same_config_in_place(
    execute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_conf" / "data").mkdir(parents=True)
    (tmp_path / "my_conf" / "data" / "shop.yaml").write_text("path: shop.csv\nseq_len: 5\n")
    words = ["validate", "seed=5", "mixer._target_=m.M", "data=shop", "--config-dir", "my_conf"]
    assert main(words) == 0
    _, first, run_dir = execute.calls[0]
    command_line = execute.argv[1:]
    monkeypatch.setenv("SEQZOO_RUN_DIR", str(run_dir))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(command_line) == 0
    assert execute.calls[1] == ("validate", first, run_dir)
    assert first["data"] == {"path": "shop.csv", "seq_len": 5}
    assert len(list((tmp_path / "runs" / "forecasting").iterdir())) == 1  # no folder of its own


def test_interpolations_that_the_user_types_resolve_in_the_config(execute: Any) -> None:
    assert main(["fit", "name=${seed}_run", "seed=4"]) == 0
    assert execute.cfg["name"] == "4_run" and execute.argv[2] == "name=${seed}_run"


def test_relative_paths_stay_relative_to_the_working_folder(execute: Any) -> None:
    assert main(["predict", "data.path=new.csv", "hydra.run.dir=out"]) == 0
    assert execute.cfg["data"]["path"] == "new.csv" and execute.calls[0][2] == Path("out").absolute()
    assert (Path("out") / "config-predict.yaml").is_file()  # a fit's config.yaml there would be left alone


def test_a_conf_folder_of_the_users_adds_options(execute: Any, tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "slow.yaml").write_text("name: adam\nlr: 1.0e-9\n")
    (tmp_path / "conf" / "config.yaml").write_text("this: is another project's\n")
    assert main(["fit", "optimizer=slow"]) == 0
    assert execute.cfg["optimizer"] == {"name": "adam", "lr": 1e-9} and "this" not in execute.cfg


def test_a_run_leaves_no_handler_behind(execute: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)
    assert main(["fit"]) == 0 and main(["fit", "data.seq_len=x"]) == 2
    assert logging.getLogger().handlers == before


def test_print_the_config(execute: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "--cfg", "job", "seed=9", "mixer._target_=m.M"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 9 and shown["mixer"] == {"_target_": "m.M"}
    assert main(["fit", "--cfg", "job", "--resolve", "data=etth1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["path"] == str(tmp_path / "data" / "ETTh1.csv")
    assert execute.calls == [] and list(tmp_path.iterdir()) == []


def test_allow_reaches_the_run_and_its_children_only(execute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_ALLOW", "a")
    assert main(["fit", "--allow", "b", "--allow=c"]) == 0
    assert execute.environment["SEQZOO_ALLOW"] == "a,b,c" and os.environ["SEQZOO_ALLOW"] == "a"


# Errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["trainer.max_epohcs=3"],
            ["'trainer.max_epohcs'", "Did you mean trainer.max_epochs", "+trainer.max_epohcs=3"],
        ),
        (["trainr.max_epochs=3"], ["'trainr.max_epochs'", "trainer"]),
        (["sed=3"], ["'sed'", "Did you mean seed", "use +sed=3 to add a new one"]),
        (["mixr=softmax"], ["'mixr'", "Did you mean mixer"]),
        (["trainer.max_epochs.x=3"], ["trainer.max_epochs is a value, not a section"]),
        (["mixer.num_head=3"], ["Did you mean mixer.num_heads"]),
        (["data=csv", "data.pth=x"], ["'data.pth'", "data.path"]),
        (["mixer=softmx"], ["'softmx'", "Did you mean softmax"]),
        (["model=patch_smal"], ["'patch_smal'", "patch_small"]),
        (["experiment=forecasting/wether"], ["'forecasting/wether'", "Did you mean forecasting/weather"]),
        (["debug=slow"], ["'slow'", "fast, one_batch, overfit"]),
        (["foo"], ["'foo' is not of the form key=value"]),
        (["data.path=a{b"], ["cannot read 'data.path=a{b'"]),
        (["data=csv"], ["data.path has no value: give data.path=..."]),
        (["mixer=custom"], ["mixer._target_ has no value"]),
        (
            ["trainer.max_epochs=ten"],
            ["trainer.max_epochs='ten' must be a whole number", "trainer.max_epochs=10"],
        ),
        (["trainer.max_epochs=1.5"], ["trainer.max_epochs=1.5 must be a whole number"]),
        (["optimizer.lr=fast"], ["optimizer.lr='fast' must be a number"]),
        (
            ["test_after_fit=maybe"],
            ["test_after_fit='maybe' must be true or false, as the default test_after_fit=true"],
        ),
        (["task.quantiles=0.5"], ["task.quantiles=0.5 must be a list"]),
        (
            ["callbacks.checkpoint.save_top_k=x"],
            ["callbacks.checkpoint.save_top_k='x' must be a whole number"],
        ),
        (["callbacks.early_stopping=7"], ["callbacks.early_stopping=7 must be a section"]),
        (["trainer=7"], ["'7'", "default"]),
        (["name=${nothing}"], ["nothing"]),
        (["mixer=linear", "mixer._target_=m.M"], ["mixer=linear"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_wrong_input_gets_one_line_status_2_and_leaves_nothing(
    words: list[str], said: list[str], execute: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for part in said:
        assert part in captured.err
    assert execute.calls == [] and captured.out == ""
    assert not list((tmp_path / "runs").rglob("*.*")) and not list(tmp_path.rglob("config.yaml"))


def test_errors_of_the_run(execute: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    execute.error = UserError("no such file: x.csv")
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == "error: no such file: x.csv\n"
    assert list((tmp_path / "runs" / "forecasting").iterdir()) == []  # nothing ran, nothing is left
    execute.error = RuntimeError("out of\n   memory")
    assert main(["fit"]) == 1
    err = capsys.readouterr().err
    assert err == "error: RuntimeError: out of memory (set HYDRA_FULL_ERROR=1 for the traceback)\n"
    assert len(list((tmp_path / "runs" / "forecasting").iterdir())) == 1
    execute.error = ValueError("during training")
    assert main(["fit"]) == 1
    capsys.readouterr()
    execute.error = SystemExit(7)
    assert main(["fit"]) == 7


def test_a_traceback_on_request_only(
    execute: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    execute.error = RuntimeError("boom")
    assert main(["fit"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: RuntimeError: boom\n")
    assert execute.environment["HYDRA_FULL_ERROR"] == "1"
    assert main(["fit", "sed=3"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "Did you mean seed" in err


@pytest.mark.parametrize("as_lightning_does", [False, True])
def test_ctrl_c_says_where_to_go_on(
    as_lightning_does: bool,
    execute: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(command: str, cfg: dict[str, Any], run_dir: Path) -> None:
        (run_dir / "checkpoints").mkdir()
        for age, name in enumerate(("last.ckpt", "best.ckpt")):
            path = run_dir / "checkpoints" / name
            path.write_text("x")
            os.utime(path, (1e9 - age, 1e9 - age))
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if as_lightning_does:
                sys.exit(1)
            raise

    monkeypatch.setattr(sys.modules[EXECUTE], "execute", interrupted)
    assert main(["fit", "hydra.run.dir=r"]) == 130
    path = Path("r/checkpoints/last.ckpt").absolute()
    assert capsys.readouterr().err == f"interrupted; the last checkpoint: ckpt_path={path} goes on from it\n"
    execute.error = KeyboardInterrupt()
    monkeypatch.setattr(sys.modules[EXECUTE], "execute", execute)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "interrupted before the first checkpoint\n"


def test_user_errors_while_building() -> None:
    with pytest.raises(UserError, match="dim=3 is odd"), user_errors():
        raise ValueError("dim=3 is odd")
    with pytest.raises(UserError, match=r"no such file: x\.csv"), user_errors():
        Path("x.csv").read_text()
    with pytest.raises(RuntimeError), user_errors():
        raise RuntimeError("ours")


# Ranks from outside ---------------------------------------------------------------------------------------


def test_ranks_of_torchrun_share_one_folder(execute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # any order
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["fit", "seed=2"]) == 0
    (_, first, folder), (_, second, other) = execute.calls
    assert first == second and folder == other == tmp_path / "runs" / "forecasting" / "torchrun-job7"
    assert os.environ["WORLD_SIZE"] == "2"
    assert main(["fit", "seed=2", "hydra.run.dir=mine"]) == 0
    assert execute.calls[-1][2] == tmp_path / "mine"


def test_torchrun_without_an_id(
    execute: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert main(["fit"]) == 0 and main(["fit"]) == 0
    assert execute.calls[0][2] == execute.calls[1][2]  # the same parent process
    assert str(os.getppid()) in execute.calls[0][2].name
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert main(["fit"]) == 2
    assert "--rdzv-id" in capsys.readouterr().err


def test_ranks_of_slurm(execute: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {
        "SLURM_PROCID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "77",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["fit"]) == 0
    assert execute.calls[0][2].name == "slurm-77-0"
    assert main(["fit", "-m", "seed=0,1"]) == 2
    assert "a sweep (-m) starts its own processes" in capsys.readouterr().err


def test_statuses_are_the_documented_ones() -> None:
    assert (launcher.OK, launcher.FAILED, launcher.USAGE, launcher.INTERRUPTED) == (0, 1, 2, 130)
