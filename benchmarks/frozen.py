"""Speedup by cached features: training a head on a frozen backbone by hftl and by the Trainer of transformers.

`python -m benchmarks frozen --data DIR --model NAME [--epochs 10] [--rounds 3]` trains the head of the same pretrained
model on the same rows, with the same preprocessing, batch size, peak learning rate and evaluation after each epoch,
without augmentation: once by hftl with an empty cache (features, grid of heads), and once by Trainer, which runs the
backbone in every epoch. It then times feature extraction and the bare forward pass over the same batches, in turn.
Times are CPU seconds of one thread, which depend less on other load than wall-clock time. hftl is timed before and
after Trainer, and the mean is reported, since the load of the machine can change during a long run of Trainer.
`--only_hftl` times hftl once and skips the rest.
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
"""Number of rows of the comparison with the bare forward pass."""


def main(argv: list[str]) -> None:
    """Prints seconds, test accuracies and both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="value of data.source")
    parser.add_argument("--model", required=True, help="value of model.name")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison with the bare forward pass")
    parser.add_argument("--only_hftl", action="store_true")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HFTL_CACHE"] = str(Path(folder, "cache"))
        run, task_class = _run_config(args, Path(folder))
        hftl_seconds, hftl_accuracy = _train_by_hftl(run, task_class)
        print(f"hftl     {hftl_seconds:8.1f} s  test accuracy {hftl_accuracy:.4f}", flush=True)
        if args.only_hftl:
            return
        trainer_seconds, trainer_accuracy = _train_by_trainer(run, task_class, Path(folder))
        print(f"Trainer  {trainer_seconds:8.1f} s  test accuracy {trainer_accuracy:.4f}", flush=True)
        os.environ["HFTL_CACHE"] = str(Path(folder, "second cache"))
        second_seconds, _ = _train_by_hftl(run, task_class)
        print(f"hftl     {second_seconds:8.1f} s, second run", flush=True)
        hftl_seconds = (hftl_seconds + second_seconds) / 2
        # the first round is warm-up
        ratios = [
            _extraction_ratio(run, task_class, Path(folder, f"cache{number}")) for number in range(args.rounds + 1)
        ][1:]
    extraction = statistics.median(ratios)
    print(f"Trainer / hftl {trainer_seconds / hftl_seconds:.2f}")
    print(f"features / bare forward pass {extraction:.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})")
    print(
        json.dumps(
            {
                "benchmark": "frozen",
                "data": Path(args.data).name,
                "model": Path(args.model).name,
                "epochs": args.epochs,
                "speedup": round(trainer_seconds / hftl_seconds, 3),
                "seconds": [round(hftl_seconds, 1), round(trainer_seconds, 1)],
                "accuracy": [round(hftl_accuracy, 4), round(trainer_accuracy, 4)],
                "extraction": round(extraction, 4),
            }
        )
    )


def _run_config(args: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """Returns the configuration and the detected task class."""
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


def _build(run: Any, task_class: Any) -> tuple[Any, ...]:
    import hftl

    run, splits, task = hftl.setup_run(run, task_class)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    return run, splits, task, accelerator, model


def _train_by_hftl(run: Any, task_class: Any) -> tuple[float, float]:
    """Returns CPU seconds of training and test accuracy."""
    import hftl
    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task, accelerator, model = _build(run, task_class)
        started = time.process_time()
        hftl.fit(accelerator, model, task, splits, run)
        seconds = time.process_time() - started
        splits.sets.pop("validation")
        return seconds, hftl.evaluate(accelerator, model, task, splits, run)["test/accuracy"]


def _train_by_trainer(run: Any, task_class: Any, folder: Path) -> tuple[float, float]:
    """Returns CPU seconds of training and test accuracy of Trainer, used as its documentation shows.

    Texts are tokenized before the timed part and padded per batch.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from hftl.logging import suppress_logs

    with suppress_logs():
        run, splits, task, _, model = _build(run, task_class)
    examples = {split: task.encode(splits[split], model.processor, None, None) for split in splits}
    config = run.train

    class ModelWithLoss(torch.nn.Module):
        """The model with its loss in the interface of Trainer."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: Any, labels: Any) -> dict[str, Any]:
            logits = self.model(inputs)["logits"]
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    trainer = Trainer(
        ModelWithLoss(),
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
        train_dataset=_MapDataset(examples["train"]),
        eval_dataset=_MapDataset(examples["validation"]),
        compute_metrics=lambda outputs: {
            "accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())
        },
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    return seconds, trainer.evaluate(_MapDataset(examples["test"]))["eval_accuracy"]


def _extraction_ratio(run: Any, task_class: Any, cache: Path) -> float:
    """Returns CPU time of feature extraction / CPU time of forward passes on the same batches; both preprocess."""
    import torch
    from accelerate import Accelerator

    from hftl.features import cache as features
    from hftl.loading.loader import make_loader
    from hftl.logging import suppress_logs

    os.environ["HFTL_CACHE"] = str(cache)
    with suppress_logs():
        run, splits, task, _, model = _build(replace(run, output_dir=str(cache) + "-run"), task_class)
        rows = splits["train"].select(range(min(PASS_ROWS, len(splits["train"]))))
        examples = task.encode(rows, model.processor, None, None)
        size = features.rows_at_once(run, "cpu")
        lengths = examples.lengths
        order = list(range(len(rows))) if lengths is None else (-lengths).argsort(kind="stable").tolist()
        batches = [[(0, row, 1.0) for row in order[start : start + size]] for start in range(0, len(order), size)]
        started = time.process_time()
        features.compute_features(Accelerator(), model, task, rows, run)
        extraction_seconds = time.process_time() - started
        model.eval()
        started = time.process_time()
        with (
            torch.no_grad(),
            make_loader(examples, lambda: iter(batches), task.collate, device="cpu", num_workers=0) as loader,
        ):
            for batch in loader:
                model(batch["inputs"])
        return extraction_seconds / (time.process_time() - started)


class _MapDataset:
    """Map-style dataset of examples."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples.fetch([index], 0)[0]


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
