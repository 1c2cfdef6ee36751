"""One backbone among several: its features of the task's rows, and what every estimator says of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.config.schema import RunConfig
from hftl.errors import DataError, HftlError, first_line
from hftl.features.cache import compute_features
from hftl.features.extractor import Layers
from hftl.features.labeled_features import LabeledFeatures, LabelKind
from hftl.features.transferability import TRANSFERABILITY_SCORES, Estimate
from hftl.logging import log
from hftl.models.build import build_model
from hftl.models.pretrained_head import source_head
from hftl.models.task_model import TaskModel
from hftl.preprocessing.tokenization import token_limit
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

LAYER_MEAN = "layer mean"
"""Name of the features that are the mean of a text model's pooled layers."""
KINDS: dict[str, LabelKind] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}
"""What the estimators take labels for, by transformers' name of the problem."""


@dataclass(frozen=True)
class View:
    """Features of a candidate read in one place, and their scores."""

    feature_size: int
    forward_seconds: float
    """Of the pass over all rows, when it was made; from the cache it costs nothing now."""
    score_seconds: float
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Candidate:
    """A backbone that was looked at, or the reason why it could not be.

    Attributes:
        name: As `model.name`.
        problem: Why there are no scores; None where there are.
        parameters: Of the backbone.
        input_size: In words.
        source_classes: Classes that its own head tells apart; None where it has none that can be read.
        views: By the place that features are read at: `head`, and for text `layer mean`.
    """

    name: str
    problem: str | None = None
    parameters: int | None = None
    input_size: str | None = None
    source_classes: int | None = None
    views: dict[str, View] = field(default_factory=dict)

    @property
    def head(self) -> View:
        """The features that a new head is trained on."""
        return self.views["head"]


def score_candidate(accelerator: Accelerator, run: RunConfig, task: Task, rows: Dataset) -> Candidate:
    """Returns what the backbone `run.model` is worth on labelled rows; its failure is its problem, not an error.

    Raises:
        DataError: The rows cannot be used, by any candidate.
    """
    name = run.model.name
    try:
        return _scored(accelerator, run, task, rows)
    except DataError:
        raise
    except HftlError as error:
        problem = "; ".join(error.problems)
    except Exception as error:  # of any library that was asked to open it
        problem = f"{type(error).__name__}: {first_line(error)}"
    log(f"rank: {name} left out: {problem}")
    return Candidate(name, problem)


def _scored(accelerator: Accelerator, run: RunConfig, task: Task, rows: Dataset) -> Candidate:
    kind = KINDS.get(task.head.problem_type or "")
    if kind is None:
        raise DataError(
            f"rank: there are no scores for {task.name.replace('_', ' ')}; tasks of type {', '.join(KINDS)} have them."
        )
    model = build_model(run, task.head)
    views, classes = {}, None
    places: dict[str, Layers] = {"head": "head"}
    if model.modality == "text" and model.backbone_root:
        places[LAYER_MEAN] = "mean"
    for place, layers in places.items():
        found = compute_features(accelerator, model, task, rows, run, layers=layers)
        if found.labels is None:
            raise DataError("rank: the training rows have no labels.")
        began = time.perf_counter()
        source = source_probabilities(run, task, found.values) if layers == "head" and found.linear else None
        classes = classes if source is None else source.shape[1]
        sample = LabeledFeatures(found.values, found.labels, kind, source)
        estimates = {key: each.compute(sample) for key, each in TRANSFERABILITY_SCORES.items() if each.fits(sample)}
        seconds = time.perf_counter() - began
        views[place] = View(found.values.shape[1], found.seconds, seconds, estimates)
    parameters = sum(each.numel() for key, each in model.named_parameters() if not model.in_head(key))
    return Candidate(run.model.name, None, parameters, _input_size(model, run), classes, views)


def source_probabilities(run: RunConfig, task: Task, features: np.ndarray) -> np.ndarray | None:
    """Returns what the checkpoint's own head says of the rows [N, Z], from the same features; None without one."""
    if task.head.problem_type != "single_label_classification":
        return None
    head = source_head(run.model, task.head.model_class)
    if head is None or head.in_features != features.shape[1]:
        return None
    import torch

    with torch.no_grad():
        logits = head.cpu().float()(torch.from_numpy(np.array(features)))
        return logits.softmax(1).numpy()


def _input_size(model: TaskModel, run: RunConfig) -> str:
    if model.modality == "image":
        size: Any = model.processor.data_config["input_size"]
        return " x ".join(map(str, size[1:]))
    return f"{token_limit(model.processor, run.data.max_length)} tokens"
