"""The one place a name becomes a model."""

from __future__ import annotations

from pathlib import Path

from hftl.config.schema import RunConfig
from hftl.console import say
from hftl.errors import ArtifactError
from hftl.models.classic_head import open_head
from hftl.models.parts import HeadSpec, TaskModel


def build_model(run: RunConfig, spec: HeadSpec) -> TaskModel:
    """Returns the pretrained model that `run.model` names, with the head that a task asks for.

    Args:
        run: Uses `run.model`, and `run.data.augment` for the training transform of images.
        spec: The task's `head`.

    Raises:
        ModelError: The name is unknown, or the weights cannot be loaded.
    """
    if spec.stock == "timm":
        from hftl.models.timm_model import build_timm

        model: TaskModel = build_timm(run.model, spec, run.data.augment)
    else:
        from hftl.models.text_model import build_text

        model = build_text(run.model, spec)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    new = sum(parameter.numel() for parameter in model.head_parameters())
    start = "pretrained" if run.model.pretrained else "random weights"
    say(
        f"model: {run.model.name} ({start}), {parameters:,} parameters; "
        f"new head: {', '.join(model.head_modules)} ({new:,})"
    )
    return model


def model_name_problem(name: str, stock: str) -> str | None:
    """Returns what is wrong with a model name for a stock class, seen without building anything; None if nothing."""
    if stock == "timm":
        from hftl.models.timm_model import timm_name_problem

        return timm_name_problem(name)
    from hftl.models.checkpoint_files import text_name_problem

    return text_name_problem(name)


def trust_problems(run: RunConfig) -> list[str]:
    """Returns what is wrong with the settings of trust in code that a model brings along."""
    from hftl.models.remote_code import trust_problem

    problem = trust_problem(run.model) if run.model.name else None
    return [problem] if problem else []


def skeleton(run: RunConfig, spec: HeadSpec) -> TaskModel:
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
        classic: Whether a classic head stands beside the network (`hftl.models.classic_head`).

    Raises:
        ArtifactError: The folder is incomplete or damaged.
    """
    try:
        if spec.stock == "timm":
            from hftl.models.timm_model import open_timm

            model: TaskModel = open_timm(folder, spec)
        else:
            from hftl.models.text_model import open_text

            model = open_text(folder, spec)
        if classic:
            model.use_classic_head(open_head(folder))
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{folder} does not open: {type(error).__name__}: {error}") from error
    return model.eval()
