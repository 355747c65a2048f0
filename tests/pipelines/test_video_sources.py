"""Spans of videos from folders, tables and the files of data sets; what is wrong names file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.clips import VideoClip, assign_splits, check_overlaps, shared_between
from seqzoo.pipelines.video.sources import (
    activitynet_clips,
    charades_clips,
    clock_seconds,
    folder_clips,
    lvbench_clips,
    named_clips,
    span_clips,
    table_clips,
    videos_in,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files are found by their names alone; nothing here opens one."""
    for name in ("book.mkv", "eat.MP4", "v_QOlSCBRmfWY.webm", "AO8RW.mp4", "sub/3MSZA.avi", "notes.txt", ".hidden.mp4"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"0")
    return tmp_path


def test_folders_and_names(root: Path) -> None:
    for label, name in (("car", "one.mp4"), ("car", "two.webm"), ("tram", "three.mov")):
        (root / "labels" / label).mkdir(parents=True, exist_ok=True)
        (root / "labels" / label / name).write_bytes(b"0")
    found = folder_clips(root / "labels")
    assert [(clip.label, clip.path.name, clip.start, clip.end) for clip in found] == [
        ("car", "one.mp4", 0.0, None),
        ("car", "two.webm", 0.0, None),
        ("tram", "three.mov", 0.0, None),
    ]
    assert isinstance(found[0], VideoClip) and found[0].shows == ()
    names = {clip.label: clip.path.name for clip in named_clips(root)}
    assert names == {
        "book": "book.mkv",
        "eat": "eat.MP4",
        "v_QOlSCBRmfWY": "v_QOlSCBRmfWY.webm",
        "AO8RW": "AO8RW.mp4",
        "3MSZA": "3MSZA.avi",
        **{"one": "one.mp4", "two": "two.webm", "three": "three.mov"},
    }
    assert videos_in(root / "book.mkv") == [root / "book.mkv"] and len(videos_in(root)) == 8
    (root / "labels" / "empty").mkdir()
    with pytest.raises(UserError, match="the label 'empty' has no video"):
        folder_clips(root / "labels")
    with pytest.raises(UserError, match=r"no such file or folder: .*boko.mkv. Did you mean book.mkv"):
        videos_in(root / "boko.mkv")


def test_tables_of_labels_and_of_queries(root: Path) -> None:
    table = root / "spans.csv"
    table.write_text("video,start,end,query,group,split\nbook.mkv,0.5,1.5,a person opens a book,ann,train\n")
    (clip,) = table_clips(table)
    assert clip[:6] == (root / "book.mkv", 0.5, 1.5, "a person opens a book", "ann", "train")
    assert clip.where == f"{table}, line 2"
    lines = root / "spans.jsonl"
    lines.write_text('{"path": "eat.MP4", "text": "lunch", "start": 0, "end": 2.5}\n')
    assert table_clips(lines)[0][:4] == (root / "eat.MP4", 0.0, 2.5, "lunch")
    tabs = root / "spans.tsv"
    tabs.write_text("file\tword\nsub/3MSZA.avi\tlight\n")
    assert table_clips(tabs, {"label": "word"})[0][:4] == (root / "sub/3MSZA.avi", 0.0, None, "light")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("bok.mkv,0,1,x", r"line 2: no such file: .*bok.mkv. Did you mean book.mkv"),
        ("book.mkv,3,1,x", "line 2: the span ends at 1, not after its start 3"),
        ("book.mkv,-1,1,x", "line 2: 'start' is -1, expected seconds from 0"),
        ("book.mkv,a,1,x", "line 2: 'start' is 'a', expected seconds"),
        ("book.mkv,0,1,x\nbook.mkv,0,1, ", "line 3: the column 'query' is empty"),
        ("", "has no rows"),
    ],
)
def test_rows_that_are_wrong(root: Path, rows: str, message: str) -> None:
    table = root / "spans.csv"
    table.write_text(f"path,start,end,query\n{rows}\n")
    with pytest.raises(UserError, match=message):
        table_clips(table)


def test_charades_sta(root: Path) -> None:
    file = root / "charades_sta_test.txt"
    file.write_text("AO8RW 0.0 6.9##a person is putting  a book on a shelf.\n\n3MSZA 24.3 30.4##turn a light on.\n")
    first, second = charades_clips(file, root)
    assert first[:4] == (root / "AO8RW.mp4", 0.0, 6.9, "a person is putting a book on a shelf.")
    assert second[:4] == (root / "sub" / "3MSZA.avi", 24.3, 30.4, "turn a light on.")
    assert {first.split, second.split} == {"test"} and first.group == "AO8RW" and second.where == f"{file}, line 3"
    for line, message in (
        ("AO8RW 0.0 6.9 a person", r"line 1: 'AO8RW 0.0 6.9 a person' is not of the form 'ID START END##SENTENCE'"),
        ("AO8RW 7.0 6.9##x", "line 1: the span ends at 6.9, not after its start 7"),
        ("AO8RW 0 inf##x\nAO8RW x 1##x", "line 2: 'x' is no time"),
        ("AO8RW 0.0 6.9##  ", "line 1: the text is empty"),
        ("AO8R 0.0 6.9##x", r"line 1: .* has no video named 'AO8R'; missing=skip.* Did you mean AO8RW"),
        ("", "has no span"),
    ):
        file.write_text(line)
        with pytest.raises(UserError, match=message):
            charades_clips(file, root)


def test_ids_without_files_can_be_left_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "train.txt"
    file.write_text("AO8RW 0 1##x\nGONE 0 1##y\nGONE 2 3##y\n")
    (clip,) = charades_clips(file, root, missing="skip")
    assert clip.label == "x" and clip.split == "train"
    assert "1 videos are not in" in capsys.readouterr().out
    with pytest.raises(UserError, match="missing='ignore' is not a choice"):
        charades_clips(file, root, missing="ignore")
    with pytest.raises(UserError, match="no such folder of videos"):
        charades_clips(file, root / "none")


def test_activitynet_captions(root: Path) -> None:
    file = root / "val_1.json"
    records = {
        "v_QOlSCBRmfWY": {
            "duration": 82.73,
            "timestamps": [[0.83, 19.86], [60.0, 83.1], [30.0, 20.0]],
            "sentences": ["A young woman is seen.", " The girl dances ", "She ends."],
        },
        "v_AO8RW": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["x"]},
    }
    file.write_text(json.dumps(records))
    found = activitynet_clips(file, root)
    assert [clip[1:4] for clip in found] == [
        (0.83, 19.86, "A young woman is seen."),
        (60.0, 82.73, "The girl dances"),
        (20.0, 30.0, "She ends."),
        (0.0, 1.0, "x"),
    ]
    assert found[0].path.name == "v_QOlSCBRmfWY.webm" and found[3].path.name == "AO8RW.mp4"
    assert {clip.split for clip in found} == {"val"} and found[0].where == f"{file}, v_QOlSCBRmfWY"
    for change, message in (
        ({"sentences": []}, "v_QOlSCBRmfWY: 3 timestamps, but 0 sentences"),
        ({"timestamps": None}, "v_QOlSCBRmfWY: 'timestamps' is None, expected a list"),
        ({"timestamps": [[0, 1], [2], [3, 4]]}, r"the timestamp \[2\] is not"),
        ({"duration": "long"}, "'long' is no time in seconds"),
    ):
        file.write_text(json.dumps({"v_QOlSCBRmfWY": {**records["v_QOlSCBRmfWY"], **change}}))
        with pytest.raises(UserError, match=message):
            activitynet_clips(file, root)
    for text, message in (("[1]", "holds a list, expected an object"), ("{", "is not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            activitynet_clips(file, root)


def test_lvbench(root: Path) -> None:
    file = root / "video_info.meta.jsonl"
    question = {"uid": "0", "question": "What year appears?\n(A) 1636\n(B) 1366", "answer": "A"}
    references = ["00:15-00:19", "01:02:03-01:02:05.5", "10:20", "00:01-00:02, 00:05-00:09", ""]
    record = {
        "key": "AO8RW",
        "type": "cartoon",
        "video_info": {"duration_minutes": 76.6, "fps": 24.0},
        "qa": [{**question, "time_reference": text} for text in references],
    }
    file.write_text("\n" + json.dumps(record) + "\n")
    found = lvbench_clips(file, root)
    assert [(clip.start, clip.end) for clip in found] == [(15, 19), (3723, 3725.5), (620, 621), (1, 2), (5, 9)]
    assert {clip.label for clip in found} == {"What year appears?"} and found[0].where == f"{file}, line 2"
    for reference, message in (
        ("00:20-00:19", "line 1: the span ends at 19, not after its start 20"),
        ("soon", "line 1: time_reference is 'soon': 'soon' is no time"),
        ("1-2-3", "expected MM:SS-MM:SS"),
    ):
        file.write_text(json.dumps({**record, "qa": [{**question, "time_reference": reference}]}))
        with pytest.raises(UserError, match=message):
            lvbench_clips(file, root)
    file.write_text('{"qa": []}')
    with pytest.raises(UserError, match="line 1: 'key' is None, expected a str"):
        lvbench_clips(file, root)


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("01:02", 62), ("1:00:00", 3600), ("00:00.5", 0.5)])
def test_times_as_a_clock_shows_them(text: str, seconds: float) -> None:
    assert clock_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", ":", "1:2:3:4", "-1", "1e3", "nan", "0x5"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        clock_seconds(text)


def test_formats_by_name(root: Path) -> None:
    file = root / "charades_sta_train.txt"
    file.write_text("AO8RW 0.0 6.9##a book\n")
    assert span_clips(file, "charades_sta", videos=root)[0].split == "train"
    with pytest.raises(UserError, match=r"give the folder of their files, data.videos"):
        span_clips(file, "charades_sta")
    with pytest.raises(UserError, match=r"format='charades' is not a choice. Did you mean charades_sta"):
        span_clips(file, "charades", videos=root)
    with pytest.raises(UserError, match="no such file"):
        span_clips(root / "none.txt", "lvbench", videos=root)


def test_splits_and_overlaps_are_those_of_audio(root: Path) -> None:
    clips = [VideoClip(root / f"{i}.mp4", 0.0, 1.0, label) for label in ("a", "b") for i in range(10)]
    clips = [clip._replace(path=root / f"{clip.label}{n}.mp4") for n, clip in enumerate(clips)]
    split = assign_splits(clips, (0.6, 0.2, 0.2), seed=1)
    assert {(clip.label, clip.split) for clip in split} == {(a, s) for a in "ab" for s in ("train", "val", "test")}
    assert isinstance(split[0], VideoClip) and not shared_between(split)
    with pytest.raises(UserError, match="overlap"):
        check_overlaps([VideoClip(root / "x.mp4", 0, 2, "a"), VideoClip(root / "x.mp4", 1, 3, "b")])
