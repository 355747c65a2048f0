"""Properties of the order of batches: nothing lost, nothing twice, over processes and epochs, and resumed anywhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines import loading
from seqzoo.pipelines.documents.sets import DocumentBatches, LabelledSet
from seqzoo.pipelines.loading import (
    BucketSampler,
    EvaluationLoader,
    IndexSampler,
    NumberSampler,
    ResumableLoader,
    loader_options,
)

SIZES = st.integers(0, 60)
BATCHES = st.integers(1, 9)
WORLDS = st.integers(1, 5)


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    with mock.patch.object(loading, "_process", lambda: (rank, world)):
        yield


def in_turn(make: Callable[[], IndexSampler], world: int, epochs: int) -> list[list[np.ndarray]]:
    """The batches of `epochs` epochs in the order in which processes take them, by epoch."""
    found = []
    samplers = [make() for _ in range(world)]
    for epoch in range(epochs):
        own = []
        for rank, sampler in enumerate(samplers):
            with process(rank, world):
                sampler.set_epoch(epoch)
                own.append(list(sampler))
                assert len(own[-1]) == len(sampler)
        found.append([batch for step in itertools.zip_longest(*own) for batch in step if batch is not None])
    return found


def items(batches: list[np.ndarray]) -> list[int]:
    return [int(i) for batch in batches for i in batch]


class Echo(torch.utils.data.Dataset[Any]):
    """A batch is its numbers, and what the random generators give for it."""

    def __getitem__(self, index: np.ndarray) -> tuple[list[int], float]:
        return index.tolist(), float(torch.rand(()))


# sharing --------------------------------------------------------------------------------------------------------------


@examples(80)
@given(size=SIZES, batch=BATCHES, world=WORLDS)
def test_processes_share_an_evaluation(size: int, batch: int, world: int) -> None:
    (found,) = in_turn(lambda: IndexSampler(size, batch), world, 1)
    assert items(found) == list(range(size))
    assert all(len(part) == batch for part in found[:-1])
    for rank in range(world):
        with process(rank, world):
            sampler = IndexSampler(size, batch)
            loader = EvaluationLoader(Echo(), sampler=sampler, **loader_options(0))
            assert len(loader) == max(len(sampler), int(size > 0)) and len(list(loader)) == len(sampler)


@examples(80)
@given(
    size=st.integers(1, 60), batch=BATCHES, world=WORLDS, steps=st.none() | st.integers(1, 9), seed=st.integers(0, 5)
)
def test_training_takes_each_item_once_before_any_comes_twice(
    size: int, batch: int, world: int, steps: int | None, seed: int
) -> None:
    epochs = in_turn(lambda: IndexSampler(size, batch, shuffle=True, seed=seed, steps=steps), world, 3)
    number = -(-size // batch)
    assert {len(epoch) for epoch in epochs} == {world * (steps or -(-number // world))}
    stream = items(list(itertools.chain(*epochs)))
    for begin in range(0, len(stream), size):
        own = stream[begin : begin + size]
        assert len(set(own)) == len(own) and (len(own) < size or sorted(own) == list(range(size)))
    one = in_turn(lambda: IndexSampler(size, batch, shuffle=True, seed=seed, steps=steps), 1, 3)
    alone = items(list(itertools.chain(*one)))  # the same stream whatever the number of processes
    assert all(a == b for a, b in zip(stream, alone, strict=False))


@examples(60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=160), batch=st.integers(1, 3), world=st.integers(1, 3),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_buckets_take_each_item_once_and_keep_lengths_together(
    lengths: list[int], batch: int, world: int, seed: int
) -> None:
    sizes, together = np.array(lengths), batch * world
    steps = -(-len(lengths) // batch)  # those of one process, so that a second permutation begins
    epochs = in_turn(lambda: BucketSampler(sizes, batch, seed=seed, steps=steps), world, 2)
    stream = items(list(itertools.chain(*epochs)))
    for begin in range(0, len(stream), len(lengths)):
        own = stream[begin : begin + len(lengths)]
        assert len(set(own)) == len(own) and (len(own) < len(lengths) or sorted(own) == list(range(len(lengths))))
    for cycle in range(len(stream) // len(lengths)):
        own = stream[cycle * len(lengths) : (cycle + 1) * len(lengths)]
        # steps of all processes: a permutation may begin within one
        begun = -cycle * steps % world * batch
        for begin in range(begun, len(own), 50 * together):
            window = own[begin : begin + 50 * together]
            parts = [sizes[window[i : i + together]] for i in range(0, len(window), together)]
            spans = sorted((int(part.min()), int(part.max())) for part in parts)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


@examples(60)
@given(batch=BATCHES, world=WORLDS, steps=st.integers(1, 6), size=st.none() | st.integers(1, 40))
def test_numbers_never_come_again(batch: int, world: int, steps: int, size: int | None) -> None:
    kind = {"steps": steps} if size is None else {"size": size}
    epochs = in_turn(lambda: NumberSampler(batch, **kind), world, 3)
    found = items(list(itertools.chain(*epochs)))
    assert found == list(range(len(found)))
    assert all(len(epoch) == (steps if size is None else -(-size // (batch * world))) * world for epoch in epochs)
    if size is not None:
        assert size <= len(items(epochs[0])) < size + batch * world


# resuming -------------------------------------------------------------------------------------------------------------


def samplers(kind: str, size: int, batch: int, steps: int | None, seed: int) -> IndexSampler:
    if kind == "index":
        return IndexSampler(size, batch, shuffle=True, seed=seed, steps=steps)
    if kind == "bucket":
        return BucketSampler((np.arange(size) * 7919) % 13, batch, seed=seed, steps=steps)
    if kind == "numbers":
        return NumberSampler(batch, steps=steps or 5)
    return IndexSampler(size, batch)


@examples(80)
@given(
    kind=st.sampled_from(["index", "bucket", "numbers", "in order"]), size=st.integers(1, 40), batch=BATCHES,
    steps=st.none() | st.integers(1, 9), world=st.integers(1, 3), stop=st.integers(0, 60), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_training_that_stops_anywhere_goes_on_as_if_it_had_not(
    kind: str, size: int, batch: int, steps: int | None, world: int, stop: int, seed: int
) -> None:
    def loader() -> ResumableLoader:
        sampler = samplers(kind, size, batch, steps, seed)
        return ResumableLoader(Echo(), sampler=sampler, **loader_options(0))

    def run(made: ResumableLoader, first: int) -> Iterator[tuple[dict[str, int], Any]]:
        for epoch in range(first, 3):
            made.sampler.set_epoch(epoch)
            for given_ in made:
                yield made.state_dict(), (epoch, given_, float(torch.rand(())))

    for rank in range(world):
        with process(rank, world):
            torch.manual_seed(seed)
            states, expected, generators = [], [], []
            for state, entry in run(loader(), 0):
                states.append(json.loads(json.dumps(state)))
                expected.append(entry)
                generators.append(torch.get_rng_state())
            if stop >= len(states):
                continue
            again = loader()
            again.load_state_dict(states[stop])
            torch.set_rng_state(generators[stop])
            ended = states[stop]["taken"] == len(again.sampler)  # as Lightning does, the next epoch begins
            rest = [entry for _, entry in run(again, states[stop]["epoch"] + ended)]
            assert rest == expected[stop + 1 :]


@examples(30)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), batch=BATCHES, stop=st.integers(0, 40),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_documents_of_an_epoch_that_was_interrupted(lengths: list[int], batch: int, stop: int, seed: int) -> None:
    ends = np.cumsum([0, *lengths])
    flat = np.arange(ends[-1]).astype(np.uint16)
    documents = LabelledSet(flat, ends[:-1, None], np.diff(ends)[:, None], np.zeros(len(lengths), np.int64))

    def loader() -> ResumableLoader:
        sampler = BucketSampler(documents.length[:, 0], batch, seed=seed)
        return ResumableLoader(DocumentBatches(documents), sampler=sampler, **loader_options(0))

    whole, first, second = list(loader()), loader(), loader()
    stop = min(stop, len(whole) - 1)
    seen = list(itertools.islice(first, stop))
    second.load_state_dict(first.state_dict())
    seen += list(second)
    assert sorted(torch.cat([found["document"] for found in seen]).tolist()) == list(range(len(lengths)))
    assert len(seen) == len(whole)
    for found, expected in zip(seen, whole, strict=True):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", ["index", "bucket", "numbers"])
def test_another_epoch_forgets_the_position(kind: str) -> None:
    sampler, fresh = samplers(kind, 20, 3, 5, 0), samplers(kind, 20, 3, 5, 0)
    sampler.position = 2
    assert len(list(sampler)) == 3 and len(list(sampler)) == 5  # once
    sampler.position = 2
    sampler.set_epoch(1)
    fresh.set_epoch(1)
    assert items(list(sampler)) == items(list(fresh))
