"""What the head sees: the input of the first layer of the head, as the network itself computes it."""

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
"""head: the input of the head. mean: the mean of the pooled layers (text). all: every pooled layer (text)."""


def head_layers(model: TaskModel) -> list[tuple[str, nn.Module]]:
    """Returns the layers of the head that have parameters of their own, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if model.in_head(name) and any(True for _ in module.parameters(recurse=False))
    ]


def linear_head(model: TaskModel) -> nn.Linear | None:
    """Returns the head where it is one linear layer, else None.

    That its output is what the model calls logits, `FeatureExtractor` sees for itself.
    """
    layers = [module for _, module in head_layers(model)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def random_before_head(model: TaskModel) -> list[str]:
    """Returns the layers outside of the backbone that draw at random in training: dropout before the head."""
    found = [
        f"{name} ({module.p:g})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and not model.in_backbone(name)
    ]
    rate = getattr(model.net, "drop_rate", 0)  # timm calls dropout as a function
    return [*found, f"drop_rate ({rate:g})"] if rate else found


class FeatureExtractor(nn.Module):
    """A model seen up to its head: inputs -> `features` [B, D] ([B, L, D] for all layers).

    It takes the place of a model in `hftl.evaluation.evaluate.predict`.

    Args:
        model: From `build_model`.
        layers: Which features.

    Raises:
        FeatureError: `layers` is not for this model.
    """

    def __init__(self, model: TaskModel, layers: Layers = "head") -> None:
        super().__init__()
        self.model = model
        self.evaluation_limit: MicroBatchLimit = model.evaluation_limit
        self.layers = layers
        self.linear = True
        """Whether every batch so far had logits that are the output of the one linear layer of the head."""
        if layers != "head" and (model.modality != "text" or not model.backbone_root):
            raise FeatureError(f"features: layers '{layers}' are for text models; say head.")

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Passes on to the model."""
        self.training = mode
        self.model.train(mode)
        return self

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the features of a batch.

        Raises:
            FeatureError: The head takes something else than one vector a row.
        """
        if self.layers != "head":
            return {"features": self._pooled_layers(inputs)}
        if self.model.joins_vectors:
            self.linear = False
            return {"features": self.model.vectors(inputs)}
        entered, head = _Calls(), linear_head(self.model)
        with entered.watching([module for _, module in head_layers(self.model)]):
            logits = self.model(inputs)["logits"]
        self.linear &= head is not None and entered.last is logits
        return {"features": self._one_vector(entered.first)}

    def _one_vector(self, features: Tensor | None) -> Tensor:
        if features is not None and features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if features is None or features.ndim != 2:
            shape = "nothing" if features is None else f"a tensor of shape {tuple(features.shape)}"
            raise FeatureError(
                f"features: the head of {self.model.source.name} takes {shape}, not one vector [B, D] a row; features "
                "for choosing and probing need a head that does (text: --model.pooling mean or cls)."
            )
        return features

    def _pooled_layers(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the outputs of the transformer's layers, without the embeddings, pooled as the model pools."""
        net = self.model.net
        backbone = net.get_submodule(self.model.backbone_root)
        found: list[Any] = []
        asks = backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"output_hidden_states": True}), with_kwargs=True
        )
        reads = backbone.register_forward_hook(lambda module, args, output: found.append(output.hidden_states))
        try:
            self.model(inputs)
        finally:
            asks.remove()
            reads.remove()
        if not found or found[0] is None:
            raise FeatureError(f"features: {self.model.source.name} does not give the outputs of its layers; say head.")
        pool: Callable[[Tensor, Tensor], Tensor] = getattr(net, "pool", _mean_of_tokens)
        pooled = torch.stack([pool(layer, inputs["attention_mask"]) for layer in found[0][1:]], 1)
        return pooled.mean(1) if self.layers == "mean" else pooled


def _mean_of_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class _Calls:
    """Notes the first input and the last output of some layers."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.last: Tensor | None = None

    @contextmanager
    def watching(self, layers: list[nn.Module]) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._note) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.first = args[0] if self.first is None else self.first
        self.last = output
