"""Decoders that raise, hang or die, and readers that are copied, forked and spawned."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

av = pytest.importorskip("av", reason="needs seqzoo[video]")

from video_files import (  # noqa: E402
    child_of,
    needs,
    number_in,
    numbers_in,
    send_numbers,
    write_video,
)

from seqzoo.pipelines.errors import UserError  # noqa: E402
from seqzoo.pipelines.video import faults  # noqa: E402
from seqzoo.pipelines.video import reader as reader_module  # noqa: E402
from seqzoo.pipelines.video.backends import decord_backend  # noqa: E402
from seqzoo.pipelines.video.faults import VideoError  # noqa: E402
from seqzoo.pipelines.video.reader import open_video  # noqa: E402
from seqzoo.pipelines.video.timeouts import Watched  # noqa: E402

# decoders that fail --------------------------------------------------------------------------------------------------


class Fake:
    """A decoder that gives frames of zeros up to one number, where it does something else."""

    def __init__(self, size: tuple[int, int], at: int, what: Callable[[], None]) -> None:
        self.size, self.at, self.what = size, at, what

    def frames(self, numbers: Any) -> Any:
        for number in numbers:
            if number >= self.at:
                self.what()
            yield np.zeros((*self.size, 3), np.uint8)

    def close(self) -> None:
        pass


def fail_first(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None], *, at: int = 0) -> None:
    real = reader_module.open_decoder

    def opened(name: str, *arguments: Any, size: tuple[int, int], **options: Any) -> Any:
        return Fake(size, at, what) if name == "decord" else real(name, *arguments, size=size, **options)

    monkeypatch.setattr(reader_module, "open_decoder", opened)


def broken() -> None:
    raise RuntimeError("own words\nof a decoder")


def test_decoder_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Named, in one line; "auto" goes on with the next from where the first stopped, and says so once."""
    path = write_video(tmp_path / "a.mp4", 20)
    monkeypatch.setattr(faults, "_kinds", [])  # other tests may have said as many as are said
    fail_first(monkeypatch, broken, at=3)
    with pytest.raises(VideoError, match=r"a\.mp4: decord cannot decode it: own words of a decoder$"):
        open_video(path, backend="decord").read([5])
    reader = open_video(path)
    assert not reader.read([1]).any() and reader.backend == "decord"
    frames = reader.read([5, 2, 19])
    assert numbers_in(frames[[0, 2]]) == [5, 19] and not frames[1].any() and reader.backend == "av"
    assert reader.read([1]).any()
    reader.read([7])
    said = capsys.readouterr().err
    assert said.count("read with av: own words of a decoder") == 1 and said.count("\n") == 1


def test_all_decoders_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"no {name}")

    monkeypatch.setattr(reader_module, "open_decoder", opened)
    reader = open_video(write_video(tmp_path / "a.mp4", 2))
    for _ in range(2):
        with pytest.raises(VideoError, match=r"no decoder reads it\. decord: no decord; av: no av; torchcodec: no t"):
            reader.read([0])


def test_decoder_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up after the time-out, once: "auto" goes on with the next."""
    path = write_video(tmp_path / "a.mp4", 20)
    fail_first(monkeypatch, threading.Event().wait, at=3)
    reader = open_video(path, timeout=0.2)
    assert numbers_in(reader.read([2, 5])) == [2, 5] and reader.backend == "av"
    alone = open_video(path, timeout=0.2, backend="decord")
    for _ in range(2):
        with pytest.raises(VideoError, match=r"a\.mp4.*no answer for 0\.2 seconds") as caught:
            alone.read([5])
        assert caught.value.cause == "hangs"
    assert not alone.read([1]).any()  # it can be asked again
    alone.close()


def test_watched_thread() -> None:
    """What a call returns or raises; busy while it runs."""
    watched, seen = Watched("a", 30), []
    assert watched.call(lambda a: seen.append(watched.busy) or a + 1, 2) == 3 and seen == [True] and not watched.busy
    with pytest.raises(ZeroDivisionError):
        watched.call(lambda: 1 // 0)
    assert not watched.busy
    watched.close()
    assert watched.call(lambda: 4) == 4  # in another thread


def test_a_slow_decoder_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time-out is for each step, not for the whole."""
    fail_first(monkeypatch, lambda: time.sleep(0.3))
    reader = open_video(write_video(tmp_path / "a.mp4", 20), timeout=2.0, backend="decord")
    assert reader.read(range(8)).shape[0] == 8


def test_process_ends(tmp_path: Path) -> None:
    """Quietly, with readers that are open and one whose decoder hangs; the process of decord ends too."""
    path = write_video(tmp_path / "a.mp4", 30)
    code = f"""
import sys, threading
from seqzoo.pipelines.video import reader
from seqzoo.pipelines.video.backends import decord_backend
from seqzoo.pipelines.video.faults import VideoError
readers = [reader.open_video({str(path)!r}, backend=name) for name in ("auto", "av")]
for one in readers:
    one.read([1])
class Fake:
    def frames(self, numbers):
        threading.Event().wait()
        yield
    def close(self):
        pass
reader.open_decoder = lambda *_, **__: Fake()
try:
    reader.open_video({str(path)!r}, backend="av", timeout=0.2).read([0])
except VideoError as error:
    print(error.cause, "torch" in sys.modules, decord_backend._child._process.pid if decord_backend._child else "")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    cause, torch_there, *child = done.stdout.split()
    assert cause == "hangs" and torch_there == "False"  # it starts fast
    if child:
        with pytest.raises(ProcessLookupError):
            os.kill(int(child[0]), 0)


def test_decord_that_hangs_or_dies(tmp_path: Path) -> None:
    """The process of decord is stopped, so that it never answers, and killed: the next decoder goes on."""
    needs("decord", tmp_path)
    path = write_video(tmp_path / "a.mp4", 20)
    stopped, other = open_video(path, timeout=0.5), open_video(path, backend="decord")
    assert numbers_in(stopped.read([1])) == numbers_in(other.read([1])) == [1] and stopped.backend == "decord"
    child = child_of(stopped)
    assert child_of(other) == child
    os.kill(child, signal.SIGSTOP)
    assert numbers_in(stopped.read([7, 9])) == [7, 9] and stopped.backend == "av"
    assert numbers_in(other.read([8])) == [8] and child_of(other) != child  # another process
    killed = open_video(path)
    killed.read([0])
    os.kill(child_of(killed), signal.SIGKILL)
    assert numbers_in(killed.read([3])) == [3] and killed.backend == "av"
    assert numbers_in(other.read([9])) == [9] and other.backend == "decord"  # the other file brought it down
    os.kill(child_of(other), signal.SIGKILL)
    with pytest.raises(VideoError, match=r"a\.mp4: decord cannot decode it: decord crashed"):
        other.read([4])
    assert numbers_in(other.read([4])) == [4]


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """What installs them; "auto" takes the next without a word."""
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(decord_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert open_video(path).backend == "av" and capfd.readouterr().err == ""
    for backend, command in (("decord", r"pip install 'seqzoo\[video\]'"), ("torchcodec", "pip install torchcodec$")):
        with pytest.raises(UserError, match=f"needs the package {backend}: {command}"):
            open_video(path, backend=backend).read([0])
    copy = write_video(tmp_path / "b.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"needs the package av: pip install 'seqzoo\[video\]'"):
        len(open_video(copy))


# copies and processes ------------------------------------------------------------------------------------------------


class Videos(Dataset):
    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        found = number_in(self.reader.read([3 * index])[0])
        child = getattr(self.reader._decoder, "_child", None)
        return torch.tensor([found, os.getpid(), os.getpid() if child is None else child._process.pid])


def test_pickle_holds_path_and_settings(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    reader = open_video(path, backend="av", size=(32, 60))
    reader.read(range(20))
    content = pickle.dumps(reader)
    assert len(content) < 1000 and not {"_table", "_times", "_decoder", "_watch"} & set(reader.__getstate__())
    copy = pickle.loads(content)
    assert copy.size == (32, 60) and copy._decoder is None and copy._table is None
    np.testing.assert_array_equal(copy.read([4]), reader.read([4]))
    with reader:
        pass
    assert reader._decoder is None and numbers_in(reader.read([5])) == [5]  # opened again


@pytest.mark.parametrize("backend", ["decord", "av", "torchcodec"])
def test_workers_after_a_fork(backend: str, tmp_path: Path) -> None:
    """The parent's decoder is open, with its thread or process: the workers open their own, the parent's goes on."""
    needs(backend, tmp_path)
    reader = open_video(write_video(tmp_path / "a.mp4", 20), backend=backend)
    assert numbers_in(reader.read([2])) == [2]
    loader = DataLoader(Videos(reader), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=60)
    found = torch.cat(list(loader))
    assert found[:, 0].tolist() == [0, 3, 6, 9, 12, 15]
    processes = [set(found[:, k].tolist()) for k in (1, 2)]
    assert os.getpid() not in processes[0] and len(processes[0]) == len(processes[1]) == 2
    if backend == "decord":
        assert child_of(reader) not in processes[1]
    assert numbers_in(reader.read([3, 2])) == [3, 2]
    del loader


def test_spawned_worker(tmp_path: Path) -> None:
    reader = open_video(write_video(tmp_path / "a.mp4", 6))
    reader.read([0])
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=send_numbers, args=(reader, there))
    worker.start()
    assert here.poll(60) and here.recv() == (reader.backend, [4, 1])
    worker.join(60)
    assert worker.exitcode == 0


def test_decord_ends_with_its_parent(tmp_path: Path) -> None:
    needs("decord", tmp_path)
    reader = open_video(write_video(tmp_path / "a.mp4", 2), backend="decord")
    reader.read([0])
    child = decord_backend._child
    assert child is not None and child.runs
    decord_backend._end()
    assert child._process.returncode is not None and not child.runs
    assert numbers_in(reader.read([1])) == [1]
