"""Transferability scores: training-free estimates of how well a backbone fits a task, from its frozen features.

Each function takes a `LabeledFeatures` and returns an `Estimate`: the score (larger is better) and the influence of
each row on it. `TRANSFERABILITY_SCORES` lists all scores with assumptions and sources.

Shapes: N rows, D feature size, R rank of the features, K targets (classes, labels or numbers), Z source classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hftl.errors import FeatureError
from hftl.features.labeled_features import LabeledFeatures, LabelKind

_PENALTIES = tuple(10.0**power for power in range(-4, 3))
"""Ridge penalties of the linear probe, in units of the mean variance per axis of the features."""
_RATIO_RANGE = (1e-8, 1e8)
"""Bounds of LogME's alpha / beta, in units of the smallest and the largest nonzero eigenvalue: evidence has no maximum
if the features reproduce the labels."""


@dataclass(frozen=True)
class Estimate:
    """Score with the influence of each row, for standard errors.

    Attributes:
        value: Score.
        influence: Derivative of the score with respect to the weight of each row, times N, [N]; its mean is 0. The
            score of rows resampled with counts w is about value + mean((w - 1) influence), and its standard error is
            sqrt(mean(influence^2) / N): the infinitesimal jackknife (Jaeckel 1972; Efron 1982, chapter 6).
        setting: Hyperparameter selected by cross-validation, as text.
    """

    value: float
    influence: np.ndarray
    setting: str = ""

    @property
    def standard_error(self) -> float:
        """Standard error of the score over random samples of rows."""
        return float(np.sqrt(np.mean(self.influence**2) / len(self.influence)))

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float]:
        """Returns value -/+ z standard errors; the default z gives a 95 % interval."""
        return self.value - z * self.standard_error, self.value + z * self.standard_error


def logme(sample: LabeledFeatures) -> Estimate:
    """Returns the log evidence per row of a Bayesian linear model with optimal prior, averaged over targets.

    You et al. 2021 (https://arxiv.org/abs/2102.11005, equation 2). Targets are one-hot columns, labels, or unscaled
    numbers. Evidence may have several maxima in the ratio t = alpha / beta, so the fixed-point iteration of You et al.
    2022 (https://arxiv.org/abs/2110.10545, section 4.3) starts at the maximum on a grid and runs to convergence:
    t <- gamma |y - Fm|^2 / ((N - gamma) |m|^2) with gamma = sum(sigma / (sigma + t)). By the envelope theorem, the
    influence of a row is its own term of the evidence.
    """
    rows, (sigma, axes) = len(sample), (sample.spectrum.sigma, sample.spectrum.axes)
    projected = sample.projections**2  # z^2 [R, K]
    unexplained = np.maximum((sample.targets**2).sum(0) - (1 / sigma) @ projected, 0.0)
    low, high = _RATIO_RANGE[0] * sigma[0], _RATIO_RANGE[1] * sigma[-1]
    grid = np.geomspace(low, high, 200)
    squared = 1 / (sigma + grid[:, None]) ** 2  # [200, R]
    misfit = unexplained + grid[:, None] ** 2 * (squared / sigma @ projected) + grid[:, None] * (squared @ projected)
    volume = np.log1p(sigma / grid[:, None]).sum(1)
    ratio, active = grid[(-rows * np.log(misfit) - volume[:, None]).argmax(0)], np.arange(projected.shape[1])
    for _ in range(1000):
        residual, norm, gamma = _ridge_norms(sigma, projected[:, active], unexplained[active], ratio[active])
        new_ratio = gamma * residual / np.maximum((rows - gamma) * norm, np.finfo(float).tiny)
        new_ratio = np.clip(new_ratio, low, high)
        change = np.abs(np.log(new_ratio / ratio[active]))
        ratio[active] = new_ratio
        active = active[change > 1e-9]
        if not len(active):
            break
    residual, norm, _ = _ridge_norms(sigma, projected, unexplained, ratio)
    # optimal beta for this ratio; the zero eigenvalues of F^T F cancel against D log(alpha)
    beta = rows / np.maximum(residual + ratio * norm, np.finfo(float).tiny)
    evidence = rows / 2 * (np.log(beta / (2 * np.pi)) - 1) - np.log1p(sigma[:, None] / ratio).sum(0) / 2
    weights = 1 / (sigma[:, None] + ratio)
    errors = sample.targets - axes @ (weights * sample.projections)
    terms = (beta * errors**2 + sample.squares @ weights).mean(1) / -2
    return Estimate(float(evidence.mean() / rows), terms - terms.mean())


def _ridge_norms(
    sigma: np.ndarray, projected: np.ndarray, unexplained: np.ndarray, ratio: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Returns |y - Fm|^2, |m|^2 and gamma [K] of the ridge solutions m with penalty `ratio` [K]."""
    weights = 1 / (sigma[:, None] + ratio)
    norm = (projected * weights**2).sum(0)
    residual = unexplained + ratio**2 * (projected / sigma[:, None] * weights**2).sum(0)
    return residual, norm, sigma @ weights


def h_score(sample: LabeledFeatures) -> Estimate:
    """Returns (1 - a) tr(S^-1 B) for the covariance B of the class means and the shrunk covariance S of the features.

    Ibrahim et al. 2021 (https://arxiv.org/abs/2110.06893), after Bao et al. 2019; shrinkage a by Ledoit & Wolf 2004.
    The covariance divides by N and that of the class means by N - 1, as in existing implementations. The score of
    multi-label targets is the mean over labels. The influence treats a as constant.
    """
    rows, size = sample.features.shape
    centered = sample.features - sample.features.mean(0)
    covariance = centered.T @ centered / rows
    squares = (centered**2).sum(1)
    shrinkage, level = _ledoit_wolf(covariance, float((squares**2).mean()), rows)
    shrunk = (1 - shrinkage) * covariance
    shrunk.flat[:: size + 1] += shrinkage * level
    is_multi_label = sample.kind == "labels"
    groups = np.concatenate([sample.targets, 1 - sample.targets], 1) if is_multi_label else sample.targets
    num_labels = sample.targets.shape[1] if is_multi_label else 1
    counts = groups.sum(0)
    means = groups.T @ centered / counts[:, None]  # [J, D]
    solved = _solve(shrunk, means.T)  # S^-1 m [D, J]
    distances, fractions = (means.T * solved).sum(0), counts / rows  # m^T S^-1 m [J]
    value = (1 - shrinkage) * rows / (rows - 1) * float(fractions @ distances) / num_labels
    scores = centered @ solved
    terms = (groups * (2 * scores - distances)).sum(1) - (1 - shrinkage) * (scores**2 @ fractions)
    terms -= shrinkage * squares / size * float((solved**2).sum(0) @ fractions)
    return Estimate(value, (1 - shrinkage) * (terms - terms.mean()) / num_labels)


def _ledoit_wolf(covariance: np.ndarray, fourth_moment: float, rows: int) -> tuple[float, float]:
    """Returns the shrinkage in [0, 1] toward a multiple of the identity, and that multiple.

    Ledoit & Wolf 2004, lemma 3.3; `fourth_moment` is the mean of |x|^4 over the centered rows.
    """
    size = len(covariance)
    level = float(np.trace(covariance)) / size
    total = float((covariance**2).sum())
    noise, distance = (fourth_moment - total) / rows, total - size * level**2
    return (float(np.clip(noise / distance, 0, 1)) if distance > 0 else 0.0), level


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import LinAlgError, cho_factor, cho_solve, pinvh

    try:
        return cho_solve(cho_factor(matrix, check_finite=False), right, check_finite=False)
    except LinAlgError:  # constant feature and no shrinkage
        return pinvh(matrix) @ right


def linear_probe(sample: LabeledFeatures) -> Estimate:
    """Returns the leave-one-out score of ridge regression on the features: accuracy, mean AUC, or R^2.

    Targets are one-hot classes (predicted by the largest output), labels or numbers; the intercept is not penalized.
    Leave-one-out residuals have the closed form (y - fit) / (1 - leverage) (Allen 1974,
    https://doi.org/10.2307/1267500), so all N fits at all penalties share the factorization of LogME. The penalty with
    the best score is selected, the larger one of equals; selecting one number on N rows has little optimistic bias.
    """
    sigma, axes = sample.spectrum.sigma, sample.spectrum.axes
    ones = axes.sum(0)  # Q^T 1
    variance = sample.features.var(0).sum() * len(sample) / len(sigma)
    best: Estimate | None = None
    for penalty in reversed(_PENALTIES):
        weights = 1 / (sigma + penalty * variance)
        unexplained = 1 - axes @ (weights * ones)
        total = max(float(unexplained.sum()), np.finfo(float).tiny)
        fit = axes @ (weights[:, None] * sample.projections)
        fit += np.outer(unexplained, unexplained @ sample.targets / total)
        leverage = sample.squares @ weights + unexplained**2 / total
        denominator = np.maximum(1 - leverage, 1e-10)[:, None]
        predicted = sample.targets - (sample.targets - fit) / denominator
        estimate = score_predictions(sample, predicted, f"penalty {penalty:g}")
        if best is None or estimate.value > best.value:
            best = estimate
    assert best is not None
    return best


def knn(sample: LabeledFeatures) -> Estimate:
    """Returns the leave-one-out score of k nearest neighbors by cosine similarity: accuracy, mean AUC, or R^2.

    Classes are predicted by majority vote, ties by summed similarity; labels and numbers by the mean over neighbors
    (Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964). The influence of a row on the accuracy is the exact
    jackknife: without the row, its neighbors lose its vote and their next neighbor votes instead. For labels and
    numbers, the influence treats the neighbors as fixed.
    """
    rows, classes, k = len(sample), sample.classes, sample.k
    neighbors, cosines = sample.neighbors
    if classes is None:
        return score_predictions(sample, sample.targets[neighbors[:, :k]].mean(1))
    neighbor_classes, weights, index = classes[neighbors], 1 + 1e-3 * cosines, np.arange(rows)
    votes = np.zeros(sample.targets.shape)
    np.add.at(votes, (index[:, None], neighbor_classes[:, :k]), weights[:, :k])
    estimate = score_predictions(sample, votes)
    if neighbors.shape[1] == k:  # no further row replaces a neighbor
        return estimate
    correct, indirect = votes.argmax(1) == classes, np.zeros(rows)
    votes[index, neighbor_classes[:, k]] += weights[:, k]
    for slot in range(k):
        votes[index, neighbor_classes[:, slot]] -= weights[:, slot]
        np.add.at(indirect, neighbors[:, slot], correct - (votes.argmax(1) == classes).astype(float))
        votes[index, neighbor_classes[:, slot]] += weights[:, slot]
    return Estimate(estimate.value, estimate.influence + indirect - indirect.mean())


def nce(sample: LabeledFeatures) -> Estimate:
    """Returns the mean log p(class | source class) from pair frequencies: the negative conditional entropy.

    Tran et al. 2019 (https://arxiv.org/abs/1908.08142, equation 3). The source class of a row is its most probable one.
    """
    classes, source = _classes_and_source(sample)
    source_classes = source.argmax(1)
    counts = np.zeros((source.shape[1], sample.targets.shape[1]))
    np.add.at(counts, (source_classes, classes), 1)
    terms = np.log(counts[source_classes, classes] / counts.sum(1)[source_classes])
    return Estimate(float(terms.mean()), terms - terms.mean())


def leep(sample: LabeledFeatures) -> Estimate:
    """Returns the mean log-likelihood of the classes under predictions derived from source probabilities.

    Nguyen et al. 2020 (https://arxiv.org/abs/2002.12462, equations 1 and 2): p(y | x) = sum_z p(y | z) p(z | x), with
    p(y | z) from the same rows.
    """
    classes, source = _classes_and_source(sample)
    mass = np.maximum(source.sum(0), np.finfo(float).tiny)
    conditional = source.T @ sample.targets / mass[:, None]  # p(y | z) [Z, K]
    likelihood = np.maximum((source * conditional[:, classes].T).sum(1), np.finfo(float).tiny)
    terms = np.log(likelihood)
    # influence of each row on p(y | z), and through it on the likelihood of all rows
    slope = source.T @ (sample.targets / likelihood[:, None])
    indirect = (slope - (conditional * slope).sum(1, keepdims=True)) / mass[:, None]
    influence = terms + (source * indirect[:, classes].T).sum(1)
    return Estimate(float(terms.mean()), influence - influence.mean())


def _classes_and_source(sample: LabeledFeatures) -> tuple[np.ndarray, np.ndarray]:
    if sample.classes is None or sample.source is None:
        raise FeatureError("NCE and LEEP need class labels, and class probabilities of the pretrained head.")
    return sample.classes, sample.source


def score_predictions(sample: LabeledFeatures, predicted: np.ndarray, setting: str = "") -> Estimate:
    """Scores out-of-sample predictions [N, K].

    Classes: accuracy. Labels: mean area under the ROC curve (influence: DeLong et al. 1988). Numbers: mean R^2.
    """
    if sample.classes is not None:
        correct = (predicted.argmax(1) == sample.classes).astype(float)
        return Estimate(float(correct.mean()), correct - correct.mean(), setting)
    if sample.kind == "labels":
        areas = [_roc_auc(target, score) for target, score in zip(sample.targets.T, predicted.T, strict=True)]
        value, influence = (np.mean(values, axis=0) for values in zip(*areas, strict=True))
        return Estimate(float(value), influence, setting)
    errors = (sample.targets - predicted) ** 2
    deviations = (sample.targets - sample.targets.mean(0)) ** 2
    unexplained = errors.sum(0) / deviations.sum(0)
    influence = ((unexplained * deviations - errors) / deviations.mean(0)).mean(1)
    return Estimate(float(1 - unexplained.mean()), influence, setting)


def _roc_auc(target: np.ndarray, score: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the area under the ROC curve and the influence of each row [N]."""
    from scipy.stats import rankdata

    positive = target > 0.5
    rank, below = rankdata(score), np.empty(len(target))
    # fraction of the opposite group with a smaller score than each row, ties counted as half
    for group, opposite in ((positive, ~positive), (~positive, positive)):
        below[group] = (rank[group] - rankdata(score[group])) / opposite.sum()
    area = float(below[positive].mean())
    return area, np.where(positive, (below - area) / positive.mean(), (1 - below - area) / (~positive).mean())


@dataclass(frozen=True)
class TransferabilityScore:
    """Entry of `TRANSFERABILITY_SCORES`."""

    compute: Callable[[LabeledFeatures], Estimate]
    assumes: str
    """Assumptions under which the score ranks backbones correctly, in one line."""
    citation: str
    kinds: tuple[LabelKind, ...] = ("classes", "labels", "values")
    needs_source: bool = False

    def fits(self, sample: LabeledFeatures) -> bool:
        """Whether the score is defined for these labels and source probabilities."""
        return sample.kind in self.kinds and (sample.source is not None or not self.needs_source)


TRANSFERABILITY_SCORES: dict[str, TransferabilityScore] = {
    "linear probe": TransferabilityScore(
        linear_probe,
        "Fine-tuned models rank like linear heads on unseen rows; ignores how fine-tuning changes the backbone. "
        "Duplicates in the data bias it upward.",
        "leave-one-out ridge regression: Allen 1974, https://doi.org/10.2307/1267500",
    ),
    "LogME": TransferabilityScore(
        logme,
        "Labels are linear in the features, with Gaussian noise and a Gaussian prior on the weights, separate for each "
        "class; classes are treated as numbers 0 and 1.",
        "You et al. 2021, https://arxiv.org/abs/2102.11005; 2022, https://arxiv.org/abs/2110.10545",
    ),
    "H-score": TransferabilityScore(
        h_score,
        "Classes differ in their means and share one covariance, which is shrunk to be invertible with few rows. "
        "Increases with the feature size.",
        "Ibrahim et al. 2021, https://arxiv.org/abs/2110.06893; Bao et al. 2019, "
        "https://doi.org/10.1109/ICIP.2019.8803726",
        ("classes", "labels"),
    ),
    "k-NN": TransferabilityScore(
        knn,
        "Rows with similar features have the same label, independent of feature scale. Duplicates in the data bias it "
        "upward.",
        "Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964",
    ),
    "NCE": TransferabilityScore(
        nce,
        "The most probable pretraining class of a row determines its label; other information in the features is "
        "ignored.",
        "Tran et al. 2019, https://arxiv.org/abs/1908.08142",
        ("classes",),
        True,
    ),
    "LEEP": TransferabilityScore(
        leep,
        "The probabilities of the pretraining classes determine the label; more pretraining classes fit the same rows "
        "more closely.",
        "Nguyen et al. 2020, https://arxiv.org/abs/2002.12462",
        ("classes",),
        True,
    ),
}
"""Scores by name, as shown in reports; the reference score first."""
