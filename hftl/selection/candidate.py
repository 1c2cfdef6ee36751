"""Transferability scores of a candidate backbone, computed on its features of the task's rows."""

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
"""Name of the mean of the pooled layers of a text model."""
KINDS: dict[str, LabelKind] = {
    "single_label_classification": "classes",
    "multi_label_classification": "labels",
    "regression": "values",
}
"""Label kind of the scores, by `problem_type` of transformers."""


@dataclass(frozen=True)
class View:
    """Scores of a candidate on the features of one layer."""

    feature_size: int
    forward_seconds: float
    """Seconds of the forward pass over all rows, as measured when the features were computed (also if cached)."""
    score_seconds: float
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class Candidate:
    """Scores of a backbone, or the reason why it has none.

    Attributes:
        name: As `model.name`.
        problem: Reason without scores; None with scores.
        parameters: Number of parameters of the backbone.
        input_size: Input size as text: "224 x 224" pixels or "512 tokens".
        source_classes: Number of classes of the pretrained head; None without a readable one.
        views: Scores by layer: `head` (input of the head), and for text models `layer mean`.
    """

    name: str
    problem: str | None = None
    parameters: int | None = None
    input_size: str | None = None
    source_classes: int | None = None
    views: dict[str, View] = field(default_factory=dict)

    @property
    def head(self) -> View:
        """Scores on the features that a new head is trained on."""
        return self.views["head"]


def score_candidate(accelerator: Accelerator, run: RunConfig, task: Task, rows: Dataset) -> Candidate:
    """Returns the scores of the backbone `run.model` on labeled rows; a failing backbone has `problem` set.

    Raises:
        DataError: The rows are invalid for every candidate.
    """
    name = run.model.name
    try:
        return _compute_scores(accelerator, run, task, rows)
    except DataError:
        raise
    except HftlError as error:
        problem = "; ".join(error.problems)
    except Exception as error:  # third-party libraries raise arbitrary types
        problem = f"{type(error).__name__}: {first_line(error)}"
    log(f"rank: skipped {name}: {problem}")
    return Candidate(name, problem)


def _compute_scores(accelerator: Accelerator, run: RunConfig, task: Task, rows: Dataset) -> Candidate:
    kind = KINDS.get(task.head.problem_type or "")
    if kind is None:
        raise DataError(
            f"task: '{task.name}' has no transferability scores; allowed: tasks of problem type {', '.join(KINDS)}."
        )
    model = build_model(run, task.head)
    views, classes = {}, None
    layers_by_view: dict[str, Layers] = {"head": "head"}
    if model.modality == "text" and model.backbone_root:
        layers_by_view[LAYER_MEAN] = "mean"
    for view, layers in layers_by_view.items():
        features = compute_features(accelerator, model, task, rows, run, layers=layers)
        if features.labels is None:
            raise DataError("data.source: training rows have no labels.")
        started = time.perf_counter()
        source = source_probabilities(run, task, features.values) if layers == "head" and features.linear else None
        classes = classes if source is None else source.shape[1]
        labeled = LabeledFeatures(features.values, features.labels, kind, source)
        estimates = {
            name: score.compute(labeled) for name, score in TRANSFERABILITY_SCORES.items() if score.fits(labeled)
        }
        seconds = time.perf_counter() - started
        views[view] = View(features.values.shape[1], features.seconds, seconds, estimates)
    parameters = sum(weight.numel() for name, weight in model.named_parameters() if not model.in_head(name))
    return Candidate(run.model.name, None, parameters, _input_size(model, run), classes, views)


def source_probabilities(run: RunConfig, task: Task, features: np.ndarray) -> np.ndarray | None:
    """Returns class probabilities of the pretrained head on the features, [N, Z]; None without a pretrained head."""
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
