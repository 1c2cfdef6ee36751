"""Labels that are likely wrong: a linear probe that has not seen a row is sure of another class.

Confident learning: Northcutt, Jiang and Chuang (2021), "Confident Learning: Estimating Uncertainty in Dataset Labels",
Journal of Artificial Intelligence Research 70, https://arxiv.org/abs/1911.00068.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FOLDS = 5
SLACK = 3.0
"""The probe's L2 penalty: scikit-learn's C is this over D, since standardised features of D numbers have a squared
length of D. The best of 0.2 to 380 for finding planted wrong labels in trec6 and cifar10_slice; a weaker penalty learns
the wrong labels too."""
FITTED = 20_000
"""Rows that each of the probes is fitted to at most; all others are predicted."""
_BLOCK = 8_192


def out_of_fold(features: Any, codes: Any, twins: Any, seed: int = 0) -> Any:
    """Returns class probabilities [N, K] of every row from a probe that was fitted to the other folds.

    The probe is a multinomial logistic regression on standardised features. Folds are stratified by class; rows that
    are the same are in one fold, so that no row is predicted by its own copy.

    Args:
        features: [N, D] float32, may be memory-mapped.
        codes: Classes [N], 0..K-1, each with at least `FOLDS` different rows.
        twins: Number of the first row that a row is the same as, [N]; its own position where there is none.
        seed: Of the folds, and of the rows that probes are fitted to.
    """
    from sklearn.model_selection import StratifiedKFold

    classes = int(codes.max()) + 1
    probabilities = np.zeros((len(codes), classes), np.float32)
    firsts = np.flatnonzero(twins == np.arange(len(codes)))
    fold = np.zeros(len(codes), np.int64)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(firsts, codes[firsts])
    for number, (_, held) in enumerate(folds):
        fold[firsts[held]] = number
    fold = fold[twins]
    rng = np.random.default_rng(seed)
    for number in range(FOLDS):
        others = np.flatnonzero(fold != number)
        if len(others) > FITTED:
            others = _some(others, codes, rng)
        predict = _fit_probe(features[others], codes[others])
        held = np.flatnonzero(fold == number)
        for start in range(0, len(held), _BLOCK):
            block = held[start : start + _BLOCK]
            present, values = predict(features[block])
            probabilities[np.ix_(block, present)] = values
    return probabilities


def _some(rows: Any, codes: Any, rng: Any) -> Any:
    """Returns `FITTED` of the rows at random, sorted; some of every class, or its rows would all look wrong."""
    order = rng.permutation(rows)
    by_class = order[np.argsort(codes[order], kind="stable")]
    _, starts, counts = np.unique(codes[by_class], return_index=True, return_counts=True)
    within = np.arange(len(by_class)) - np.repeat(starts, counts)
    first = np.isin(order, by_class[within < FOLDS])
    return np.sort(np.concatenate([order[first], order[~first]])[:FITTED])


def _fit_probe(features: Any, codes: Any) -> Any:
    """Returns a function features -> (classes that were seen, their probabilities)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    probe = LogisticRegression(C=SLACK / features.shape[1], max_iter=200, tol=1e-3)
    probe.fit(scaler.transform(features), codes)
    return lambda rows: (probe.classes_, probe.predict_proba(scaler.transform(rows)))


def confident_joint(probabilities: Any, codes: Any) -> Any:
    """Returns for each row the class that it is confidently of, [N]; -1 where there is none.

    That is the most probable of the classes whose probability reaches the class's threshold: the mean probability of
    class j over the rows labelled j (equation 2 of the paper).

    Args:
        probabilities: Out of fold, [N, K].
        codes: Labels [N]; each of the K classes has rows.
    """
    classes = probabilities.shape[1]
    sums = np.bincount(codes, probabilities[np.arange(len(codes)), codes], classes)
    thresholds = sums / np.maximum(np.bincount(codes, minlength=classes), 1)
    above = probabilities >= thresholds - 1e-6
    best = np.where(above, probabilities, -1).argmax(1)
    return np.where(above.any(1), best, -1)


def likely_wrong(probabilities: Any, codes: Any) -> Any:
    """Returns the positions of the rows whose labels are likely wrong, the likeliest first.

    How many: the rows that are confidently of another class than their label (the off-diagonal of the confident
    joint). Which: those with the lowest probability of their label, which found more planted errors than these rows
    themselves.

    Args:
        probabilities: Out of fold, [N, K].
        codes: Labels [N].
    """
    confident = confident_joint(probabilities, codes)
    count = int(((confident >= 0) & (confident != codes)).sum())
    given = probabilities[np.arange(len(codes)), codes]
    order = np.argsort(given, kind="stable")
    return order[probabilities[order].argmax(1) != codes[order]][:count]
