"""Whether a frozen backbone has to run in every epoch."""

from __future__ import annotations

from typing import Any

import torch

from hftl.config.schema import RunConfig
from hftl.console import say
from hftl.data.source import Splits
from hftl.features.tap import FeatureReader, linear_head, random_before_head
from hftl.models.parts import TaskModel
from hftl.tasks.task import Task


def trains_on_features(model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> bool:
    """Whether this run trains a head on features that are computed once; says why not, where it might have."""
    if run.adapt.method != "frozen" or not run.adapt.frozen.cache:
        return False
    rows = task.encode(splits["train"], model.processor, None, run.data.max_length)
    before, batch = random_before_head(model), task.collate(rows.fetch([0], 0))
    if linear_head(model) is None:
        why = "the new head is more than one linear layer (text: --model.pooling mean or cls makes it one)"
    elif before:
        why = f"{', '.join(before)} before the head draws anew for every row (--model.dropout 0 leaves it out)"
    elif set(batch) != {"inputs", "labels"}:
        why = f"the task's batches hold more than inputs and labels ({', '.join(batch)})"
    elif not _linear_in_features(model, batch["inputs"]):
        why = "the logits are not the output of the head's one linear layer"
    else:
        return True
    say(f"adapt: frozen, the backbone runs in every epoch: {why}")
    return False


def _linear_in_features(model: TaskModel, inputs: Any) -> bool:
    from accelerate.utils import send_to_device

    reader, training = FeatureReader(model), model.training
    with torch.no_grad():
        reader.eval()(send_to_device(inputs, next(model.parameters()).device))
    model.train(training)
    return reader.linear
