"""Batch samplers of `hftl.loading.loader`; the reference is one process with the same effective batch."""

from itertools import chain

import numpy as np
import pytest

from hftl.loading.loader import Share, eval_batches, steps_per_epoch, train_batches

LENGTHS = np.random.default_rng(0).integers(3, 60, 101).astype(np.int32)


def keys_by_step(rows, lengths, batch, accumulation, world, epoch=0):
    """Returns the keys of every step over all processes."""
    shares = [Share(rank, world, batch, accumulation) for rank in range(world)]
    streams = [list(train_batches(rows, lengths, share, 3, epoch)) for share in shares]
    keys = [
        [k for stream in streams for b in stream[i : i + accumulation] for k in b]
        for i in range(0, len(streams[0]), accumulation)
    ]
    assert {len(stream) for stream in streams} == {steps_per_epoch(rows, shares[0]) * accumulation}
    return keys


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("rows", [16, 100, 101])
@pytest.mark.parametrize(
    ("batch", "accumulation", "world"), [(8, 1, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1), (1, 2, 4)]
)
def test_train_batches_equal_effective_batch_matches_steps(rows, lengths, batch, accumulation, world):
    lengths = None if lengths is None else lengths[:rows]
    steps = keys_by_step(rows, lengths, batch, accumulation, world)
    expected = keys_by_step(rows, lengths, 8, 1, 1)
    assert [{k[1] for k in step if k[2]} for step in steps] == [{k[1] for k in step} for step in expected]
    weighted = sorted(k[1] for k in chain(*steps) if k[2])
    assert weighted == list(range(rows))
    for step in steps:
        assert sum(k[2] for k in step) == pytest.approx(1.0)
    sizes = [sum(1 for k in step if k[2]) for step in steps]
    assert max(sizes) - min(sizes) <= 1


def test_train_batches_order_depends_on_seed_and_epoch():
    share = Share(0, 1, 8)
    first, second = (list(train_batches(50, None, share, 1, 2)) for _ in range(2))
    assert first == second
    assert first != list(train_batches(50, None, share, 1, 3))
    assert first != list(train_batches(50, None, share, 2, 2))


def test_train_batches_by_length_reduces_padding():
    lengths = np.random.default_rng(0).integers(3, 200, 2000)

    def padding(with_lengths):
        batches = train_batches(2000, with_lengths, Share(0, 1, 16), 0, 0)
        return sum(max(lengths[k[1]] for k in b) * len(b) - sum(lengths[k[1]] for k in b) for b in batches)

    assert padding(lengths) < 0.1 * padding(None)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 101])
def test_eval_batches_any_world_matches_single_process(rows, lengths, world):
    lengths = None if lengths is None else lengths[:rows]
    expected = list(eval_batches(rows, lengths, Share(0, 1, 8)))
    ranks = [list(eval_batches(rows, lengths, Share(rank, world, 8))) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    weighted = [b for batches in zip(*ranks, strict=True) for b in batches if b[0][2]]
    assert weighted == expected
    assert sorted(k[1] for b in weighted for k in b) == list(range(rows))
