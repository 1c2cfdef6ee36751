"""Rescaling of standardized outputs to target units, folded into the weights of the head on save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hftl.errors import ModelError
from hftl.models.task_model import HeadSpec, TaskModel


class OutputScale:
    """Forward hook of a layer that rescales its output, z * std + mean, in float32 for precision.

    Args:
        mean: Mean of the target per output [K].
        std: Standard deviation of the target per output [K].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns the output of the layer in target units."""
        return self.apply(output, of_convolution=isinstance(layer, nn.Conv2d))

    def apply(self, output: Tensor, of_convolution: bool = False) -> Tensor:
        """Returns outputs [..., K] (of a convolution: [B, K, H, W]) in target units."""
        shape = (-1, 1, 1) if of_convolution else (-1,)
        mean, std = (value.to(output.device).reshape(shape) for value in (self.mean, self.std))
        return output.float() * std + mean

    def fold(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Folds the scale into weight and bias of a layer, so that it computes the same without this hook."""
        assert layer.bias is not None, "add_scale selects layers with a bias"
        mean, std = self.mean.double(), self.std.double()
        with torch.no_grad():
            weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
            layer.weight.copy_(weight * std.reshape(-1, *[1] * (weight.ndim - 1)))
            layer.bias.copy_(bias * std + mean)


def add_scale(model: TaskModel, spec: HeadSpec) -> None:
    """Adds `OutputScale` hooks to the output layers of the head, so that the network predicts in target units.

    Raises:
        ModelError: The head does not end in a linear or convolutional layer with a bias.
    """
    if spec.scale is None:
        return
    layers = [
        module
        for name, module in model.named_modules()
        if model.in_head(name)
        and isinstance(module, (nn.Linear, nn.Conv2d))
        and module.weight.shape[0] == spec.num_outputs
        and module.bias is not None
    ]
    if not layers:
        raise ModelError(
            f"model.name: the head of '{model.source.name}' does not end in a linear layer with a bias, which "
            "regression needs for the target scale. Choose another model."
        )
    for layer in layers:  # distilled networks average the outputs of two layers
        layer.register_forward_hook(OutputScale(*spec.scale))


def scale_of(layer: nn.Module) -> OutputScale | None:
    """Returns the output scale of a layer, or None."""
    # torch has no public list of hooks; copies of a layer, as made by peft, have no handles
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, OutputScale)), None)


def fold_scale(model: TaskModel) -> None:
    """Folds the scale into the weights of the head, so that the network predicts in target units without hooks."""
    for layer in model.net.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, OutputScale):
                hook.fold(cast(Any, layer))
                del layer._forward_hooks[key]
    model.spec = replace(model.spec, scale=None)
