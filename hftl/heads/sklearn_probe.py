"""Classic heads on frozen features, by scikit-learn; their settings by stratified cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hftl.errors import FeatureError, shorten
from hftl.heads.classifiers import KINDS, ClassifierSpec, pipeline
from hftl.heads.sklearn_head import decides, logits, raw_outputs
from hftl.logging import log

_ABSENT = -50.0
"""Logit of a class without training rows, beside others that average 0: its probability is 0 in float32."""


@dataclass(frozen=True)
class Probe:
    """A fitted head and what cross-validation said.

    Attributes:
        head: Its name in `KINDS`.
        settings: The chosen ones.
        accuracy: Of the chosen ones, cross-validated.
        loss: The same for the mean log-loss of the calibrated probabilities.
        tried: Every setting with its `accuracy` and `loss`.
        folds: Parts of the cross-validation.
        rows: Rows that it used.
        estimator: scikit-learn's pipeline, fitted to all rows.
        calibration: See `hftl.heads.sklearn_head.logits`.
        num_classes: K.
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
        """Returns weight [K, D] and bias [K], float32, whose logits of raw features are those of the pipeline.

        softmax(features @ weight.T + bias) is `predict_proba` of a logistic head. Of the others it is the softmax of
        decision values (of LDA: log posteriors) over a temperature. Two classes share the one decision value. A class
        without training rows gets a probability of 0.

        Raises:
            ValueError: The head is not linear.
        """
        if not KINDS[self.head].linear:
            raise ValueError(f"a {self.head} head is not linear")
        # what the pipeline does is affine: its values at 0 and at the unit vectors are all there is to know
        features = self.estimator.n_features_in_
        at_zero = raw_outputs(self.estimator, np.zeros((1, features)))[0] / self.calibration
        slopes = raw_outputs(self.estimator, np.eye(features)) / self.calibration - at_zero
        weight, bias = np.zeros((self.num_classes, features)), np.full(self.num_classes, _ABSENT)
        # a constant added to all logits of a row changes nothing
        weight[self.estimator.classes_] = (slopes - slopes.mean(1, keepdims=True)).T
        bias[self.estimator.classes_] = at_zero - at_zero.mean()
        return weight.astype(np.float32), bias.astype(np.float32)

    def record(self) -> dict[str, Any]:
        """Returns what is worth keeping in the record of a run, as JSON values."""
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
    """Fits a classic head to standardised features; its settings are those with the best cross-validated accuracy.

    Of settings with equal accuracy the log-loss decides. The calibration comes from the out-of-fold outputs of the
    chosen ones: decision values are divided by the temperature, and votes mixed with the share of equal probabilities,
    that give the least log-loss. Logistic regression needs none: it is fitted to the log-loss.

    Args:
        values: Features [N, D], finite.
        labels: Classes [N], integers 0..num_classes-1. Classes without rows are never predicted.
        num_classes: K.
        head: A name in `KINDS`.
        folds: Parts of the cross-validation; as many as the smallest class has rows, where these are fewer.
        seed: Of the folds, and of the heads that draw numbers.
        threads: For the heads that take several.

    Raises:
        FeatureError: Features are not finite, or the same in all rows; there are fewer than two classes, or a class
            with a single row.
    """
    labels = np.asarray(labels)
    kind, folds = KINDS[head], usable_folds(values, labels, folds)
    picked = _stratified(labels, kind.rows, folds, seed)
    grid = _grid(kind, len(picked) - -(-len(picked) // folds), values.shape[1])
    some = np.ascontiguousarray(values[picked], dtype=np.float32)
    classes, codes = np.unique(labels[picked], return_inverse=True)
    with _quietly():
        out_of_fold = _cross_validate(kind, head, grid, some, codes, folds, seed, threads)
        tried, calibrations = [], []
        decision = decides(kind.make(seed, threads))
        for setting, outputs in zip(grid, out_of_fold, strict=True):
            calibration = calibrate(outputs, codes, decision) if kind.calibrated else 1.0
            found = logits(outputs, calibration, decision)
            right = float((found.argmax(1) == codes).mean())
            tried.append({**setting, "accuracy": right, "loss": float(_log_losses(found, codes).mean())})
            calibrations.append(calibration)
        best = min(range(len(grid)), key=lambda i: (-tried[i]["accuracy"], tried[i]["loss"]))
        estimator = pipeline(kind, *values.shape, kind.make(seed, threads).set_params(**grid[best]))
        estimator.fit(np.asarray(values, dtype=np.float64), labels)
    if head == "random_forest":
        estimator[-1].set_params(n_jobs=1)  # starting threads for each batch costs more than they give
    scores = {name: tried[best][name] for name in ("accuracy", "loss")}
    return Probe(
        head, grid[best], **scores, tried=tried, folds=folds, rows=len(picked), estimator=estimator,
        calibration=calibrations[best], num_classes=num_classes,
    )  # fmt: skip


def usable_folds(values: np.ndarray, labels: np.ndarray, folds: int) -> int:
    """Returns the number of folds that every class has a row for, at most `folds`; says so where it is lower.

    Raises:
        FeatureError: No cross-validation is possible; see `fit_classifier`.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise FeatureError(f"probe: the {len(labels)} training rows have one class ({classes}); two are needed.")
    single = [str(name) for name in classes[counts == 1].tolist()]
    if single:
        raise FeatureError(
            f"probe: class(es) {shorten(single)} have a single training row, and cross-validation needs one to fit to "
            "and one to measure. Add rows or drop the class, or say adapt.method frozen."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        rows = shorten([str(row) for row in bad], 8)
        raise FeatureError(f"probe: features of {len(bad)} training row(s) are NaN or infinite: {rows}.")
    if not np.ptp(values, axis=0).any():
        raise FeatureError("probe: the features of all training rows are the same: this backbone tells none apart.")
    if counts.min() < folds:
        log(f"probe: {counts.min()} folds instead of {folds}: the smallest class has no more training rows")
    return int(min(folds, counts.min()))


def calibrate(outputs: np.ndarray, codes: np.ndarray, decision: bool) -> float:
    """Returns the calibration of `hftl.heads.sklearn_head.logits` with the least log-loss on these rows.

    Args:
        outputs: [N, C] from `raw_outputs` of estimators that were not fitted to these rows.
        codes: The true columns [N].
        decision: Whether `outputs` are decision values. Their targets are those of Platt (1999, section 2.2), which are
            not quite 0 and 1, so that there is a best temperature where every row is right too.
    """
    from scipy.optimize import minimize_scalar

    rows, count = outputs.shape
    few = 1 / (rows + 2)
    if not decision:
        loss = lambda share: _log_losses(logits(outputs, share, False), codes).mean()  # noqa: E731
        found: Any = minimize_scalar(loss, bounds=(few, 0.5), method="bounded")
        return float(found.x)
    targets = np.full(outputs.shape, few / (count - 1))
    targets[np.arange(rows), codes] = 1 - few
    unit = float(outputs.std()) or 1.0

    def smoothed(log_temperature: float) -> float:
        scaled = logits(outputs, unit * np.exp(log_temperature), True)
        return float(-(targets * _log_softmax(scaled)).sum(1).mean())

    found = minimize_scalar(smoothed, bounds=(-5, 5), method="bounded")
    return unit * float(np.exp(found.x))


def _cross_validate(
    kind: ClassifierSpec,
    head: str,
    grid: Sequence[dict[str, Any]],
    values: np.ndarray,
    codes: np.ndarray,
    folds: int,
    seed: int,
    threads: int,
) -> np.ndarray:
    """Returns what each setting says of each row when it is fitted to the other folds [settings, N, C]."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.model_selection import StratifiedKFold

    out = np.zeros((len(grid), len(values), int(codes.max()) + 1))
    for rest, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(values, codes):
        scaled = pipeline(kind, len(rest), values.shape[1])
        inside, outside = scaled.fit_transform(values[rest]), scaled.transform(values[held])
        classifier = kind.make(seed, threads).set_params(**kind.meanwhile)
        near = far = inside
        if head == "svm":  # one matrix product for all settings; libsvm would compute each kernel value by itself
            near, far = (euclidean_distances(of, inside, squared=True) for of in (inside, outside))
        for number, setting in enumerate(grid):
            if head == "svm":
                classifier.set_params(kernel="precomputed", C=setting["C"])
                seen, new = np.exp(-setting["gamma"] * near), np.exp(-setting["gamma"] * far)
            else:
                classifier.set_params(**setting)
                seen, new = inside, outside
            out[number, held] = raw_outputs(classifier.fit(seen, codes[rest]), new)
    return out


def _grid(kind: ClassifierSpec, rows: int, features: int) -> list[dict[str, Any]]:
    """Returns the settings that make sense for so many rows to fit to and so many features."""
    grid = [dict(setting) for setting in kind.grid if setting.get("n_neighbors", 1) <= rows]
    for setting in grid:
        if "gamma" in setting:
            setting["gamma"] /= features
    return grid


def _stratified(labels: np.ndarray, most: int, folds: int, seed: int) -> np.ndarray:
    """Returns at most `most` row numbers, sorted, drawn at random but with `folds` rows of each class among them."""
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.unique(labels[by_class], return_index=True)[1]
    within = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))
    first = by_class[within < folds]
    rest = order[~np.isin(order, first)]
    log(f"probe: settings are chosen on {most:,} of the {len(labels):,} training rows; the head is fitted to all")
    return np.sort(np.concatenate([first, rest])[: max(most, len(first))])


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _log_losses(found: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return -_log_softmax(found)[np.arange(len(codes)), codes]


@contextmanager
def _quietly() -> Iterator[None]:
    """Leaves out what scikit-learn says of settings that converge slowly: those that did badly are not chosen."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
