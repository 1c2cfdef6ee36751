"""Choice between cached features and running a frozen backbone in every epoch."""

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
    """Whether this run trains the head on cached features; logs the reason if a frozen backbone prevents it."""
    if not _may_cache(run) or model.joins_vectors:
        return False
    rows = task.encode(splits["train"], model.processor, None, run.data.max_length)
    random_layers, batch = random_before_head(model), task.collate(rows.fetch([0], 0))
    if linear_head(model) is None:
        reason = "the new head is not one linear layer (text: set --model.pooling mean or cls)"
    elif random_layers:
        reason = f"{', '.join(random_layers)} before the head is random (--model.dropout 0 removes it)"
    elif set(batch) != {"inputs", "labels"}:
        reason = f"batches of the task have keys other than inputs and labels ({', '.join(batch)})"
    elif not _linear_in_features(model, batch["inputs"]):
        reason = "the logits are not the output of the linear layer of the head"
    else:
        return True
    log(f"adapt: frozen without cached features; the backbone runs in every epoch because {reason}")
    return False


def training_rows(
    accelerator: Accelerator, model: TaskModel, task: Task, splits: Splits, run: RunConfig
) -> tuple[Examples, Examples | None]:
    """Returns the encoded rows of train, and of validation if it exists.

    For a frozen model whose head fuses the embeddings of several encoders, the rows hold the cached embeddings.
    """
    encoded = [
        task.encode(splits[split], model.processor, seed, run.data.max_length) if split in splits else None
        for split, seed in (("train", run.train.seed), ("validation", None))
    ]
    accept_embeddings = all(rows is None or hasattr(rows, "with_vectors") for rows in encoded)
    if _may_cache(run) and model.joins_vectors and not accept_embeddings:
        log("adapt: frozen without cached embeddings; the encoders run in every epoch because their inputs are random")
    elif _may_cache(run) and model.joins_vectors:
        log("adapt: frozen on cached encoder embeddings, without image augmentation")
        for index, split in enumerate(("train", "validation")):
            rows = encoded[index]
            if rows is not None:
                features = compute_features(accelerator, model, task, splits[split], run, split=split)
                encoded[index] = cast(Any, rows).with_vectors(features.values)
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

    extractor, training = FeatureExtractor(model), model.training
    with torch.no_grad():
        extractor.eval()(send_to_device(inputs, next(model.parameters()).device))
    model.train(training)
    return extractor.linear
