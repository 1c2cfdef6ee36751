"""Full fine-tuning and frozen backbone: `requires_grad` of the parameters of the timm or transformers model."""

from __future__ import annotations

from hftl.config.schema import BatchNorm
from hftl.models.task_model import TaskModel


def unfreeze_all(model: TaskModel, batch_norm: BatchNorm = "auto") -> None:
    """Makes all parameters trainable, except batch norms of a pretrained backbone (cf. torchvision FrozenBatchNorm2d).

    With statistics of micro-batches the result of a step would depend on how its rows are divided into micro-batches.
    Channels with little variance have small scales (3e-3 in checkpoints converted from quantized models), which steps
    of the usual size destroy.

    Args:
        model: Changed in place.
        batch_norm: `frozen` freezes the batch norms, `train` trains them; `auto` freezes those of pretrained backbones.
    """
    model.requires_grad_(True)
    if batch_norm == "train" or (batch_norm == "auto" and not model.source.pretrained):
        return
    model.frozen = "statistics"
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None and model.in_backbone(name):
            module.requires_grad_(False)


def freeze_backbone(model: TaskModel) -> None:
    """Freezes the backbone's parameters and buffers; only the head is trainable.

    `requires_grad` alone is not sufficient: in training mode batch norms update their running statistics in every
    forward pass. The backbone therefore also stays in eval mode (see `TaskModel.train`).
    """
    model.frozen = "all"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.in_head(name))
