"""full and frozen: which parameters of the stock network require gradients."""

from __future__ import annotations

from hftl.config.schema import BatchNorm
from hftl.models.task_model import TaskModel


def unfreeze_all(model: TaskModel, batch_norm: BatchNorm = "auto") -> None:
    """All parameters learn, except batch norms that are kept: fixed scales and shifts (cf. FrozenBatchNorm2d).

    Statistics of micro-batches would make a step depend on how its rows are cut, and channels that hardly vary have
    scales so small (3e-3 in checkpoints converted from quantised ones) that steps of a usual size destroy them.
    """
    model.requires_grad_(True)
    if batch_norm == "train" or (batch_norm == "auto" and not model.source.pretrained):
        return
    model.frozen = "statistics"
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and model.in_backbone(name):
            module.requires_grad_(False)


def freeze_backbone(model: TaskModel) -> None:
    """Only the head learns; the backbone's parameters and buffers stay as they came, bit for bit.

    `requires_grad` alone would not do: batch norm moves its running statistics in every forward pass of a
    model in training mode, so the backbone also stays in eval mode (see `TaskModel.train`).
    """
    model.frozen = "all"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.in_head(name))
