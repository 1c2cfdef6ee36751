"""Baseline of extractive question answering: the first sentence of the context is the answer.

Usage: python -m benchmarks first_sentence FOLDER [--split test]
Prints F1 and exact match as defined by SQuAD.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence

from hftl.config.schema import DataConfig
from hftl.data.source import load_splits
from hftl.tasks.targets.question_answering.metrics import Answered, AnswerMetrics


def main(arguments: Sequence[str]) -> None:
    """Prints both metrics as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks first_sentence", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--split", default="test")
    options = parser.parse_args(arguments)
    metric = AnswerMetrics(None, 0.0)
    for row in load_splits(DataConfig(source=options.folder), training=False)[options.split]:
        answers: dict[str, list[str]] = row["answers"]  # pyright: ignore
        first_sentence = re.split(r"(?<=[.!?])\s", row["context"])[0]  # pyright: ignore
        metric.add(Answered(first_sentence, 0.0), list(answers["text"]))
    print(json.dumps(metric.compute()))
