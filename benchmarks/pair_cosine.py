"""Baseline of text pairs without training: correlation of scores with cosine similarity of mean-pooled features.

Usage: python -m benchmarks pair_cosine MODEL TABLE [TABLE ...] [--columns sentence1,sentence2,score]
Prints Pearson and Spearman correlation for each Parquet table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import pyarrow.parquet as pq
import torch
from torch import Tensor

from hftl.tasks.targets.regression.metrics import regression_scores


def embed(model_name: str, texts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Returns mean-pooled features [N, D] of texts; batches contain texts of similar length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModel.from_pretrained(model_name).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    features: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        batch = [texts[index] for index in order[start : start + batch_size]]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            tokens = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        features.append((tokens * mask).sum(1) / mask.sum(1))
    return torch.cat(features)[torch.tensor(order).argsort()]


def main(arguments: Sequence[str]) -> None:
    """Prints one line per table, and all results as JSON."""
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
        correlations = ", ".join(f"{name} {value:.4f}" for name, value in results[table].items())
        print(f"{table}: {len(score)} pairs, {correlations}")
    print(json.dumps(results))
