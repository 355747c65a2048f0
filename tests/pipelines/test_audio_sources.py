"""Labelled clips: what folders, names, tables and datasets say, splits without leaks, and bad files counted."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")

from seqzoo.pipelines.audio.clips import (  # noqa: E402
    Clip,
    assign_splits,
    check_overlaps,
    read_clip,
    shared_between,
)
from seqzoo.pipelines.audio.faults import AudioError  # noqa: E402
from seqzoo.pipelines.audio.known import PROMPTS, digit_clips, prompt_clips, prompt_text, prompts_by_kind  # noqa: E402
from seqzoo.pipelines.audio.reader import AudioReader  # noqa: E402
from seqzoo.pipelines.audio.skipping import BadFiles, checked_clips, read_or_skip  # noqa: E402
from seqzoo.pipelines.audio.sources import folder_clips, named_clips, table_clips  # noqa: E402
from seqzoo.pipelines.errors import UserError  # noqa: E402

RATE = 8000


def recording(path: Path, seconds: float = 0.1) -> Path:
    """A ramp: each sample is its own place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    length = round(seconds * RATE)
    soundfile.write(path, np.arange(length, dtype=np.float32) / 2**15, RATE, subtype="FLOAT")
    return path


def files(root: Path, *names: str) -> Path:
    for name in names:
        recording(root / name)
    return root


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def found(clips: list[Clip], root: Path) -> list[tuple[str, str, str | None, str]]:
    return [(Path(clip.name).relative_to(root).as_posix(), clip.label, clip.group, clip.split) for clip in clips]


# folders and names ----------------------------------------------------------------------------------------------------


def test_folder_of_labels(tmp_path: Path) -> None:
    files(tmp_path, "cat/1.wav", "cat/deep/2.wav", "dog/1.wav", "dog/.hidden.wav")
    (tmp_path / "dog" / "notes.txt").write_text("not a recording")
    clips = folder_clips(tmp_path)
    assert found(clips, tmp_path) == [
        ("cat/1.wav", "cat", None, ""),
        ("cat/deep/2.wav", "cat", None, ""),
        ("dog/1.wav", "dog", None, ""),
    ]
    assert clips[0].start == 0 and clips[0].end is None
    assert len(read_clip(clips[0], sample_rate=16000)) == 1600


def test_folder_of_splits(tmp_path: Path) -> None:
    files(tmp_path, "train/cat/1.wav", "train/dog/1.wav", "valid/cat/2.wav", "test/dog/3.wav")
    assert found(folder_clips(tmp_path), tmp_path) == [
        ("test/dog/3.wav", "dog", None, "test"),
        ("train/cat/1.wav", "cat", None, "train"),
        ("train/dog/1.wav", "dog", None, "train"),
        ("valid/cat/2.wav", "cat", None, "val"),
    ]
    files(tmp_path, "bird/1.wav")
    with pytest.raises(UserError, match="train beside the folder 'bird'"):
        folder_clips(tmp_path)


def test_folder_errors(tmp_path: Path) -> None:
    files(tmp_path, "cats/1.wav")
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match=r"the label 'dog' has no audio file"):
        folder_clips(tmp_path)
    table(tmp_path / "cats" / "labels.csv", "path,label")
    with pytest.raises(UserError, match=r"no sub-folders.*did you mean the table .*labels\.csv"):
        folder_clips(tmp_path / "cats")
    with pytest.raises(UserError, match=r"no such folder: .*catz\. Did you mean cats\?"):
        folder_clips(tmp_path / "catz")


def test_names(tmp_path: Path) -> None:
    files(tmp_path, "7_theo_0.wav", "more/hello_anna_bell_12.wav")
    assert found(named_clips(tmp_path, "{label}_{speaker}_{take}"), tmp_path) == [
        ("7_theo_0.wav", "7", "theo", ""),
        ("more/hello_anna_bell_12.wav", "hello", "anna", ""),
    ]
    assert found(named_clips(tmp_path / "more", "{rest}_{take}_{label}"), tmp_path)[0][1] == "bell_12"
    files(tmp_path / "split", "dev/anna/a.b+c.wav")
    clips = named_clips(tmp_path / "split", "{split}/{group}/{label}.b+{x}")
    assert found(clips, tmp_path / "split") == [("dev/anna/a.b+c.wav", "a", "anna", "val")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{word}_{take}", r"has no \{label\}; such as '\{label\}_\{speaker\}_\{take\}'"),
        ("{label}_{label}", r"has \{label\}, twice"),
        ("{label}_{}", "which is no name"),
        ("{label", "cannot be read"),
        ("{label}-{take}", r"2 of 2 names do not match the pattern '\{label\}-\{take\}' \(label, take\), .*1_a_0\.wav"),
        ("{label}.{take}", "2 of 2 names do not match"),
        ("{label}_{split}_{x}", r"1_a_0\.wav: the split is 'a'\. Did you mean val"),
    ],
)
def test_patterns_that_do_not_fit(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_clips(files(tmp_path, "1_a_0.wav", "2_a_0.wav"), pattern)


# tables ---------------------------------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    files(tmp_path, "a.wav", "sub/b.wav")
    spans = table(
        tmp_path / "spans.csv",
        "file,onset,offset,class,speaker,split",
        "a.wav,0.01,0.05,cat,anna,train",
        "a.wav,0.05,0.1,dog,anna,train",
        "",
        'sub/b.wav,,,"cat, big",,dev',
    )
    lines = [json.dumps({"path": str(tmp_path / "a.wav"), "label": 7}), "", json.dumps({"path": "a.wav", "label": "x"})]
    clips = table_clips(spans)
    assert [clip[1:6] for clip in clips] == [
        (0.01, 0.05, "cat", "anna", "train"),
        (0.05, 0.1, "dog", "anna", "train"),
        (0.0, None, "cat, big", None, "val"),
    ]
    assert [clip.where.rsplit(", ")[-1] for clip in clips] == ["line 2", "line 3", "line 5"]
    np.testing.assert_array_equal(read_clip(clips[0]) * 2**15, np.arange(80, 400))
    np.testing.assert_array_equal(read_clip(clips[2]) * 2**15, np.arange(800))
    json_clips = table_clips(table(tmp_path / "t.jsonl", *lines))
    assert [(clip.path, clip.label) for clip in json_clips] == [(tmp_path / "a.wav", "7"), (tmp_path / "a.wav", "x")]
    named = table(tmp_path / "n.tsv", "clip\tbird", "a.wav\twren")
    assert table_clips(named, {"path": "clip", "label": "bird"})[0].label == "wren"


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path,label", "c.wav,cat", r"t\.csv, line 3: no such file: .*c\.wav\. Did you mean b\.wav, a\.wav"),
        ("path,label", "a.wav,", r"t\.csv, line 3: the column 'label' is empty"),
        ("path,label", ",cat", r"t\.csv, line 3: the column 'path' is empty"),
        ("path,label", "a.wav", r"t\.csv, line 3: 1 fields, but 2 columns"),
        ("path,labels", "a.wav,cat", r"t\.csv has no column 'label'; name it\. Did you mean labels"),
        ("paths,label", "a.wav,cat", r"t\.csv has no column 'path'; name it\. Did you mean paths"),
        ("path,start,label", "a.wav,0,cat", r"t\.csv has the column 'start' \(start\) and none for end"),
        ("path,start,end,label", "a.wav,0.05,0.02,cat", r"line 3: the span ends at 0.02, not after its start 0.05"),
        ("path,start,end,label", "a.wav,0.05,,cat", r"line 3: 'end' is '', expected seconds"),
        ("path,start,end,label", 'a.wav,0,"0,05",cat', r"line 3: 'end' is '0,05', expected seconds; decimals are"),
        ("path,start,end,label", "a.wav,-1,0.05,cat", r"line 3: 'start' is -1, expected seconds from 0"),
        ("path,start,end,label", "a.wav,0,nan,cat", r"line 3: 'end' is nan, expected seconds from 0"),
        ("path,label,split", "a.wav,cat,trian", r"line 3: the column 'split' is 'trian'\. Did you mean train"),
    ],
)
def test_table_errors(tmp_path: Path, header: str, row: str, message: str) -> None:
    files(tmp_path, "a.wav", "b.wav")
    good = {"path": "b.wav", "paths": "b.wav", "start": "0", "end": "0.1", "split": "train"}
    first = ",".join(good.get(name, "dog") for name in header.split(","))
    with pytest.raises(UserError, match=message):
        table_clips(table(tmp_path / "t.csv", header, first, row))


def test_table_options(tmp_path: Path) -> None:
    files(tmp_path, "a.wav")
    path = table(tmp_path / "t.csv", "path,label", "a.wav,cat")
    with pytest.raises(UserError, match=r"no column 'lable' \(label\)\. Did you mean label"):
        table_clips(path, {"label": "lable"})
    with pytest.raises(UserError, match=r"columns has the key 'lable'\. Did you mean label"):
        table_clips(path, {"lable": "label"})
    with pytest.raises(UserError, match=r"no such file: .*r\.csv\. Did you mean t\.csv"):
        table_clips(tmp_path / "r.csv")
    with pytest.raises(UserError, match=r"a\.wav ends in \.wav, a table in"):
        table_clips(tmp_path / "a.wav")
    with pytest.raises(UserError, match="has no rows"):
        table_clips(table(tmp_path / "empty.csv", "path,label"))


def test_spans_against_their_files(tmp_path: Path) -> None:
    """An end that is rounded up by less than a millisecond is the file's; a later one is an error with its row."""
    files(tmp_path, "a.wav")
    clips = table_clips(table(tmp_path / "t.csv", "path,start,end,label", "a.wav,0.05,0.1004,x", "a.wav,0,0.11,y"))
    with pytest.raises(
        AudioError, match=r"t\.csv, line 3: the span from 0 to 0\.11 seconds ends after .*a\.wav.* 0\.1"
    ):
        checked_clips(clips)
    kept = checked_clips(clips[:1])
    assert kept[0].end == 0.1 and len(read_clip(kept[0], sample_rate=11025)) == round(0.1 * 11025) - round(0.05 * 11025)
    np.testing.assert_array_equal(read_clip(clips[0]), read_clip(kept[0]))
    with pytest.raises(AudioError, match=r"t\.csv, line 3: .*a\.wav: the span from 0 to 0\.11 ends beyond"):
        read_clip(clips[1])


def test_overlaps(tmp_path: Path) -> None:
    files(tmp_path, "a.wav", "b.wav")
    rows = ["a.wav,0.05,0.08,x", "b.wav,0.01,0.09,x", "a.wav,0.01,0.05,y"]
    check_overlaps(table_clips(table(tmp_path / "t.csv", "path,start,end,label", *rows)))
    clips = table_clips(table(tmp_path / "t.csv", "path,start,end,label", *rows, "a.wav,0.07,0.1,z"))
    with pytest.raises(UserError, match=r"spans of .*a\.wav overlap: .*line 2' \(0\.05 to 0\.08\) and .*line 5' \("):
        check_overlaps(clips)
    with pytest.raises(UserError, match=r"overlap.*to the end"):
        check_overlaps([Clip(Path("a"), 0.0, None, "x"), Clip(Path("a"), 5.0, 6.0, "y")])


# splits ---------------------------------------------------------------------------------------------------------------


def test_speakers_are_never_shared() -> None:
    """Chains too: a file with two speakers holds both together, wherever their other files are."""
    clips = [Clip(Path(f"{s}{n}.wav"), 0.0, None, str(n % 3), s) for s in "abcdefghij" for n in range(6)]
    clips += [Clip(Path(f"{s}x.wav"), 0.0, None, "9", s) for s in "cdefgh"]  # not all speakers say all
    clips += [Clip(Path("both.wav"), 0.0, 1.0, "0", "a"), Clip(Path("both.wav"), 1.0, 2.0, "1", "j")]
    splits = {}
    for seed in range(5):
        found = assign_splits(clips, (0.6, 0.2, 0.2), seed=seed)
        assert Counter(clip.label for clip in found) == Counter(clip.label for clip in clips)
        by_speaker = {speaker: {clip.split for clip in found if clip.group == speaker} for speaker in "abcdefghij"}
        assert all(len(stages) == 1 for stages in by_speaker.values())
        assert by_speaker["a"] == by_speaker["j"]
        assert {clip.split for clip in found} == {"train", "val", "test"}
        assert not shared_between(found)
        assert found == assign_splits(clips, (0.6, 0.2, 0.2), seed=seed)
        splits[seed] = [clip.split for clip in found]
    assert len(set(map(tuple, splits.values()))) > 1


def test_labels_without_speakers_are_split_one_by_one() -> None:
    clips = [Clip(Path(f"/x/{label}/{n}.wav"), 0.0, None, label) for label in "ab" for n in range(20)]
    found = assign_splits(clips, (0.8, 0.1, 0.1))
    assert Counter((clip.label, clip.split) for clip in found) == {
        (label, split): number for label in "ab" for split, number in (("train", 16), ("val", 2), ("test", 2))
    }
    # the same files elsewhere
    moved = [clip._replace(path=Path("/y/z") / Path(clip.name).relative_to("/x")) for clip in clips]
    assert [clip.split for clip in assign_splits(moved, (0.8, 0.1, 0.1))] == [clip.split for clip in found]
    # spans of one file stay together
    spans = [Clip(Path(f"{n}.wav"), float(k), k + 1.0, "ab"[k], None) for n in range(10) for k in range(2)]
    assert not shared_between(assign_splits(spans))


def test_given_splits() -> None:
    def clip(name: str, split: str, label: str = "x", group: str | None = None) -> Clip:
        return Clip(Path(name), 0.0, None, label, group, split)

    given = [clip(f"{n}", "train") for n in range(10)] + [clip(f"t{n}", "test") for n in range(3)]
    counts = Counter(clip.split for clip in assign_splits(given, (0.8, 0.2, 0.0)))
    assert counts == {"train": 8, "val": 2, "test": 3}
    whole = [*given, clip("v", "val")]
    assert assign_splits(whole) == whole
    assert assign_splits(given, (1.0, 0.0, 0.0)) == given
    notes = shared_between([clip("a", "train", group="anna"), clip("a", "test"), clip("b", "val", group="anna")])
    assert notes == [
        "1 file(s) of train are in test too, such as a",
        "1 group(s) of train are in val too, such as anna",
    ]


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([("a", "x", None, "train"), ("b", "x", None, "")], "b has no split, other clips have one"),
        ([("a", "x", None, "")] * 9, "the label 'x' has 1 file"),
        ([(f"{n}", "x", "anna", "") for n in range(9)], r"there are 1 group\(s\)"),
        ([("a", "x", None, "train"), ("b", "y", None, "test")], "no training clip has the label 'y', but b has it"),
    ],
)
def test_splits_that_cannot_be(clips: list, message: str) -> None:
    made = [Clip(Path(name), 0.0, None, label, group, split) for name, label, group, split in clips]
    ratio = (0.8, 0.1, 0.1) if not made[0].split else (1.0, 0.0, 0.0)
    with pytest.raises(UserError, match=message):
        assign_splits(made, ratio)


# known sets -----------------------------------------------------------------------------------------------------------


def test_digits(shared_data: Path) -> None:
    """300 test clips, takes 0 to 4; validation has whole takes, so that digits and speakers are balanced."""
    clips = checked_clips(digit_clips(shared_data / "fsdd"))
    assert Counter(clip.split for clip in clips) == {"train": 780, "val": 120, "test": 300}
    takes = {
        split: {int(Path(c.name).stem[-2:].strip("_")) for c in clips if c.split == split} for split in ("test", "val")
    }
    assert takes["test"] == {0, 1, 2, 3, 4} and len(takes["val"]) == 2
    assert Counter((clip.label, clip.group) for clip in clips if clip.split == "test") == {
        (str(digit), speaker): 5
        for digit in range(10)
        for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    }
    assert Path(clips[0].name).name.startswith(f"{clips[0].label}_{clips[0].group}_")
    assert {clip.split for clip in digit_clips(shared_data / "fsdd", val_part=0)} == {"train", "test"}
    with AudioReader(clips[0].path) as reader:
        assert reader.rate == 8000 and len(read_clip(clips[0])) == reader.frames


def test_digits_of_held_out_speakers(shared_data: Path) -> None:
    for clips in (
        digit_clips(shared_data / "fsdd", "speakers", test_speakers=["theo"]),
        digit_clips(shared_data / "fsdd", "speakers", seed=3),
    ):
        speakers = [{clip.group for clip in clips if clip.split == split} for split in ("train", "val", "test")]
        assert [len(each) for each in speakers] == [4, 1, 1] and len(set.union(*speakers)) == 6
        assert len(clips) == 1200
    assert {
        c.group for c in digit_clips(shared_data / "fsdd", "speakers", test_speakers=["theo"]) if c.split == "test"
    } == {"theo"}
    with pytest.raises(UserError, match=r"no speaker 'teo'\. Did you mean theo"):
        digit_clips(shared_data / "fsdd", "speakers", test_speakers=["teo"])
    with pytest.raises(UserError, match=r"protocol='speaker' is not a choice\. Did you mean speakers"):
        digit_clips(shared_data / "fsdd", "speaker")


def test_digits_that_are_not_there_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no spoken digits in .*fsdd; get them with git clone https://.*SEQZOO_DATA"):
        digit_clips(tmp_path / "fsdd")


def test_digits_in_the_folder_of_their_repository(tmp_path: Path) -> None:
    files(tmp_path, "recordings/7_theo_0.wav", "recordings/7_theo_5.wav", "acquire/noise.wav")
    assert Counter(clip.split for clip in digit_clips(tmp_path)) == {"test": 1, "train": 1}
    recording(tmp_path / "recordings" / "7_theo_x.wav")
    with pytest.raises(UserError, match="take 'x' is not a number"):
        digit_clips(tmp_path)


@pytest.mark.skipif(not PROMPTS.is_dir(), reason="needs Debian's asterisk-core-sounds-en-wav")
def test_prompts() -> None:
    clips = prompt_clips()
    assert len(clips) == 568 == len({clip.label for clip in clips})
    assert {"vm-goodbye", "digits/7", "letters/a"} <= {clip.label for clip in clips}
    assert len(prompt_clips(folder="digits")) == 94
    assert prompt_clips(folder="digits")[0].label.startswith("digits/")
    assert len(read_clip(prompt_clips(folder="digits")[7], sample_rate=16000)) > 1600
    with pytest.raises(UserError, match=r"no folder 'digit'\. Did you mean digits"):
        prompt_clips(folder="digit")
    kinds = Counter(clip.label for clip in prompts_by_kind())
    assert set(kinds) == {"digits", "letters", "phonetic", "phrases"} and kinds["digits"] == 94
    silent = sum(clip.label.startswith("silence/") for clip in clips)
    assert sum(kinds.values()) == 568 - silent and silent > 0


def test_prompts_that_are_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install asterisk-core-sounds-en-wav"):
        prompt_clips(tmp_path / "sounds")
    with pytest.raises(UserError, match="apt-get install asterisk-core-sounds-en-wav"):
        prompt_clips(tmp_path)
    assert prompt_text("digits/mon-3") == "digits mon 3"


# datasets -------------------------------------------------------------------------------------------------------------


def test_datasets(tmp_path: Path) -> None:
    """Bytes in the table, or the path of a file; numbers of labels become their names. `datasets` decodes nothing."""
    datasets = pytest.importorskip("datasets", reason="needs seqzoo[text]")
    from seqzoo.pipelines.audio.hub import hub_clips

    path = recording(tmp_path / "a.wav")
    features = datasets.Features(
        {
            "sound": datasets.Audio(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "who": datasets.Value("string"),
        }
    )
    rows = {
        "sound": [
            {"bytes": path.read_bytes(), "path": None},
            {"bytes": None, "path": str(path)},
            {"bytes": b"", "path": "x"},
            None,
        ],
        "label": [1, 0, 0, 1],
        "who": ["anna", "bob", None, "bob"],
    }
    # not by from_dict, which wants torchcodec
    made = datasets.Dataset(pa.Table.from_pydict(rows, features.arrow_schema))
    assert isinstance(made.features["sound"], datasets.Audio) and made.features["sound"].decode
    made.save_to_disk(str(tmp_path / "set"))
    clips = hub_clips(str(tmp_path / "set"), group_column="who")
    assert [(clip.label, clip.group) for clip in clips] == [
        ("dog", "anna"),
        ("cat", "bob"),
        ("cat", None),
        ("dog", "bob"),
    ]
    for clip in pickle.loads(pickle.dumps(clips[:2])):
        np.testing.assert_array_equal(read_clip(clip) * 2**15, np.arange(800))
    with pytest.raises(AudioError, match="set, record 2 is empty"):
        read_clip(clips[2])
    with pytest.raises(AudioError, match="set, record 3 has no audio"):
        read_clip(clips[3])
    # a table of bytes and paths that does not call them audio
    plain = pa.table({"sound": pa.array(rows["sound"][:2]), "label": ["wren", "rook"]})
    datasets.Dataset(plain).save_to_disk(str(tmp_path / "plain"))
    clips = hub_clips(str(tmp_path / "plain"))
    assert [(clip.label, len(read_clip(clip))) for clip in clips] == [("wren", 800), ("rook", 800)]
    with pytest.raises(UserError, match=r"no column 'labels' \(label_column\)\. Did you mean label"):
        hub_clips(str(tmp_path / "set"), label_column="labels")
    with pytest.raises(UserError, match=r"the column 'who' is not audio\. Known: sound"):
        hub_clips(str(tmp_path / "set"), audio_column="who")
    made.remove_columns("sound").save_to_disk(str(tmp_path / "mute"))
    with pytest.raises(UserError, match="has no audio column"):
        hub_clips(str(tmp_path / "mute"))


# bad files ------------------------------------------------------------------------------------------------------------


def some_bad(root: Path, bad: int, total: int = 40) -> list[Clip]:
    files(root, *(f"x/{number:02}.wav" for number in range(total)))
    for number in range(bad):
        (root / "x" / f"{number:02}.wav").write_bytes([b"", b"notes\n" * 9][number % 2])
    return folder_clips(root)


def test_bad_files_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = some_bad(tmp_path, 2)
    bad = BadFiles(clip.name for clip in clips)
    assert bad.report() == "" and bad.causes == {}
    assert len(checked_clips(clips, bad)) == 38
    for _ in range(2):  # a second epoch counts nothing twice, and says nothing twice
        assert [read_or_skip(clip, bad) is None for clip in clips] == [True, True] + [False] * 38
    assert bad.causes == {"empty": 1, "not audio": 1}
    assert bad.report() == "2 of 40 audio files were skipped: 1 empty, 1 not audio"
    said = capfd.readouterr().err.splitlines()
    way_out = "copy or record it again; read are WAV, FLAC, OGG, MP3, AIFF"
    assert len(said) == 2 and said[0] == f"skipped: {clips[0].name} is empty (0 bytes): {way_out}"
    with pytest.raises(AudioError, match=r"00\.wav is empty"):  # an evaluation leaves nothing out
        checked_clips(clips)


def test_many_bad_files_stop(tmp_path: Path) -> None:
    clips = some_bad(tmp_path, 3)
    for use in (lambda bad: checked_clips(clips, bad), lambda bad: [read_or_skip(clip, bad) for clip in clips]):
        bad = BadFiles(clip.name for clip in clips)
        with pytest.raises(UserError, match=r"3 of 40 .*2 empty, 1 not audio, more than 5 ?%; the first is .*00\.wav"):
            use(bad)


def _worker(clips: list[Clip], bad: BadFiles) -> None:
    for clip in clips:
        read_or_skip(clip, bad)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_count_together(tmp_path: Path) -> None:
    clips = some_bad(tmp_path, 2)
    bad = BadFiles(clip.name for clip in clips)
    context = multiprocessing.get_context("fork")
    for part in (clips[:1], clips[:2]):
        process = context.Process(target=_worker, args=(part, bad))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert bad.causes == {"empty": 1, "not audio": 1}


def test_the_row_of_a_bad_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    some_bad(tmp_path, 1)
    rows = [f"x/{number:02}.wav,0,0.1,cat" for number in range(40)]
    clips = table_clips(table(tmp_path / "t.csv", "path,start,end,label", *rows))
    with pytest.raises(AudioError, match=r"t\.csv, line 2: .*00\.wav is empty"):
        checked_clips(clips)
    checked_clips(clips, BadFiles(clip.name for clip in clips))
    assert "t.csv, line 2: " in capfd.readouterr().err
