"""Scores of backbones equal independent references, say how far chance moves them, and refuse what says nothing."""

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

PEER = """
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


def drawn(rows=120, size=8, classes=3, seed=0, signal=1.0):
    """Features [N, D] with a mean, unequal scales and some signal, classes [N], and source probabilities [N, 5]."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % classes)
    centres = rng.normal(size=(classes, size)) * signal
    features = (centres[labels] + rng.normal(size=(rows, size))) * rng.uniform(0.2, 2, size) + 0.5
    logits = rng.normal(size=(rows, 5)) + 2 * rng.normal(size=(classes, 5))[labels]
    source = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return features, labels, source


@pytest.fixture(scope="module")
def digits():
    """What the embedded network sees in 300 digits, trained and with random weights [300, 96] each, and the classes.

    The random one has features that never change, a mean far above the differences, and two maxima of the evidence.
    """
    import torch

    import hftl
    from hftl.logging import suppress_logs

    features = []
    for pretrained in (True, False):
        torch.manual_seed(0)
        model = hftl.ModelConfig(name="embedded:letters", pretrained=pretrained)
        run = hftl.RunConfig(hftl.DataConfig(source="embedded:digits"), model)
        with suppress_logs(), torch.no_grad():
            task = hftl.ImageClassification(splits := hftl.load_splits(run.data))
            built = hftl.build_model(run, task.head).eval()
            batch = task.collate(task.encode(splits["train"], built.processor, None, None).fetch(range(300), 0))
            net = built.net
            seen = net.forward_head(net.forward_features(batch["inputs"]["pixel_values"]), pre_logits=True)
        features.append(seen.double().numpy())
    return *features, batch["labels"].numpy()


CASES = ("many rows", "few rows", "low rank", "numbers", "digits", "few digits", "digits, random network")


def cases(digits, rows=300):
    """Features and labels: few and many rows, a rank below the size, classes and numbers, random and real."""
    trained, random, labels = (part[:rows] for part in digits)
    narrow, wide = drawn(), drawn(rows=40, size=90)
    low = (narrow[0][:, :3] @ np.random.default_rng(1).normal(size=(3, 8)), narrow[1])
    numbers = narrow[0][:, 0] + np.random.default_rng(2).normal(size=120)
    found = [narrow[:2], wide[:2], low, (narrow[0], numbers)]
    found += [(trained, labels), (trained[:60], labels[:60]), (random, labels)]
    return dict(zip(CASES, found, strict=True))


def greatest_evidence(features, target):
    """log p(y) / N of y ~ N(0, F F^T / alpha + I / beta) by its density over rows, at the best of many starts."""
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
def test_logme_is_the_greatest_evidence_of_the_gaussian_model(case, digits):
    features, labels = cases(digits, rows=80)[case]  # the density is of size rows x rows
    sample = LabeledFeatures(features, labels)
    targets = sample.targets[:, :2]  # each is an optimisation of its own
    expected = np.mean([greatest_evidence(features, target) for target in targets.T])
    assert logme(LabeledFeatures(features, targets, "values")).value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "numbers"])
def test_h_score_with_an_explicit_inverse_and_scikit_learns_shrinkage(case, digits):
    from sklearn.covariance import LedoitWolf

    features, labels = cases(digits)[case]
    shrunk = LedoitWolf().fit(features)
    means = np.stack([features[labels == label].mean(0) for label in labels])
    between = np.cov(means, rowvar=False)
    expected = np.trace((1 - shrunk.shrinkage_) * np.linalg.inv(shrunk.covariance_) @ between)
    assert h_score(LabeledFeatures(features, labels)).value == pytest.approx(expected, rel=1e-6)


def test_h_score_of_yes_or_no_labels_is_the_mean_over_them():
    features, labels, _ = drawn()
    answers = np.stack([labels == 1, labels > 0], 1)
    each = [h_score(LabeledFeatures(features, answer.astype(int))).value for answer in answers.T]
    assert h_score(LabeledFeatures(features, answers.astype(float))).value == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize(("rows", "size"), [(50, 6), (24, 60)])
def test_linear_probe_is_ridge_fitted_once_for_each_row(rows, size):
    from sklearn.linear_model import Ridge

    features, labels, _ = drawn(rows, size, signal=0.5)
    found = linear_probe(LabeledFeatures(features, labels))
    rank = np.linalg.matrix_rank(features)
    accuracies = {}
    for strength in 10.0 ** np.arange(-4, 3):
        penalty = strength * rows * features.var(0).sum() / rank
        right = 0
        for row in range(rows):
            others = np.arange(rows) != row
            ridge = Ridge(alpha=penalty, solver="svd").fit(features[others], np.eye(3)[labels[others]])
            right += ridge.predict(features[[row]]).argmax() == labels[row]
        accuracies[f"penalty {strength:g}"] = right / rows
    assert found.value == pytest.approx(max(accuracies.values()))
    assert accuracies[found.setting] == max(accuracies.values())


def test_knn_by_loops():
    features, labels, _ = drawn(rows=150, signal=0.4)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    right = []
    for row in range(150):
        cosines = unit @ unit[row]
        cosines[row] = -2
        nearest = np.argsort(-cosines)[:5]
        votes = [
            ((labels[nearest] == label).sum(), cosines[nearest][labels[nearest] == label].sum()) for label in range(3)
        ]
        right.append(max(range(3), key=lambda label: votes[label]) == labels[row])
    assert knn(LabeledFeatures(features, labels)).value == pytest.approx(np.mean(right))


def test_nce_and_leep_by_loops():
    features, labels, source = drawn(rows=90)
    sample = LabeledFeatures(features, labels, source=source)
    joint = np.zeros((5, 3))
    for label, shares in zip(labels, source, strict=True):
        joint[:, label] += shares / 90
    leeps = [
        np.log(sum(joint[z, label] / joint[z].sum() * shares[z] for z in range(5)))
        for label, shares in zip(labels, source, strict=True)
    ]
    assert leep(sample).value == pytest.approx(np.mean(leeps), abs=1e-12)
    hard = np.zeros((5, 3))
    for label, shares in zip(labels, source, strict=True):
        hard[shares.argmax(), label] += 1 / 90
    entropy = sum(-p * np.log(p / row.sum()) for row in hard for p in row if p)
    assert nce(sample).value == pytest.approx(-entropy, abs=1e-12)


def test_scores_of_predictions_are_scikit_learns():
    from sklearn.metrics import r2_score, roc_auc_score

    rng = np.random.default_rng(0)
    features, labels, _ = drawn()
    answers = np.stack([labels == 1, labels > 0], 1).astype(float)
    guesses = np.round(answers + rng.normal(size=answers.shape), 1)  # with ties
    assert score_predictions(LabeledFeatures(features, answers), guesses).value == pytest.approx(
        roc_auc_score(answers, guesses)
    )
    numbers = rng.normal(size=(120, 2))
    guesses = numbers + rng.normal(size=(120, 2))
    assert score_predictions(LabeledFeatures(features, numbers), guesses).value == pytest.approx(
        r2_score(numbers, guesses)
    )


SMOOTH = {
    "LogME": lambda f, y, s: logme(LabeledFeatures(f, y)),
    "LogME of numbers": lambda f, y, s: logme(LabeledFeatures(f, f[:, :1] ** 2 + y[:, None], "values")),
    "H-score": lambda f, y, s: h_score(LabeledFeatures(f, y)),
    "H-score of labels": lambda f, y, s: h_score(LabeledFeatures(f, np.stack([y == 1, y > 0], 1).astype(float))),
    "NCE": lambda f, y, s: nce(LabeledFeatures(f, y, source=s)),
    "LEEP": lambda f, y, s: leep(LabeledFeatures(f, y, source=s)),
    "AUC": lambda f, y, s: score_predictions(LabeledFeatures(f, np.stack([y == 1, y > 0], 1).astype(float)), f[:, :2]),
    "R^2": lambda f, y, s: score_predictions(LabeledFeatures(f, f[:, 0] + f[:, 1] ** 2), f[:, :1]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_influence_is_what_leaving_a_row_out_does(name):
    features, labels, source = drawn(rows=400, size=5)
    whole = SMOOTH[name](features, labels, source)
    expected = []
    for row in range(0, 400, 8):
        others = np.arange(400) != row
        without = SMOOTH[name](features[others], labels[others], source[others])
        expected.append(399 * (whole.value - without.value))
    found = whole.influence[::8]
    assert abs(whole.influence.mean()) < 1e-9
    assert np.corrcoef(found, expected)[0, 1] > 0.95
    assert found.std() / np.std(expected) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", TRANSFERABILITY_SCORES)
def test_standard_error_is_the_spread_over_new_rows(name):
    rng = np.random.default_rng(3)
    features, labels, source = drawn(rows=6000, size=6, signal=0.5)
    draws = [rng.choice(6000, 300, replace=False) for _ in range(60)]
    found = [
        TRANSFERABILITY_SCORES[name].compute(LabeledFeatures(features[d], labels[d], source=source[d])) for d in draws
    ]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    # the jackknife of a vote that changes by leaps errs to the wide side (Efron & Stein 1981)
    widest = 1.7 if name == "k-NN" else 1.35
    assert 0.7 < np.mean([estimate.standard_error for estimate in found]) / spread < widest
    low, high = found[0].interval()
    assert high - low == pytest.approx(2 * 1.96 * found[0].standard_error, rel=1e-3)


@pytest.mark.parametrize("name", TRANSFERABILITY_SCORES)
def test_informative_features_score_higher_whatever_the_order_of_rows_and_features(name):
    features, labels, source = drawn(rows=300)
    rng = np.random.default_rng(0)
    noise, shuffled = rng.normal(size=features.shape), rng.permutation(300)
    compute = TRANSFERABILITY_SCORES[name].compute
    good = compute(LabeledFeatures(features, labels, source=source)).value
    assert good > compute(LabeledFeatures(noise, labels, source=source[shuffled])).value
    turned = compute(
        LabeledFeatures(features[shuffled][:, ::-1], labels[shuffled] * 7 + 3, source=source[shuffled])
    ).value
    assert turned == pytest.approx(good, abs=1e-9)


def peer_python() -> str:
    """An interpreter with transformer-ranker: HFTL_PEER_PYTHON, or this one."""
    named = os.environ.get("HFTL_PEER_PYTHON")
    if not named and importlib.util.find_spec("transformer_ranker") is None:
        pytest.skip("no transformer-ranker: name an interpreter that has it in HFTL_PEER_PYTHON")
    return named or sys.executable


def test_transformer_ranker_gives_the_same(digits, tmp_path):
    """LogME and H-score of transformer-ranker 0.2.0, its LogME iterated until it stands.

    Where rows are fewer than features its LogME leaves (D - N) / 2 log(alpha) of the zero eigenvalues in the sum, so
    that part of the formula is compared with the density alone (above).
    """
    found = cases(digits)
    chosen = {name: found[name] for name in ("many rows", "numbers", "digits")}
    file = tmp_path / "cases.npz"
    np.savez(file, **{name: np.column_stack([labels, features]) for name, (features, labels) in chosen.items()})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [peer_python(), "-c", PEER, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for (features, labels), (evidence, spread) in zip(chosen.values(), json.loads(done.stdout), strict=True):
        sample = LabeledFeatures(features, labels)
        assert logme(sample).value == pytest.approx(evidence, abs=1e-6)
        if spread is not None:
            assert h_score(sample).value == pytest.approx(spread, rel=1e-6)


def test_features_that_say_nothing_are_refused():
    features, labels, _ = drawn()
    broken = features.copy()
    broken[[3, 7], 0] = np.nan, np.inf
    with pytest.raises(FeatureError, match="2 of 120 rows are NaN or infinite: rows 3, 7"):
        LabeledFeatures(broken, labels)
    with pytest.raises(FeatureError, match="the same in all 120 rows"):
        LabeledFeatures(np.ones((120, 4)), labels)
    with pytest.raises(FeatureError, match="shape"):
        LabeledFeatures(features[:, 0], labels)
    with pytest.raises(FeatureError, match="source probabilities"):
        LabeledFeatures(features, labels, source=np.ones((3, 2)))
    with pytest.raises(FeatureError, match="NCE and LEEP"):
        nce(LabeledFeatures(features, labels))


def test_labels_that_say_nothing_are_refused():
    features, labels, _ = drawn()
    with pytest.raises(DataError, match="all 120 rows have the class 1"):
        LabeledFeatures(features, np.ones(120, dtype=int))
    with pytest.raises(DataError, match="each class needs a second row"):
        LabeledFeatures(features[:5], np.arange(5))
    with pytest.raises(DataError, match="120 rows of features"):
        LabeledFeatures(features, labels[:-1])
    with pytest.raises(DataError, match="labels of 1 of 120 rows are NaN"):
        LabeledFeatures(features, np.where(np.arange(120) == 4, np.nan, 1.5))
    with pytest.raises(DataError, match="the same label"):
        LabeledFeatures(features, np.full(120, 2.5))
    with pytest.raises(DataError, match="0 or 1"):
        LabeledFeatures(features, np.full((120, 2), 0.5), "labels")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f, y: (np.column_stack([f, np.ones((len(f), 3))]), y),  # features that do not vary
        lambda f, y: (np.column_stack([f, f]), y),  # and ones that repeat others
        lambda f, y: (np.repeat(f, 2, 0), np.repeat(y, 2)),  # every row twice
        lambda f, y: (np.column_stack([f, np.eye(3)[y]]), y),  # the answer among the features
        lambda f, y: (f[:4], np.array([0, 1, 2, 2])),  # fewer rows than neighbours, and than features
        lambda f, y: (f * 1e-20, y),
        lambda f, y: (f * 1e15, y),
        lambda f, y: (np.where(np.arange(len(f))[:, None] < 50, 0.0, f), y),  # rows of zeros
    ],
)
def test_odd_features_have_finite_scores(spoil):
    features, labels, source = drawn()
    features, labels = spoil(features, labels)
    sample = LabeledFeatures(features, labels, source=np.resize(source, (len(features), 5)))
    for name, estimator in TRANSFERABILITY_SCORES.items():
        found = estimator.compute(sample)
        assert np.isfinite(found.value) and np.isfinite(found.influence).all(), name


def test_every_estimator_says_what_it_assumes_and_cites_its_source():
    assert next(iter(TRANSFERABILITY_SCORES)) == "linear probe"
    for estimator in TRANSFERABILITY_SCORES.values():
        assert estimator.assumes.endswith(".") and "https://" in estimator.citation
    features, labels, _ = drawn()
    assert [
        name for name, e in TRANSFERABILITY_SCORES.items() if e.fits(LabeledFeatures(features, features[:, 0]))
    ] == [
        "linear probe",
        "LogME",
        "k-NN",
    ]
