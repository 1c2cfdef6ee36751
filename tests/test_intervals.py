"""Confidence intervals of proportions and metrics, compared with closed forms and row-wise bootstrap."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from hftl.statistics.confidence_intervals import wilson
from hftl.tasks.targets.single_label.metrics import BUILT_IN, PROPORTIONS, confusion_intervals, metric_intervals


def noisy_predictions(rows: int, num_classes: int = 4, seed: int = 0):
    """Returns labels, and predictions with an accuracy of about 0.75 or more."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, rows)
    return labels, np.where(rng.random(rows) < 0.75, labels, rng.integers(0, num_classes, rows))


@pytest.mark.parametrize("successes, rows", [(0, 10), (1, 10), (7, 10), (10, 10), (481, 500), (99_000, 100_000)])
def test_wilson_matches_defining_equation(successes, rows):
    """Both ends are the proportions p at the boundary of the score test: (x/n - p)^2 = z^2 p (1 - p) / n."""
    z = 1.959963984540054
    for end in wilson(successes, rows):
        assert math.isclose((successes / rows - end) ** 2, z**2 * end * (1 - end) / rows, abs_tol=1e-12)


def test_wilson_without_rows_returns_unit_interval():
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_has_nominal_coverage():
    proportion, rows = 0.9, 60
    successes = np.random.default_rng(0).binomial(rows, proportion, 5_000)
    intervals = {k: wilson(k, rows) for k in np.unique(successes)}
    covered = np.mean([intervals[k][0] <= proportion <= intervals[k][1] for k in successes])
    assert 0.93 < covered < 0.97


def test_metric_intervals_contain_metric_values():
    labels, predictions = noisy_predictions(300)
    intervals = metric_intervals(labels, predictions, 4)
    assert set(intervals) == set(BUILT_IN)
    low, high = intervals["macro_f1"]
    assert low < f1_score(labels, predictions, average="macro") < high
    correct = int((labels == predictions).sum())
    assert all(intervals[name] == wilson(correct, 300) for name in PROPORTIONS)


def test_metric_intervals_match_row_bootstrap():
    """Multinomial resampling of confusion cells matches scikit-learn scores of resampled rows."""
    labels, predictions = noisy_predictions(200)
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(300):
        rows = rng.integers(0, 200, 200)
        scores.append(f1_score(labels[rows], predictions[rows], average="macro"))
    interval = metric_intervals(labels, predictions, 4, resamples=4000)["macro_f1"]
    assert interval == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.015)


def test_metric_intervals_are_seeded_and_shrink_with_rows():
    labels, predictions = noisy_predictions(200)
    intervals = metric_intervals(labels, predictions, 4)
    assert intervals == metric_intervals(labels, predictions, 4)
    assert intervals["macro_f1"] != metric_intervals(labels, predictions, 4, seed=1)["macro_f1"]
    low, high = intervals["macro_f1"]
    narrow = metric_intervals(np.tile(labels, 100), np.tile(predictions, 100), 4)["macro_f1"]
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 10, rel=0.2)


def test_metric_intervals_skip_absent_classes_and_no_rows():
    labels, predictions = noisy_predictions(50)
    low, high = metric_intervals(labels, predictions, 9)["weighted_recall"]  # five classes are absent
    assert low <= accuracy_score(labels, predictions) <= high
    assert metric_intervals([], [], 3) == {} == confusion_intervals(np.zeros((3, 3)))
