"""What cached features save: a frozen backbone under hftl against the same one under transformers' Trainer.

`python -m benchmarks frozen --data DIR --model NAME [--epochs 10] [--rounds 3]` trains the head of the same pretrained
network on the same rows, with the same preprocessing, batch size, peak learning rate and evaluation after each epoch,
without augmentation: once by hftl's verbs on an empty cache (features, a grid of heads), once by Trainer, which runs
the backbone in every epoch. Then it times the pass that computes features against the bare forward pass over the same
batches, by turns. Times are CPU seconds of one thread, which a busy machine disturbs less than wall time; hftl is timed
before Trainer and after it (the mean counts), since a long run of Trainer sees the machine change. `--only_hftl` times
it once and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

PASS_ROWS = 512
"""Rows of the comparison with the bare forward pass."""


def main(argv: list[str]) -> None:
    """Prints seconds, accuracy, and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="source as in data.source")
    parser.add_argument("--model", required=True, help="as model.name")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with the bare forward pass")
    parser.add_argument("--only_hftl", action="store_true")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HFTL_CACHE"] = str(Path(folder, "cache"))
        run, kind = _run(args, Path(folder))
        ours, our_accuracy = _hftl(run, kind)
        print(f"hftl     {ours:8.1f} s  test accuracy {our_accuracy:.4f}", flush=True)
        if args.only_hftl:
            return
        trainers, their_accuracy = _trainer(run, kind, Path(folder))
        print(f"Trainer  {trainers:8.1f} s  test accuracy {their_accuracy:.4f}", flush=True)
        os.environ["HFTL_CACHE"] = str(Path(folder, "cache again"))
        again, _ = _hftl(run, kind)
        print(f"hftl     {again:8.1f} s, again", flush=True)
        ours = (ours + again) / 2
        ratios = [_pass(run, kind, Path(folder, f"cache{number}")) for number in range(args.rounds + 1)][1:]
    extraction = statistics.median(ratios)
    print(f"Trainer / hftl {trainers / ours:.2f}")
    print(f"features / bare forward pass {extraction:.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    print(
        json.dumps(
            {
                "benchmark": "frozen",
                "data": Path(args.data).name,
                "model": Path(args.model).name,
                "epochs": args.epochs,
                "speedup": round(trainers / ours, 3),
                "seconds": [round(ours, 1), round(trainers, 1)],
                "accuracy": [round(our_accuracy, 4), round(their_accuracy, 4)],
                "extraction": round(extraction, 4),
            }
        )
    )


def _run(args: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    import hftl
    from hftl.logging import suppress_logs
    from hftl.tasks.auto_task import infer_task

    run = hftl.RunConfig(
        hftl.DataConfig(
            source=args.data, augment=hftl.AugmentConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0), num_workers=0
        ),
        hftl.ModelConfig(name=args.model),
        hftl.AdaptConfig(method="frozen"),
        hftl.TrainConfig(num_epochs=args.epochs, trackers=[]),
        output_dir=str(folder / "run"),
        overwrite=True,
    )
    with suppress_logs():
        return run, infer_task(hftl.load_splits(run.data))


def _built(run: Any, kind: Any) -> tuple[Any, ...]:
    import hftl

    run, splits, task = hftl.setup_run(run, kind)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    return run, splits, task, accelerator, model


def _hftl(run: Any, kind: Any) -> tuple[float, float]:
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task, accelerator, model = _built(run, kind)
        started = time.process_time()
        hftl.fit(accelerator, model, task, splits, run)
        seconds = time.process_time() - started
        splits.sets.pop("validation")
        return seconds, hftl.evaluate(accelerator, model, task, splits, run)["test/accuracy"]


def _trainer(run: Any, kind: Any, folder: Path) -> tuple[float, float]:
    """Trainer as its documentation shows it, on the same network: texts tokenized before, padded batch by batch."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task, _, model = _built(run, kind)
    rows = {split: task.encode(splits[split], model.processor, None, None) for split in splits}
    config = run.train

    class Net(torch.nn.Module):
        """The network with its loss, as Trainer wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
            logits = self.model(inputs)["logits"]
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    trainer = Trainer(
        Net(),
        TrainingArguments(
            str(folder / "trainer"),
            num_train_epochs=config.num_epochs,
            learning_rate=config.head_lr,
            per_device_train_batch_size=config.batch_size_per_device,
            per_device_eval_batch_size=config.batch_size_per_device,
            weight_decay=config.weight_decay,
            warmup_steps=config.warmup_ratio,
            eval_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        data_collator=task.collate,
        train_dataset=_Map(rows["train"]),
        eval_dataset=_Map(rows["validation"]),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    return seconds, trainer.evaluate(_Map(rows["test"]))["eval_accuracy"]


def _pass(run: Any, kind: Any, cache: Path) -> float:
    """Returns the time of features over that of a forward pass over the same batches, preprocessing in both."""
    import torch
    from accelerate import Accelerator

    from hftl.features import cache as features
    from hftl.loading.loader import make_loader
    from hftl.logging import suppress_logs

    os.environ["HFTL_CACHE"] = str(cache)
    with suppress_logs():
        run, splits, task, _, model = _built(replace(run, output_dir=str(cache) + "-run"), kind)
        few = splits["train"].select(range(min(PASS_ROWS, len(splits["train"]))))
        rows = task.encode(few, model.processor, None, None)
        size = features.rows_at_once(run, "cpu")
        order = list(range(len(few))) if rows.lengths is None else (-rows.lengths).argsort(kind="stable").tolist()
        batches = [[(0, row, 1.0) for row in order[at : at + size]] for at in range(0, len(order), size)]
        started = time.process_time()
        features.compute_features(Accelerator(), model, task, few, run)
        ours = time.process_time() - started
        model.eval()
        started = time.process_time()
        with (
            torch.no_grad(),
            make_loader(rows, lambda: iter(batches), task.collate, device="cpu", num_workers=0) as all_,
        ):
            for batch in all_:
                model(batch["inputs"])
        return ours / (time.process_time() - started)


class _Map:
    """The rows, one at a time, as a plain map-style data set."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows.fetch([index], 0)[0]


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
