"""Tables, recordings, videos and names of files that someone else wrote: see test_hostile.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from seqzoo.pipelines.errors import UserError

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "fuzz"

pytestmark = pytest.mark.usefixtures("canary")


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
    from video_files import write_video

    from seqzoo.pipelines.video.reader import open_video

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
