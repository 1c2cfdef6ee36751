"""Which source task makes the better embedded model: digits with 10 labels per class, four methods, several seeds.

`python -m benchmarks embedded_source letters=local-dir:A fashion=local-dir:B [--seeds 3] [--split validation]` compares
networks of the same architecture that were trained on different sources. Choose on validation, report test.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from hftl.embedded.quickstart import METHODS, Trial, mean_and_half_width, run_trial, table, trial_config


def main(argv: list[str]) -> None:
    """Prints quickstart's table for each source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="NAME=MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args(argv)
    means: dict[str, dict[str, float]] = {}
    scratch: list[Trial] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            name, _, model = source.partition("=")
            trials: dict[str, list[Trial]] = {}
            for method in METHODS:
                if method == "scratch" and scratch is not None:
                    trials[method] = scratch  # random weights do not depend on the source
                    continue
                configs = [trial_config(method, model, seed, folder, True) for seed in range(args.seeds)]
                trials[method] = [run_trial(config) for config in configs]
            scratch = trials["scratch"]
            print(f"\nsource: {name} ({model}); {args.split} accuracy")
            print(table(trials, args.split))
            means[name] = {
                m: round(mean_and_half_width([t.accuracy(args.split) for t in of])[0], 4) for m, of in trials.items()
            }
    print(json.dumps({"benchmark": "embedded_source", "split": args.split, "seeds": args.seeds, "accuracy": means}))
