"""Parameter counts of an adapted model, by group."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hftl.models.task_model import TaskModel


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts by group; `backbone` and `head` exclude the parameters of adapters."""

    method: str
    backbone: int
    backbone_trainable: int
    adapters: int
    head: int
    targets: tuple[str, ...] = ()
    """Original names of the layers with adapters."""

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return self.backbone_trainable + self.adapters + self.head

    @property
    def total(self) -> int:
        """Number of all parameters, including adapters."""
        return self.backbone + self.adapters + self.head

    def __str__(self) -> str:
        return (
            f"adapt: {self.method}; trainable parameters: {self.trainable:,} of {self.total:,} "
            f"({100 * self.trainable / self.total:.2f} %); backbone {self.backbone_trainable:,} of {self.backbone:,}, "
            f"adapters {self.adapters:,}"
            + (f" in {len(self.targets)} layers" if self.targets else "")
            + f", head {self.head:,}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        return asdict(self) | {"trainable": self.trainable, "total": self.total, "targets": list(self.targets)}


def count_parameters(model: TaskModel, method: str, targets: tuple[str, ...] = ()) -> ParameterCounts:
    """Returns the current parameter counts of a model."""
    sums = {"backbone": 0, "backbone_trainable": 0, "adapters": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue  # peft keeps an untrained copy of the head
        if "lora_" in name:
            sums["adapters"] += parameter.numel()
        elif model.in_head(name):
            sums["head"] += parameter.numel()
        else:
            sums["backbone"] += parameter.numel()
            sums["backbone_trainable"] += parameter.numel() * parameter.requires_grad
    return ParameterCounts(method, **sums, targets=targets)
