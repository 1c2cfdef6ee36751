"""The order of rows: a pure function of (seed, epoch), shared out without loss, the same steps for equal products."""

from itertools import chain

import numpy as np
import pytest

from hftl.loading.loader import Share, eval_batches, steps_per_epoch, train_batches

LENGTHS = np.random.default_rng(0).integers(3, 60, 101).astype(np.int32)


def steps(rows, lengths, batch, accumulation, world, epoch=0):
    """Returns the set of rows of every step, over all processes, and all keys."""
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
def test_equal_products_make_equal_steps_and_every_row_counts_once(rows, lengths, batch, accumulation, world):
    lengths = None if lengths is None else lengths[:rows]
    found = steps(rows, lengths, batch, accumulation, world)
    wanted = steps(rows, lengths, 8, 1, 1)
    assert [{k[1] for k in step if k[2]} for step in found] == [{k[1] for k in step} for step in wanted]
    counted = sorted(k[1] for k in chain(*found) if k[2])
    assert counted == list(range(rows))
    for step in found:
        assert sum(k[2] for k in step) == pytest.approx(1.0)
    sizes = [sum(1 for k in step if k[2]) for step in found]
    assert max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch_alone():
    share = Share(0, 1, 8)
    once, again = (list(train_batches(50, None, share, 1, 2)) for _ in range(2))
    assert once == again
    assert once != list(train_batches(50, None, share, 1, 3))
    assert once != list(train_batches(50, None, share, 2, 2))


def test_like_lengths_share_a_batch():
    lengths = np.random.default_rng(0).integers(3, 200, 2000)

    def padding(with_lengths):
        batches = train_batches(2000, with_lengths, Share(0, 1, 16), 0, 0)
        return sum(max(lengths[k[1]] for k in b) * len(b) - sum(lengths[k[1]] for k in b) for b in batches)

    assert padding(lengths) < 0.1 * padding(None)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 101])
def test_evaluation_sees_each_row_once_in_the_same_batches_on_any_number_of_processes(rows, lengths, world):
    lengths = None if lengths is None else lengths[:rows]
    alone = list(eval_batches(rows, lengths, Share(0, 1, 8)))
    shared = [list(eval_batches(rows, lengths, Share(rank, world, 8))) for rank in range(world)]
    assert len({len(batches) for batches in shared}) == 1
    real = [b for batches in zip(*shared, strict=True) for b in batches if b[0][2]]
    assert real == alone
    assert sorted(k[1] for b in real for k in b) == list(range(rows))
