"""Intervals: against closed forms and slower ways to the same number."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from hftl.statistics.confidence_intervals import wilson
from hftl.tasks.targets.single_label.metrics import BUILT_IN, PROPORTIONS, confusion_intervals, metric_intervals


def noisy(rows: int, num_classes: int = 4, seed: int = 0):
    """Labels, and predictions of which about three in four are right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, rows)
    return labels, np.where(rng.random(rows) < 0.75, labels, rng.integers(0, num_classes, rows))


@pytest.mark.parametrize("successes, rows", [(0, 10), (1, 10), (7, 10), (10, 10), (481, 500), (99_000, 100_000)])
def test_wilson_solves_its_defining_equation(successes, rows):
    """Both ends are the proportions p at which the score test just rejects: (x/n - p)^2 = z^2 p (1 - p) / n."""
    z = 1.959963984540054
    for end in wilson(successes, rows):
        assert math.isclose((successes / rows - end) ** 2, z**2 * end * (1 - end) / rows, abs_tol=1e-12)


def test_wilson_without_rows_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_true_proportion_as_often_as_it_says():
    truth, rows = 0.9, 60
    drawn = np.random.default_rng(0).binomial(rows, truth, 5_000)
    ends = {k: wilson(k, rows) for k in np.unique(drawn)}
    covered = np.mean([ends[k][0] <= truth <= ends[k][1] for k in drawn])
    assert 0.93 < covered < 0.97


def test_every_metric_has_an_interval_around_its_value():
    labels, predictions = noisy(300)
    found = metric_intervals(labels, predictions, 4)
    assert set(found) == set(BUILT_IN)
    low, high = found["macro_f1"]
    assert low < f1_score(labels, predictions, average="macro") < high
    right = int((labels == predictions).sum())
    assert all(found[name] == wilson(right, 300) for name in PROPORTIONS)


def test_drawing_cells_is_drawing_rows():
    """The multinomial draws have the distribution of resampled rows scored by scikit-learn."""
    labels, predictions = noisy(200)
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(300):
        rows = rng.integers(0, 200, 200)
        scores.append(f1_score(labels[rows], predictions[rows], average="macro"))
    found = metric_intervals(labels, predictions, 4, resamples=4000)["macro_f1"]
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.015)


def test_intervals_repeat_with_their_seed_and_shrink_with_rows():
    labels, predictions = noisy(200)
    once = metric_intervals(labels, predictions, 4)
    assert once == metric_intervals(labels, predictions, 4)
    assert once["macro_f1"] != metric_intervals(labels, predictions, 4, seed=1)["macro_f1"]
    low, high = once["macro_f1"]
    many = metric_intervals(np.tile(labels, 100), np.tile(predictions, 100), 4)["macro_f1"]
    assert many[1] - many[0] == pytest.approx((high - low) / 10, rel=0.2)


def test_weighted_recall_is_the_accuracy_and_no_rows_have_no_interval():
    labels, predictions = noisy(50)
    found = metric_intervals(labels, predictions, 9)  # five classes never seen
    assert found["weighted_recall"][0] <= accuracy_score(labels, predictions) <= found["weighted_recall"][1]
    assert metric_intervals([], [], 3) == {} == confusion_intervals(np.zeros((3, 3)))
