"""scikit-learn heads on frozen features, with hyperparameters selected by stratified cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.errors import FeatureError, shorten
from hftl.heads.classifiers import CLASSIFIERS, ClassifierSpec, pipeline
from hftl.heads.sklearn_head import has_decision_function, logits, raw_outputs
from hftl.logging import log

_ABSENT = -50.0
"""Logit of a class without training rows: its probability is 0 in float32, as the other logits average 0."""


@dataclass(frozen=True)
class Probe:
    """Fitted head with its cross-validation results.

    Attributes:
        head: Name in `CLASSIFIERS`.
        settings: Selected hyperparameters.
        accuracy: Cross-validated accuracy of `settings`.
        loss: Cross-validated mean log-loss of the calibrated probabilities of `settings`.
        tried: All settings, each with its `accuracy` and `loss`.
        folds: Number of folds.
        rows: Number of rows in cross-validation.
        estimator: scikit-learn pipeline, fitted to all rows.
        calibration: See `hftl.heads.sklearn_head.logits`.
        num_classes: Number of classes K.
    """

    head: str
    settings: dict[str, Any]
    accuracy: float
    loss: float
    tried: list[dict[str, Any]]
    folds: int
    rows: int
    estimator: Any
    calibration: float
    num_classes: int

    def linear(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns weight [K, D] and bias [K] in float32 of the linear layer equivalent to the pipeline.

        softmax(features @ weight.T + bias) equals `predict_proba` of logistic regression. For other classifiers it is
        the softmax of decision values (LDA: log posteriors) divided by a temperature. For two classes, the single
        decision value is split between them. Classes without training rows have a probability of 0.

        Raises:
            ValueError: The head is not linear.
        """
        if not CLASSIFIERS[self.head].linear:
            raise ValueError(f"a {self.head} head is not linear")
        # the pipeline is affine: determined by its values at 0 and at the unit vectors
        features = self.estimator.n_features_in_
        intercepts = raw_outputs(self.estimator, np.zeros((1, features)))[0] / self.calibration
        slopes = raw_outputs(self.estimator, np.eye(features)) / self.calibration - intercepts
        weight, bias = np.zeros((self.num_classes, features)), np.full(self.num_classes, _ABSENT)
        # the softmax is invariant to a constant added to all logits of a row
        weight[self.estimator.classes_] = (slopes - slopes.mean(1, keepdims=True)).T
        bias[self.estimator.classes_] = intercepts - intercepts.mean()
        return weight.astype(np.float32), bias.astype(np.float32)

    def record(self) -> dict[str, Any]:
        """Returns the fields for the run record, as JSON values."""
        names = ("head", "settings", "accuracy", "loss", "tried", "folds", "rows", "calibration")
        return {name: getattr(self, name) for name in names}


def fit_classifier(
    values: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    head: str = "logistic",
    *,
    folds: int = 5,
    seed: int = 0,
    threads: int = 1,
) -> Probe:
    """Fits a scikit-learn head to standardized features, with the hyperparameters of best cross-validated accuracy.

    Ties in accuracy are resolved by log-loss. The calibration minimizes the log-loss of the out-of-fold outputs of the
    selected setting: decision values are divided by a temperature, and votes are mixed with the uniform distribution.
    Logistic regression needs no calibration, because it minimizes the log-loss itself.

    Args:
        values: Features [N, D], finite.
        labels: Classes [N], integers 0..num_classes-1. Classes without rows are never predicted.
        num_classes: Number of classes K.
        head: Name in `CLASSIFIERS`.
        folds: Number of folds; reduced to the number of rows in the smallest class.
        seed: Seed of the folds and of randomized classifiers.
        threads: Number of threads of multi-threaded classifiers.

    Raises:
        FeatureError: Features are not finite, or equal in all rows; there are fewer than two classes, or a class has a
            single row.
    """
    labels = np.asarray(labels)
    spec, folds = CLASSIFIERS[head], usable_folds(values, labels, folds)
    cv_rows = _stratified_sample(labels, spec.max_cv_rows, folds, seed)
    grid = _usable_grid(spec, len(cv_rows) - -(-len(cv_rows) // folds), values.shape[1])
    cv_values = np.ascontiguousarray(values[cv_rows], dtype=np.float32)
    classes, codes = np.unique(labels[cv_rows], return_inverse=True)
    with _ignore_convergence_warnings():
        out_of_fold = _cross_validate(spec, head, grid, cv_values, codes, folds, seed, threads)
        tried, calibrations = [], []
        decision = has_decision_function(spec.make(seed, threads))
        for setting, outputs in zip(grid, out_of_fold, strict=True):
            calibration = calibrate(outputs, codes, decision) if spec.needs_calibration else 1.0
            calibrated = logits(outputs, calibration, decision)
            accuracy = float((calibrated.argmax(1) == codes).mean())
            tried.append({**setting, "accuracy": accuracy, "loss": float(_log_losses(calibrated, codes).mean())})
            calibrations.append(calibration)
        best = min(range(len(grid)), key=lambda i: (-tried[i]["accuracy"], tried[i]["loss"]))
        estimator = pipeline(spec, *values.shape, spec.make(seed, threads).set_params(**grid[best]))
        estimator.fit(np.asarray(values, dtype=np.float64), labels)
    if head == "random_forest":
        estimator[-1].set_params(n_jobs=1)  # starting threads per batch takes longer than it saves
    scores = {name: tried[best][name] for name in ("accuracy", "loss")}
    return Probe(
        head, grid[best], **scores, tried=tried, folds=folds, rows=len(cv_rows), estimator=estimator,
        calibration=calibrations[best], num_classes=num_classes,
    )  # fmt: skip


def usable_folds(values: np.ndarray, labels: np.ndarray, folds: int) -> int:
    """Returns the number of folds, at most `folds`, for which each class has at least one row per fold.

    Raises:
        FeatureError: Cross-validation is impossible; see `fit_classifier`.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise FeatureError(f"probe: all {len(labels)} training rows have the class {classes}; allowed: two or more.")
    single = [str(name) for name in classes[counts == 1].tolist()]
    if single:
        raise FeatureError(
            f"probe: class(es) {shorten(single)} have a single training row, but cross-validation needs at least 2. "
            "Add rows, remove the class, or set adapt.method frozen."
        )
    nonfinite = np.flatnonzero(~np.isfinite(values).all(1))
    if len(nonfinite):
        rows = shorten([str(row) for row in nonfinite], 8)
        raise FeatureError(f"probe: features of {len(nonfinite)} training row(s) are NaN or infinite: {rows}.")
    if not np.ptp(values, axis=0).any():
        raise FeatureError("probe: features are equal in all training rows. Choose another backbone.")
    if counts.min() < folds:
        log(f"probe: {counts.min()} folds instead of {folds}, the number of training rows of the smallest class")
    return int(min(folds, counts.min()))


def calibrate(outputs: np.ndarray, codes: np.ndarray, decision: bool) -> float:
    """Returns the calibration for `hftl.heads.sklearn_head.logits` that minimizes the log-loss on these rows.

    Args:
        outputs: Outputs [N, C] of `raw_outputs`, of estimators not fitted to these rows.
        codes: Column of the true class of each row [N].
        decision: Whether `outputs` are decision values. Their targets are smoothed as in Platt (1999, section 2.2), so
            that an optimal temperature exists even if all rows are classified correctly.
    """
    from scipy.optimize import minimize_scalar

    rows, num_classes = outputs.shape
    smoothing = 1 / (rows + 2)
    if not decision:
        loss = lambda weight: _log_losses(logits(outputs, weight, False), codes).mean()  # noqa: E731
        optimum: Any = minimize_scalar(loss, bounds=(smoothing, 0.5), method="bounded")
        return float(optimum.x)
    targets = np.full(outputs.shape, smoothing / (num_classes - 1))
    targets[np.arange(rows), codes] = 1 - smoothing
    unit = float(outputs.std()) or 1.0

    def smoothed_loss(log_temperature: float) -> float:
        scaled = logits(outputs, unit * np.exp(log_temperature), True)
        return float(-(targets * _log_softmax(scaled)).sum(1).mean())

    optimum = minimize_scalar(smoothed_loss, bounds=(-5, 5), method="bounded")
    return unit * float(np.exp(optimum.x))


def _cross_validate(
    spec: ClassifierSpec,
    head: str,
    grid: Sequence[dict[str, Any]],
    values: np.ndarray,
    codes: np.ndarray,
    folds: int,
    seed: int,
    threads: int,
) -> np.ndarray:
    """Returns the out-of-fold outputs of each setting for each row [settings, N, C]."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.model_selection import StratifiedKFold

    out_of_fold = np.zeros((len(grid), len(values), int(codes.max()) + 1))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(values, codes):
        preprocessing = pipeline(spec, len(train), values.shape[1])
        train_values, test_values = preprocessing.fit_transform(values[train]), preprocessing.transform(values[test])
        classifier = spec.make(seed, threads).set_params(**spec.cv_settings)
        train_distances = test_distances = train_values
        if head == "svm":  # one matrix product for all settings; libsvm would compute kernel values one by one
            train_distances, test_distances = (
                euclidean_distances(rows, train_values, squared=True) for rows in (train_values, test_values)
            )
        for number, setting in enumerate(grid):
            if head == "svm":
                classifier.set_params(kernel="precomputed", C=setting["C"])
                fit_inputs = np.exp(-setting["gamma"] * train_distances)
                inputs = np.exp(-setting["gamma"] * test_distances)
            else:
                classifier.set_params(**setting)
                fit_inputs, inputs = train_values, test_values
            out_of_fold[number, test] = raw_outputs(classifier.fit(fit_inputs, codes[train]), inputs)
    return out_of_fold


def _usable_grid(spec: ClassifierSpec, rows: int, features: int) -> list[dict[str, Any]]:
    """Returns the grid for `rows` rows to fit to: without larger `n_neighbors`, and gamma divided by `features`."""
    grid = [dict(setting) for setting in spec.grid if setting.get("n_neighbors", 1) <= rows]
    for setting in grid:
        if "gamma" in setting:
            setting["gamma"] /= features
    return grid


def _stratified_sample(labels: np.ndarray, max_rows: int, folds: int, seed: int) -> np.ndarray:
    """Returns at most `max_rows` random row numbers, sorted, with at least `folds` rows of each class."""
    if len(labels) <= max_rows:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.unique(labels[by_class], return_index=True)[1]
    rank_in_class = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))
    required = by_class[rank_in_class < folds]
    rest = order[~np.isin(order, required)]
    log(f"probe: cross-validation on {max_rows:,} of {len(labels):,} training rows; final fit on all rows")
    return np.sort(np.concatenate([required, rest])[: max(max_rows, len(required))])


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _log_losses(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return -_log_softmax(values)[np.arange(len(codes)), codes]


@contextmanager
def _ignore_convergence_warnings() -> Iterator[None]:
    """Suppresses convergence warnings of scikit-learn: settings that fit badly are not selected."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
