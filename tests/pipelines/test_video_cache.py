"""Arrays kept on the disk: right or not there, bounded, whatever else happens in the folder."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video import cache as cache_module
from seqzoo.pipelines.video import faults
from seqzoo.pipelines.video.cache import FeatureCache, read_cached


def files(cache: FeatureCache) -> list[Path]:
    return sorted(p for p in cache.folder.rglob("*") if p.is_file())


def total(cache: FeatureCache) -> int:
    return sum(path.stat().st_size for path in files(cache))


def test_what_is_put_is_got(tmp_path: Path) -> None:
    """Every shape and type, bit by bit; a key is its values, in whatever order a mapping has them."""
    cache = FeatureCache(tmp_path, 1 << 20)
    arrays = [
        np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32),
        np.arange(3, dtype=np.int64),
        np.zeros((0, 4), np.float16),
        np.array(2.5),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([np.nan, np.inf]),
    ]
    for number, array in enumerate(arrays):
        assert cache.get(["file", number]) is None
        assert cache.put(["file", number], array)
    again = FeatureCache(tmp_path, 1 << 20)
    for number, array in enumerate(arrays):
        found = again.get(("file", number))
        assert found is not None and found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    cache.put({"b": 1, "a": "x"}, np.ones(1))
    assert cache.get({"a": "x", "b": 1}) is not None and cache.get({"a": "x", "b": 2}) is None
    assert cache.get(["file", "0"]) is None
    cache.put(["file", 0], np.zeros(2))
    np.testing.assert_array_equal(again.get(["file", 0]), np.zeros(2))
    cache.clear()
    assert files(cache) == [] and again.get(["file", 1]) is None


def test_wrong_arguments(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    with pytest.raises(UserError, match="cannot be kept"):
        cache.put("a", np.array([object()]))
    for key in (Path("a"), {"a": np.float32(1)}, float("nan")):
        with pytest.raises(UserError, match="plain values"):
            cache.get(key)
    for wrong in (-1, 1.5, True):
        with pytest.raises(UserError, match="max_bytes"):
            FeatureCache(tmp_path, wrong)  # type: ignore[arg-type]


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "moved"))
    cache = FeatureCache()
    assert cache.put("a", np.ones(3)) and cache.folder == tmp_path / "moved" / "video" and len(files(cache)) == 1


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    """Never more than max_bytes; what was asked for stays longer, what is larger than all of it is not kept."""
    size = 128 + 32 + 800  # of the array's header, the hash and 100 numbers
    cache = FeatureCache(tmp_path, 5 * size)
    for number in range(5):
        assert cache.put(number, np.full(100, float(number)))
        os.utime(cache._path(number), ns=(number * 10**9, number * 10**9))
    assert total(cache) == 5 * size
    assert cache.get(0) is not None  # now it is the youngest
    cache.put(5, np.full(100, 5.0))
    assert total(cache) == 5 * size
    assert [number for number in range(6) if cache._path(number).exists()] == [0, 2, 3, 4, 5]
    assert not cache.put(6, np.ones(1000)) and total(cache) == 5 * size
    assert not FeatureCache(tmp_path / "none", 0).put(0, np.ones(1))
    for number in range(100, 140):
        cache.put(number, np.full(100, 1.0))
        assert total(cache) <= 5 * size
    # an entry that is replaced counts once
    for _ in range(20):
        cache.put(139, np.full(100, 2.0))
    assert total(cache) == 5 * size


def test_bytes_of_other_processes_count(tmp_path: Path) -> None:
    one, other = FeatureCache(tmp_path, 100_000), FeatureCache(tmp_path, 100_000)
    one.put(-1, np.zeros(10))
    for number in range(40):
        other.put(number, np.zeros(1000))
    for number in range(100, 100 + cache_module._LOOK_EVERY):
        one.put(number, np.zeros(10))
    assert total(one) <= 100_000


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "longer"])
def test_damaged_entry(damage: str, tmp_path: Path) -> None:
    """Not there, and gone: what is put next is got."""
    cache = FeatureCache(tmp_path)
    cache.put("a", np.arange(50.0))
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[-9] ^= 1
    path.write_bytes({"cut": content[:-8], "emptied": b"", "longer": content + b"x"}.get(damage, content))
    assert cache.get("a") is None and not path.exists()
    cache.put("a", np.arange(50.0))
    np.testing.assert_array_equal(cache.get("a"), np.arange(50.0))


def test_killed_writers(tmp_path: Path) -> None:
    """Their temporary files are no entries, and go once they are old."""
    cache = FeatureCache(tmp_path)
    cache.put("a", np.ones(3))
    (path,) = files(cache)
    old, new = path.parent / ".old.tmp", path.parent / ".new.tmp"
    for temporary in (old, new):
        temporary.write_bytes(b"half")
    os.utime(old, (time.time() - 2e5,) * 2)
    FeatureCache(tmp_path).put("b", np.ones(3))
    assert not old.exists() and new.exists() and cache.get("a") is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Said once; what was kept is still got, nothing raises."""
    monkeypatch.setattr(faults, "_said", set())
    cache = FeatureCache(tmp_path)
    cache.put("a", np.ones(3))
    before = files(cache)

    tried = []

    def full(*given: Any) -> None:
        tried.append(given)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache_module.os, "replace", full)
    assert not cache.put("b", np.ones(3)) and not cache.put("c", np.ones(3))
    assert cache.get("b") is None and cache.get("a") is not None and files(cache) == before
    assert len(tried) == 1  # then it is left alone
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said
    assert ("disk is full" in said) == (number == errno.ENOSPC)


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file" / "folder")
    assert not cache.put("a", np.ones(3)) and cache.get("a") is None
    assert "nothing more is cached" in capsys.readouterr().err


WRITER = """
import sys
import numpy as np
from seqzoo.pipelines.video.cache import FeatureCache
cache, seed = FeatureCache(sys.argv[1], 40_000), int(sys.argv[2])
random = np.random.default_rng(seed)
for turn in range(300):
    key = int(random.integers(30))
    found = cache.get(key)
    assert found is None or (found == key).all() and found.shape == (200 + key,), (key, found)
    cache.put(key, np.full(200 + key, float(key)))
"""


def test_several_processes(tmp_path: Path) -> None:
    """They write, read and remove the same entries: each array is whole, and the folder stays bounded."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE, text=True) for seed in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and not error, error
    cache = FeatureCache(tmp_path, 40_000)
    cache.put("last", np.ones(1))
    assert 20_000 < total(cache) <= 40_000 and not list(tmp_path.rglob("*.tmp"))


def test_pickled(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, 1000)
    cache.put("a", np.ones(3))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.max_bytes == 1000 and (copy.get("a") == 1).all() and copy.put("b", np.ones(3))


class Film:
    """Frames of their number, and how often they were decoded."""

    size = (2, 3)

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def read(self, indices: Any) -> np.ndarray:
        self.decoded += list(indices)
        return np.stack([np.full((2, 3, 3), k, np.uint8) for k in indices])

    def identities(self, indices: Any) -> list[tuple[str, int]]:
        return [("film", int(k) % 10) for k in indices]


def test_frames_are_decoded_once(tmp_path: Path) -> None:
    """By their identities: frames 10 to 19 of this film are those of 0 to 9."""
    cache, film = FeatureCache(tmp_path), Film()
    assert read_cached(film, [3, 1, 3], cache)[:, 0, 0, 0].tolist() == [3, 1, 3]
    assert sorted(set(film.decoded)) == [1, 3]
    film.decoded = []
    assert read_cached(film, [1, 2, 13], cache)[:, 0, 0, 0].tolist() == [1, 2, 3] and film.decoded == [2]
    assert read_cached(film, [], cache).shape == (0, 2, 3, 3)
    film.size = (2, 4)  # another size is another picture
    film.decoded = []
    with pytest.raises(ValueError):
        read_cached(film, [1], cache)
    assert film.decoded == [1]
