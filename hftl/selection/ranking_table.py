"""A ranking as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from hftl.features.transferability import ESTIMATORS
from hftl.selection.bootstrap_ranks import Score
from hftl.selection.candidate import Candidate
from hftl.selection.ranking import MEASURES, Ranking


def table(ranking: Ranking) -> str:
    """Returns a line for each candidate, and for text a second table of the layer means."""
    measure, short = MEASURES[ranking.kind], short_names([candidate.name for candidate in ranking.candidates])
    parts = [f"Ranked by {ranking.by}, {ranking.rows:,} training rows; linear probe and k-NN: leave-one-out {measure}."]
    for place in sorted(ranking.scores, key=lambda place: place != ranking.place):
        found = ranking.scores[place]
        lines = [_head(ranking, found)]
        for candidate in ranking.candidates:
            if candidate.problem is None and place in candidate.views:
                lines.append(_line(ranking, candidate, place, short))
        if len(ranking.scores) > 1:
            parts.append("Features: the input of the head." if place == "head" else "Features: the mean of the layers.")
        parts.append(_aligned(lines))
    left_out = [f"– {short[each.name]}: {each.problem}" for each in ranking.candidates if each.problem]
    return "\n\n".join([*parts, *(["\n".join(left_out)] if left_out else [])])


def _head(ranking: Ranking, found: dict[str, dict[str, Score]]) -> list[str]:
    others = [name for name in found if name != ranking.by]
    leading = [ranking.by, "95 %"] if ranking.by in found else []
    return [
        "rank",
        "candidate",
        *leading,
        *others,
        "parameters",
        "features",
        "input",
        "forward s",
        "scores s",
        "by size",
    ]


def _line(ranking: Ranking, candidate: Candidate, place: str, short: dict[str, str]) -> list[str]:
    found, view = ranking.scores[place], candidate.views[place]
    score = found.get(ranking.by, {}).get(candidate.name)
    line = [rank_text(score) if score else "–", short[candidate.name]]
    if ranking.by in found:
        line += [f"{score.value:.4f}", f"[{score.interval[0]:.3f}, {score.interval[1]:.3f}]"] if score else ["–", "–"]
    for estimator, of in found.items():
        if estimator != ranking.by:
            other = of.get(candidate.name)
            line.append(f"{other.value:.4g} ({other.rank})" if other else "–")
    size = ranking.by_size.index(candidate.name) + 1
    line += [f"{candidate.parameters:,}", f"{view.feature_size:,}", candidate.input_size or "–"]
    return [*line, f"{view.forward_seconds:.1f}", f"{view.score_seconds:.1f}", str(size)]


def rank_text(score: Score) -> str:
    """Returns the rank, and where it lies in 95 % of the resamples where that is not one rank."""
    low, high = score.ranks
    return f"{score.rank}" if low == high == score.rank else f"{score.rank} ({low}-{high})"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Returns folders by their last part where that is unambiguous, other names as they are."""
    short = {name: Path(name.removeprefix("local-dir:")).name if _is_folder(name) else name for name in names}
    taken = list(short.values())
    return {name: each if taken.count(each) == 1 else name for name, each in short.items()}


def _is_folder(name: str) -> bool:
    return name.startswith("local-dir:") or Path(name).is_dir()


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = {0, 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def explanation(ranking: Ranking) -> str:
    """Returns what each estimator in the table assumes, and its source."""
    shown = [name for name in ESTIMATORS if any(name in found for found in ranking.scores.values())]
    return "\n".join(
        textwrap.fill(
            f"{name}: {ESTIMATORS[name].assumes} [{ESTIMATORS[name].citation}]",
            100,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name in shown
    )
