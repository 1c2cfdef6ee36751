"""Transferability scores: compared with independent references, standard errors with resampling, invalid input."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from hftl.errors import DataError, FeatureError
from hftl.features.labeled_features import LabeledFeatures
from hftl.features.transferability import (
    TRANSFERABILITY_SCORES,
    h_score,
    knn,
    leep,
    linear_probe,
    logme,
    nce,
    score_predictions,
)

TRANSFORMER_RANKER = """
import json, sys
import numpy as np, torch
from transformer_ranker.estimators import HScore, LogME
out = []
for case in np.load(sys.argv[1], allow_pickle=False).values():
    values, labels = torch.from_numpy(case[:, 1:].copy()), torch.from_numpy(case[:, 0].copy())
    regression = bool((labels != labels.round()).any())
    fitted = LogME(regression).fit(embeddings=values, labels=labels, max_iter=100_000, tol=1e-13)
    out.append([fitted, None if regression else HScore().fit(embeddings=values, labels=labels.long())])
print(json.dumps(out))
"""


def make_data(rows=120, size=8, classes=3, seed=0, signal=1.0):
    """Returns features [N, D] with nonzero mean and unequal scales, classes [N], and source probabilities [N, 5]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % classes)
    centers = rng.normal(size=(classes, size)) * signal
    features = (centers[labels] + rng.normal(size=(rows, size))) * rng.uniform(0.2, 2, size) + 0.5
    logits = rng.normal(size=(rows, 5)) + 2 * rng.normal(size=(classes, 5))[labels]
    source = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return features, labels, source


@pytest.fixture(scope="module")
def digits():
    """Features [300, 96] of digits from the pretrained and from a random embedded network, and the classes [300].

    Random weights give constant features, a mean much larger than the deviations, and two maxima of the evidence.
    """
    import torch

    import hftl
    from hftl.logging import suppress_logs

    features = []
    for pretrained in (True, False):
        torch.manual_seed(0)
        config = hftl.ModelConfig(name="embedded:letters", pretrained=pretrained)
        run = hftl.RunConfig(hftl.DataConfig(source="embedded:digits"), config)
        with suppress_logs(), torch.no_grad():
            task = hftl.ImageClassification(splits := hftl.load_splits(run.data))
            model = hftl.build_model(run, task.head).eval()
            batch = task.collate(task.encode(splits["train"], model.processor, None, None).fetch(range(300), 0))
            net = model.net
            pooled = net.forward_head(net.forward_features(batch["inputs"]["pixel_values"]), pre_logits=True)
        features.append(pooled.double().numpy())
    return *features, batch["labels"].numpy()


CASES = ("many rows", "few rows", "low rank", "numbers", "digits", "few digits", "digits, random network")


def cases(digits, rows=300):
    """Returns features and labels per case: few and many rows, low rank, classes and numbers, synthetic and real."""
    pretrained, random, labels = (array[:rows] for array in digits)
    narrow, wide = make_data(), make_data(rows=40, size=90)
    low_rank = (narrow[0][:, :3] @ np.random.default_rng(1).normal(size=(3, 8)), narrow[1])
    numbers = narrow[0][:, 0] + np.random.default_rng(2).normal(size=120)
    data = [narrow[:2], wide[:2], low_rank, (narrow[0], numbers)]
    data += [(pretrained, labels), (pretrained[:60], labels[:60]), (random, labels)]
    return dict(zip(CASES, data, strict=True))


def max_evidence(features, target):
    """Returns max log p(y) / N of y ~ N(0, F F^T / alpha + I / beta) from the density over rows, with restarts."""
    from scipy.optimize import minimize

    rows, gram = len(target), features @ features.T

    def loss(logs):
        covariance = gram * np.exp(-logs[0]) + np.eye(rows) * np.exp(-logs[1])
        sign, log_determinant = np.linalg.slogdet(covariance)
        return (log_determinant + target @ np.linalg.solve(covariance, target) + rows * np.log(2 * np.pi)) / 2 / rows

    starts = [(0.0, 0.0), (5.0, 2.0), (-5.0, 3.0), (-12.0, 3.0)]
    options = {"xatol": 1e-7, "fatol": 1e-13, "maxiter": 4000}
    return max(-minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)


@pytest.mark.parametrize("case", [*CASES[:-1], pytest.param(CASES[-1], marks=pytest.mark.slow)])
def test_logme_matches_max_evidence_of_gaussian_model(case, digits):
    features, labels = cases(digits, rows=80)[case]  # the density is of size rows x rows
    sample = LabeledFeatures(features, labels)
    targets = sample.targets[:, :2]  # one optimization per target
    expected = np.mean([max_evidence(features, target) for target in targets.T])
    assert logme(LabeledFeatures(features, targets, "values")).value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "numbers"])
def test_h_score_matches_sklearn_ledoit_wolf(case, digits):
    from sklearn.covariance import LedoitWolf

    features, labels = cases(digits)[case]
    shrunk = LedoitWolf().fit(features)
    means = np.stack([features[labels == label].mean(0) for label in labels])
    between = np.cov(means, rowvar=False)
    expected = np.trace((1 - shrunk.shrinkage_) * np.linalg.inv(shrunk.covariance_) @ between)
    assert h_score(LabeledFeatures(features, labels)).value == pytest.approx(expected, rel=1e-6)


def test_h_score_multi_label_returns_mean_over_labels():
    features, labels, _ = make_data()
    targets = np.stack([labels == 1, labels > 0], 1)
    values = [h_score(LabeledFeatures(features, target.astype(int))).value for target in targets.T]
    assert h_score(LabeledFeatures(features, targets.astype(float))).value == pytest.approx(np.mean(values), rel=1e-9)


@pytest.mark.parametrize(("rows", "size"), [(50, 6), (24, 60)])
def test_linear_probe_matches_leave_one_out_ridge(rows, size):
    from sklearn.linear_model import Ridge

    features, labels, _ = make_data(rows, size, signal=0.5)
    estimate = linear_probe(LabeledFeatures(features, labels))
    rank = np.linalg.matrix_rank(features)
    accuracies = {}
    for penalty in 10.0 ** np.arange(-4, 3):
        alpha = penalty * rows * features.var(0).sum() / rank
        correct = 0
        for row in range(rows):
            others = np.arange(rows) != row
            ridge = Ridge(alpha=alpha, solver="svd").fit(features[others], np.eye(3)[labels[others]])
            correct += ridge.predict(features[[row]]).argmax() == labels[row]
        accuracies[f"penalty {penalty:g}"] = correct / rows
    assert estimate.value == pytest.approx(max(accuracies.values()))
    assert accuracies[estimate.setting] == max(accuracies.values())


def test_knn_matches_loop_reference():
    features, labels, _ = make_data(rows=150, signal=0.4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    correct = []
    for row in range(150):
        cosines = unit @ unit[row]
        cosines[row] = -2
        nearest = np.argsort(-cosines)[:5]
        votes = [
            ((labels[nearest] == label).sum(), cosines[nearest][labels[nearest] == label].sum()) for label in range(3)
        ]
        correct.append(max(range(3), key=lambda label: votes[label]) == labels[row])
    assert knn(LabeledFeatures(features, labels)).value == pytest.approx(np.mean(correct))


def test_nce_and_leep_match_loop_reference():
    features, labels, source = make_data(rows=90)
    sample = LabeledFeatures(features, labels, source=source)
    joint = np.zeros((5, 3))
    for label, probabilities in zip(labels, source, strict=True):
        joint[:, label] += probabilities / 90
    terms = [
        np.log(sum(joint[z, label] / joint[z].sum() * probabilities[z] for z in range(5)))
        for label, probabilities in zip(labels, source, strict=True)
    ]
    assert leep(sample).value == pytest.approx(np.mean(terms), abs=1e-12)
    hard = np.zeros((5, 3))
    for label, probabilities in zip(labels, source, strict=True):
        hard[probabilities.argmax(), label] += 1 / 90
    entropy = sum(-p * np.log(p / row.sum()) for row in hard for p in row if p)
    assert nce(sample).value == pytest.approx(-entropy, abs=1e-12)


def test_score_predictions_matches_sklearn_metrics():
    from sklearn.metrics import r2_score, roc_auc_score

    rng = np.random.default_rng(0)
    features, labels, _ = make_data()
    targets = np.stack([labels == 1, labels > 0], 1).astype(float)
    predicted = np.round(targets + rng.normal(size=targets.shape), 1)  # rounded to create ties
    assert score_predictions(LabeledFeatures(features, targets), predicted).value == pytest.approx(
        roc_auc_score(targets, predicted)
    )
    numbers = rng.normal(size=(120, 2))
    predicted = numbers + rng.normal(size=(120, 2))
    assert score_predictions(LabeledFeatures(features, numbers), predicted).value == pytest.approx(
        r2_score(numbers, predicted)
    )


SMOOTH = {
    "LogME": lambda f, y, s: logme(LabeledFeatures(f, y)),
    "LogME regression": lambda f, y, s: logme(LabeledFeatures(f, f[:, :1] ** 2 + y[:, None], "values")),
    "H-score": lambda f, y, s: h_score(LabeledFeatures(f, y)),
    "H-score multi-label": lambda f, y, s: h_score(LabeledFeatures(f, np.stack([y == 1, y > 0], 1).astype(float))),
    "NCE": lambda f, y, s: nce(LabeledFeatures(f, y, source=s)),
    "LEEP": lambda f, y, s: leep(LabeledFeatures(f, y, source=s)),
    "AUC": lambda f, y, s: score_predictions(LabeledFeatures(f, np.stack([y == 1, y > 0], 1).astype(float)), f[:, :2]),
    "R^2": lambda f, y, s: score_predictions(LabeledFeatures(f, f[:, 0] + f[:, 1] ** 2), f[:, :1]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_influence_matches_leave_one_out_difference(name):
    features, labels, source = make_data(rows=400, size=5)
    full = SMOOTH[name](features, labels, source)
    expected = []
    for row in range(0, 400, 8):
        others = np.arange(400) != row
        without_row = SMOOTH[name](features[others], labels[others], source[others])
        expected.append(399 * (full.value - without_row.value))
    influence = full.influence[::8]
    assert abs(full.influence.mean()) < 1e-9
    assert np.corrcoef(influence, expected)[0, 1] > 0.95
    assert influence.std() / np.std(expected) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", TRANSFERABILITY_SCORES)
def test_standard_error_matches_std_over_samples(name):
    rng = np.random.default_rng(3)
    features, labels, source = make_data(rows=6000, size=6, signal=0.5)
    samples = [rng.choice(6000, 300, replace=False) for _ in range(60)]
    compute = TRANSFERABILITY_SCORES[name].compute
    estimates = [compute(LabeledFeatures(features[s], labels[s], source=source[s])) for s in samples]
    std = np.std([estimate.value for estimate in estimates], ddof=1)
    # the jackknife overestimates the error of non-smooth statistics such as votes (Efron & Stein 1981)
    max_ratio = 1.7 if name == "k-NN" else 1.35
    assert 0.7 < np.mean([estimate.standard_error for estimate in estimates]) / std < max_ratio
    low, high = estimates[0].interval()
    assert high - low == pytest.approx(2 * 1.96 * estimates[0].standard_error, rel=1e-3)


@pytest.mark.parametrize("name", TRANSFERABILITY_SCORES)
def test_score_prefers_signal_and_preserves_permutations(name):
    features, labels, source = make_data(rows=300)
    rng = np.random.default_rng(0)
    noise, shuffled = rng.normal(size=features.shape), rng.permutation(300)
    compute = TRANSFERABILITY_SCORES[name].compute
    value = compute(LabeledFeatures(features, labels, source=source)).value
    assert value > compute(LabeledFeatures(noise, labels, source=source[shuffled])).value
    permuted = compute(
        LabeledFeatures(features[shuffled][:, ::-1], labels[shuffled] * 7 + 3, source=source[shuffled])
    ).value
    assert permuted == pytest.approx(value, abs=1e-9)


def transformer_ranker_python() -> str:
    """Returns a Python interpreter with transformer-ranker: HFTL_PEER_PYTHON, or this one."""
    interpreter = os.environ.get("HFTL_PEER_PYTHON")
    if not interpreter and importlib.util.find_spec("transformer_ranker") is None:
        pytest.skip("transformer-ranker is not installed; set HFTL_PEER_PYTHON to an interpreter that has it")
    return interpreter or sys.executable


def test_logme_and_h_score_match_transformer_ranker(digits, tmp_path):
    """transformer-ranker 0.2.0, with its LogME iterated to convergence.

    For fewer rows than features, its LogME includes (D - N) / 2 log(alpha) of the zero eigenvalues; these cases are
    compared with the Gaussian density only (above).
    """
    selected = {name: cases(digits)[name] for name in ("many rows", "numbers", "digits")}
    file = tmp_path / "cases.npz"
    np.savez(file, **{name: np.column_stack([labels, features]) for name, (features, labels) in selected.items()})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [transformer_ranker_python(), "-c", TRANSFORMER_RANKER, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    for (features, labels), (evidence, score) in zip(selected.values(), json.loads(result.stdout), strict=True):
        sample = LabeledFeatures(features, labels)
        assert logme(sample).value == pytest.approx(evidence, abs=1e-6)
        if score is not None:
            assert h_score(sample).value == pytest.approx(score, rel=1e-6)


def test_labeled_features_rejects_invalid_features():
    features, labels, _ = make_data()
    nonfinite = features.copy()
    nonfinite[[3, 7], 0] = np.nan, np.inf
    with pytest.raises(FeatureError, match="2 of 120 rows are NaN or infinite: rows 3, 7"):
        LabeledFeatures(nonfinite, labels)
    with pytest.raises(FeatureError, match="equal in all 120 rows"):
        LabeledFeatures(np.ones((120, 4)), labels)
    with pytest.raises(FeatureError, match="shape"):
        LabeledFeatures(features[:, 0], labels)
    with pytest.raises(FeatureError, match="source probabilities"):
        LabeledFeatures(features, labels, source=np.ones((3, 2)))
    with pytest.raises(FeatureError, match="NCE and LEEP"):
        nce(LabeledFeatures(features, labels))


def test_labeled_features_rejects_invalid_labels():
    features, labels, _ = make_data()
    with pytest.raises(DataError, match="all 120 rows have the class 1"):
        LabeledFeatures(features, np.ones(120, dtype=int))
    with pytest.raises(DataError, match="two rows of one class are required"):
        LabeledFeatures(features[:5], np.arange(5))
    with pytest.raises(DataError, match="120 rows of features"):
        LabeledFeatures(features, labels[:-1])
    with pytest.raises(DataError, match="labels: 1 of 120 rows are NaN"):
        LabeledFeatures(features, np.where(np.arange(120) == 4, np.nan, 1.5))
    with pytest.raises(DataError, match="the same label"):
        LabeledFeatures(features, np.full(120, 2.5))
    with pytest.raises(DataError, match="0 or 1"):
        LabeledFeatures(features, np.full((120, 2), 0.5), "labels")


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, y: (np.column_stack([f, np.ones((len(f), 3))]), y),  # constant features
        lambda f, y: (np.column_stack([f, f]), y),  # duplicate features
        lambda f, y: (np.repeat(f, 2, 0), np.repeat(y, 2)),  # duplicate rows
        lambda f, y: (np.column_stack([f, np.eye(3)[y]]), y),  # labels leaked into the features
        lambda f, y: (f[:4], np.array([0, 1, 2, 2])),  # fewer rows than neighbors and features
        lambda f, y: (f * 1e-20, y),
        lambda f, y: (f * 1e15, y),
        lambda f, y: (np.where(np.arange(len(f))[:, None] < 50, 0.0, f), y),  # zero rows
    ],
)
def test_scores_degenerate_features_return_finite_values(transform):
    features, labels, source = make_data()
    features, labels = transform(features, labels)
    sample = LabeledFeatures(features, labels, source=np.resize(source, (len(features), 5)))
    for name, score in TRANSFERABILITY_SCORES.items():
        estimate = score.compute(sample)
        assert np.isfinite(estimate.value) and np.isfinite(estimate.influence).all(), name


def test_scores_have_assumptions_citations_and_kinds():
    assert next(iter(TRANSFERABILITY_SCORES)) == "linear probe"
    for score in TRANSFERABILITY_SCORES.values():
        assert score.assumes.endswith(".") and "https://" in score.citation
    features, labels, _ = make_data()
    sample = LabeledFeatures(features, features[:, 0])
    supported = [name for name, score in TRANSFERABILITY_SCORES.items() if score.fits(sample)]
    assert supported == ["linear probe", "LogME", "k-NN"]
