"""Source tasks of the embedded model, compared on digits with 10 labels per class, four methods and several seeds.

`python -m benchmarks embedded_source letters=local-dir:A fashion=local-dir:B [--seeds 3] [--split validation]` compares
models of the same architecture that were trained on different source tasks. Select on validation, report test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from hftl.cli.quickstart import quickstart_plan
from hftl.selection.comparison import run_plan


def main(argv: list[str]) -> None:
    """Prints the table of `hftl quickstart` for each source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="NAME=MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    args = parser.parse_args(argv)
    means: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            name, _, model = source.partition("=")
            print(f"\nsource: {name} ({model}); {args.split} accuracy")
            plan = quickstart_plan(model, args.seeds, Path(folder) / name)
            comparison = run_plan(replace(plan, split=args.split))
            means[name] = {result.method: round(result.score, 4) for result in comparison.results}
    print(json.dumps({"benchmark": "embedded_source", "split": args.split, "seeds": args.seeds, "accuracy": means}))
