"""Whether a frozen backbone has to run in every epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from hftl.config.schema import RunConfig
from hftl.data.splits import Splits
from hftl.features.cache import compute_features
from hftl.features.extractor import FeatureExtractor, linear_head, random_before_head
from hftl.loading.loader import Examples
from hftl.logging import log
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator


def uses_cached_features(model: TaskModel, task: Task, splits: Splits, run: RunConfig) -> bool:
    """Whether this run trains a head on features that are computed once; says why not, where it might have."""
    if not _may_cache(run) or model.joins_vectors:
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
    log(f"adapt: frozen, the backbone runs in every epoch: {why}")
    return False


def training_rows(
    accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig
) -> tuple[Examples, Examples | None]:
    """Returns the encoded rows of train, and of validation where there is one.

    Under a frozen model whose head joins the vectors of several encoders these are the vectors, computed once.
    """
    encoded = [
        task.encode(splits[split], model.processor, seed, run.data.max_length) if split in splits else None
        for split, seed in (("train", run.train.seed), ("validation", None))
    ]
    keeps_vectors = all(rows is None or hasattr(rows, "with_vectors") for rows in encoded)
    if _may_cache(run) and model.joins_vectors and not keeps_vectors:
        log("adapt: frozen, the encoders run in every epoch: what they see of a row is drawn anew each time")
    elif _may_cache(run) and model.joins_vectors:
        log("adapt: frozen, on the vectors of the encoders, computed once; images as they are, without augmentation")
        for place, split in enumerate(("train", "validation")):
            rows = encoded[place]
            if rows is not None:
                found = compute_features(accelerator, model, task, splits[split], run, split=split)
                encoded[place] = cast(Any, rows).with_vectors(found.values)
    train, validation = encoded
    assert train is not None
    return train, validation


def _may_cache(run: RunConfig) -> bool:
    adapt = run.adapt
    return (
        adapt.method == "frozen" and adapt.frozen.cache and {adapt.image_method, adapt.text_method} <= {None, "frozen"}
    )


def _linear_in_features(model: TaskModel, inputs: Any) -> bool:
    from accelerate.utils import send_to_device

    reader, training = FeatureExtractor(model), model.training
    with torch.no_grad():
        reader.eval()(send_to_device(inputs, next(model.parameters()).device))
    model.train(training)
    return reader.linear
