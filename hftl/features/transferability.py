"""How well a backbone would do on a task, from the features of frozen weights alone: scores without any training.

Each function takes a `LabeledFeatures` and returns an `Estimate`: the score (larger is better) and the influence of
each row on it.
`TRANSFERABILITY_SCORES` lists them, with what each assumes and where it comes from.

Shapes: N rows, D feature size, R rank of the features, K targets (classes, labels or numbers), Z source classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hftl.errors import FeatureError
from hftl.features.labeled_features import LabeledFeatures, LabelKind

_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Penalties of the linear probe, in units of the mean variance along an axis of the features."""
_RATIO_RANGE = (1e-8, 1e8)
"""Bounds of LogME's alpha / beta, in units of the least and the greatest eigenvalue that is not zero: evidence has no
maximum where the features reproduce the labels."""


@dataclass(frozen=True)
class Estimate:
    """A score, and what a resampling of the rows would do to it.

    Attributes:
        value: The score.
        influence: Derivative of the score by each row's weight, times N [N]; of mean 0. The score of rows resampled
            with counts w is about value + mean((w - 1) influence), and its standard error sqrt(mean(influence^2) / N):
            the infinitesimal jackknife (Jaeckel 1972; Efron 1982, chapter 6).
        setting: What was chosen by cross-validation, in words.
    """

    value: float
    influence: np.ndarray
    setting: str = ""

    @property
    def standard_error(self) -> float:
        """Returns the standard error of the score over draws of the rows."""
        return float(np.sqrt(np.mean(self.influence**2) / len(self.influence)))

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float]:
        """Returns value -/+ z standard errors: 95 % by default."""
        return self.value - z * self.standard_error, self.value + z * self.standard_error


def logme(sample: LabeledFeatures) -> Estimate:
    """Returns the log evidence per row of a Bayesian linear model, at its best prior, averaged over targets.

    You et al. 2021 (https://arxiv.org/abs/2102.11005, equation 2). Targets are one-hot columns, labels, or numbers as
    they are. Evidence may have several maxima in the ratio t = alpha / beta: the greatest on a grid is where the fixed
    point of You et al. 2022 (https://arxiv.org/abs/2110.10545, section 4.3) begins, iterated until it stands: with
    gamma = sum(sigma / (sigma + t)), t <- gamma |y - Fm|^2 / ((N - gamma) |m|^2). By the envelope theorem the influence
    of a row is its own term of the evidence.
    """
    rows, (sigma, axes) = len(sample), (sample.spectrum.sigma, sample.spectrum.axes)
    along = sample.projections**2  # z^2 [R, K]
    outside = np.maximum((sample.targets**2).sum(0) - (1 / sigma) @ along, 0.0)
    low, high = _RATIO_RANGE[0] * sigma[0], _RATIO_RANGE[1] * sigma[-1]
    grid = np.geomspace(low, high, 200)
    squared = 1 / (sigma + grid[:, None]) ** 2  # [200, R]
    misfit = outside + grid[:, None] ** 2 * (squared / sigma @ along) + grid[:, None] * (squared @ along)
    volume = np.log1p(sigma / grid[:, None]).sum(1)
    ratio, active = grid[(-rows * np.log(misfit) - volume[:, None]).argmax(0)], np.arange(along.shape[1])
    for _ in range(1000):
        residual, norm, gamma = _fit(sigma, along[:, active], outside[active], ratio[active])
        found = gamma * residual / np.maximum((rows - gamma) * norm, np.finfo(float).tiny)
        found = np.clip(found, low, high)
        moved = np.abs(np.log(found / ratio[active]))
        ratio[active] = found
        active = active[moved > 1e-9]
        if not len(active):
            break
    residual, norm, _ = _fit(sigma, along, outside, ratio)
    # the best beta at this ratio; the zero eigenvalues of F^T F cancel against D log(alpha)
    beta = rows / np.maximum(residual + ratio * norm, np.finfo(float).tiny)
    evidence = rows / 2 * (np.log(beta / (2 * np.pi)) - 1) - np.log1p(sigma[:, None] / ratio).sum(0) / 2
    weights = 1 / (sigma[:, None] + ratio)
    errors = sample.targets - axes @ (weights * sample.projections)
    terms = (beta * errors**2 + sample.squares @ weights).mean(1) / -2
    return Estimate(float(evidence.mean() / rows), terms - terms.mean())


def _fit(sigma: np.ndarray, along: np.ndarray, outside: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns |y - Fm|^2, |m|^2 and gamma [K] of the ridge solutions m with penalty `ratio` [K]."""
    weights = 1 / (sigma[:, None] + ratio)
    norm = (along * weights**2).sum(0)
    residual = outside + ratio**2 * (along / sigma[:, None] * weights**2).sum(0)
    return residual, norm, sigma @ weights


def h_score(sample: LabeledFeatures) -> Estimate:
    """Returns (1 - a) tr(S^-1 B): spread of the class means B against the shrunk covariance S of all features.

    Ibrahim et al. 2021 (https://arxiv.org/abs/2110.06893), after Bao et al. 2019; shrinkage a by Ledoit & Wolf 2004.
    The covariance divides by N and that of the class means by N - 1, as the implementations in use do. Yes/no labels
    are averaged. The influence takes a as given.
    """
    rows, size = sample.features.shape
    centred = sample.features - sample.features.mean(0)
    covariance = centred.T @ centred / rows
    squares = (centred**2).sum(1)
    shrinkage, level = _ledoit_wolf(covariance, float((squares**2).mean()), rows)
    shrunk = (1 - shrinkage) * covariance
    shrunk.flat[:: size + 1] += shrinkage * level
    several = sample.kind == "labels"
    groups = np.concatenate([sample.targets, 1 - sample.targets], 1) if several else sample.targets
    averaged = sample.targets.shape[1] if several else 1
    counts = groups.sum(0)
    means = groups.T @ centred / counts[:, None]  # [J, D]
    solved = _solve(shrunk, means.T)  # S^-1 m [D, J]
    spread, share = (means.T * solved).sum(0), counts / rows
    value = (1 - shrinkage) * rows / (rows - 1) * float(share @ spread) / averaged
    seen = centred @ solved
    terms = (groups * (2 * seen - spread)).sum(1) - (1 - shrinkage) * (seen**2 @ share)
    terms -= shrinkage * squares / size * float((solved**2).sum(0) @ share)
    return Estimate(value, (1 - shrinkage) * (terms - terms.mean()) / averaged)


def _ledoit_wolf(covariance: np.ndarray, fourth: float, rows: int) -> tuple[float, float]:
    """Returns how far to shrink towards a multiple of the identity, in [0, 1], and that multiple.

    Ledoit & Wolf 2004, lemma 3.3; `fourth` is the mean of |x|^4 over the centred rows.
    """
    size = len(covariance)
    level = float(np.trace(covariance)) / size
    total = float((covariance**2).sum())
    noise, distance = (fourth - total) / rows, total - size * level**2
    return (float(np.clip(noise / distance, 0, 1)) if distance > 0 else 0.0), level


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import LinAlgError, cho_factor, cho_solve, pinvh

    try:
        return cho_solve(cho_factor(matrix, check_finite=False), right, check_finite=False)
    except LinAlgError:  # a constant feature, and nothing shrunk
        return pinvh(matrix) @ right


def linear_probe(sample: LabeledFeatures) -> Estimate:
    """Returns the leave-one-out score of ridge regression on the features: accuracy, mean AUC, or R^2.

    One-hot classes (the largest output wins), labels or numbers, with an intercept that is not penalised. Leaving a row
    out has a closed form, (y - fit) / (1 - leverage) (Allen 1974, https://doi.org/10.2307/1267500), so all N trainings
    at all penalties share LogME's one factorisation. The penalty with the best score is taken, the stronger of equals;
    one number chosen on N rows flatters little.
    """
    sigma, axes = sample.spectrum.sigma, sample.spectrum.axes
    ones = axes.sum(0)  # Q^T 1
    variance = sample.features.var(0).sum() * len(sample) / len(sigma)
    best: Estimate | None = None
    for strength in reversed(_STRENGTHS):
        weights = 1 / (sigma + strength * variance)
        unexplained = 1 - axes @ (weights * ones)
        total = max(float(unexplained.sum()), np.finfo(float).tiny)
        fit = axes @ (weights[:, None] * sample.projections)
        fit += np.outer(unexplained, unexplained @ sample.targets / total)
        leverage = sample.squares @ weights + unexplained**2 / total
        left = np.maximum(1 - leverage, 1e-10)[:, None]
        found = score_predictions(sample, sample.targets - (sample.targets - fit) / left, f"penalty {strength:g}")
        if best is None or found.value > best.value:
            best = found
    assert best is not None
    return best


def knn(sample: LabeledFeatures) -> Estimate:
    """Returns the leave-one-out score of the k nearest rows by cosine: accuracy, mean AUC, or R^2.

    Classes by majority, ties by summed cosine; labels and numbers by the neighbours' mean (Cover & Hart 1967,
    https://doi.org/10.1109/TIT.1967.1053964). The influence of a row on the accuracy is the jackknife's, in full: its
    own vote leaves its neighbours too, and their next neighbour takes its place. That of labels and numbers takes the
    neighbours as given.
    """
    rows, classes, k = len(sample), sample.classes, sample.k
    neighbours, cosines = sample.neighbours
    if classes is None:
        return score_predictions(sample, sample.targets[neighbours[:, :k]].mean(1))
    names, weights, each = classes[neighbours], 1 + 1e-3 * cosines, np.arange(rows)
    votes = np.zeros(sample.targets.shape)
    np.add.at(votes, (each[:, None], names[:, :k]), weights[:, :k])
    found = score_predictions(sample, votes)
    if neighbours.shape[1] == k:  # there is no other row
        return found
    right, pulled = votes.argmax(1) == classes, np.zeros(rows)
    votes[each, names[:, k]] += weights[:, k]
    for slot in range(k):
        votes[each, names[:, slot]] -= weights[:, slot]
        np.add.at(pulled, neighbours[:, slot], right - (votes.argmax(1) == classes).astype(float))
        votes[each, names[:, slot]] += weights[:, slot]
    return Estimate(found.value, found.influence + pulled - pulled.mean())


def nce(sample: LabeledFeatures) -> Estimate:
    """Returns the mean log p(class | source class), from how often each pair occurs: minus a conditional entropy.

    Tran et al. 2019 (https://arxiv.org/abs/1908.08142, equation 3). A row's source class is its most probable one.
    """
    classes, source = _classes_and_source(sample)
    guessed = source.argmax(1)
    counts = np.zeros((source.shape[1], sample.targets.shape[1]))
    np.add.at(counts, (guessed, classes), 1)
    terms = np.log(counts[guessed, classes] / counts.sum(1)[guessed])
    return Estimate(float(terms.mean()), terms - terms.mean())


def leep(sample: LabeledFeatures) -> Estimate:
    """Returns the mean log likelihood of the classes when source probabilities are turned into target ones.

    Nguyen et al. 2020 (https://arxiv.org/abs/2002.12462, equations 1 and 2): p(y | x) = sum_z p(y | z) p(z | x), with
    p(y | z) from the same rows.
    """
    classes, source = _classes_and_source(sample)
    seen = np.maximum(source.sum(0), np.finfo(float).tiny)
    given = source.T @ sample.targets / seen[:, None]  # p(y | z) [Z, K]
    expected = np.maximum((source * given[:, classes].T).sum(1), np.finfo(float).tiny)
    terms = np.log(expected)
    # how each row moves p(y | z), and p(y | z) the likelihood of all rows
    slope = source.T @ (sample.targets / expected[:, None])
    moved = (slope - (given * slope).sum(1, keepdims=True)) / seen[:, None]
    influence = terms + (source * moved[:, classes].T).sum(1)
    return Estimate(float(terms.mean()), influence - influence.mean())


def _classes_and_source(sample: LabeledFeatures) -> tuple[np.ndarray, np.ndarray]:
    if sample.classes is None or sample.source is None:
        raise FeatureError("NCE and LEEP need classes, and probabilities of the checkpoint's own classes.")
    return sample.classes, sample.source


def score_predictions(sample: LabeledFeatures, predicted: np.ndarray, setting: str = "") -> Estimate:
    """Returns what predictions [N, K] for rows that were left out are worth.

    Classes: accuracy. Labels: mean area under the ROC curve (influence: DeLong et al. 1988). Numbers: mean R^2.
    """
    if sample.classes is not None:
        right = (predicted.argmax(1) == sample.classes).astype(float)
        return Estimate(float(right.mean()), right - right.mean(), setting)
    if sample.kind == "labels":
        areas = [_auc(truth, guess) for truth, guess in zip(sample.targets.T, predicted.T, strict=True)]
        value, influence = (np.mean(part, axis=0) for part in zip(*areas, strict=True))
        return Estimate(float(value), influence, setting)
    errors = (sample.targets - predicted) ** 2
    spread = (sample.targets - sample.targets.mean(0)) ** 2
    unexplained = errors.sum(0) / spread.sum(0)
    influence = ((unexplained * spread - errors) / spread.mean(0)).mean(1)
    return Estimate(float(1 - unexplained.mean()), influence, setting)


def _auc(truth: np.ndarray, guess: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the area under the ROC curve and the influence [N]."""
    from scipy.stats import rankdata

    yes = truth > 0.5
    rank, beaten = rankdata(guess), np.empty(len(truth))
    for group, other in ((yes, ~yes), (~yes, yes)):  # share of the other group below each row, ties half
        beaten[group] = (rank[group] - rankdata(guess[group])) / other.sum()
    area = float(beaten[yes].mean())
    return area, np.where(yes, (beaten - area) / yes.mean(), (1 - beaten - area) / (~yes).mean())


@dataclass(frozen=True)
class TransferabilityScore:
    """An entry of `TRANSFERABILITY_SCORES`."""

    compute: Callable[[LabeledFeatures], Estimate]
    assumes: str
    """What must hold for its order to be right, in a line."""
    citation: str
    kinds: tuple[LabelKind, ...] = ("classes", "labels", "values")
    needs_source: bool = False

    def fits(self, sample: LabeledFeatures) -> bool:
        """Whether the score is defined for this sample."""
        return sample.kind in self.kinds and (sample.source is not None or not self.needs_source)


TRANSFERABILITY_SCORES: dict[str, TransferabilityScore] = {
    "linear probe": TransferabilityScore(
        linear_probe,
        "What a linear head reaches on unseen rows is what fine-tuning will order by; blind to what changes when the "
        "backbone itself learns. Duplicates in the data flatter it.",
        "leave-one-out ridge regression: Allen 1974, https://doi.org/10.2307/1267500",
    ),
    "LogME": TransferabilityScore(
        logme,
        "Labels are linear in the features with Gaussian noise and a Gaussian prior on the weights, one of each for "
        "every class; classes are treated as numbers 0 and 1.",
        "You et al. 2021, https://arxiv.org/abs/2102.11005; 2022, https://arxiv.org/abs/2110.10545",
    ),
    "H-score": TransferabilityScore(
        h_score,
        "Classes lie apart by their means under one covariance, which is shrunk to stay invertible with few rows. "
        "Grows with the feature size.",
        "Ibrahim et al. 2021, https://arxiv.org/abs/2110.06893; Bao et al. 2019, "
        "https://doi.org/10.1109/ICIP.2019.8803726",
        ("classes", "labels"),
    ),
    "k-NN": TransferabilityScore(
        knn,
        "Rows that the backbone puts side by side have the same label, whatever the scale of its features. Duplicates "
        "in the data flatter it.",
        "Cover & Hart 1967, https://doi.org/10.1109/TIT.1967.1053964",
    ),
    "NCE": TransferabilityScore(
        nce,
        "The checkpoint's own best guess for a row says what the row is; the rest of the features does not count.",
        "Tran et al. 2019, https://arxiv.org/abs/1908.08142",
        ("classes",),
        True,
    ),
    "LEEP": TransferabilityScore(
        leep,
        "The checkpoint's own classes, softly guessed, say what the row is; more source classes fit the same rows more "
        "closely.",
        "Nguyen et al. 2020, https://arxiv.org/abs/2002.12462",
        ("classes",),
        True,
    ),
}
"""By the names of the table, the reference first."""
