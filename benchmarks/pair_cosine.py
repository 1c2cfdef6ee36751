"""What a text encoder says of pairs without training: cosine of mean-pooled features against scores.

Usage: python -m benchmarks pair_cosine MODEL TABLE [TABLE ...] [--columns sentence1,sentence2,score]
Prints Pearson and Spearman for each Parquet table: the baseline that a trained regression on pairs has to beat.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import pyarrow.parquet as pq
import torch
from torch import Tensor

from hftl.tasks.targets.regression.metrics import regression_scores


def embed(place: str, texts: Sequence[str], batch: int = 64) -> Tensor:
    """Returns mean-pooled features [N, D] of texts, those of like length together."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    found: list[Tensor] = []
    for start in range(0, len(order), batch):
        part = [texts[number] for number in order[start : start + batch]]
        inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            tokens = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append((tokens * mask).sum(1) / mask.sum(1))
    return torch.cat(found)[torch.tensor(order).argsort()]


def main(arguments: Sequence[str]) -> None:
    """Prints a line for each table, and all of it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pair_cosine", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tables", nargs="+")
    parser.add_argument("--columns", default="sentence1,sentence2,score")
    options = parser.parse_args(arguments)
    results = {}
    for table in options.tables:
        first, second, score = (pq.read_table(table)[name].to_pylist() for name in options.columns.split(","))
        cosine = torch.nn.functional.cosine_similarity(embed(options.model, first), embed(options.model, second))
        scores = regression_scores(torch.tensor(score)[:, None].numpy(), cosine.double()[:, None].numpy(), ["cosine"])
        results[table] = {name: scores[name] for name in ("pearson", "spearman")}
        said = ", ".join(f"{name} {value:.4f}" for name, value in results[table].items())
        print(f"{table}: {len(score)} pairs, {said}")
    print(json.dumps(results))
