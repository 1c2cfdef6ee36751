"""Outputs in the units of the target while the head learns in standard ones; folded into its weights to be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hftl.errors import ModelError
from hftl.models.task_model import HeadSpec, TaskModel


class OutputScale:
    """Forward hook of a layer: z -> z x std + mean, in float32, which carries digits that half precision does not.

    Args:
        mean: Of the target, for each output [K].
        std: Its standard deviation, for each output [K].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32)
        self.std = torch.tensor(std, dtype=torch.float32)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Returns what the layer answers in the units of the target."""
        return self.apply(output, of_convolution=isinstance(layer, nn.Conv2d))

    def apply(self, output: Tensor, of_convolution: bool = False) -> Tensor:
        """Returns outputs [..., K] (of a convolution [B, K, H, W]) in the units of the target."""
        shape = (-1, 1, 1) if of_convolution else (-1,)
        mean, std = (part.to(output.device).reshape(shape) for part in (self.mean, self.std))
        return output.float() * std + mean

    def fold(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Changes weight and bias of a layer so that it computes the same without this hook."""
        assert layer.bias is not None, "add_scale chooses layers that have one"
        mean, std = self.mean.double(), self.std.double()
        with torch.no_grad():
            weight, bias = layer.weight.cpu().double(), layer.bias.cpu().double()
            layer.weight.copy_(weight * std.reshape(-1, *[1] * (weight.ndim - 1)))
            layer.bias.copy_(bias * std + mean)


def add_scale(model: TaskModel, spec: HeadSpec) -> None:
    """Makes the network itself answer in the units of `spec.scale`, whatever calls it.

    Raises:
        ModelError: No layer of the head gives the outputs, or it has no bias to hold a mean.
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
            f"model.name: the head of {model.source.name} does not end in a linear layer with a bias, which would hold "
            "the scale of a regression; choose another model."
        )
    for layer in layers:  # distilled networks have two, and answer with the mean of both
        layer.register_forward_hook(OutputScale(*spec.scale))


def scale_of(layer: nn.Module) -> OutputScale | None:
    """Returns the scale that a layer answers in, if it has one."""
    # torch lists hooks nowhere else; a copy of a layer, as peft makes, has copies of them and no handles
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, OutputScale)), None)


def fold_scale(model: TaskModel) -> None:
    """Puts the scale into the weights of the head, so that the stock network answers in the units of the target."""
    for layer in model.net.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if isinstance(hook, OutputScale):
                hook.fold(cast(Any, layer))
                del layer._forward_hooks[key]
    model.spec = replace(model.spec, scale=None)
