"""Which examples make an update: exact whatever the ranks, the micro-batches and the workers."""

from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from training.batches import (
    Batching,
    EpochSteps,
    _cheapest_split,
    epoch_batches,
    epoch_loader,
    examples,
    micro_batches,
    rank_share,
)

STRATEGIES = ("random", "group_by_length", "sequential")
# The size is drawn first: left to itself, hypothesis makes short lists.
sizes = st.integers(1, 60)
lengths_of = sizes.flatmap(lambda n: st.lists(st.integers(1, 40), min_size=n, max_size=n)).map(np.array)


def collate(rows):
    return {"row": torch.tensor([row["row"] for row in rows]), "draw": torch.tensor([row["draw"] for row in rows])}


def make_steps(lengths, batching, *, epoch=0):
    features = datasets.Dataset.from_dict({"row": list(range(len(lengths))), "length": lengths.tolist()})
    plan = [
        micro_batches(rank_share(batch, lengths, rank=0, world_size=1), lengths, batching)
        for batch in epoch_batches(lengths, batching, epoch=epoch)
    ]
    return EpochSteps(features, collate, plan, draw=(batching.seed, epoch))


def rows_of(steps):
    return [[batch["row"].tolist() for batch in micro] for micro in steps]


@given(lengths_of, st.integers(1, 70), st.sampled_from(STRATEGIES), st.integers(0, 3), st.integers(0, 5))
def test_every_example_once_an_epoch(lengths, batch_size, strategy, seed, epoch):
    batching = Batching(batch_size, seed, strategy)
    batches = epoch_batches(lengths, batching, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == batching.steps_per_epoch(len(lengths))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)


def test_each_example_is_told_seed_and_epoch():
    steps = make_steps(np.array([3, 1, 2]), Batching(2, seed=7, micro_batch_size=1), epoch=5)
    assert [batch["draw"].tolist() for k in range(len(steps)) for batch in steps[k]] == [[[7, 5]]] * 3


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_order_is_a_function_of_seed_and_epoch_alone(strategy):
    lengths = np.random.default_rng(0).integers(1, 40, 100)

    def order(seed, epoch, **other):
        batches = epoch_batches(lengths, Batching(8, seed, strategy, **other), epoch=epoch)
        return np.concatenate(batches).tolist()

    first = order(1, 2)
    np.random.seed(5)
    torch.manual_seed(5)
    assert order(1, 2, micro_batch_size=2, accumulation=3, overhead=7.0, num_workers=2) == first
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_sequential_keeps_the_order():
    batches = epoch_batches(np.array([3, 1, 2, 9, 4]), Batching(2, 0, "sequential"), epoch=3)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_group_by_length_puts_like_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 100, 400)

    def padded(strategy):
        batches = epoch_batches(lengths, Batching(8, 0, strategy), epoch=0)
        return sum(len(batch) * lengths[batch].max() for batch in batches)

    assert padded("group_by_length") < 1.1 * lengths.sum() < padded("random")


@pytest.mark.parametrize(("rows", "size"), [(1000, 4), (3000, 5), (70, 16), (5, 2), (3, 8), (1, 1)])
def test_group_by_length_orders_as_transformers_does(rows, size, monkeypatch):
    lengths = np.random.default_rng(3).integers(1, 300, rows)
    drawn = np.random.default_rng([7, 2]).permutation(rows)
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: torch.from_numpy(drawn))
    theirs = get_length_grouped_indices(lengths.tolist(), size)
    assert np.concatenate(epoch_batches(lengths, Batching(size, 7, "group_by_length"), epoch=2)).tolist() == theirs


@given(
    lengths_of,
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.none(), st.integers(1, 9)),
    st.sampled_from([0.0, 10.0, 1e6]),
)
def test_micro_batches_of_all_ranks_make_the_global_batch(lengths, world_size, size, accumulation, overhead):
    batching = Batching(16, 0, micro_batch_size=size, accumulation=accumulation, overhead=overhead)
    for batch in epoch_batches(lengths, batching, epoch=0):
        shares = [rank_share(batch, lengths, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [micro_batches(share, lengths, batching) for share in shares]
        assert sorted(i for share in parts for part in share for i in part) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        if accumulation is not None:
            assert [len(part) for part in parts] == [min(accumulation, len(share)) for share in shares]
        elif size is not None:
            assert all(len(part) <= size for share in parts for part in share)
        assert all(len(part) for share in parts for part in share)


def test_shares_are_dealt_by_length():
    """So that no rank waits for one that got all the long ones."""
    lengths = np.array([1, 9, 2, 8, 3, 7])
    shares = [rank_share(np.arange(6), lengths, rank=rank, world_size=2) for rank in (0, 1)]
    assert [lengths[share].tolist() for share in shares] == [[9, 7, 2], [8, 3, 1]]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.integers(1, 8),
    st.sampled_from([20, 60, 1000]),
    st.sampled_from([0.0, 1.0, 5.0, 40.0]),
)
def test_cheapest_split_is_optimal(lengths, limit, tokens, overhead):
    lengths = np.sort(lengths)[::-1]
    share = np.arange(len(lengths))

    def cost(cuts):
        return sum((end - start) * lengths[start] + overhead for start, end in pairwise([0, *cuts, len(share)]))

    def all_cuts():
        for mask in range(2 ** (len(share) - 1)):
            cuts = [i + 1 for i in range(len(share) - 1) if mask >> i & 1]
            if all(fits(end - start, lengths[start]) for start, end in pairwise([0, *cuts, len(share)])):
                yield cuts

    def fits(size, longest):
        return size == 1 or (size <= limit and size * longest <= tokens)

    found = _cheapest_split(share, lengths, most_examples=limit, most_tokens=tokens, overhead=overhead)
    assert np.concatenate(found).tolist() == share.tolist()
    assert all(fits(len(part), lengths[part[0]]) for part in found)
    assert cost(np.cumsum([len(part) for part in found])[:-1].tolist()) == min(map(cost, all_cuts()))


def test_an_empty_share_has_no_micro_batches():
    empty = np.array([], dtype=np.int64)
    assert micro_batches(empty, np.array([3]), Batching(4, 0)) == []
    assert micro_batches(empty, np.array([3]), Batching(4, 0, accumulation=2)) == []


def test_examples_are_the_rows():
    features = datasets.Dataset.from_dict({"row": [0, 1, 2], "input_ids": [[1], [2, 3], [4]]})
    assert examples(features, np.array([2, 0])) == [features[2], features[0]]


@given(lengths_of, st.integers(1, 9), st.sampled_from(STRATEGIES), st.data())
def test_starting_at_a_step_gives_the_rest(lengths, batch_size, strategy, data):
    steps = make_steps(lengths, Batching(batch_size, 3, strategy, micro_batch_size=2), epoch=1)
    start = data.draw(st.integers(0, len(steps)))
    whole = rows_of(epoch_loader(steps, start=0))
    assert rows_of(epoch_loader(steps, start=start)) == whole[start:]
    assert sorted(row for micro in whole for part in micro for row in part) == list(range(len(lengths)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_leaves_the_global_generators_alone(num_workers):
    steps = make_steps(np.arange(1, 30), Batching(4, 0))
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loaded = rows_of(epoch_loader(steps, start=1, num_workers=num_workers))
    assert loaded == rows_of(steps[i] for i in range(1, len(steps)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
