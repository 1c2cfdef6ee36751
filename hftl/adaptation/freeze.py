"""full and frozen: which parameters of the stock network require gradients."""

from __future__ import annotations

from hftl.models.parts import TaskModel


def train_everything(model: TaskModel) -> None:
    """All parameters learn."""
    model.requires_grad_(True)


def freeze_backbone(model: TaskModel) -> None:
    """Only the head learns; the backbone's parameters and buffers stay as they came, bit for bit.

    `requires_grad` alone would not do: batch norm moves its running statistics in every forward pass of a
    model in training mode, so the backbone also stays in eval mode (see `TaskModel.train`).
    """
    model.frozen = "all"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.in_head(name))
