"""Entry points of the model families: build, check by name, and open a saved model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ArtifactError
from hftl.heads.sklearn_head import open_head
from hftl.logging import log
from hftl.models.target_scaling import add_scale
from hftl.models.task_model import HeadSpec, TaskModel

FAMILIES: dict[str, str] = {
    "timm": "hftl.models.timm_model",
    "UperNetForSemanticSegmentation": "hftl.models.segmentation_model",
    "RTDetrForObjectDetection": "hftl.models.detection_model",
    "AutoModelForTokenClassification": "hftl.models.token_model",
    "AutoModelForQuestionAnswering": "hftl.models.token_model",
    "SentenceTransformer": "hftl.models.embedding_model",
    "ImageTextForClassification": "hftl.models.image_text_model",
    "ImageTextDualEncoder": "hftl.models.image_text_model",
}
"""Module of each `HeadSpec.model_class`; transformers auto classes not listed here use `hftl.models.text_model`.

Each module defines `build(run, spec)`, `open_saved(folder, spec)` and `name_problem(config)`; `spec_problem(config,
spec)` is optional.
"""


def build_model(run: RunConfig, spec: HeadSpec) -> TaskModel:
    """Builds the pretrained model `run.model.name` with a new head.

    Args:
        run: Uses `run.model`, and `run.data.augment` for the training transform of images.
        spec: Head of the task.

    Raises:
        ModelError: The name is unknown, or the weights cannot be loaded.
    """
    model: TaskModel = _family(spec.model_class).build(run, spec)
    add_scale(model, spec)
    total = sum(parameter.numel() for parameter in model.parameters())
    in_head = sum(parameter.numel() for parameter in model.head_parameters())
    weights = "pretrained" if run.model.pretrained else "random weights"
    log(
        f"model: {run.model.name} ({weights}), {total:,} parameters; "
        f"new head: {', '.join(model.head_modules) or 'none'} ({in_head:,})"
    )
    return model


def model_name_problem(config: ModelConfig, model_class: str) -> str | None:
    """Returns an error message if the model name is invalid for a model class, else None. Builds nothing."""
    return _family(model_class).name_problem(config)


def model_problem(config: ModelConfig, spec: HeadSpec) -> str | None:
    """Returns an error message if the model does not fit the head, as far as its family checks this, else None."""
    check = getattr(_family(spec.model_class), "spec_problem", None)
    return check(config, spec) if check is not None else None


def _family(model_class: str) -> Any:
    return import_module(FAMILIES.get(model_class, "hftl.models.text_model"))


def trust_problems(run: RunConfig) -> list[str]:
    """Returns an error message for each invalid combination of `model.trust_remote_code` and `model.revision`."""
    from hftl.models.remote_code import trust_problem

    problem = trust_problem(run.model) if run.model.name else None
    return [problem] if problem else []


def build_on_meta(run: RunConfig, spec: HeadSpec) -> TaskModel:
    """Builds the model on torch's meta device, without weights, for checks of module names and shapes."""
    from dataclasses import replace

    import torch

    untrained = replace(run, model=replace(run.model, pretrained=False))
    with torch.device("meta"):
        return build_model(untrained, spec)


def open_model(folder: Path, spec: HeadSpec, classic: bool = False) -> TaskModel:
    """Loads a saved model with its head, in eval mode.

    Args:
        folder: Written by `TaskModel.save`.
        spec: Head that the model was built with.
        classic: Whether `folder` also contains a scikit-learn head (`hftl.heads.sklearn_head`).

    Raises:
        ArtifactError: The folder is incomplete or damaged.
    """
    try:
        model: TaskModel = _family(spec.model_class).open_saved(folder, spec)
        if classic:
            model.use_sklearn_head(open_head(folder))
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{folder}: cannot be loaded: {type(error).__name__}: {error}") from error
    return model.eval()
