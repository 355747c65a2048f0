"""Files that someone else wrote: nothing in them is executed, and what they ask for is refused in one clear message.

SECURITY.md says who writes which file and what each may do. A payload makes a file, the canary, where it is executed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from seqzoo.pipelines.checkpoints import load_checkpoint, saved_parameters
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.errors import UserError
from seqzoo.zoo import create_model, load_model, save_model
from seqzoo.zoo._files import file_sha256, read_state

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "fuzz"


class Payload:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the payloads make; it must not be there after any test of this file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def test_the_payloads_work(tmp_path: Path) -> None:
    """Else that nothing was executed would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "other")))
    yaml.load(_tagged(tmp_path / "third"), yaml.UnsafeLoader)
    assert (tmp_path / "other").is_dir() and (tmp_path / "third").is_dir()


def _tagged(canary: Path) -> str:
    return f"name: !!python/object/apply:os.mkdir ['{canary}']\n"


# the command line and config files ------------------------------------------------------------------------------------


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
    (folder / "evil.yaml").write_text(_tagged(canary))
    assert main(["fit", f"{group}=evil", "--config-dir", "theirs"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "python/object/apply" in said and "\n" not in said
    assert not ran
    assert main(["fit", "--help", group, "--config-dir", "theirs"]) == 0  # reads lines, no YAML


@pytest.mark.parametrize("content", ["TAGGED", "a: &a [1]\n" + "b: [*a" + ", *a" * 50 + "]\nname: [", "[" * 5000, "\0"])
def test_the_config_of_a_run_that_last_looks_at(content: str, canary: Path) -> None:
    """A run that cannot be read is not the one that is looked for."""
    from seqzoo.pipelines.run import find_checkpoint

    for name, text in (("evil", content.replace("TAGGED", _tagged(canary))), ("mine", "name: mine\n")):
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


# checkpoints ----------------------------------------------------------------------------------------------------------


def _checkpoint(**content: Any) -> Path:
    path = Path("some.ckpt")
    torch.save({"state_dict": {}, **content}, path)
    return path


def test_a_checkpoint_with_a_payload_is_not_read(canary: Path) -> None:
    path = _checkpoint(hyper_parameters=Payload(canary))
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def test_a_target_in_a_checkpoints_hyper_parameters_is_not_imported(canary: Path, tmp_path: Path) -> None:
    from seqzoo.pipelines.nets import mixer_class

    (tmp_path / "evil_saved.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    sections = {key: {} for key in ("task", "optimizer", "scheduler", "schema")}
    for target in ("evil_saved.Mixer", "os.mkdir", "seqzoo.pipelines.cli.main"):
        path = _checkpoint(hyper_parameters={**sections, "model": {"name": "x", "mixer": {"_target_": target}}})
        saved = saved_parameters(load_checkpoint(path), "forecasting", path)
        with pytest.raises(UserError, match="_target_"):
            mixer_class(saved["model"], {"command_line_targets": []})
    assert "evil_saved" not in sys.modules


@pytest.mark.parametrize("saved", [None, 3, [], {"model": 3}, "task", {"task": []}])
def test_hyper_parameters_that_are_none(saved: Any) -> None:
    keys: dict[str, Any] = {key: {} for key in ("model", "task", "optimizer", "scheduler", "schema")}
    content = {**keys, **saved} if isinstance(saved, dict) else saved
    path = _checkpoint(hyper_parameters=content)
    with pytest.raises(UserError, match="no forecasting checkpoint"):
        saved_parameters(load_checkpoint(path), "forecasting", path)


def test_a_checkpoint_that_would_unpack_to_more_than_it_is() -> None:
    path = _checkpoint(big=torch.zeros(1 << 20))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in whole.namelist():
            bomb.writestr(part, whole.read(part))
    assert Path("bomb.ckpt").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint("bomb.ckpt")


def test_arrays_with_objects_are_not_unpickled(canary: Path) -> None:
    """Our caches are .npy files; NumPy reads objects in one only where it is told to."""
    from seqzoo.pipelines.documents.lra.image import read_batch

    np.save("a.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    np.savez("a.npz", x=np.array([Payload(canary)], dtype=object))
    for read in (lambda: np.load("a.npy"), lambda: np.load("a.npz")["x"]):
        with pytest.raises(ValueError, match="allow_pickle"):
            read()
    Path("data_batch_1").write_bytes(pickle.dumps({"data": Payload(canary)}))
    with pytest.raises(UserError, match="not read"):
        read_batch(Path("data_batch_1"))


def test_no_line_of_the_library_unpickles() -> None:
    """Whoever adds one says here why it is safe."""
    known = {
        "blocks/testing/basics.py": "pickle.loads",  # of what it pickled itself
        "pipelines/documents/lra/image.py": "pickle.Unpickler",  # knows the names of arrays only
    }
    words = ("pickle.load", "pickle.Unpickler", "allow_pickle=True", "weights_only=False", "yaml.load(", "unsafe_load",
             "yaml.full_load", "joblib", "shelve", "marshal", "extractall", "unpack_archive", "shell=True", "os.system",
             " eval(", " exec(")  # fmt: skip
    found = {}
    for folder in ("kernels", "blocks", "zoo", "pipelines", "seqzoo"):
        for path in (ROOT / folder).rglob("*.py"):
            for word in words:
                name = path.relative_to(ROOT).as_posix()
                if word in path.read_text(encoding="utf-8") and not known.get(name, "-").startswith(word):
                    found[name] = word
    assert not found


# saved models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(
        create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer="linear"), tmp_path / "m"
    )


def _edit(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["options"].update(options)
    path.write_text(json.dumps(record))


HUGE: list[dict[str, Any]] = [
    {"dim": 1 << 14},
    {"dim": 1 << 40},
    {"depth": 10**9},
    {"seq_len": 10**12},
    {"pred_len": 10**9},
    {"in_channels": 10**12},
    {"dim": 10**400},
    {"mixer": {"name": "s4d", "d_state": 1 << 40}},
    {"mixer": {"name": "long_vq", "codebook_size": 1 << 40}},
]


_LOADING = """
import json, resource, sys
from seqzoo.zoo import load_model
load_model(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for folder in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = f"{load_model(folder)} was built"
    except ValueError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
def test_configs_that_ask_for_a_huge_model(saved: Path) -> None:
    """Refused before it is allocated: each grows the process by less than 512 MiB, all take less than 2 minutes of
    CPU."""
    folders = []
    for number, options in enumerate(HUGE):
        folders.append(Path(f"huge{number}"))
        shutil.copytree(saved, folders[-1])
        _edit(folders[-1], **options)
    command = [sys.executable, "-c", _LOADING, str(saved), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for options, folder, (said, grew) in zip(HUGE, folders, answers, strict=False):
        assert str(folder) in said and "was built" not in said, (options, said)
        assert grew < 512, (options, grew)
    assert done.returncode == 0 and len(answers) == len(HUGE), done.stderr


def test_a_header_of_exabytes_costs_nothing(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    claims = {"exabytes": 1 << 60, "all": (1 << 64) - 1, "more than any header": 200_000_000}
    for claimed in claims.values():
        with path.open("wb") as file:
            file.write(claimed.to_bytes(8, "little") + content[8:])
            file.truncate(300_000_000)  # sparse
        tracemalloc.start()
        with pytest.raises(ValueError, match="header claims"):
            read_state(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("offset", ["1e999", "9" * 5000, '"x"', "null", "{}", "[]"])
def test_offsets_that_are_no_numbers(offset: str) -> None:
    header = f'{{"w":{{"dtype":"F32","shape":[1],"data_offsets":[0,{offset}]}}}}'.encode()
    Path("w").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="w is no safetensors file"):
        read_state(Path("w"))


@pytest.mark.parametrize(
    "text", ['{"name": ' + "9" * 5000 + "}", '{"name": "a", "options": ' + '{"a":' * 900 + "1" + "}" * 901]
)
def test_numbers_and_depths_that_json_allows(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|unknown model|sha256"):
        load_model(saved)


def test_a_safetensors_file_that_is_a_pickle(saved: Path, canary: Path) -> None:
    path = saved / "model.safetensors"
    torch.save({"w": Payload(canary)}, path)
    record = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**record, "sha256": file_sha256(path)}))
    with pytest.raises(ValueError, match="is a pickle"):
        load_model(saved)


@pytest.mark.parametrize("where", ["options", "preprocessing", "record"])
def test_a_target_anywhere_in_a_saved_config(saved: Path, where: str) -> None:
    path = saved / "config.json"
    record = json.loads(path.read_text())
    record[where] = {**record.get(where, {}), "a": [{"b": {"_target_": "os.mkdir", "path": "canary"}}]}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds '_target_'"):
        load_model(saved)


def test_weights_of_a_small_file_are_not_refused() -> None:
    """The bound leaves room: what ships and what the caller overrides is built."""
    save_file({"a": torch.ones(2)}, "a")
    folder = save_model(create_model("dlinear", seq_len=8, pred_len=2, in_channels=1), "d")
    assert load_model(folder).config["options"]["pred_len"] == 2


# tables and names -----------------------------------------------------------------------------------------------------


def _wav(path: Path) -> Path:
    soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(800), 16000)
    return path


def test_paths_of_a_table_may_lead_anywhere_that_the_user_reads(tmp_path: Path) -> None:
    """ ".." and absolute paths and links are how tables are used; SECURITY.md says what that allows."""
    from seqzoo.pipelines.audio.sources import table_clips

    there = _wav(tmp_path / "elsewhere" / "a.wav")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "link.wav").symlink_to(there)
    for cell in ("../elsewhere/a.wav", str(there), "link.wav"):
        table = tmp_path / "tables" / "t.csv"
        table.write_text(f"path,label\n{cell},x\n")
        (clip,) = table_clips(table)
        assert Path(clip.path).resolve() == there


@pytest.mark.parametrize(
    "cell", ["~nobody_of_that_name/a.wav", "a" * 5000, "a\\u0000.wav", "/dev/zero", "/", "..", "/dev/tty"]
)
def test_cells_that_are_no_files(cell: str) -> None:
    """No device is opened, and what can be no path is told as such."""
    from seqzoo.pipelines.audio.sources import table_clips
    from seqzoo.pipelines.documents.readers import read_part

    Path("t.jsonl").write_text(f'{{"path": "{cell}", "file": "{cell}", "label": "x"}}\n')
    with pytest.raises(UserError, match="line 1"):
        table_clips("t.jsonl")
    columns = dict.fromkeys(("text", "file", "label", "split"))
    with pytest.raises(UserError, match="line 1"):
        list(read_part("train", Path("t.jsonl"), columns))


def test_a_file_of_secrets_named_as_a_recording_is_refused_without_its_content() -> None:
    from seqzoo.pipelines.audio.reader import AudioReader
    from seqzoo.pipelines.video.reader import open_video

    Path("key.wav").write_text("-----BEGIN KEY-----\n" + "c2VjcmV0IG9mIHRoZSB1c2Vy\n" * 50)
    pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
    with pytest.raises(UserError) as caught:
        AudioReader("key.wav").read()
    assert "c2VjcmV0IG9mIHRoZSB1c2Vy" not in str(caught.value)
    pytest.importorskip("av", reason="needs seqzoo[video]")
    with pytest.raises(UserError):
        len(open_video("key.wav"))


@pytest.mark.parametrize("head", [b"#EXTM3U\n#\1\n", b"ffconcat version 1.0\n#\1\n"])
def test_a_playlist_under_the_name_of_a_video_opens_no_other_file(tmp_path: Path, head: bytes) -> None:
    pytest.importorskip("av", reason="needs seqzoo[video]")
    from seqzoo.pipelines.video.reader import open_video

    from ..helpers.video_files import write_video

    write_video(tmp_path / "private.mp4", 3)
    entry = b"#EXTINF:1,\nprivate.mp4\n#EXT-X-ENDLIST\n" if head.startswith(b"#EXTM3U") else b"file private.mp4\n"
    (tmp_path / "movie.mp4").write_bytes(head + entry)
    with pytest.raises(UserError, match="other files"):
        len(open_video(tmp_path / "movie.mp4", backend="av"))


@pytest.mark.parametrize("module", ["audio.events.predict", "video.grounding.predict", "video.search.predict"])
def test_output_names_made_of_file_names_stay_in_the_run_folder(module: str) -> None:
    import importlib

    unique = importlib.import_module(f"seqzoo.pipelines.{module}")._unique
    files = [Path("../../a/..b.wav"), Path("/etc/a.wav"), Path("x/a.wav"), Path("..."), Path("a/\\..\\c.wav")]
    names = [unique(file, files) for file in files]
    assert len(set(names)) == len(names) and all("/" not in name for name in names)
    assert all((Path("/run") / f"{name}.png").resolve().parent == Path("/run") for name in names)


@pytest.mark.parametrize("query", ["../../etc/x", "/abs", "..", "a/b", "\0", "", "CON", "a" * 500])
def test_output_names_made_of_queries_stay_in_the_run_folder(query: str) -> None:
    from seqzoo.pipelines.video.search.predict import _slug

    slug = _slug(query, set())
    assert slug and len(slug) <= 40 and not set(slug) & set("/\\.\0")


# what the fuzzer found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*-*.*")), ids=lambda path: path.name)
def test_what_the_fuzzer_found(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file once made a reader fail with an error that was not ours, hang, or take too much memory."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _fuzz_reading

    kind = path.suffix[1:]
    needs = {"wav": "soundfile", "mp4": "av", "json": "tokenizers"}.get(kind)
    if needs is not None:
        pytest.importorskip(needs)
    answer = _fuzz_reading.read(path, kind)
    assert answer["outcome"] in ("read", "refused"), answer
