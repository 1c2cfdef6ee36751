"""A task of your own, written in your own file: which of three traits does a digit have?

    python recipes/custom_task.py --output_dir runs/traits

Each image gets several labels at once (is it even? is it large? is there a closed loop?), which no task of hftl does.
A task joins inputs (how rows become tensors: here hftl's own, for images) with a target (what is learnt from them),
and a target is what you see below. `check_task` holds the result to the contract that hftl's own tasks pass.
"""

import numpy as np
import torch
from torch.nn import functional

import hftl
from hftl.models.parts import HeadSpec
from hftl.tasks import ImageInputs
from hftl.testing import check_task

TRAITS = {"even": {0, 2, 4, 6, 8}, "large": {5, 6, 7, 8, 9}, "loop": {0, 6, 8, 9}}
DEFAULTS = hftl.RunConfig(
    data=hftl.DataConfig(source="embedded:digits", augment=hftl.AugmentConfig(crop_scale=1.0, hflip=0.0)),
    model=hftl.ModelConfig(name="embedded:letters"),
)


class TraitAccuracy:
    """Share of right yes/no answers, per trait: sums that are divided once."""

    def __init__(self) -> None:
        self.right, self.count = np.zeros(len(TRAITS), dtype=np.int64), 0

    def update(self, outputs, batch) -> None:
        """Adds logits [B, K] against labels [B, K]."""
        right = (outputs["logits"] > 0) == (batch["labels"] > 0.5)
        self.right += right.sum(0).cpu().numpy()
        self.count += len(right)

    def merge(self, other) -> None:
        """Adds what another process counted."""
        self.right += other.right
        self.count += other.count

    def compute(self) -> dict[str, float]:
        """Returns each trait's accuracy and their mean."""
        shares = self.right / max(self.count, 1)
        return dict(zip(TRAITS, shares.tolist(), strict=True)) | {"mean_accuracy": float(shares.mean())}


class Traits:
    """Yes or no for each trait: independent sigmoids."""

    columns, problems, best_metric = ["label"], [], "mean_accuracy"

    def head(self, stock):
        """One output per trait."""
        return HeadSpec(stock, len(TRAITS), tuple(TRAITS), "multi_label_classification")

    def labels(self, examples):
        """Returns [B, K] of zeros and ones."""
        return torch.tensor([[float(row["label"] in digits) for digits in TRAITS.values()] for row in examples])

    def loss(self, outputs, labels):
        """Returns the mean over traits for each example, [B]."""
        return functional.binary_cross_entropy_with_logits(outputs["logits"], labels, reduction="none").mean(-1)

    def metrics(self):
        """Fresh accumulators."""
        return [TraitAccuracy()]

    def decode(self, outputs):
        """Returns the probability of each trait by name."""
        return [dict(zip(TRAITS, row, strict=True)) for row in outputs["logits"].sigmoid().tolist()]

    def state(self):
        """Nothing to remember: the traits stand above."""
        return {}


class DigitTraits(hftl.SupervisedTask):
    """Images of digits with three traits each."""

    name, stock = "digit_traits", "timm"

    def __init__(self, splits: hftl.Splits) -> None:
        super().__init__(ImageInputs.find(splits), Traits())


def main(run: hftl.RunConfig) -> dict[str, float]:
    """Checks the task, then trains, measures and saves as every recipe does."""
    run, splits, task = hftl.prepare(run, DigitTraits)
    check_task(task, splits, run)
    accelerator = hftl.start(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.run_folder(run) / "predictions.parquet")
    hftl.publish(accelerator, model, task, splits, run, hftl.Outcome(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
