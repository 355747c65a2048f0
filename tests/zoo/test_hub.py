"""The hub: the real client against a small server of this process, offline, without a network, and a fake API."""

import errno
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub (seqzoo[hub]) is not installed")
pytest.importorskip("huggingface_hub.constants")  # a part of it that it does not import itself


from seqzoo.zoo import (  # noqa: E402
    Weights,
    create_model,
    load_model,
    push_to_hub,
    read_config,
    register_weights,
    save_model,
)
from seqzoo.zoo import _hub as ours  # noqa: E402
from seqzoo.zoo import _weights as weights  # noqa: E402
from seqzoo.zoo._files import file_sha256  # noqa: E402
from seqzoo.zoo._hub import cache_folder, download, parse_hub_id  # noqa: E402

OLD, NEW = "a" * 40, "b" * 40


class Hub(BaseHTTPRequestHandler):
    """`/org/name/resolve/REVISION/FILE` from folders, by commit; what else the client asks is not there."""

    def reply(self, with_body):
        found = re.fullmatch(r"/(org/name)/resolve/([^/]+)/(.+)", self.path)
        commit = self.server.branches.get(found[2]) if found else None
        path = self.server.commits[commit] / found[3] if commit else None
        self.server.asked.append((self.command, self.path))
        if path is None or not path.is_file():
            self.send_response(404)
            code = "EntryNotFound" if commit else "RevisionNotFound" if found else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{file_sha256(path)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_GET(self):
        self.reply(True)

    def do_HEAD(self):
        self.reply(False)

    def log_message(self, *_):
        pass


@pytest.fixture
def models(tmp_path):
    """Two commits of one repository."""
    made = {}
    for commit in (OLD, NEW):
        torch.manual_seed(ord(commit[0]))
        made[commit] = create_model("classifier_tiny", dim=16, depth=1).eval()
        save_model(made[commit], tmp_path / "commits" / commit, preprocessing={"labels": [commit[0]]})
    (tmp_path / "commits" / NEW / "README.md").unlink()
    return made


@pytest.fixture
def server(tmp_path, models, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits = {commit: tmp_path / "commits" / commit for commit in models}
    server.branches = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_names():
    assert parse_hub_id("org/name") == ("org/name", None)
    assert parse_hub_id("org/name@v1.0") == ("org/name", "v1.0")
    assert parse_hub_id("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for wrong in (
        "name",
        "a/b/c",
        "../name",
        "org/..",
        "/org/name",
        "org/na me",
        "org/name@",
        "org/name@../x",
        "o--g/n",
    ):
        assert parse_hub_id(wrong) is None, wrong


def test_download_and_revisions(server, models, tmp_path):
    model = load_model("org/name")
    assert same(model, models[NEW]) and model.preprocessing == {"labels": ["b"]} and not model.training
    for source, arguments in (("org/name@v1", {}), ("org/name", {"revision": "v1"}), (f"org/name@{OLD}", {})):
        assert same(load_model(source, **arguments), models[OLD])
    assert (tmp_path / "cache" / "models--org--name").is_dir(), "SEQZOO_CACHE"
    with pytest.raises(ValueError, match="another revision"):
        load_model("org/name@v1", revision="main")
    assert len(load_model("org/name", num_classes=5).state_dict()["head.1.bias"]) == 5


def test_the_second_time_only_asks_for_news(server):
    load_model(f"org/name@{OLD}")
    server.asked.clear()
    load_model(f"org/name@{OLD}")
    assert server.asked == [], "a commit that is there needs no network"


def test_all_files_are_of_one_commit(server, models, monkeypatch):
    """The branch moves between the first file and the second."""
    fetch = ours._fetch

    def moving(repo, name, revision, cache):
        path = fetch(repo, name, revision, cache)
        server.branches["main"] = OLD
        return path

    monkeypatch.setattr(ours, "_fetch", moving)
    assert same(load_model("org/name"), models[NEW])


def test_offline(server, models, monkeypatch, tmp_path):
    load_model("org/name@v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.asked.clear()
    assert same(load_model("org/name@v1"), models[OLD])
    with pytest.raises(
        ValueError, match=r"org/name: offline \(HF_HUB_OFFLINE\) and not in the cache .*hf download org/name"
    ):
        load_model("org/name", cache_dir=tmp_path / "empty")
    assert server.asked == []


def test_no_network(server, monkeypatch, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again and again
    monkeypatch.setattr(
        hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"the hub cannot be reached, .*load_model\('FOLDER'\)"):
        load_model("org/name")


def test_what_is_not_there(server, tmp_path):
    with pytest.raises(ValueError, match="org/name has no revision 'v9'"):
        load_model("org/name@v9")
    with pytest.raises(ValueError, match="no model 'org/nothing', or it is private"):
        load_model("org/nothing")
    (server.commits[OLD] / "config.json").unlink()
    with pytest.raises(ValueError, match="is no saved model of seqzoo"):
        load_model("org/name@v1")


def test_weights_that_were_changed_are_refused(server):
    path = server.commits[NEW] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=rf"sha256 {file_sha256(path)}, its config says [0-9a-f]{{64}}"):
        load_model("org/name")


def test_a_config_of_the_hub_cannot_name_other_files(server, tmp_path):
    path = server.commits[NEW] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {"../../x": "0" * 64}}))
    with pytest.raises(ValueError, match="only plain file names"):
        load_model("org/name")
    assert not any("x" in asked.rsplit("/", 1)[-1] for _, asked in server.asked if "json" not in asked)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk(server, models, monkeypatch, tmp_path, wrapped):
    """Only the cache is full: the message says which disk, nothing half-written stays, and later all works."""
    real = hub.hf_hub_download

    def full(repo, name, **arguments):
        if name != "model.safetensors":
            return real(repo, name, **arguments)
        half = tmp_path / "cache" / "models--org--name" / "blobs" / "x.incomplete"
        half.write_bytes(b"half")
        error = OSError(errno.ENOSPC, "No space left on device")
        if wrapped:
            raise RuntimeError("download failed") from error
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(ValueError, match=r"no space left in the cache .*/cache for org/name.*SEQZOO_CACHE"):
        load_model("org/name")
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    monkeypatch.setattr(hub, "hf_hub_download", real)
    assert same(load_model("org/name"), models[NEW])


def test_where_downloads_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("SEQZOO_CACHE", raising=False)
    assert cache_folder() is None and cache_folder(tmp_path) == tmp_path
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" and cache_folder(tmp_path) == tmp_path


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    model = create_model("classifier_tiny", dim=16, depth=1)
    save_model(model, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ours, "_library", lambda: pytest.fail("the hub was asked"))
    assert same(load_model("org/name"), model)


class FakeApi:
    """What `push_to_hub` asks of an API; the files as they were when it was called."""

    def __init__(self):
        self.calls = []

    def create_repo(self, **arguments):
        self.calls.append(("create_repo", arguments))

    def upload_folder(self, *, folder_path, **arguments):
        from pathlib import Path

        self.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", arguments))
        return SimpleNamespace(commit_url="https://hub/org/name/commit/1")


def test_the_calls_are_those_of_the_real_api():
    """The fake has no more than `HfApi`: its arguments are ours."""
    import inspect

    real = hub.HfApi
    for name, used in (
        ("create_repo", {"repo_id", "private", "exist_ok"}),
        ("upload_folder", {"repo_id", "folder_path", "revision", "commit_message", "allow_patterns"}),
    ):
        assert used <= set(inspect.signature(getattr(real, name)).parameters)


def test_push(tmp_path):
    model, api = create_model("classifier_tiny", dim=16, depth=1), FakeApi()
    model.preprocessing = {"labels": ["x"]}
    assert push_to_hub(model, "org/name", api=api, private=True, revision="next") == "https://hub/org/name/commit/1"
    (_, made), (_, sent) = api.calls
    assert made == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "org/name" and sent["revision"] == "next"
    assert sorted(api.files) == sorted(sent["allow_patterns"]) == ["README.md", "config.json", "model.safetensors"]
    card = api.files["README.md"].decode()
    assert 'seqzoo.load_model("org/name")' in card and hub.ModelCard(card).data.library_name == "seqzoo"
    folder = tmp_path / "back"
    folder.mkdir()
    for name, content in api.files.items():
        (folder / name).write_bytes(content)
    loaded = load_model(folder)
    assert same(loaded, model) and loaded.preprocessing == {"labels": ["x"]}


def test_push_a_folder(tmp_path):
    """Only what belongs to the model: not the notes that lie beside it."""
    (tmp_path / "bpe").write_text("{}")
    folder = save_model(
        create_model("classifier_tiny", dim=16, depth=1), tmp_path / "m", files={"bpe.json": tmp_path / "bpe"}
    )
    (folder / "secret.txt").write_text("mine")
    api = FakeApi()
    push_to_hub(folder, "org/name", api=api)
    assert sorted(api.files) == ["README.md", "bpe.json", "config.json", "model.safetensors"]
    assert json.loads(api.files["config.json"]) == json.loads((folder / "config.json").read_text())
    assert read_config(folder)["files"] == {"bpe.json": file_sha256(tmp_path / "bpe")}


def test_records_of_the_hub(server, models, monkeypatch, tmp_path):
    """Weights that do not ship, by tag: the record pins commit and hash."""
    monkeypatch.setattr(weights, "_REGISTERED", {})
    digest = file_sha256(server.commits[OLD] / "model.safetensors")
    shared = {"model": "classifier_tiny", "num_parameters": 1, "source": f"org/name@{OLD}"}
    register_weights(Weights(tag="here", sha256=digest, **shared))
    register_weights(Weights(tag="other", sha256="0" * 64, **shared))
    assert same(create_model("classifier_tiny.here", pretrained=True), models[OLD])
    with pytest.raises(ValueError, match=rf"{digest}, its record says 0{{64}}"):
        load_model("classifier_tiny.other")
    register_weights(Weights(tag="odd", sha256=digest, **{**shared, "source": "no/such/thing"}))
    with pytest.raises(ValueError, match="neither a folder nor org/name@revision"):
        load_model("classifier_tiny.odd")


def test_push_refuses(tmp_path):
    folder = save_model(create_model("classifier_tiny", dim=16, depth=1), tmp_path / "saved")
    with pytest.raises(ValueError, match="dtype: a folder is uploaded as it was saved"):
        push_to_hub(folder, "org/name", api=FakeApi(), dtype="bfloat16")
    with pytest.raises(ValueError, match="must be a name such as org/name"):
        push_to_hub(create_model("classifier_tiny"), "name", api=FakeApi())
    with pytest.raises(ValueError, match="a branch is revision="):
        push_to_hub(create_model("classifier_tiny"), "org/name@v1", api=FakeApi())
    with pytest.raises(ValueError, match="is not a saved model"):
        push_to_hub(tmp_path, "org/name", api=FakeApi())
    with pytest.raises(ValueError, match="made by create_model"):
        push_to_hub(torch.nn.Linear(1, 1), "org/name", api=FakeApi())


def test_without_the_client(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'seqzoo\[hub\]'"):
        download("org/name")
