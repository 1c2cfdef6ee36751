"""Calibration: against scikit-learn, plain loops, and models whose calibration is known by construction."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from hftl.evaluation.calibration import Calibration, fit_temperature, soften


def softmax(logits):
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def drawn(rows: int, num_classes: int = 4, sharpness: float = 1.0, seed: int = 0):
    """Labels drawn from softmax(logits), and the probabilities of a model `sharpness` times as sure as is right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, num_classes))
    truth = softmax(logits)
    labels = (rng.random((rows, 1)) > truth.cumsum(1)).sum(1).clip(0, num_classes - 1)
    return softmax(logits * sharpness), labels


def measure(probabilities, labels, **options):
    found = Calibration(**options)
    found.update(probabilities, labels)
    return found.compute()


def test_scores_are_those_of_scikit_learn_and_of_the_definition():
    shares, labels = drawn(500, sharpness=2.0)
    found = measure(shares, labels)
    assert found["nll"] == pytest.approx(log_loss(labels, shares))
    two, binary = drawn(300, num_classes=2)
    assert measure(two, binary)["brier"] == pytest.approx(2 * brier_score_loss(binary, two[:, 1]))
    onehot = np.eye(4)[labels]
    assert found["brier"] == pytest.approx(((shares - onehot) ** 2).sum(1).mean())
    ece, confidence, right = 0.0, shares.max(1), shares.argmax(1) == labels
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(ece)


def test_batches_give_what_the_whole_gives():
    shares, labels = drawn(257)
    parts = Calibration(temperature=1.7)
    for start in range(0, 257, 50):
        parts.update(shares[start : start + 50], labels[start : start + 50])
    assert parts.rows == 257
    assert parts.compute() == pytest.approx(measure(shares, labels, temperature=1.7))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_overconfidence(sharpness):
    """A model that is s times as sure as is right needs temperature s, which other rows confirm."""
    temperature = fit_temperature(*drawn(20_000, sharpness=sharpness))
    assert temperature == pytest.approx(sharpness, rel=0.06)
    shares, labels = drawn(20_000, sharpness=sharpness, seed=1)
    before, after = measure(shares, labels), measure(shares, labels, temperature=temperature)
    assert after["ece"] < 0.015
    if sharpness != 1.0:
        assert all(after[name] < before[name] for name in before)


def test_the_temperature_is_the_best_of_a_grid():
    shares, labels = drawn(400, sharpness=2.5)
    grid = {t: measure(shares, labels, temperature=t)["nll"] for t in np.geomspace(0.2, 10, 400)}
    assert fit_temperature(shares, labels) == pytest.approx(min(grid, key=grid.get), rel=0.02)


def test_softening_is_dividing_logits_and_survives_underflow():
    logits = np.array([[3.0, 1.0, -2.0], [0.0, 0.5, 0.25]])
    np.testing.assert_allclose(soften(softmax(logits), 2.5), softmax(logits / 2.5), rtol=1e-12)
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert np.isfinite(soften(certain, 3.0)).all()
    assert np.isfinite(list(measure(certain, [0, 1]).values())).all()
    assert fit_temperature(certain, [0, 1]) > 10  # half of what it is sure of is wrong


def test_no_temperature_without_an_error_and_no_score_without_rows():
    shares, _ = drawn(30)
    assert fit_temperature(shares, shares.argmax(1)) is None
    assert fit_temperature(shares[:0], []) is None
    assert all(np.isnan(value) for value in Calibration().compute().values())
