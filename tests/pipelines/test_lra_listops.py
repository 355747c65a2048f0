"""ListOps: the generator against a parser of the surface form written for this test, and against the published file."""

from __future__ import annotations

import hashlib
import statistics
from pathlib import Path

import numpy as np
import pytest

from seqzoo.pipelines.documents.lra.bits import below, bits, stream, uniform
from seqzoo.pipelines.documents.lra.listops import CLOSE, SYMBOLS, Grammar, listops_splits, sample
from seqzoo.pipelines.documents.lra.listops_files import evaluate, from_source, read_tsv, to_source, write_tsv
from seqzoo.pipelines.errors import UserError

SHORT = Grammar(min_length=5, max_length=60, max_depth=5, max_args=4)


@pytest.fixture(scope="module")
def released():
    """The first examples of the default grammar."""
    return sample(1500, seed=0)


def value_of(text: str) -> int:
    """The value of a fully parenthesised expression: applications ( f x ) are resolved from the innermost one."""
    symbols = text.split()

    def read(place: int):
        if symbols[place] != "(":
            return symbols[place], place + 1
        function, place = read(place + 1)
        argument, place = read(place)
        assert symbols[place] == ")"
        if isinstance(function, str):
            return [function, int(argument)], place + 1
        if argument != "]":
            return [*function, int(argument)], place + 1
        operator, *values = function
        if operator == "[MIN":
            return str(min(values)), place + 1
        if operator == "[MAX":
            return str(max(values)), place + 1
        if operator == "[MED":
            return str(int(statistics.median(values))), place + 1
        assert operator == "[SM"
        return str(sum(values) % 10), place + 1

    value, end = read(0)
    assert end == len(symbols)
    return int(value)


def shape_of(tokens: np.ndarray) -> tuple[int, int, int]:
    """(depth, fewest arguments, most arguments) of an expression, counted while walking over it."""
    depth = deepest = 1
    counts, numbers = [0], []
    for token in tokens.tolist():
        if token == CLOSE:
            depth -= 1
            numbers.append(counts.pop())
            continue
        counts[-1] += 1
        deepest = max(deepest, depth)
        if SYMBOLS[token].startswith("["):
            depth += 1
            counts.append(0)
    assert counts == [1]
    return deepest, min(numbers), max(numbers)


def test_labels_are_the_values_of_the_surface_form(released):
    for row in range(60):
        tokens = released.tokens[row, : released.lengths[row]]
        assert value_of(to_source(tokens)) == released.labels[row] == evaluate(tokens)
    short = sample(400, grammar=SHORT, seed=3)
    for row in range(400):
        tokens = short.tokens[row, : short.lengths[row]]
        assert value_of(to_source(tokens)) == short.labels[row] == evaluate(tokens)


def test_first_hundred_examples_of_seed_zero_are_fixed(released):
    digest = hashlib.sha256()
    for row in range(100):
        digest.update(released.tokens[row, : released.lengths[row]].tobytes() + bytes([released.labels[row]]))
    assert digest.hexdigest() == "b9fc3e62ad437515d7b33fe934b7e4eb60d485ad56d67bf1bcff1d73d80b954f"


def test_grammar_of_the_release(released):
    assert released.num_classes == 10 and released.vocab_size == 16
    assert released.lengths.min() > 500 and released.lengths.max() < 2000
    padding = np.arange(released.tokens.shape[1]) >= released.lengths[:, None]
    assert np.array_equal(released.tokens == 0, padding)
    assert len({row.tobytes() for row in released.tokens}) == len(released)
    shapes = [shape_of(released.tokens[row, : released.lengths[row]]) for row in range(100)]
    assert max(shape[0] for shape in shapes) == 10
    assert min(shape[1] for shape in shapes) == 2 and max(shape[2] for shape in shapes) == 10
    # 0: 16.6 %, 9: 17.0 %, the others 7 to 9 %, mean length 1,034 to 1,040: four standard errors of this sample
    share = released.counts / len(released)
    assert abs(share[0] - 0.166) < 0.039 and abs(share[9] - 0.17) < 0.039
    assert np.all(np.abs(share[1:9] - 0.083) < 0.035)
    assert abs(released.lengths.mean() - 1037) < 45
    assert released.majority == share.max() and 0.14 < released.majority < 0.2
    symbols = np.bincount(released.tokens[~padding], minlength=16)
    assert symbols[CLOSE] == symbols[11:CLOSE].sum()
    assert np.ptp(symbols[11:CLOSE]) < 0.02 * symbols[11:CLOSE].sum()
    assert np.ptp(symbols[1:11]) < 0.02 * symbols[1:11].sum()


def test_a_larger_set_begins_with_the_smaller_one_and_seeds_differ(released):
    few = sample(40, seed=0)
    assert np.array_equal(few.tokens, released.tokens[:40]) and np.array_equal(few.labels, released.labels[:40])
    assert not np.array_equal(sample(40, seed=1).lengths, few.lengths)


def test_every_tree_counts_once():
    # depth 2, two arguments: 4 operators x 100 pairs of digits
    tiny = Grammar(min_length=1, max_length=6, max_depth=2, max_args=2)
    everything = sample(400, grammar=tiny)
    assert len({row.tobytes() for row in everything.tokens}) == 400 and set(everything.lengths) == {4}
    with pytest.raises(UserError, match="400 of the 401"):
        sample(401, grammar=tiny)


def test_variants_are_named_as_ours():
    assert Grammar().name == "listops"
    assert Grammar(min_length=10, max_length=100).name == "listops (ours: min_length=10, max_length=100)"
    short = sample(300, grammar=SHORT)
    assert short.lengths.min() > 5 and short.lengths.max() < 60
    shapes = [shape_of(short.tokens[row, : short.lengths[row]]) for row in range(300)]
    assert max(shape[0] for shape in shapes) == 5 and max(shape[2] for shape in shapes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": 0}, "max_depth=0"),
        ({"max_args": 1}, "max_args=1"),
        ({"min_length": 50, "max_length": 51}, "no length between"),
        ({"max_depth": 3, "max_args": 3}, "longer than 17 tokens"),
    ],
)
def test_a_grammar_without_trees_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Grammar(**options)


def test_splits_are_cached_and_do_not_overlap(tmp_path, monkeypatch):
    sizes = {"train": 200, "val": 30, "test": 20}
    made = listops_splits(**sizes, grammar=SHORT, cache_dir=tmp_path)
    assert {name: len(split) for name, split in made.items()} == sizes
    rows = [row.tobytes() for split in made.values() for row in split.tokens]
    assert len(set(rows)) == 250
    monkeypatch.setattr("seqzoo.pipelines.documents.lra.listops.sample", None)  # not called again
    again = listops_splits(**sizes, grammar=SHORT, cache_dir=tmp_path)
    for name, split in made.items():
        for field in ("tokens", "lengths", "labels"):
            assert np.array_equal(getattr(split, field), getattr(again[name], field))
        assert (again[name].num_classes, again[name].vocab_size) == (10, 16)
    monkeypatch.undo()
    more = listops_splits(train=300, val=30, test=20, grammar=SHORT, cache_dir=tmp_path)
    assert np.array_equal(more["test"].tokens, made["test"].tokens)
    assert np.array_equal(more["val"].labels, made["val"].labels)
    with pytest.raises(UserError, match="train=0"):
        listops_splits(train=0, cache_dir=tmp_path)


def test_surface_form():
    text = "( ( ( [MAX 2 ) ( ( ( [MED 3 ) 6 ) ] ) ) ] )"
    tokens = from_source(text)
    assert [SYMBOLS[token] for token in tokens] == ["[MAX", "2", "[MED", "3", "6", "]", "]"]
    assert to_source(tokens) == text and evaluate(tokens) == 4  # the median 4.5 is rounded down
    assert np.array_equal(from_source("[MAX 2 [MED 3 6 X X"), tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("( ( [MAX 2 )", "MAX is not closed"),
        ("( [MAX ] )", "no arguments"),
        ("]", "closes nothing"),
        ("3 4", "token 1: .* ended"),
        ("", "empty"),
        ("[AVG 2 ]", "AVG.* is no symbol"),
        ("[MAX 12 ]", "12.* is no symbol"),
    ],
)
def test_what_is_no_expression_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(from_source(text))


def test_files_of_the_release(tmp_path: Path):
    split = sample(50, grammar=SHORT)
    path = tmp_path / "basic_train.tsv"
    write_tsv(split, path)
    lines = path.read_bytes().split(b"\r\n")
    assert lines[0] == b"Source\tTarget" and len(lines) == 52 and lines[1].startswith(b"( ( ( ")
    again = read_tsv(path)
    assert np.array_equal(again.tokens, split.tokens[:, : split.lengths.max()])
    assert np.array_equal(again.lengths, split.lengths) and np.array_equal(again.labels, split.labels)
    original = tmp_path / "test.tsv"
    original.write_text("4\t( ( ( [MAX 2 ) 4 ) ] )\n\n7\t7\n")
    assert read_tsv(original).labels.tolist() == [4, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Source\tTarget\n( ( ( [MAX 2 ) 4 ) ] )\t3\n", ":2: .*'3'.* is 4"),
        ("5\t5\n3\t( ( [MAX 3 ) )\n", ":2: .*not closed"),
        ("5\n", ":1: 1 columns"),
        ("Source\tTarget\n", "no expressions"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, text, message):
    path = tmp_path / "listops.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_tsv(path)
    with pytest.raises(UserError, match="no ListOps file"):
        read_tsv(tmp_path / "absent.tsv")


def test_published_file_has_the_values_that_we_compute(shared_data):
    published = read_tsv(shared_data / "listops" / "listops_d20s.tsv")  # refuses a value that is not ours
    assert len(published) == 10_000 and published.lengths.max() == 939 and np.median(published.lengths) == 16


def test_random_bits_are_those_of_splitmix64():
    # The reference program's first outputs from the state 1234567.
    key = np.array([1234567], dtype=np.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits(key, np.arange(5)).tolist() == expected
    draws = uniform(stream(0, "test"), np.arange(10_000))
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 0.012
    dice = below(6, bits(stream(5, "test"), np.arange(60_000)))
    assert np.all(np.abs(np.bincount(dice, minlength=6) - 10_000) < 400)
    assert stream(0, "a") != stream(0, "b") and stream(0, "a") != stream(1, "a")
