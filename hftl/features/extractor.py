"""Feature extraction: captures the input of the head's first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftl.errors import FeatureError
from hftl.models.oom_retry import MicroBatchLimit
from hftl.models.task_model import TaskModel

Layers = Literal["head", "mean", "all"]
"""head: input of the head. mean: mean over the pooled layers (text). all: all pooled layers (text)."""


def head_layers(model: TaskModel) -> list[tuple[str, nn.Module]]:
    """Returns name and module of the layers in the head that have parameters."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if model.in_head(name) and any(True for _ in module.parameters(recurse=False))
    ]


def linear_head(model: TaskModel) -> nn.Linear | None:
    """Returns the head if it is a single linear layer, else None.

    `FeatureExtractor.linear` tells whether its output is also the logits.
    """
    layers = [module for _, module in head_layers(model)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def random_before_head(model: TaskModel) -> list[str]:
    """Returns names and probabilities of dropout layers outside the backbone, which are random in training."""
    layers = [
        f"{name} ({module.p:g})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and not model.in_backbone(name)
    ]
    rate = getattr(model.net, "drop_rate", 0)  # timm applies dropout as a function, not a module
    return [*layers, f"drop_rate ({rate:g})"] if rate else layers


class FeatureExtractor(nn.Module):
    """Module that maps inputs to `features` [B, D], the input of a model's head ([B, L, D] for `layers` all).

    Usable as a model in `hftl.evaluation.evaluate.predict`.

    Args:
        model: From `build_model`.
        layers: Layers to extract features from.

    Raises:
        FeatureError: The model does not support `layers`.
    """

    def __init__(self, model: TaskModel, layers: Layers = "head") -> None:
        super().__init__()
        self.model = model
        self.evaluation_limit: MicroBatchLimit = model.evaluation_limit
        self.layers = layers
        self.linear = True
        """Whether the logits of all batches so far were the output of a single linear head layer."""
        if layers != "head" and (model.modality != "text" or not model.backbone_root):
            raise FeatureError(f"features: layers '{layers}' requires a text model. Set head.")

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Sets training mode of the model."""
        self.training = mode
        self.model.train(mode)
        return self

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the features of a batch.

        Raises:
            FeatureError: The input of the head is not one vector per row.
        """
        if self.layers != "head":
            return {"features": self._pooled_layers(inputs)}
        if self.model.joins_vectors:
            self.linear = False
            return {"features": self.model.vectors(inputs)}
        capture, head = _TensorCapture(), linear_head(self.model)
        with capture.hooks([module for _, module in head_layers(self.model)]):
            logits = self.model(inputs)["logits"]
        self.linear &= head is not None and capture.last_output is logits
        return {"features": self._as_vectors(capture.first_input)}

    def _as_vectors(self, features: Tensor | None) -> Tensor:
        if features is not None and features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if features is None or features.ndim != 2:
            shape = "no input" if features is None else f"input of shape {tuple(features.shape)}"
            raise FeatureError(
                f"features: the head of '{self.model.source.name}' has {shape}; features require one vector per row, "
                "[B, D]. Choose another model; for texts, set --model.pooling mean (or cls)."
            )
        return features

    def _pooled_layers(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the outputs of all transformer layers except the embeddings, with the pooling of the model."""
        net = self.model.net
        backbone = net.get_submodule(self.model.backbone_root)
        captured: list[Any] = []
        pre_hook = backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"output_hidden_states": True}), with_kwargs=True
        )
        hook = backbone.register_forward_hook(lambda module, args, output: captured.append(output.hidden_states))
        try:
            self.model(inputs)
        finally:
            pre_hook.remove()
            hook.remove()
        if not captured or captured[0] is None:
            raise FeatureError(f"features: '{self.model.source.name}' does not return hidden states. Set layers head.")
        pool: Callable[[Tensor, Tensor], Tensor] = getattr(net, "pool", _masked_mean)
        pooled = torch.stack([pool(layer, inputs["attention_mask"]) for layer in captured[0][1:]], 1)
        return pooled.mean(1) if self.layers == "mean" else pooled


def _masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class _TensorCapture:
    """Captures the first input and the last output of a group of layers."""

    def __init__(self) -> None:
        self.first_input: Tensor | None = None
        self.last_output: Tensor | None = None

    @contextmanager
    def hooks(self, layers: list[nn.Module]) -> Iterator[None]:
        handles = [layer.register_forward_hook(self._capture) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _capture(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.first_input = args[0] if self.first_input is None else self.first_input
        self.last_output = output
