"""Overhead per optimizer step of `hftl.fit` over a minimal Accelerate loop, with the same model and batches.

`python -m benchmarks step_overhead [--model minilm|resnet] [--rounds 5]` times both in turn in one process, in CPU
seconds of one thread, which depend less on other load than wall-clock time. Time per step is the slope between a short
and a long run, which excludes setup; the ratio is computed per round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

SHORT, LONG = 5, 30


def main(argv: list[str]) -> None:
    """Prints milliseconds per step of both loops and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "resnet"), default="minilm")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, task_class = _text(Path(folder)) if args.model == "minilm" else _image(Path(folder))
        rounds = [_round(run, task_class) for _ in range(args.rounds + 1)][1:]  # the first round is warm-up
    hftl_seconds, plain_seconds = (statistics.median(seconds[i] for seconds in rounds) for i in (0, 1))
    ratios = [hftl / plain for hftl, plain in rounds]
    print(f"\n{'loop':<18} ms per step (median of {len(rounds)} rounds)")
    print(f"{'hftl.fit':<18} {hftl_seconds * 1e3:.2f}\n{'plain Accelerate':<18} {plain_seconds * 1e3:.2f}")
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    print(
        json.dumps(
            {
                "benchmark": "step_overhead",
                "model": args.model,
                "ratio": round(ratio, 4),
                "ms_hftl": round(hftl_seconds * 1e3, 3),
                "ms_plain": round(plain_seconds * 1e3, 3),
            }
        )
    )


def _text(folder: Path) -> tuple[Any, Any]:
    """Returns a run with a random BERT of the size of MiniLM-L6 on texts of 30 tokens, and its task class."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from hftl import DataConfig, ModelConfig, RunConfig, TextClassification, TrainConfig

    words = [f"w{number}" for number in range(500)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder / "bert")
    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).save_pretrained(folder / "bert")
    lines = [f"{' '.join(words[(row * 7 + i) % 500] for i in range(28))},{row % 3}" for row in range(2000)]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]))
    run = RunConfig(
        DataConfig(source=str(folder / "train.csv"), validation_fraction=0.0),
        ModelConfig(name=str(folder / "bert"), pooling="default"),
        train=TrainConfig(batch_size_per_device=16, trackers=[]),
        output_dir=str(folder / "run"),
        overwrite=True,
    )
    return run, TextClassification


def _image(folder: Path) -> tuple[Any, Any]:
    """Returns a run with the embedded model on digits, and its task class."""
    from hftl import DataConfig, ImageClassification, ModelConfig, RunConfig, TrainConfig

    run = RunConfig(
        DataConfig(source="embedded:digits", validation_fraction=0.0),
        ModelConfig(name="embedded:letters"),
        train=TrainConfig(batch_size_per_device=32, trackers=[]),
        output_dir=str(folder / "run"),
        overwrite=True,
    )
    return run, ImageClassification


def _round(run: Any, task_class: Any) -> tuple[float, float]:
    """Returns CPU seconds per step of `hftl.fit` and of the Accelerate loop, measured in turn."""
    times = {loop: {steps: loop(run, task_class, steps) for steps in (SHORT, LONG)} for loop in (_hftl, _accelerate)}
    hftl_seconds, plain_seconds = ((seconds[LONG] - seconds[SHORT]) / (LONG - SHORT) for seconds in times.values())
    return hftl_seconds, plain_seconds


def _hftl(run: Any, task_class: Any, steps: int) -> float:
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task = hftl.setup_run(replace(run, train=replace(run.train, max_steps=steps)), task_class)
        splits.sets.pop("validation", None)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        started = time.process_time()
        hftl.fit(accelerator, model, task, splits, run)
        return time.process_time() - started


def _accelerate(run: Any, task_class: Any, steps: int) -> float:
    """Returns CPU seconds of a training loop as in the documentation of Accelerate."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task = hftl.setup_run(run, task_class)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
    dataset = _MapDataset(task.encode(splits["train"], model.processor, 0, None))
    accelerator = Accelerator()
    started = time.process_time()
    loader = DataLoader(dataset, batch_size=run.train.batch_size_per_device, shuffle=True, collate_fn=task.collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 1, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    for _, batch in zip(range(steps), loader, strict=False):
        logits = model(batch["inputs"])["logits"]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return time.process_time() - started


class _MapDataset:
    """Map-style dataset of examples."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.examples.fetch(indices, 0)
