"""A task of your own, in your own file: two questions about each image, answered by one network.

    python recipes/custom_task.py --output_dir runs/two_questions

A task joins inputs (how rows become tensors: here hftl's own, for images) with a target: what is learnt from them.
"""

import torch
from torch.nn.functional import cross_entropy

import hftl
from hftl.models.task_model import HeadSpec
from hftl.run.testing import check_task
from hftl.tasks.registry import ImageInputs
from hftl.tasks.targets.single_label.metrics import ClassificationMetrics

ANSWERS = {"parity": ("even", "odd"), "size": ("small", "medium", "large")}
PARTS = {"parity": slice(0, 2), "size": slice(2, 5)}  # of the outputs [B, 5]
DATA = hftl.DataConfig(source="embedded:digits", augment=hftl.AugmentConfig(crop_scale=1.0, hflip=0.0))
DEFAULTS = hftl.RunConfig(data=DATA, model=hftl.ModelConfig(name="embedded:letters"))


class Accuracy(ClassificationMetrics):  # accumulators: `update` by batch, `merge` over processes, `compute` once
    def __init__(self, question):
        super().__init__(len(ANSWERS[question]))
        self.question, self.place = question, list(ANSWERS).index(question)

    def update(self, outputs, batch):
        logits, labels = outputs["logits"][:, PARTS[self.question]], batch["labels"][:, self.place]
        super().update({"logits": logits}, {"labels": labels})

    def compute(self):
        return {f"{self.question}_accuracy": super().compute()["accuracy"]}


class TwoQuestions:
    columns, problems, best_metric = ["label"], [], "size_accuracy"

    def head(self, model_class):
        return HeadSpec(model_class, 5, sum(ANSWERS.values(), ()), problem_type=None)

    def labels(self, examples):
        return torch.tensor([[row["label"] % 2, row["label"] // 4] for row in examples])

    def loss(self, outputs, labels):  # one number for each example
        parity, size = (outputs["logits"][:, part] for part in PARTS.values())
        return cross_entropy(parity, labels[:, 0], reduction="none") + cross_entropy(
            size, labels[:, 1], reduction="none"
        )

    def metrics(self):
        return [Accuracy(question) for question in ANSWERS]

    def decode(self, outputs, batch):
        best = [outputs["logits"][:, part].argmax(-1).tolist() for part in PARTS.values()]
        return [{q: ANSWERS[q][i] for q, i in zip(ANSWERS, row, strict=True)} for row in zip(*best, strict=True)]

    def state(self):
        return {}


class DigitQuestions(hftl.SupervisedTask):
    name, model_class, primary_metrics = "digit_questions", "timm", ("parity_accuracy", "size_accuracy")

    def __init__(self, splits):
        super().__init__(ImageInputs.find(splits), TwoQuestions())


def main(run):
    run, splits, task = hftl.setup_run(run, DigitQuestions)
    check_task(task, splits, run)  # the contract that hftl's own tasks pass
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    report = hftl.adapt(model, run.adapt)
    history = hftl.fit(accelerator, model, task, splits, run)
    metrics = hftl.evaluate(accelerator, model, task, splits, run, hftl.get_run_folder(run) / "predictions.parquet")
    hftl.save_run(accelerator, model, task, splits, run, hftl.RunResult(report, history, metrics))
    return metrics


if __name__ == "__main__":
    hftl.run_recipe(main, DEFAULTS, __doc__)
