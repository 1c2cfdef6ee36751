"""What hftl's loop costs over a plain Accelerate loop, per optimizer step, on the same model and batches.

`python -m benchmarks step_overhead [--model minilm|resnet] [--rounds 5]` times both in turn in one process, in CPU
seconds of one thread, which a busy machine disturbs less than wall time. The cost of a step is the slope between a
short and a long run, so set-up does not count; the ratio is taken round by round.
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
        run, kind = _text(Path(folder)) if args.model == "minilm" else _image(Path(folder))
        rows = [_round(run, kind) for _ in range(args.rounds + 1)][1:]  # the first warms up
    ours, plain = (statistics.median(row[i] for row in rows) for i in (0, 1))
    ratios = [row[0] / row[1] for row in rows]
    print(f"\n{'loop':<18} ms a step (median of {len(rows)} rounds)")
    print(f"{'hftl.fit':<18} {ours * 1e3:.2f}\n{'plain Accelerate':<18} {plain * 1e3:.2f}")
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    print(
        json.dumps(
            {
                "benchmark": "step_overhead",
                "model": args.model,
                "ratio": round(ratio, 4),
                "ms_hftl": round(ours * 1e3, 3),
                "ms_plain": round(plain * 1e3, 3),
            }
        )
    )


def _text(folder: Path) -> tuple[Any, Any]:
    """A BERT of MiniLM-L6's size with random weights, on texts of 30 tokens."""
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
    """The embedded network on digits."""
    from hftl import DataConfig, ImageClassification, ModelConfig, RunConfig, TrainConfig

    run = RunConfig(
        DataConfig(source="embedded:digits", validation_fraction=0.0),
        ModelConfig(name="embedded:letters"),
        train=TrainConfig(batch_size_per_device=32, trackers=[]),
        output_dir=str(folder / "run"),
        overwrite=True,
    )
    return run, ImageClassification


def _round(run: Any, kind: Any) -> tuple[float, float]:
    """Returns seconds per step of hftl's loop and of the plain one, measured in turn."""
    times = {loop: {steps: loop(run, kind, steps) for steps in (SHORT, LONG)} for loop in (_ours, _plain)}
    ours, plain = ((of[LONG] - of[SHORT]) / (LONG - SHORT) for of in times.values())
    return ours, plain


def _ours(run: Any, kind: Any, steps: int) -> float:
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task = hftl.setup_run(replace(run, train=replace(run.train, max_steps=steps)), kind)
        splits.sets.pop("validation", None)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        started = time.process_time()
        hftl.fit(accelerator, model, task, splits, run)
        return time.process_time() - started


def _plain(run: Any, kind: Any, steps: int) -> float:
    """The loop that a reader of Accelerate's documentation would write."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task = hftl.setup_run(run, kind)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
    rows = task.encode(splits["train"], model.processor, 0, None)
    accelerator = Accelerator()
    started = time.process_time()
    examples = _Map(rows)
    loader = DataLoader(examples, batch_size=run.train.batch_size_per_device, shuffle=True, collate_fn=task.collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for _, batch in zip(range(steps), loader, strict=False):
        logits = model(batch["inputs"])["logits"]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.process_time() - started


class _Map:
    """The rows, one at a time, as a plain map-style data set."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self.rows.fetch(indices, 0)
