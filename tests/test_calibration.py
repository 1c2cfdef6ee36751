"""`hftl.evaluation.calibration` against scikit-learn, direct loops, and models of known calibration."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss

from hftl.evaluation.calibration import Calibration, fit_temperature, soften


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def sample(rows: int, num_classes: int = 4, sharpness: float = 1.0, seed: int = 0):
    """Returns probabilities softmax(sharpness * logits) [N, K] and labels [N] sampled from softmax(logits)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, num_classes))
    truth = softmax(logits)
    labels = (rng.random((rows, 1)) > truth.cumsum(1)).sum(1).clip(0, num_classes - 1)
    return softmax(logits * sharpness), labels


def measure(probabilities, labels, **options):
    calibration = Calibration(**options)
    calibration.update(probabilities, labels)
    return calibration.compute()


def test_scores_match_scikit_learn_and_definition():
    probabilities, labels = sample(500, sharpness=2.0)
    scores = measure(probabilities, labels)
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities))
    binary, binary_labels = sample(300, num_classes=2)
    assert measure(binary, binary_labels)["brier"] == pytest.approx(2 * brier_score_loss(binary_labels, binary[:, 1]))
    onehot = np.eye(4)[labels]
    assert scores["brier"] == pytest.approx(((probabilities - onehot) ** 2).sum(1).mean())
    ece, confidence, correct = 0.0, probabilities.max(1), probabilities.argmax(1) == labels
    for low, high in zip(np.arange(15) / 15, np.arange(1, 16) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert scores["ece"] == pytest.approx(ece)


def test_update_by_batches_matches_single_update():
    probabilities, labels = sample(257)
    batched = Calibration(temperature=1.7)
    for start in range(0, 257, 50):
        batched.update(probabilities[start : start + 50], labels[start : start + 50])
    assert batched.rows == 257
    assert batched.compute() == pytest.approx(measure(probabilities, labels, temperature=1.7))


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_fit_temperature_corrects_overconfidence(sharpness):
    """Logits scaled by s need temperature s; ECE decreases on other rows."""
    temperature = fit_temperature(*sample(20_000, sharpness=sharpness))
    assert temperature == pytest.approx(sharpness, rel=0.06)
    probabilities, labels = sample(20_000, sharpness=sharpness, seed=1)
    before, after = measure(probabilities, labels), measure(probabilities, labels, temperature=temperature)
    assert after["ece"] < 0.015
    if sharpness != 1.0:
        assert all(after[name] < before[name] for name in before)


def test_fit_temperature_matches_grid_search():
    probabilities, labels = sample(400, sharpness=2.5)
    grid = {t: measure(probabilities, labels, temperature=t)["nll"] for t in np.geomspace(0.2, 10, 400)}
    assert fit_temperature(probabilities, labels) == pytest.approx(min(grid, key=grid.get), rel=0.02)


def test_soften_matches_scaled_logits_despite_underflow():
    logits = np.array([[3.0, 1.0, -2.0], [0.0, 0.5, 0.25]])
    np.testing.assert_allclose(soften(softmax(logits), 2.5), softmax(logits / 2.5), rtol=1e-12)
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert np.isfinite(soften(certain, 3.0)).all()
    assert np.isfinite(list(measure(certain, [0, 1]).values())).all()
    assert fit_temperature(certain, [0, 1]) > 10  # half of the certain predictions are wrong


def test_fit_temperature_without_errors_returns_none():
    probabilities, _ = sample(30)
    assert fit_temperature(probabilities, probabilities.argmax(1)) is None
    assert fit_temperature(probabilities[:0], []) is None
    assert all(np.isnan(value) for value in Calibration().compute().values())
