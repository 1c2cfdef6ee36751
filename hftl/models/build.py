"""The one place a name becomes a model."""

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
"""`HeadSpec.model_class` -> the module that builds it; auto classes of transformers are built by the one for text.

Each module has `build(run, spec)`, `open_saved(folder, spec)` and `name_problem(config)`; it may have
`spec_problem(config, spec)`.
"""


def build_model(run: RunConfig, spec: HeadSpec) -> TaskModel:
    """Returns the pretrained model that `run.model` names, with the head that a task asks for.

    Args:
        run: Uses `run.model`, and `run.data.augment` for the training transform of images.
        spec: The task's `head`.

    Raises:
        ModelError: The name is unknown, or the weights cannot be loaded.
    """
    model: TaskModel = _family(spec.model_class).build(run, spec)
    add_scale(model, spec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    new = sum(parameter.numel() for parameter in model.head_parameters())
    start = "pretrained" if run.model.pretrained else "random weights"
    log(
        f"model: {run.model.name} ({start}), {parameters:,} parameters; "
        f"new head: {', '.join(model.head_modules) or 'none'} ({new:,})"
    )
    return model


def model_name_problem(config: ModelConfig, model_class: str) -> str | None:
    """Returns what is wrong with the names of models for a class, seen without building anything; None if nothing."""
    return _family(model_class).name_problem(config)


def model_problem(config: ModelConfig, spec: HeadSpec) -> str | None:
    """Returns what is wrong with a model for what a task asks for, where its family can say so; None if nothing."""
    check = getattr(_family(spec.model_class), "spec_problem", None)
    return check(config, spec) if check is not None else None


def _family(model_class: str) -> Any:
    return import_module(FAMILIES.get(model_class, "hftl.models.text_model"))


def trust_problems(run: RunConfig) -> list[str]:
    """Returns what is wrong with the settings of trust in code that a model brings along."""
    from hftl.models.remote_code import trust_problem

    problem = trust_problem(run.model) if run.model.name else None
    return [problem] if problem else []


def build_on_meta(run: RunConfig, spec: HeadSpec) -> TaskModel:
    """Returns the network without weights (on torch's meta device), for checks that need only its module names."""
    from dataclasses import replace

    import torch

    bare = replace(run, model=replace(run.model, pretrained=False))
    with torch.device("meta"):
        return build_model(bare, spec)


def open_model(folder: Path, spec: HeadSpec, classic: bool = False) -> TaskModel:
    """Returns a model that hftl saved, head and all, ready for evaluation.

    Args:
        folder: What `TaskModel.save` wrote.
        spec: The head that was asked for when it was built.
        classic: Whether a classic head stands beside the network (`hftl.heads.sklearn_head`).

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
        raise ArtifactError(f"{folder} does not open: {type(error).__name__}: {error}") from error
    return model.eval()
