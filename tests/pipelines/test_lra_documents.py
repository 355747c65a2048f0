"""Long Range Arena's tasks on the user's own files: pictures, reviews, pairs; and the pairs that are generated."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest

from seqzoo.pipelines.documents.lra.citations import Library, citation_splits, sample
from seqzoo.pipelines.documents.lra.documents import read_pairs, retrieval_splits, text_splits
from seqzoo.pipelines.documents.lra.image import TEST, TRAIN, grey, image_splits, read_batch
from seqzoo.pipelines.errors import UserError

# --- pictures


def colours(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, 10, count).tolist()


def write_archive(folder: Path, form: str, protocol: int = 2) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True)
    batches = {name: colours(20, seed) for seed, name in enumerate((*TRAIN, TEST))}
    for name, (data, labels) in batches.items():
        if form == "binary":
            records = np.concatenate([np.array(labels, dtype=np.uint8)[:, None], data], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            # text keys, as pickled by Python 2, arrive as bytes
            (folder / name).write_bytes(pickle.dumps({"labels": labels, "data": data, "filenames": ["x"]}, protocol))
    return batches


@pytest.mark.parametrize(("form", "inner"), [("binary", "cifar-10-batches-bin"), ("python", "cifar-10-batches-py")])
def test_pictures_of_either_archive(tmp_path, form, inner):
    batches = write_archive(tmp_path / "data" / inner, form)
    splits = image_splits(tmp_path / "data", val=30, cache_dir=tmp_path / "cache")
    assert {name: split.tokens.shape for name, split in splits.items()} == {
        **{"train": (70, 1024), "val": (30, 1024), "test": (20, 1024)}
    }
    data, labels = batches[TEST]
    assert splits["test"].labels.tolist() == labels and splits["test"].num_classes == 10
    assert np.array_equal(splits["test"].tokens, grey(data)) and splits["test"].vocab_size == 256
    # training and validation together are the five batches, each picture with its label
    seen = collections.Counter(
        (tokens.tobytes(), label)
        for name in ("train", "val")
        for tokens, label in zip(splits[name].tokens, splits[name].labels.tolist(), strict=True)
    )
    assert seen == collections.Counter(
        (row.tobytes(), label)
        for name in TRAIN
        for row, label in zip(grey(batches[name][0]), batches[name][1], strict=True)
    )
    again = image_splits(tmp_path / "data" / inner, val=30, cache_dir=tmp_path / "cache")
    assert np.array_equal(again["val"].tokens, splits["val"].tokens)
    other = image_splits(tmp_path / "data" / inner, val=30, seed=1, cache_dir=tmp_path / "cache")
    assert not np.array_equal(other["val"].tokens, splits["val"].tokens)


def test_grey_is_what_pillow_computes():
    image = pytest.importorskip("PIL.Image")
    data, _ = colours(8, 3)
    for row, ours in zip(data, grey(data), strict=True):
        picture = image.fromarray(np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0)))
        assert np.array_equal(np.asarray(picture.convert("L")).reshape(-1), ours)


def test_a_pickle_of_python_2_is_read(tmp_path):
    # Written by hand as Python 2 does: protocol 2, byte strings, numpy.core.multiarray.
    data, labels = colours(2, 0)
    content = b"\x80\x02}(U\x06labels]("
    content += b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    content += b"U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    content += b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    content += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content += b"\x89T" + (2 * 3072).to_bytes(4, "little") + data.tobytes() + b"tbu."
    file = tmp_path / TEST
    file.write_bytes(content)
    images, read = read_batch(file)
    assert np.array_equal(images, grey(data)) and read.tolist() == labels


class Harm:
    def __reduce__(self):
        return print, ("read, and run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harm(), r"asks for __builtin__\.print"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": Harm()}, "asks for"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1, 2]}, "no list 'labels' of 2"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "no list 'labels' of 2"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]}, "no uint8 array"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}, "label 10"),
        ([1, 2], "no uint8 array"),
        (b"", "no Python batch"),
    ],
)
def test_other_pickles_are_refused_and_nothing_of_them_is_run(tmp_path, capsys, content, message):
    file = tmp_path / "data_batch_1"
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, 2))
    with pytest.raises(UserError, match=message):
        read_batch(file)
    assert not capsys.readouterr().out


def test_missing_pictures_are_named_with_their_source(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*absent.*cs\.toronto\.edu"):
        image_splits(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no CIFAR-10 batches in .*cs\.toronto\.edu"):
        image_splits(tmp_path)
    write_archive(tmp_path / "data", "binary")
    with pytest.raises(UserError, match="val=100 leaves nothing of the 100"):
        image_splits(tmp_path / "data", val=100, cache_dir=tmp_path / "cache")
    (tmp_path / "data" / "data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"lacks data_batch_4\.bin"):
        image_splits(tmp_path / "data")
    broken = tmp_path / "test_batch.bin"
    broken.write_bytes(bytes(3072))
    with pytest.raises(UserError, match="not a multiple of 3,073"):
        read_batch(broken)
    broken.write_bytes(b"")
    with pytest.raises(UserError, match="no pictures"):
        read_batch(broken)


# --- reviews


def write_reviews(root: Path, number: int = 12) -> dict[bytes, int]:
    """Reviews of growing length; by content, the label."""
    labels = {}
    for part in ("train", "test"):
        for label, name in enumerate(("neg", "pos")):
            (root / part / name).mkdir(parents=True)
            for which in range(number):
                text = f"{part} {name} {which} \xe9 ".encode() * (1 + 40 * which)
                (root / part / name / f"{which}_7.txt").write_bytes(text)
                labels[text] = label
    (root / "train" / "unsup").mkdir()
    return labels


@pytest.mark.parametrize(("protocol", "length"), [("release", 1000), ("4k", 4096)])
def test_reviews(tmp_path, protocol, length):
    labels = write_reviews(tmp_path / "aclImdb")
    splits = text_splits(tmp_path, protocol=protocol, cache_dir=tmp_path / "cache")
    expected = {text[:length]: label for text, label in labels.items()}
    for name in ("train", "test"):
        split = splits[name]
        assert split.tokens.shape == (24, length) and split.vocab_size == 256 and split.majority == 0.5
        contents = [row[:size].tobytes() for row, size in zip(split.tokens, split.lengths, strict=True)]
        assert set(contents) == {text for text in expected if text.startswith(name.encode())}
        assert [expected[text] for text in contents] == split.labels.tolist()
        assert not split.tokens[np.arange(length) >= split.lengths[:, None]].any()
        assert 1 < split.labels[:12].sum() < 11  # shuffled: every beginning has both classes
    assert splits["train"].lengths.max() == length
    assert np.array_equal(splits["val"].tokens, splits["test"].tokens)  # as published


def test_reviews_held_out_for_validation(tmp_path):
    write_reviews(tmp_path)
    whole = text_splits(tmp_path, cache_dir=tmp_path / "cache")
    splits = text_splits(tmp_path, val=5, cache_dir=tmp_path / "cache")
    assert (len(splits["train"]), len(splits["val"]), len(splits["test"])) == (19, 5, 24)
    together = np.concatenate([splits["val"].tokens, splits["train"].tokens])
    assert np.array_equal(together, whole["train"].tokens)
    # another file state is another cache entry
    (tmp_path / "test" / "pos" / "new.txt").write_bytes(b"new")
    assert len(text_splits(tmp_path, val=5, cache_dir=tmp_path / "cache")["test"]) == 25


def test_reviews_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*train/neg.*aclImdb_v1"):
        text_splits(tmp_path)
    write_reviews(tmp_path, number=2)
    with pytest.raises(UserError, match=r"no protocol '4096'.*4k"):
        text_splits(tmp_path, protocol="4096")
    with pytest.raises(UserError, match="val=4 must be 1 to 3"):
        text_splits(tmp_path, val=4)
    (tmp_path / "test" / "neg" / "1_7.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"1_7\.txt is empty"):
        text_splits(tmp_path, cache_dir=tmp_path / "cache")
    for file in (tmp_path / "test" / "neg").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no \*\.txt in .*test/neg"):
        text_splits(tmp_path)


# --- pairs


def test_pairs_of_the_release(tmp_path):
    rows = [
        (b"1.0", b"A00-1001", b"A00-1002", b'first "quoted" \xff', b"start " + b"x" * 5000),
        (b"0.0", b"1", b"2", b"b'second'", b"short"),
    ]
    for name in ("train", "eval", "test"):
        text = b"".join(b"\t".join(row) + b"\n" for row in rows)
        (tmp_path / f"new_aan_pairs.{name}.tsv").write_bytes(text)
    splits = retrieval_splits(tmp_path, cache_dir=tmp_path / "cache")
    assert sorted(splits) == ["test", "train", "val"]
    split = splits["val"]
    assert split.tokens.shape == (2, 2, 4000) and split.labels.tolist() == [1, 0]
    assert split.lengths.tolist() == [[16, 4000], [9, 5]]
    for row in range(2):
        for which in range(2):
            size = split.lengths[row, which]
            assert split.tokens[row, which, :size].tobytes() == rows[row][3 + which][:4000]
            assert not split.tokens[row, which, size:].any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1\t2\t3\tfour\tfive\n\n1\t2\t3\tfour\n", ":3: 4 columns"),
        (b"label\t2\t3\tfour\tfive\n", ":1: the label is b'label'"),
        (b"2\t2\t3\tfour\tfive\n", ":1: the label is b'2'"),
        (b"1\t2\t3\tfour\t\n", ":1: text 2 is empty"),
        (b"\n", "has no pairs"),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, text, message):
    file = tmp_path / "pairs.train.tsv"
    file.write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_pairs(file)
    with pytest.raises(UserError, match=r"one \*\.eval\.tsv, but has no such file"):
        retrieval_splits(tmp_path)
    with pytest.raises(UserError, match=r"no folder .*absent.*long-range-arena"):
        retrieval_splits(tmp_path / "absent")


SMALL = Library(length=1600, start=300, words=200, rare=2000, topics=5, mentions=8, shared=4)


@pytest.fixture(scope="module")
def pairs():
    return sample(400, SMALL)


def texts(split, row: int) -> list[list[bytes]]:
    """The words of both documents."""
    return [split.tokens[row, which, : split.lengths[row, which]].tobytes().split(b" ") for which in range(2)]


def test_generated_pairs_share_rare_words_where_they_cite_and_only_there(pairs):
    assert pairs.tokens.shape == (400, 2, 1600) and pairs.lengths.max() <= 1600 and pairs.lengths.min() >= 650
    assert abs(pairs.labels.mean() - 0.5) < 0.1 and pairs.majority < 0.6
    for row in range(400):
        documents = texts(pairs, row)
        rare = [{word for word in words if len(word) == 8} for words in documents]
        assert all(len(words) == SMALL.mentions for words in rare)
        assert len(rare[0] & rare[1]) == (SMALL.shared if pairs.labels[row] else 0)
        for words in documents:
            offset = 0
            for word in words:
                assert len(word) in range(3, 9) and (len(word) < 8 or offset > SMALL.start)
                offset += len(word) + 1


def test_nothing_but_the_rare_words_tells_the_label(pairs):
    def best(score: np.ndarray) -> float:
        """The accuracy of the best threshold in either direction."""
        order = np.argsort(score, kind="stable")
        right = np.cumsum(2 * pairs.labels[order] - 1)
        return 0.5 + np.abs(right - right[-1] / 2).max() / len(score)

    common = [
        [collections.Counter(word for word in words if len(word) < 8) for words in texts(pairs, row)]
        for row in range(400)
    ]
    overlap = np.array([sum((first & second).values()) for first, second in common])
    rare = np.array(
        [len({word for word in set(a) & set(b) if len(word) == 8}) for a, b in (texts(pairs, r) for r in range(400))]
    )
    beginning = np.array(
        [len(set(bytes(a[:300]).split(b" ")) & set(bytes(b[:300]).split(b" "))) for a, b in pairs.tokens]
    )
    assert best(rare) == 1.0
    # of the largest deviation of 400 fair coins' running sum from its line, 0.07 is 1 in 100
    for score in (
        overlap,
        beginning,
        pairs.lengths[:, 0],
        pairs.lengths[:, 1],
        np.abs(np.diff(pairs.lengths, axis=1))[:, 0],
    ):
        assert best(score) < 0.58


def test_generated_splits(tmp_path):
    splits = citation_splits(train=6, val=4, test=3, library=SMALL, cache_dir=tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 4, "test": 3}
    again = sample(13, SMALL)
    assert np.array_equal(splits["test"].tokens, again.tokens[:3])
    assert np.array_equal(splits["train"].tokens, again.tokens[7:])
    assert not np.array_equal(sample(3, SMALL, seed=1).tokens, again.tokens[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": 13}, "shared=13 is more than mentions=12"),
        ({"start": 1900}, "start=1900 leaves 100 bytes"),
        ({"rare": 20}, "rare=20 must be at least twice"),
        ({"concentration": 0.0}, "concentration=0.0"),
        ({"topics": 0}, "topics=0"),
    ],
)
def test_a_library_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Library(**options)
