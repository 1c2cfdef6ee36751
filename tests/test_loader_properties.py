"""Properties of `eval_batches` and `train_batches` for any number of rows, batch size and processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hftl.loading.loader import Share, eval_batches, steps_per_epoch, train_batches


@st.composite
def sizes(draw):
    """Returns number of rows, lengths or None, batch size, number of processes."""
    rows = draw(st.integers(1, 70))
    lengths = draw(st.none() | st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    return rows, lengths and np.array(lengths, dtype=np.int32), draw(st.integers(1, 9)), draw(st.integers(1, 5))


LENGTHS = np.random.default_rng(0).integers(1, 9, 70).astype(np.int32)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("world", range(1, 6))
def test_eval_batches_cover_rows_once_with_equal_counts(world, by_length):
    for rows in range(71):
        for batch in range(1, 10):
            lengths = LENGTHS[:rows] if by_length else None
            ranks = [list(eval_batches(rows, lengths, Share(rank, world, batch))) for rank in range(world)]
            assert len({len(batches) for batches in ranks}) == 1, "collectives would hang"
            keys = [key for batches in ranks for keys in batches for key in keys]
            assert sorted(row for _, row, weight in keys if weight) == list(range(rows))
            assert all(0 <= row < rows for _, row, _ in keys)
            assert all(len(keys) == 1 for batches in ranks for keys in batches if not keys[0][2]), "one padding row"
            expected = list(eval_batches(rows, lengths, Share(0, 1, batch)))
            interleaved = [ranks[turn % world][turn // world] for turn in range(len(expected))]
            assert interleaved == expected, "batches depend on the number of processes"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(sizes(), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_train_batches_cover_rows_once_and_weights_sum_to_1(size, accumulation, seed, epoch):
    rows, lengths, batch, world = size
    shares = [Share(rank, world, batch, accumulation) for rank in range(world)]
    ranks = [list(train_batches(rows, lengths, share, seed, epoch)) for share in shares]
    steps = steps_per_epoch(rows, shares[0])
    assert all(len(batches) == steps * accumulation for batches in ranks)
    assert all(0 < len(keys) <= batch for batches in ranks for keys in batches)
    rows_by_step = []
    for step in range(steps):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        keys = [key for batches in ranks for keys in batches[micro] for key in keys]
        assert sum(weight for _, _, weight in keys) == pytest.approx(1)
        assert {key_epoch for key_epoch, _, _ in keys} == {epoch}
        rows_by_step.append([row for _, row, weight in keys if weight])
    assert sorted(row for step in rows_by_step for row in step) == list(range(rows))
    single = Share(0, 1, batch * accumulation * world)
    expected = [[row for _, row, _ in keys] for keys in train_batches(rows, lengths, single, seed, epoch)]
    assert [sorted(step) for step in rows_by_step] == [sorted(step) for step in expected]
