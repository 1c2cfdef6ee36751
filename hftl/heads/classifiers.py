"""scikit-learn classifiers and their hyperparameter grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_TREES = 200


@dataclass(frozen=True)
class ClassifierSpec:
    """Classifier with preprocessing and hyperparameter grid.

    Attributes:
        make: Maps seed and number of threads to the unfitted classifier.
        grid: Hyperparameter settings, fastest to fit first.
        max_cv_rows: Maximum number of training rows in cross-validation; the selected classifier is fitted to all rows.
        linear: Whether the classifier is linear, with one weight per feature and class.
        needs_calibration: Whether outputs must be calibrated before their softmax is a probability.
        unit_length: Whether rows are scaled to unit length, so that distances are monotonic in cosine similarity.
        max_components: Maximum number of principal components as input; None: the features without PCA.
        cv_settings: Hyperparameters used in cross-validation only, to reduce its run time.
    """

    make: Callable[[int, int], Any]
    grid: Sequence[dict[str, Any]]
    max_cv_rows: int
    linear: bool = True
    needs_calibration: bool = True
    unit_length: bool = False
    max_components: int | None = None
    cv_settings: dict[str, Any] = field(default_factory=dict)


def _logistic(seed: int, threads: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    # warm start from the previous setting of the grid; the final fit uses the smaller tolerance
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


def _grid(name: str, *values: Any, **fixed: Any) -> list[dict[str, Any]]:
    return [{name: value, **fixed} for value in values]


# Grids assume standardized features. `max_cv_rows` keeps cross-validation on 1,280 features within minutes.
CLASSIFIERS: dict[str, ClassifierSpec] = {
    "logistic": ClassifierSpec(
        _logistic,
        _grid("C", 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0),
        10_000,
        needs_calibration=False,
        cv_settings={"tol": 1e-4},
    ),
    "linear_svm": ClassifierSpec(_linear_svm, _grid("C", 1e-5, 1e-4, 1e-3, 1e-2), 3_000),
    "ridge": ClassifierSpec(_ridge, _grid("alpha", 1.0, 10.0, 1e2, 1e3, 1e4), 10_000),
    "lda": ClassifierSpec(_lda, _grid("shrinkage", 0.01, 0.1, 0.3, 0.7), 5_000, max_components=512),
    "svm": ClassifierSpec(
        _svm, [*_grid("C", 1.0, 10.0, gamma=1.0), *_grid("C", 1.0, 10.0, gamma=0.3)], 4_000, linear=False
    ),
    "random_forest": ClassifierSpec(
        _random_forest, _grid("min_samples_leaf", 1, 4), 2_000, linear=False, cv_settings={"n_estimators": _TREES // 4}
    ),
    "knn": ClassifierSpec(_knn, _grid("n_neighbors", 1, 5, 10, 20, 40), 5_000, linear=False, unit_length=True),
}
"""Classifiers by their names in `adapt.probe.classifier`. The SVM's gamma is in units of 1 / D."""


def pipeline(spec: ClassifierSpec, rows: int, features: int, *last: Any) -> Any:
    """Builds the scikit-learn pipeline of preprocessing for a classifier, followed by `last`.

    Args:
        spec: Classifier.
        rows: Number of rows N to fit to.
        features: Feature size D.
        *last: Final steps, such as the classifier.
    """
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    steps: list[Any] = [StandardScaler()]
    if spec.unit_length:
        steps.append(Normalizer())
    if spec.max_components and min(rows, features) > 1:
        solver = "full" if rows < features else "covariance_eigh"  # equal results; selects the faster solver
        steps.append(PCA(min(spec.max_components, rows, features), svd_solver=solver))
    return make_pipeline(*steps, *last)
