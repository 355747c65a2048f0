"""Overrides, errors in one line, run folders, ranks and sweeps; the work itself is replaced by a recorder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from seqzoo.pipelines import launcher
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError, nearest, user_errors
from seqzoo.pipelines.overrides import (
    command_line_targets,
    complete_mixer,
    parse_arguments,
    quote,
    split_override,
)
from seqzoo.pipelines.validate import validate_names, validate_types

EXECUTE = "seqzoo.pipelines.run"


class Recorder:
    """Stands in for `run.execute`: keeps what it was called with, and fails on demand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], Path]] = []
        self.environment: dict[str, str] = {}
        self.argv: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
        from hydra.core.hydra_config import HydraConfig

        self.calls.append((command, cfg, run_dir))
        self.environment, self.argv = dict(os.environ), list(sys.argv)
        self.hydra_is_hidden = not HydraConfig.initialized()
        if self.error is not None:
            raise self.error
        return {}

    @property
    def cfg(self) -> dict[str, Any]:
        return self.calls[-1][1]


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    recorder = Recorder()
    module = types.ModuleType(EXECUTE)
    module.execute = recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, EXECUTE, module)
    for name in ("SEQZOO_RUN_DIR", "SEQZOO_ALLOW", "SEQZOO_DATA", "HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/bin/lightning"])
    monkeypatch.chdir(tmp_path)
    return recorder


# Overrides as text ----------------------------------------------------------------------------------------


def test_split_override() -> None:
    assert split_override("a.b=3") == ("", "a.b", "3")
    assert split_override("++a=b=c") == ("++", "a", "b=c")
    assert split_override("~a.b") == ("~", "a.b", None)
    assert split_override("data@x=csv") == ("", "data", "csv")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["mixer._target_=m.M"], ["mixer=custom", "mixer._target_=m.M"]),
        (
            ["seed=1", "mixer._target_=m.M", "mixer.rank=3"],
            ["mixer=custom", "seed=1", "mixer._target_=m.M", "++mixer.rank=3"],
        ),
        (
            ["mixer=custom", "mixer._target_=m.M", "+mixer.a=1"],
            ["mixer=custom", "mixer._target_=m.M", "+mixer.a=1"],
        ),
        (["mixer=linear", "mixer.eps=1"], ["mixer=linear", "mixer.eps=1"]),
        (["mixer.num_heads=2"], ["mixer.num_heads=2"]),
    ],
)
def test_complete_mixer(typed: list[str], completed: list[str]) -> None:
    assert complete_mixer(typed) == completed
    assert complete_mixer(completed) == completed  # a rank gets the completed line and must not change it


def test_a_mixer_of_ones_own_excludes_a_registered_one() -> None:
    with pytest.raises(UserError, match="mixer=linear"):
        complete_mixer(["mixer=linear", "mixer._target_=m.M"])


def test_command_line_targets() -> None:
    typed = ["mixer._target_=m.M", "++callbacks.extra.x._target_='p.C'", "mixer.target=no", "seed=1"]
    assert command_line_targets(typed) == ["m.M", "p.C"]


def test_parse_arguments_sorts_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    request = parse_arguments(
        "fit", ["a=1", "-m", "--allow", "p", "b=2", "--cfg=job", "--config-dir", "mine", "--allow=q"]
    )
    assert request.overrides == ["a=1", "b=2"] and request.flags == ["-m", "--cfg", "job"]
    assert request.allow == ["p", "q"] and request.config_dirs == [str(tmp_path / "mine")] and request.sweep
    with pytest.raises(UserError, match="not both"):
        parse_arguments("fit", ["--config-dir", "mine", "hydra.searchpath=[]"])
    # a pickle must not be loaded from the command line
    with pytest.raises(UserError, match="unknown flag --experimental-rerun"):
        parse_arguments("fit", ["--experimental-rerun", "x.pickle"])


@pytest.mark.parametrize(
    "value", ["/plain", "/with space", "/it's", "/a,b", "/a=b", "/back\\slash", "/${x}".replace("$", "")]
)
def test_quote_is_read_back_by_hydra(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([f"hydra.run.dir={quote(value)}"])
    assert parsed[0].value() == value


def test_nearest() -> None:
    assert nearest("softmx", ["softmax", "linear"]) == " Did you mean softmax?"
    assert nearest("zzz", ["softmax", "linear"]) == " Known: linear, softmax."


# One run --------------------------------------------------------------------------------------------------


def test_fit_gets_a_plain_config_and_a_folder_of_its_own(execute: Recorder, tmp_path: Path) -> None:
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


def test_lightning_finds_a_plain_process_during_the_run(execute: Recorder) -> None:
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
    execute: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_interpolations_that_the_user_types_resolve_in_the_config(execute: Recorder) -> None:
    assert main(["fit", "name=${seed}_run", "seed=4"]) == 0
    assert execute.cfg["name"] == "4_run" and execute.argv[2] == "name=${seed}_run"


def test_relative_paths_stay_relative_to_the_working_folder(execute: Recorder) -> None:
    assert main(["predict", "data.path=new.csv", "hydra.run.dir=out"]) == 0
    assert execute.cfg["data"]["path"] == "new.csv" and execute.calls[0][2] == Path("out").absolute()
    assert (Path("out") / "config-predict.yaml").is_file()  # a fit's config.yaml there would be left alone


def test_a_conf_folder_of_the_users_adds_options(execute: Recorder, tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "slow.yaml").write_text("name: adam\nlr: 1.0e-9\n")
    (tmp_path / "conf" / "config.yaml").write_text("this: is another project's\n")
    assert main(["fit", "optimizer=slow"]) == 0
    assert execute.cfg["optimizer"] == {"name": "adam", "lr": 1e-9} and "this" not in execute.cfg


def test_print_the_config(execute: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "--cfg", "job", "seed=9", "mixer._target_=m.M"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 9 and shown["mixer"] == {"_target_": "m.M"}
    assert main(["fit", "--cfg", "job", "--resolve", "data=etth1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["path"] == str(tmp_path / "data" / "ETTh1.csv")
    assert execute.calls == [] and list(tmp_path.iterdir()) == []


def test_allow_reaches_the_run_and_its_children_only(execute: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
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
    words: list[str], said: list[str], execute: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for part in said:
        assert part in captured.err
    assert execute.calls == [] and captured.out == ""
    assert not list((tmp_path / "runs").rglob("*.*")) and not list(tmp_path.rglob("config.yaml"))


def test_errors_of_the_run(execute: Recorder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
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
    execute: Recorder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    execute: Recorder,
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


def test_ranks_of_torchrun_share_one_folder(execute: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    execute: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


def test_ranks_of_slurm(execute: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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


# Sweeps and processes -------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, types
module = types.ModuleType("seqzoo.pipelines.run")
def execute(command, cfg, run_dir):
    record = {"command": command, "seed": cfg["seed"], "pid": os.getpid(), "argv": sys.argv[1:],
              "targets": cfg["command_line_targets"], "cwd": os.getcwd()}
    record["rank"] = os.environ.get("LOCAL_RANK")
    (run_dir / f"record{os.environ.get('LOCAL_RANK', '')}.json").write_text(json.dumps(record))
    (run_dir / "metrics.json").write_text(json.dumps({"objective": cfg["seed"] + 0.5}))
    if cfg["name"] == "bad":
        raise RuntimeError("this job fails")
    if cfg["name"] == "ranks" and "LOCAL_RANK" not in os.environ:
        # as Lightning's launcher does
        import subprocess
        import __main__
        word = [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
        subprocess.run(word, env={**os.environ, "LOCAL_RANK": "1"}, check=True)
    return {}
module.execute = execute
sys.modules["seqzoo.pipelines.run"] = module
"""


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where `run.execute` is the recorder above."""
    (tmp_path / "fake").mkdir(exist_ok=True)
    (tmp_path / "fake" / "sitecustomize.py").write_text(FAKE)
    (tmp_path / "work").mkdir(exist_ok=True)
    keep = {k: v for k, v in os.environ.items() if not k.startswith("SEQZOO") and k not in ("LOCAL_RANK", "RANK")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "seqzoo", *words],
        cwd=tmp_path / "work",
        env={**keep, "PYTHONPATH": str(tmp_path / "fake")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_sweep_runs_each_job_in_its_own_process_and_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "test", "-m", "seed=1,2", "name=good,bad", "mixer._target_=m.M", "mixer.rank=1")
    assert done.returncode == 1, done.stderr  # two of the four failed, the others ran
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "work").rglob("record.json"))]
    assert [r["seed"] for r in records] == [1, 1, 2, 2] and len({r["pid"] for r in records}) == 4
    assert all(r["command"] == "test" and r["targets"] == ["m.M"] for r in records)
    folders = sorted(p.parent for p in (tmp_path / "work").rglob("record.json"))
    assert [f.name for f in folders] == ["0", "1", "2", "3"] and len({f.parent for f in folders}) == 1
    assert all((f / "config-test.yaml").is_file() for f in folders)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["runs"]
    table = done.stdout
    assert table.count("failed (1)") == 2 and "1.5" in table and "2.5" in table
    assert done.stderr.count("this job fails") == 2 and "Traceback" not in done.stderr


def test_a_sweep_over_a_wrong_option_starts_no_job(tmp_path: Path) -> None:
    done = run(tmp_path, "fit", "-m", "mixer=softmax,softmx")
    assert done.returncode == 2 and "Did you mean softmax" in done.stderr
    assert list((tmp_path / "work").rglob("record*.json")) == []


def test_a_rank_that_lightning_starts_keeps_command_and_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "test", "name=ranks", "seed=6")
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "work").rglob("record*.json"))
    assert first.parent == second.parent
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    assert (one["rank"], two["rank"]) == (None, "1") and one["pid"] != two["pid"]
    assert all(two[k] == one[k] for k in ("command", "seed", "argv", "cwd"))


# Checks before any data are read --------------------------------------------------------------------------


@pytest.fixture
def composed(execute: Recorder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("seqzoo.pipelines.validate.list_tasks", lambda: ["forecasting"])
    assert main(["fit"]) == 0
    validate_names(execute.cfg)
    return execute.cfg


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("model", {"name": "patch_smal"}, r"unknown model 'patch_smal'.*patch_small"),
        ("model", {"dept": 3}, r"model 'patch_small' has no option 'dept'.*depth"),
        ("mixer", {"name": "softmx"}, r"unknown mixer 'softmx'.*softmax"),
        ("mixer", {"num_head": 3}, r"mixer 'softmax' has no option 'num_head'.*num_heads"),
        ("task", {"name": "forcasting"}, r"unknown task 'forcasting'.*forecasting"),
        ("task", {"loss": "quantil"}, r"task.loss='quantil'.*quantile"),
        ("optimizer", {"name": "adamv"}, r"unknown optimizer 'adamv'.*adamw"),
        ("scheduler", {"name": "cosin"}, r"unknown scheduler 'cosin'.*cosine"),
        ("data", {"pred_len": 0}, r"data.pred_len=0 must be greater than 0"),
        ("data", {"split": "etth"}, r"data.split='etth'.*ett_hour"),
        ("callbacks", {"progress": "fancy"}, r"callbacks.progress='fancy'"),
        ("trainer", {"max_epohcs": 3}, r"unknown key trainer.max_epohcs. Did you mean max_epochs"),
        ("data", {"seqlen": 3}, r"unknown key data.seqlen. Did you mean seq_len"),
        ("optimizer", {"name": None}, r"optimizer.name is missing.*adam"),
    ],
)
def test_wrong_names_are_found(section: str, values: dict[str, Any], said: str, composed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=said):
        validate_names({**composed, section: {**composed[section], **values}})


def test_a_custom_mixer_is_left_to_the_run(composed: dict[str, Any]) -> None:
    validate_names({**composed, "mixer": {"_target_": "m.M", "rank": 3}})


def test_types_that_may_differ(composed: dict[str, Any]) -> None:
    choices = {"trainer": "default", "data": "weather", "callbacks": "default", "logger": "default"}
    for section, values in (
        (
            "trainer",
            {"devices": "auto", "limit_train_batches": 0.5, "max_time": "00:01:00:00", "precision": 16},
        ),
        ("trainer", {"devices": [0, 1], "gradient_clip_val": 1, "deterministic": "warn", "max_epochs": None}),
        ("data", {"targets": ["a"], "split_ratio": [1, 2, 3], "freq": "D"}),
        ("callbacks", {"early_stopping": None, "extra": {"x": {"_target_": "a.B"}}}),
        ("logger", {"tensorboard": True}),
    ):
        validate_types({**composed, section: {**composed[section], **values}}, choices)
    with pytest.raises(UserError, match=r"trainer.detect_anomaly=1 must be true or false"):
        validate_types({**composed, "trainer": {**composed["trainer"], "detect_anomaly": 1}}, choices)
    with pytest.raises(UserError, match=r"callbacks.extra='x' must be a section"):
        validate_types({**composed, "callbacks": {**composed["callbacks"], "extra": "x"}}, choices)


def test_statuses_are_the_documented_ones() -> None:
    assert (launcher.OK, launcher.FAILED, launcher.USAGE, launcher.INTERRUPTED) == (0, 1, 2, 130)
