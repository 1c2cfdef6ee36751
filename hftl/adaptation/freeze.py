"""full and frozen: which parameters of the stock network require gradients."""

from __future__ import annotations

from hftl.config.schema import Statistics
from hftl.models.parts import TaskModel


def train_everything(model: TaskModel, norm_statistics: Statistics = "auto") -> None:
    """All parameters learn; running statistics of batch norms move only if they are to be updated.

    Statistics of micro-batches would make a step depend on how its rows are cut into batches, and some checkpoints
    (converted from quantised ones) hold statistics that no batch reproduces.
    """
    model.requires_grad_(True)
    keep = norm_statistics == "keep" or (norm_statistics == "auto" and model.source.pretrained)
    model.frozen = "statistics" if keep else "nothing"


def freeze_backbone(model: TaskModel) -> None:
    """Only the head learns; the backbone's parameters and buffers stay as they came, bit for bit.

    `requires_grad` alone would not do: batch norm moves its running statistics in every forward pass of a
    model in training mode, so the backbone also stays in eval mode (see `TaskModel.train`).
    """
    model.frozen = "all"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.in_head(name))
