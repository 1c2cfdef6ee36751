"""Bootstrap intervals of transferability scores and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hftl.features.transferability import Estimate
from hftl.selection.candidate import Candidate

RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """Score and rank of a candidate among all candidates.

    Attributes:
        value: Score on all rows; larger is better.
        interval: 95 % bootstrap interval of the score.
        rank: Rank from 1 (best); equal scores share the better rank.
        ranks: 95 % bootstrap interval of the rank.
        first: Fraction of resamples with rank 1, in [0, 1].
        setting: Hyperparameters that the estimator selected, as text.
    """

    value: float
    interval: tuple[float, float]
    rank: int
    ranks: tuple[int, int]
    first: float
    setting: str = ""


def compare_scores(estimates: Mapping[str, Estimate], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Score]:
    """Returns the score of each candidate with bootstrap intervals of score and rank.

    All candidates share the resampled rows, so that rows that are easy or hard for all of them do not blur the order.
    A resampled score is computed from the influences of its rows (see `Estimate`).

    Args:
        estimates: Estimates of one estimator by candidate, on the same rows.
        seed: Seed of the bootstrap.
        resamples: Number of bootstrap resamples.
    """
    if not estimates:
        return {}
    influences = np.stack([estimate.influence for estimate in estimates.values()], 1)  # [N, candidates]
    values = np.array([estimate.value for estimate in estimates.values()])
    rng, rows = np.random.default_rng(seed), len(influences)
    resampled = np.empty((resamples, len(values)))
    for index in range(resamples):
        counts = np.bincount(rng.integers(0, rows, rows), minlength=rows)
        resampled[index] = values + counts @ influences / rows  # influences have mean 0
    ranks, resampled_ranks = _ranks(values[None])[0], _ranks(resampled)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    best, worst = np.quantile(resampled_ranks, [0.025, 0.975], axis=0, method="inverted_cdf")
    return {
        name: Score(
            float(values[i]),
            (float(low[i]), float(high[i])),
            int(ranks[i]),
            (int(best[i]), int(worst[i])),
            float((resampled_ranks[:, i] == 1).mean()),
            estimate.setting,
        )
        for i, (name, estimate) in enumerate(estimates.items())
    }


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Returns the rank of each score in its row, [B, C]: 1 + the number of larger scores."""
    return 1 + (scores[:, None, :] > scores[:, :, None]).sum(2)


def by_size(candidates: Sequence[Candidate]) -> list[str]:
    """Returns the names by number of parameters, most first: a baseline that does not use the data."""
    sized = [candidate for candidate in candidates if candidate.parameters is not None]
    return [candidate.name for candidate in sorted(sized, key=lambda each: -(each.parameters or 0))]
