"""Token-level probes: solved by oracles, with the published laws."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text.probes import token_tasks
from seqzoo.pipelines.text.probes.token_tasks import (
    INDUCTION_TESTS,
    MQAR_TESTS,
    MQAR_TRAINING,
    TOKEN_TASKS,
    chance_level,
    copying,
    induction_heads,
    mqar,
    selective_copying,
    token_batch,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def after(row, place, *, last):
    """What followed an earlier occurrence of the token at `place`: the first one or the last one."""
    earlier = [t for t in range(place) if row[t] == row[place]]
    return row[earlier[-1 if last else 0] + 1] if earlier else None


def accuracy(tokens, targets, solver):
    asked = np.argwhere(targets >= 0)
    return np.mean([solver(tokens[b], t) == targets[b, t] for b, t in asked])


def is_uniform(values, size):
    counts = np.bincount(np.asarray(values).ravel(), minlength=size)
    assert len(counts) == size, counts
    return stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("length, pairs", [(64, 8), (65, 4), (64, 10)])
def test_mqar_rows_are_pairs_then_each_key_once_more(length, pairs, passes):
    tokens, targets = mqar(rng(), 40, length, num_pairs=pairs, vocab_size=64, num_passes=passes)
    assert tokens.dtype == targets.dtype == np.int64 and tokens.shape == targets.shape == (40, length)
    context = 2 * pairs * passes
    for row, wanted in zip(tokens, targets, strict=True):
        keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < 32 <= values.min() and values.max() < 64
        for again in range(passes):
            assert (row[2 * pairs * again : 2 * pairs * (again + 1)] == row[: 2 * pairs]).all()
        asked = np.flatnonzero(wanted != -100)
        assert sorted(row[asked]) == sorted(keys) and (asked >= context).all() and (asked % 2 == 0).all()
        for key in keys:  # no filler is a key
            assert (row == key).sum() == passes + 1
        lookup = dict(zip(keys, values, strict=True))
        assert [lookup[key] for key in row[asked]] == list(wanted[asked])
    assert tokens.min() >= 0 and tokens.max() < 64


def test_mqar_is_solved_by_looking_back_and_by_nothing_less():
    tokens, targets = mqar(rng(), 50, 64, num_pairs=8, vocab_size=64)
    for last in (False, True):
        assert accuracy(tokens, targets, lambda row, t, last=last: after(row, t, last=last)) == 1
    public, asked = mqar(rng(), 50, 64, num_pairs=8, vocab_size=64, fillers="public")
    assert accuracy(public, asked, lambda row, t: after(row, t, last=False)) == 1
    # the public recipe's fillers hit keys: the last occurrence of a key is not always its pair
    assert accuracy(public, asked, lambda row, t: after(row, t, last=True)) < 0.95
    zeros, _ = mqar(rng(), 50, 64, num_pairs=8, vocab_size=64, fillers="none")
    assert ((zeros[:, 16:] != 0).sum(1) == 8).all()


def test_mqar_slots_follow_the_power_law_without_replacement():
    weights = np.arange(1, 4) ** (0.5 - 1)
    p = weights / weights.sum()
    tokens, targets = mqar(rng(), 20_000, 10, num_pairs=2, vocab_size=16, power=0.5)
    # slots of the first and of the second key of each row
    place = [np.argmax((tokens == tokens[:, 2 * i, None]) & (targets >= 0), axis=1) for i in (0, 1)]
    first, second = ((where - 4) // 2 for where in place)
    observed, expected = [], []
    for i in range(3):
        for j in range(3):
            if i != j:
                observed.append(np.sum((first == i) & (second == j)))
                expected.append(20_000 * p[i] * p[j] / (1 - p[i]))
    assert sum(observed) == 20_000
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("power, share", [(0.01, 0.189), (1.0, 0.01)])
def test_mqar_first_of_a_hundred_slots(power, share):
    _, targets = mqar(rng(), 8000, 202, num_pairs=1, vocab_size=64, power=power)
    assert abs(np.mean(targets[:, 2] >= 0) - share) < 4 * np.sqrt(share * (1 - share) / 8000)


def test_mqar_keys_values_and_fillers_are_uniform():
    tokens, _ = mqar(rng(), 8000, 8, num_pairs=2, vocab_size=10)
    assert is_uniform(tokens[:, 0] - 1, 4) and is_uniform(tokens[:, 2] - 1, 4)
    assert is_uniform(tokens[:, 1] - 5, 5) and is_uniform(tokens[:, 3] - 5, 5)
    for keys in ((1, 2), (3, 1), (2, 4)):
        rows = tokens[(tokens[:, 0] == keys[0]) & (tokens[:, 2] == keys[1])]
        fillers = rows[:, 5]  # the second place of a slot is always a filler
        others = [token for token in range(10) if token not in keys]
        assert is_uniform([others.index(token) for token in fillers], 8)
    public, _ = mqar(rng(), 8000, 8, num_pairs=2, vocab_size=10, fillers="public")
    assert is_uniform(public[:, 5], 10)


def test_mqar_published_settings_fit():
    for length, pairs in (*MQAR_TESTS, *((length, pairs) for length, pairs, _ in MQAR_TRAINING)):
        tokens, targets = mqar(rng(), 2, length, num_pairs=pairs)
        assert ((targets >= 4096).sum(1) == pairs).all() and tokens.max() < 8192


@pytest.mark.parametrize("length", [3, 4, 64, 1000])
def test_induction_heads(length):
    tokens, targets = induction_heads(rng(), 200, length)
    assert tokens.shape == targets.shape == (200, length)
    assert ((tokens == 15).sum(1) == 2).all() and (tokens[:, -1] == 15).all()
    assert (targets[:, :-1] == -100).all()
    assert accuracy(tokens, targets, lambda row, t: after(row, t, last=True)) == 1


def test_induction_heads_are_uniform():
    tokens, targets = induction_heads(rng(), 20_000, 12)
    assert is_uniform(np.argmax(tokens == 15, axis=1), 10)
    assert is_uniform(targets[:, -1], 15)
    assert INDUCTION_TESTS[0] == 64 and INDUCTION_TESTS[-1] == 1_048_576


@pytest.mark.parametrize("task", [copying, selective_copying])
def test_copying_asks_the_symbols_in_order(task):
    tokens, targets = task(rng(), 30, 100, num_symbols=7, vocab_size=11)
    assert tokens.shape == targets.shape == (30, 100)
    for row, wanted in zip(tokens, targets, strict=True):
        assert (wanted[:-7] == -100).all()
        assert [token for token in row if token >= 2] == list(wanted[-7:])
        assert (row[-7:] == 1).all() and (row[:-7] != 1).all()
    symbols = targets[:, -7:]
    assert symbols.min() == 2 and symbols.max() == 10


def test_selective_copying_places_are_any_copying_places_the_first():
    tokens, _ = selective_copying(rng(), 20_000, 5, num_symbols=2)
    found = tokens[:, :3] != 0
    assert is_uniform(np.argmin(found, axis=1), 3)  # which of three places is left out
    tokens, targets = selective_copying(rng(), 5, 4, num_symbols=2)  # no noise at all
    assert (tokens[:, :2] == targets[:, 2:]).all()
    tokens, _ = copying(rng(), 100, 60, num_symbols=9)
    assert (tokens[:, :9] >= 2).all() and (tokens[:, 9:51] == 0).all()


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_a_batch_is_a_function_of_its_seed(task):
    one, two, other = (token_batch(task, rng(seed), 3, 64) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (one[0] != other[0]).any()


@pytest.mark.parametrize("task", TOKEN_TASKS)
def test_a_guess_scores_the_chance_level(task):
    _, targets = token_batch(task, rng(), 2000, 64, vocab_size=20)
    answers = targets[targets >= 0]
    chance = chance_level(task, vocab_size=20)
    assert chance == 1 / len(set(answers))
    share = np.bincount(answers).max() / len(answers)  # of the most frequent answer
    assert abs(share - chance) < 5 * np.sqrt(chance / len(answers))
    assert chance_level("mqar") == 1 / 4096


def test_the_first_batches_stay_what_they_are():
    digest = hashlib.sha256()
    for task in TOKEN_TASKS:
        for part in token_batch(task, np.random.default_rng([0, 2, 0]), 100, 64):
            digest.update(part.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "ae87edecdad929e5"


@pytest.mark.parametrize(
    "task, arguments, message",
    [
        ("mqar", {"length": 15, "num_pairs": 4}, "needs a length of 16 or more, got length=15.*at most 3 pairs"),
        ("mqar", {"length": 64, "num_pairs": 11, "num_passes": 2}, "needs a length of 66 .*at most 10 pairs"),
        ("mqar", {"length": 64, "num_pairs": 8, "vocab_size": 17}, "needs vocab_size=18 or more, got vocab_size=17"),
        ("mqar", {"length": 64, "num_pairs": 0}, "num_pairs=0"),
        ("mqar", {"length": 64, "fillers": "publik"}, "fillers='publik'.*Did you mean public"),
        ("mqar", {"length": 64, "pairs": 4}, "no option 'pairs'.*num_pairs"),
        ("mqar", {"length": 64, "rows": 0}, "rows=0"),
        ("induction", {"length": 2}, "length=2 is too short: the task needs 3"),
        ("induction", {"length": 9, "vocab_size": 2}, "vocab_size=2 .*take 3"),
        ("selective_copying", {"length": 31}, "length=31 is too short: the task needs 32"),
        ("copying", {"length": 64, "vocab_size": 3}, "vocab_size=3 .*take 4"),
        ("copying", {"length": 64, "num_symbols": 0}, "num_symbols=0"),
        ("copyng", {"length": 64}, "no token task 'copyng'.*Did you mean copying"),
    ],
)
def test_wrong_arguments_name_the_nearest_right_ones(task, arguments, message):
    with pytest.raises(UserError, match=message):
        token_batch(task, rng(), **{"rows": 2, **arguments})


def test_the_largest_settings_that_fit():
    for arguments in ({"length": 16, "num_pairs": 4}, {"length": 66, "num_pairs": 11, "num_passes": 2}):
        _, targets = mqar(rng(), 5, vocab_size=1000, **arguments)
        assert ((targets >= 0).sum(1) == arguments["num_pairs"]).all()
    assert mqar(rng(), 5, 64, num_pairs=8, vocab_size=18)[0].max() < 18


def test_excluding_is_exhaustive():
    excluded = np.array([[0, 3], [4, 3], [1, 0]])
    drawn = token_tasks._excluding(rng(), excluded, 5, 400)
    assert [sorted(set(row)) for row in drawn.tolist()] == [[1, 2, 4], [0, 1, 2], [2, 3, 4]]
