"""Checkpoint selection with a small validation split: the best, the last, or the last within one standard error.

`python -m benchmarks selection` trains linear heads on frozen features of hymenoptera (77 validation and 76 test rows;
folder `HFTL_SHARED`) with several learning rates, numbers of epochs and seeds, and prints the mean test accuracy of
each rule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

RULES = ("best accuracy", "best loss", "last", "one error")
VIEWS = 4
"""Number of augmented views per training image with precomputed features; epochs use them in turn."""


def main(argv: list[str]) -> None:
    """Prints test accuracy by rule for each setting, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args(argv)
    views, validation, test = _features()
    rows = []
    print(f"{'batch':>5} {'lr':>6} {'epochs':>6}   " + "   ".join(f"{rule:>13}" for rule in RULES))
    for batch, lr, epochs in (
        (32, 3e-3, 5),
        (32, 3e-3, 8),
        (32, 1e-2, 5),
        (32, 1e-2, 8),
        (32, 1e-2, 12),
        (16, 3e-3, 8),
    ):
        accuracies = [
            _selected(_train(views, validation, test, batch, lr, epochs, seed), len(validation[1]))
            for seed in range(args.seeds)
        ]
        means = [sum(by_seed) / len(by_seed) for by_seed in zip(*accuracies, strict=True)]
        rows.append(means)
        print(f"{batch:>5} {lr:>6g} {epochs:>6}   " + "   ".join(f"{mean:>13.3f}" for mean in means))
    overall = [sum(by_setting) / len(by_setting) for by_setting in zip(*rows, strict=True)]
    print(f"{'mean':>19}   " + "   ".join(f"{mean:>13.3f}" for mean in overall))
    print(
        json.dumps(
            {"benchmark": "selection", "seeds": args.seeds, "test_accuracy": dict(zip(RULES, overall, strict=True))}
        )
    )


def _features() -> tuple[list[Any], Any, Any]:
    """Returns (features, labels) of the training views, of validation and of test."""
    import torch

    import hftl
    from hftl.logging import suppress_logs

    shared = Path(os.environ.get("HFTL_SHARED", "../shared")) / "data"
    with tempfile.TemporaryDirectory() as folder, suppress_logs():
        run = hftl.RunConfig(
            hftl.DataConfig(source=str(shared / "image" / "hymenoptera")),
            hftl.ModelConfig(name=f"local-dir:{shared / 'weights' / 'mobilenetv2_100'}"),
            output_dir=str(Path(folder) / "run"),
        )
        run, splits, task = hftl.setup_run(run, hftl.ImageClassification)
        model = hftl.build_model(run, task.head).eval()
        net = model.net

        def encode(split: str, seed: int | None, epoch: int) -> Any:
            encoded = task.encode(splits[split], model.processor, seed, None)
            features, labels = [], []
            for start in range(0, len(encoded), 32):
                batch = task.collate(encoded.fetch(range(start, min(start + 32, len(encoded))), epoch))
                with torch.no_grad():
                    pixels = batch["inputs"]["pixel_values"].contiguous(memory_format=torch.channels_last)
                    features.append(net.forward_head(net.forward_features(pixels), pre_logits=True))
                labels.append(batch["labels"])
            return torch.cat(features), torch.cat(labels)

        views = [encode("train", 0, epoch) for epoch in range(VIEWS)]
        return views, encode("validation", None, 0), encode("test", None, 0)


def _train(
    views: list[Any], validation: Any, test: Any, batch: int, lr: float, epochs: int, seed: int
) -> list[tuple[float, ...]]:
    """Returns (validation accuracy, validation loss, test accuracy) after every epoch."""
    import torch

    from hftl.training.optim import lr_factor

    torch.manual_seed(seed)
    rows = len(views[0][1])
    head = torch.nn.Linear(views[0][0].shape[1], int(views[0][1].max()) + 1)
    torch.nn.init.trunc_normal_(head.weight, std=0.01)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    steps = -(-rows // batch)
    total, step, results = epochs * steps, 0, []
    for epoch in range(epochs):
        features, labels = views[epoch % VIEWS]
        for indices in torch.randperm(rows).tensor_split(steps):
            optimizer.param_groups[0]["lr"] = lr * lr_factor(step, "linear", total, math.ceil(0.1 * total))
            torch.nn.functional.cross_entropy(head(features[indices]), labels[indices]).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        with torch.no_grad():
            logits = head(validation[0])
            accuracy = float((logits.argmax(1) == validation[1]).float().mean())
            loss = float(torch.nn.functional.cross_entropy(logits, validation[1]))
            results.append((accuracy, loss, float((head(test[0]).argmax(1) == test[1]).float().mean())))
    return results


def _selected(epochs: list[tuple[float, ...]], rows: int) -> list[float]:
    """Returns the test accuracy of the epoch that each rule selects; the standard error is that of Agresti-Coull."""
    best = max(accuracy for accuracy, _, _ in epochs)
    adjusted = (best * rows + 2) / (rows + 4)
    error = math.sqrt(adjusted * (1 - adjusted) / rows)
    return [
        max(epochs, key=lambda epoch: (epoch[0], -epoch[1]))[2],
        min(epochs, key=lambda epoch: epoch[1])[2],
        epochs[-1][2],
        [epoch for epoch in epochs if epoch[0] >= best - error][-1][2],
    ]
