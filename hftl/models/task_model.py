"""Base class of models: a timm or transformers network split into pretrained backbone and new head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hftl.heads.sklearn_head import SklearnHead
from hftl.models.oom_retry import MicroBatchLimit

Frozen = Literal["nothing", "statistics", "all"]
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
ReloadedModel = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Source:
    """Origin of the backbone; unknown fields are None."""

    name: str
    revision: str | None
    pretrained: bool
    library: str
    hub_id: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    text_source: Source | None = None
    """Origin of the text encoder, if this is the image encoder of an image-text model."""


@dataclass(frozen=True)
class HeadSpec:
    """Specification of the head that a task needs.

    Attributes:
        model_class: Class to build: a key of `hftl.models.build.FAMILIES`, or a transformers auto class
            (`AutoModelForSequenceClassification`, …).
        num_outputs: Number of outputs K; 0: there is no head, and the network itself is trained.
        labels: Names of the outputs, or empty.
        problem_type: Problem type of transformers; None if it has no name for the task.
        scale: Mean and standard deviation of the target per output, in target units; None for outputs without unit.
        options: Further properties of the data that determine the architecture, as JSON values.
    """

    model_class: str
    num_outputs: int
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = "single_label_classification"
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> HeadSpec:
        """Restores a spec from its `asdict` after a JSON round trip."""
        scale = values.get("scale")
        tuples = {"labels": tuple(values["labels"]), "scale": scale and (tuple(scale[0]), tuple(scale[1]))}
        return cls(**values | tuples)


class TaskModel(nn.Module, ABC):
    """Network split into backbone and head.

    `net` is an unmodified timm or transformers class (or peft's wrapper around it); it is trained and saved.

    Args:
        net: timm or transformers network.
        processor: Preprocessing of rows into its inputs (`ImageProcessor` or a tokenizer).
        source: Origin of the backbone.
        spec: Specification of the head.
        head_modules: Dotted names in `net` of the modules whose parameters are all new.
        backbone_root: Dotted name of the backbone in `net`; empty: all of `net` except the head.
    """

    modality: str
    compared: tuple[str, ...] = ("logits",)
    """Names of the outputs that must be equal after a saved model is reloaded."""
    encoders: Mapping[str, str] = {}
    """Module name of each encoder by modality (`image`, `text`), if there are several."""

    def __init__(
        self,
        net: nn.Module,
        processor: Any,
        source: Source,
        spec: HeadSpec,
        head_modules: Iterable[str],
        backbone_root: str = "",
    ) -> None:
        super().__init__()
        self.net: Any = net  # Any: nn.Module does not declare the methods of timm and transformers classes
        self.processor = processor
        self.source = source
        self.spec = spec
        self.head_modules = tuple(head_modules)
        self.backbone_root = backbone_root
        self.frozen: Frozen = "nothing"
        self.still: tuple[str, ...] = ()
        """Backbone modules that always stay in eval mode, in addition to those selected by `frozen`."""
        self.evaluation_limit = MicroBatchLimit("evaluation")
        self.adapted = False
        """Whether `net` is peft's wrapper around the network."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns outputs by name, including those of `compared`; each has one entry per row."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes `net` (with merged adapters) and its preprocessing into `folder`."""

    @abstractmethod
    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads a saved model with every library that supports it, for verification.

        Args:
            path_or_repo_id: Folder, or repo id that it was pushed to.
            revision: Commit on the Hub.

        Returns:
            For each library by name, a function from inputs to `reference_outputs`, independent of this object.
        """

    @property
    def sklearn_head(self) -> SklearnHead | None:
        """The scikit-learn head, or None."""
        return next((module for module in self.net.modules() if isinstance(module, SklearnHead)), None)

    def use_sklearn_head(self, head: SklearnHead) -> None:
        """Replaces the network's single head layer by a scikit-learn head."""
        (name,) = self.head_modules
        self.net.set_submodule(name, head)

    def reference_outputs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the outputs that saved models must reproduce: logits [B, K], or the outputs of `compared` [B, …].

        With a scikit-learn head these are features [B, D], because the network is saved without a head and the head is
        saved separately.
        """
        head = self.sklearn_head
        if head is not None:
            head.bypassed = True
        try:
            with torch.no_grad():
                return compared_outputs(self(inputs), self.compared)
        finally:
            if head is not None:
                head.bypassed = False

    def original_labels(self) -> list[str]:
        """Returns the names of the outputs recorded in the network's configuration, or []."""
        return []

    @property
    def joins_vectors(self) -> bool:
        """Whether the head takes the concatenated vectors of several encoders, computed by `vectors`."""
        return False

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the concatenated encoder vectors of a batch [B, D]; the model accepts them as the input `vectors`."""
        raise NotImplementedError

    @property
    def stem(self) -> tuple[str, ...]:
        """Names in `net` of the layers whose input is pixels, from timm's `first_conv`."""
        first = (getattr(self.net, "pretrained_cfg", None) or {}).get("first_conv") or ()
        return (first,) if isinstance(first, str) else tuple(first)

    @property
    def build_args(self) -> dict[str, Any]:
        """Arguments that rebuild the same architecture, in addition to its name."""
        return {}

    @abstractmethod
    def build_untrained(self) -> nn.Module:
        """Builds the network as before training, as the base model of an adapter."""

    def original_name(self, name: str) -> str:
        """Returns the name of a module or parameter in the original network, without wrapper prefixes."""
        name = name.removeprefix("net.").removeprefix("base_model.model.")
        return name.replace(".modules_to_save.default", "").replace(".original_module", "").replace(".base_layer", "")

    def in_head(self, name: str) -> bool:
        """Whether a module or parameter, by its name in this model or in the original network, belongs to the head."""
        return self.under(name, self.head_modules)

    def under(self, name: str, modules: Iterable[str]) -> bool:
        """Whether a module or parameter is one of `modules` (original names) or inside one of them."""
        name = self.original_name(name)
        return any(name == module or name.startswith(module + ".") for module in modules)

    def in_backbone(self, name: str) -> bool:
        """Whether a module or parameter belongs to the backbone."""
        name, root = self.original_name(name), self.backbone_root
        return not self.in_head(name) and (not root or name == root or name.startswith(root + "."))

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the head."""
        return [parameter for name, parameter in self.named_parameters() if self.in_head(name)]

    def train(self, mode: bool = True) -> TaskModel:
        """Sets training mode, except for frozen parts of the backbone.

        A frozen backbone stays in eval mode. A backbone with adapters keeps its running statistics, because they are
        not saved with an adapter.
        """
        super().train(mode)
        if mode and self.frozen != "nothing":
            for name, module in self.named_modules():
                holds_statistics = getattr(module, "running_mean", None) is not None
                # timm networks apply the dropout before the head by the training flag of the root
                if name not in ("", "net") and self.in_backbone(name) and (self.frozen == "all" or holds_statistics):
                    module.training = False
        if mode and self.still:
            for name, module in self.named_modules():
                module.training &= not self.under(name, self.still)
        return self


def compared_outputs(outputs: Any, names: Sequence[str]) -> Tensor:
    """Returns a single output unchanged, or several outputs flattened per row and concatenated [B, D]."""
    if len(names) == 1:
        return outputs[names[0]]
    return torch.cat([outputs[name].flatten(1) for name in names], 1)
