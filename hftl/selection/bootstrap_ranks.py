"""Scores into ranks, and how far both hold when the rows are drawn again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hftl.features.transferability import Estimate
from hftl.selection.candidate import Candidate

RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """What one estimator says of one candidate, among the others.

    Attributes:
        value: The score.
        interval: 95 % of the resampled scores.
        rank: 1 is best; equal scores share the better rank.
        ranks: 95 % of the ranks in the resamples.
        first: Share of the resamples in which no other candidate was better.
        setting: What the estimator chose, in words.
    """

    value: float
    interval: tuple[float, float]
    rank: int
    ranks: tuple[int, int]
    first: float
    setting: str = ""


def compare_scores(found: Mapping[str, Estimate], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Score]:
    """Returns the score of each candidate by name, from the estimates of one estimator on the same rows.

    Rows are drawn again with replacement, the same draw for all candidates, so that what makes the rows easy or hard
    for all of them does not blur their order. A score follows its rows by its influences (see `Estimate`).
    """
    if not found:
        return {}
    influences = np.stack([estimate.influence for estimate in found.values()], 1)  # [N, candidates]
    values = np.array([estimate.value for estimate in found.values()])
    rng, rows = np.random.default_rng(seed), len(influences)
    drawn = np.empty((resamples, len(values)))
    for number in range(resamples):
        counts = np.bincount(rng.integers(0, rows, rows), minlength=rows)
        drawn[number] = values + counts @ influences / rows  # influences are of mean 0
    ranks, places = _ranks(values[None])[0], _ranks(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    best, worst = np.quantile(places, [0.025, 0.975], axis=0, method="inverted_cdf")
    return {
        name: Score(
            float(values[i]),
            (float(low[i]), float(high[i])),
            int(ranks[i]),
            (int(best[i]), int(worst[i])),
            float((places[:, i] == 1).mean()),
            estimate.setting,
        )
        for i, (name, estimate) in enumerate(found.items())
    }


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Returns 1 + the number of larger scores in each row of [B, C]."""
    return 1 + (scores[:, None, :] > scores[:, :, None]).sum(2)


def by_size(candidates: Sequence[Candidate]) -> list[str]:
    """Returns the names by parameters, most first: an order that never looks at the data, the baseline to beat."""
    sized = [candidate for candidate in candidates if candidate.parameters is not None]
    return [candidate.name for candidate in sorted(sized, key=lambda each: -(each.parameters or 0))]
