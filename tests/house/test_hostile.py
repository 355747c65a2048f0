"""Config files and command lines of others: nothing in them is executed, what they ask for is refused in one message.

SECURITY.md says who writes which file and what each may do. A payload makes a folder, the canary, where it is executed.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from payloads import Payload, tagged

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "fuzz"

pytestmark = pytest.mark.usefixtures("canary")


def test_the_payloads_work(tmp_path: Path) -> None:
    """Else that nothing was executed would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "other")))
    yaml.load(tagged(tmp_path / "third"), yaml.UnsafeLoader)
    assert (tmp_path / "other").is_dir() and (tmp_path / "third").is_dir()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The configs of the runs that would have begun."""
    configs: list[dict[str, Any]] = []

    def execute(command: str, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
        configs.append({**cfg, "allowed": os.environ.get("SEQZOO_ALLOW")})
        return {}

    monkeypatch.setattr("seqzoo.pipelines.run.execute", execute)
    monkeypatch.setattr(sys, "argv", ["lightning"])
    monkeypatch.delenv("SEQZOO_ALLOW", raising=False)
    return configs


def _experiment(text: str, name: str = "theirs") -> list[str]:
    Path("conf_of_theirs/experiment").mkdir(parents=True, exist_ok=True)
    Path(f"conf_of_theirs/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}")
    return [f"experiment={name}", "--config-dir", "conf_of_theirs"]


HYDRA = {
    "a callback": ("hydra: {callbacks: {x: {_target_: os.mkdir, path: CANARY}}}", "hydra.callbacks.x._target_="),
    "a callback of a library": (
        "hydra: {callbacks: {x: {_target_: subprocess.Popen, args: [mkdir, CANARY]}}}",
        "hydra.callbacks.x._target_=",
    ),
    "a callback elsewhere": (
        "evil: {_target_: os.mkdir, path: CANARY}\n"
        "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback, y: '${evil}'}}}",
        "only ${hydra...}",
    ),
    "callbacks elsewhere": ("evil: {x: {_target_: os.mkdir, path: CANARY}}\nhydra: {callbacks: '${evil}'}", ""),
    "a factory of the log": ("hydra: {job_logging: {handlers: {x: {(): os.mkdir, path: CANARY}}}}", "would be called"),
    "a class of the log": (
        "hydra: {job_logging: {handlers: {file: {class: logging.os.mkdir, path: CANARY}}}}",
        "logging.os.mkdir",
    ),
    "an object of the log": (
        "hydra: {job_logging: {handlers: {console: {stream: 'ext://seqzoo.pipelines.cli.main'}}}}",
        "names an object",
    ),
    "a factory elsewhere": (
        "evil: {(): os.mkdir, path: CANARY}\nhydra: {job_logging: {handlers: {x: '${evil}'}}}",
        "only ${hydra...}",
    ),
    "the packages that are trusted": ("hydra: {job: {env_set: {SEQZOO_ALLOW: os}}}", "env_set.SEQZOO_ALLOW"),
    "what Hydra trusts": (
        "hydra: {job: {env_set: {HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE: os.mkdir}}}",
        "env_set.HYDRA_INSTANTIATE",
    ),
    "a launcher": ("hydra: {launcher: {_target_: os.mkdir, path: CANARY}}", ""),
    "overrides of a sweep": ("hydra: {sweeper: {params: {mixer._target_: evil.Mixer}}}", "hydra.sweeper.params has"),
}


@pytest.mark.parametrize("case", HYDRA)
def test_hydras_own_section_calls_nothing_of_a_file(
    case: str, canary: Path, ran: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = HYDRA[case]
    assert main(["fit", *_experiment(text.replace("CANARY", str(canary)))]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not ran


def test_a_job_of_a_sweep_is_looked_at_too(canary: Path, ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    _experiment("seed: 1", "good")
    words = _experiment(f"hydra: {{job_logging: {{handlers: {{x: {{(): os.mkdir, path: {canary}}}}}}}}}")
    assert main(["fit", "-m", "experiment=theirs,theirs", *words[1:]]) == 2
    assert "would be called" in capsys.readouterr().err


def test_what_the_user_types_and_what_ships_passes(ran: list[Any]) -> None:
    words = [
        "+hydra.job.env_set.MINE=1",
        "+hydra.callbacks.x._target_=hydra.experimental.callbacks.LogJobReturnCallback",
    ]
    assert main(["fit", *words]) == 0
    assert len(ran) == 1


def test_a_file_cannot_say_whom_to_trust(
    tmp_path: Path, canary: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`allow` and `command_line_targets` in a config are no --allow and no command line."""
    from seqzoo.pipelines.nets import mixer_class

    (tmp_path / "evil_mixer.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    words = _experiment("allow: [evil_mixer]\ncommand_line_targets: [evil_mixer.M]\nmixer: {_target_: evil_mixer.M}")
    assert main(["fit", *words]) == 0
    assert ran[0]["command_line_targets"] == [] and ran[0]["allowed"] is None
    with pytest.raises(UserError, match="comes from a file"):
        mixer_class({"mixer": {"_target_": "evil_mixer.M"}}, ran[0])


NAMES = [
    "x,_target_=os.system.csv",
    "_target_=os.system.csv",
    "${oc.env:HOME}.csv",
    "$(mkdir canary).csv",
    "`mkdir canary`;mkdir canary.csv",
    "!!os.mkdir [canary].csv",
    "{_target_: os.mkdir, path: canary}.csv",
    "[a,b].csv",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_data_file_is_only_a_name(name: str, ran: list[Any]) -> None:
    """Quoted as the launcher quotes it; the config that is saved beside the results reads back to the same."""
    from seqzoo.pipelines.forecasting.tables import load_table
    from seqzoo.pipelines.overrides import quote

    Path(name).write_text("date,y\n" + "".join(f"2024-01-{day:02d},{day}\n" for day in range(1, 29)))
    assert main(["fit", f"data.path={quote(name.replace('${', chr(92) + '${'))}"]) == 0
    assert ran[0]["data"]["path"] == name and ran[0]["command_line_targets"] == []
    (saved,) = Path("runs").rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["data"]["path"] == name
    assert load_table(name, cache_dir="cache").num_rows == 28


@pytest.mark.parametrize("year", ["9999-12-31", "0001-01-01", "1500-06-01"])
def test_years_beyond_a_table_of_nanoseconds(year: str) -> None:
    """No name of an error of pandas, and the line."""
    from seqzoo.pipelines.forecasting.tables import load_table

    rows = [f"2024-01-{day:02d},{day}\n" for day in range(1, 20)]
    Path("t.csv").write_text("date,y\n" + "".join([*rows, f"{year},0\n"]))
    with pytest.raises(UserError, match=rf"line 21.*{year}"):
        load_table("t.csv", time_column="date", cache_dir="cache")


@pytest.mark.parametrize(
    "word",
    ["data.path=x,_target_=os.mkdir.csv", "data.path={_target_:os.mkdir}", "data={_target_:os.mkdir,path:canary}"],
)
def test_an_unquoted_name_is_an_error_or_a_value(word: str, ran: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["fit", word])
    assert status in (0, 2) and all(cfg["command_line_targets"] == [] for cfg in ran)
    assert status == 0 or capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("group", ["experiment", "mixer"])
def test_yaml_with_python_tags_in_a_config_folder(
    group: str, canary: Path, ran: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("theirs") / group
    folder.mkdir(parents=True)
    (folder / "evil.yaml").write_text(tagged(canary))
    assert main(["fit", f"{group}=evil", "--config-dir", "theirs"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "python/object/apply" in said and "\n" not in said
    assert not ran
    assert main(["fit", "--help", group, "--config-dir", "theirs"]) == 0  # reads lines, no YAML


@pytest.mark.parametrize("content", ["TAGGED", "a: &a [1]\n" + "b: [*a" + ", *a" * 50 + "]\nname: [", "[" * 5000, "\0"])
def test_the_config_of_a_run_that_last_looks_at(content: str, canary: Path) -> None:
    """A run that cannot be read is not the one that is looked for."""
    from seqzoo.pipelines.run import find_checkpoint

    for name, text in (("evil", content.replace("TAGGED", tagged(canary))), ("mine", "name: mine\n")):
        (Path("runs") / name / "checkpoints").mkdir(parents=True)
        (Path("runs") / name / "config.yaml").write_text(text)
        (Path("runs") / name / "checkpoints" / "last.ckpt").write_bytes(b"")
    found = find_checkpoint("last", {"paths": {"runs": "runs"}, "name": "mine"}, Path("runs/now"))
    assert found.parts[1] == "mine"


def test_a_yaml_bomb_in_the_config_of_a_run() -> None:
    """A few hundred bytes that would be 10^9 items if the references were unfolded."""
    from seqzoo.pipelines.run import find_checkpoint

    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]" for n in range(1, 10)]
    (Path("runs") / "a" / "checkpoints").mkdir(parents=True)
    (Path("runs/a/config.yaml")).write_text("k0: &k0 [0]\n" + "\n".join(levels) + "\nname: mine\n")
    (Path("runs/a/checkpoints/last.ckpt")).write_bytes(b"")
    assert find_checkpoint("last", {"paths": {"runs": "runs"}, "name": "mine"}, Path("runs/now")).is_file()
