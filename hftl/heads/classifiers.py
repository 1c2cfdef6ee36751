"""The classic heads: which estimators of scikit-learn, and which of their settings are tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_TREES = 200


@dataclass(frozen=True)
class ClassifierSpec:
    """One way of fitting a head.

    Attributes:
        make: Seed and threads -> the unfitted classifier.
        grid: Settings that are tried, cheapest first.
        rows: Most training rows that cross-validation uses; the chosen head is fitted to all.
        linear: Whether it has one weight for each feature and class.
        calibrated: Whether its outputs need a calibration before their softmax is a probability.
        unit_length: Whether rows are scaled to length 1, so that distances are those of cosines.
        components: Most principal components that the head is given; None: the features themselves.
        meanwhile: Settings during cross-validation alone, to save time.
    """

    make: Callable[[int, int], Any]
    grid: Sequence[dict[str, Any]]
    rows: int
    linear: bool = True
    calibrated: bool = True
    unit_length: bool = False
    components: int | None = None
    meanwhile: dict[str, Any] = field(default_factory=dict)


def _logistic(seed: int, threads: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    # along the grid each start is the solution before; the head that is kept is solved to the end
    return LogisticRegression(max_iter=5000, tol=1e-8, warm_start=True)


def _linear_svm(seed: int, threads: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(dual=True, max_iter=2000, random_state=seed)  # pyright: ignore[reportArgumentType]


def _ridge(seed: int, threads: int) -> Any:
    from sklearn.linear_model import RidgeClassifier

    return RidgeClassifier()


def _lda(seed: int, threads: int) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr")


def _svm(seed: int, threads: int) -> Any:
    from sklearn.svm import SVC

    return SVC(cache_size=1000)


def _random_forest(seed: int, threads: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(_TREES, random_state=seed, n_jobs=threads)


def _knn(seed: int, threads: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(algorithm="brute")


def _each(name: str, *values: Any, **fixed: Any) -> list[dict[str, Any]]:
    return [{name: value, **fixed} for value in values]


# Grids are for standardised features. The numbers of rows keep a cross-validation of 1,280 features within minutes.
KINDS: dict[str, ClassifierSpec] = {
    "logistic": ClassifierSpec(
        _logistic,
        _each("C", 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0),
        10_000,
        calibrated=False,
        meanwhile={"tol": 1e-4},
    ),
    "linear_svm": ClassifierSpec(_linear_svm, _each("C", 1e-5, 1e-4, 1e-3, 1e-2), 3_000),
    "ridge": ClassifierSpec(_ridge, _each("alpha", 1.0, 10.0, 1e2, 1e3, 1e4), 10_000),
    "lda": ClassifierSpec(_lda, _each("shrinkage", 0.01, 0.1, 0.3, 0.7), 5_000, components=512),
    "svm": ClassifierSpec(
        _svm, [*_each("C", 1.0, 10.0, gamma=1.0), *_each("C", 1.0, 10.0, gamma=0.3)], 4_000, linear=False
    ),
    "random_forest": ClassifierSpec(
        _random_forest, _each("min_samples_leaf", 1, 4), 2_000, linear=False, meanwhile={"n_estimators": _TREES // 4}
    ),
    "knn": ClassifierSpec(_knn, _each("n_neighbors", 1, 5, 10, 20, 40), 5_000, linear=False, unit_length=True),
}
"""By the names of `adapt.probe.classifier`. An SVM's gamma is in units of 1 / D."""


def pipeline(kind: ClassifierSpec, rows: int, features: int, *last: Any) -> Any:
    """Returns scikit-learn's pipeline of what happens to features before a head, and `last`."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    steps: list[Any] = [StandardScaler()]
    if kind.unit_length:
        steps.append(Normalizer())
    if kind.components and min(rows, features) > 1:
        solver = "full" if rows < features else "covariance_eigh"  # the faster of two that give the same
        steps.append(PCA(min(kind.components, rows, features), svd_solver=solver))
    return make_pipeline(*steps, *last)
