"""Custom task: predict parity and size of handwritten digits, two labels per image, with one model.

    python recipes/custom_task.py --output_dir runs/two_questions

A task combines inputs and a target. Inputs convert rows to tensors for the model; this task reuses `ImageInputs`.
The target defines labels, head, loss, metrics and predictions; this file implements one. Shapes: B is the batch size.
"""

import torch
from torch.nn.functional import cross_entropy

import hftl
from hftl.models.task_model import HeadSpec
from hftl.run.testing import check_task
from hftl.tasks.inputs import ImageInputs
from hftl.tasks.targets.single_label.metrics import ClassificationMetrics

CLASSES = {"parity": ("even", "odd"), "size": ("small", "medium", "large")}
LOGITS = {"parity": slice(0, 2), "size": slice(2, 5)}  # columns of the model output [B, 5]
DATA = hftl.DataConfig(source="embedded:digits", augment=hftl.AugmentConfig(crop_scale=1.0, hflip=0.0))
DEFAULTS = hftl.RunConfig(data=DATA, model=hftl.ModelConfig(name="embedded:letters"))


class LabelAccuracy(ClassificationMetrics):
    """Accuracy of one label: `update` adds a batch, `merge` adds another process, `compute` returns the result."""

    def __init__(self, label):
        super().__init__(num_classes=len(CLASSES[label]))
        self.label, self.index = label, list(CLASSES).index(label)

    def update(self, outputs, batch):
        """Adds the logits and labels of a batch."""
        logits = outputs["logits"][:, LOGITS[self.label]]
        super().update({"logits": logits}, {"labels": batch["labels"][:, self.index]})

    def compute(self):
        """Returns the metric by name."""
        return {f"{self.label}_accuracy": super().compute()["accuracy"]}


class ParityAndSize:
    """Target: parity and size of the digit in column `label`, trained with the sum of two cross-entropy losses."""

    columns = ["label"]  # columns that `labels` reads
    problems = []  # error messages of data validation
    best_metric = "size_accuracy"  # validation metric that selects the best checkpoint

    def head(self, model_class):
        """Returns the specification of the head: one linear layer with 5 outputs."""
        return HeadSpec(model_class, num_outputs=5, labels=CLASSES["parity"] + CLASSES["size"], problem_type=None)

    def labels(self, examples):
        """Returns the class indices of parity and size [B, 2]."""
        return torch.tensor([[example["label"] % 2, example["label"] // 4] for example in examples])

    def loss(self, outputs, labels):
        """Returns one loss per example [B]; hftl computes the mean over batches and processes."""
        parity, size = (outputs["logits"][:, columns] for columns in LOGITS.values())
        parity_loss = cross_entropy(parity, labels[:, 0], reduction="none")
        return parity_loss + cross_entropy(size, labels[:, 1], reduction="none")

    def metrics(self):
        """Returns new metric accumulators."""
        return [LabelAccuracy(label) for label in CLASSES]

    def decode(self, outputs, batch):
        """Returns the predicted class names, one dictionary per example."""
        parity, size = (outputs["logits"][:, columns].argmax(-1).tolist() for columns in LOGITS.values())
        return [{"parity": CLASSES["parity"][p], "size": CLASSES["size"][s]} for p, s in zip(parity, size, strict=True)]

    def state(self):
        """Returns the constructor's arguments, which are saved with the model."""
        return {}


class DigitQuestions(hftl.SupervisedTask):
    """Task: images as inputs, parity and size as target, a timm model with a new head."""

    name = "digit_questions"
    model_class = "timm"
    primary_metrics = ("parity_accuracy", "size_accuracy")

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), ParityAndSize())


def main(run):
    """Trains, evaluates and saves; returns validation and test metrics."""
    run, splits, task = hftl.setup_run(run, DigitQuestions)
    check_task(task, splits, run)  # raises AssertionError if the task violates the protocol of hftl.tasks.task
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    counts = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(counts, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
