"""A stock network and what hftl knows of it: which parameters came with the checkpoint and which are new."""

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
    """Where the backbone came from, as far as it is known."""

    name: str
    revision: str | None
    pretrained: bool
    library: str
    hub_id: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    text_source: Source | None = None
    """The text encoder's, where this is the image encoder's and the model has both."""


@dataclass(frozen=True)
class HeadSpec:
    """What a task wants on top of a backbone.

    Attributes:
        model_class: The class to build: a name in `hftl.models.build.FAMILIES`, or a transformers auto class
            (`AutoModelForSequenceClassification`, …).
        num_outputs: Width K of the output; 0: there is no head, the network itself learns.
        labels: Names of the outputs, or empty.
        problem_type: transformers' name for what the outputs mean; None where it has none.
        scale: Mean and standard deviation of each output's target, in its own units; None where outputs have no unit.
        options: What else the data say about the architecture, as JSON values.
    """

    model_class: str
    num_outputs: int
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = "single_label_classification"
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> HeadSpec:
        """Returns the spec whose `asdict` has been through JSON."""
        scale = values.get("scale")
        tuples = {"labels": tuple(values["labels"]), "scale": scale and (tuple(scale[0]), tuple(scale[1]))}
        return cls(**values | tuples)


class TaskModel(nn.Module, ABC):
    """A stock network split into backbone and head.

    `net` is the stock class itself (or peft's wrapper around it): it is what is trained and what is saved.

    Args:
        net: The stock network.
        processor: What turns rows into its inputs (`ImageProcessor` or a tokenizer).
        source: Where the backbone came from.
        spec: The head that was asked for.
        head_modules: Dotted names in `net` of the modules whose parameters are all new.
        backbone_root: Dotted name of the backbone in `net`; empty where it is all of `net` but the head.
    """

    modality: str
    compared: tuple[str, ...] = ("logits",)
    """The outputs that must be the same when a saved model is opened again."""
    encoders: Mapping[str, str] = {}
    """Module of each encoder by what it reads (`image`, `text`), where there are several."""

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
        self.net: Any = net  # with the methods of its stock class, which nn.Module does not declare
        self.processor = processor
        self.source = source
        self.spec = spec
        self.head_modules = tuple(head_modules)
        self.backbone_root = backbone_root
        self.frozen: Frozen = "nothing"
        self.still: tuple[str, ...] = ()
        """Modules of the backbone that stay in eval mode whole, beside what `frozen` says."""
        self.evaluation_limit = MicroBatchLimit("evaluation")
        self.adapted = False
        """Whether `net` is peft's wrapper around the stock network."""

    @abstractmethod
    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the network's outputs by name, those of `compared` among them; each has one entry a row."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes `net` (a stock network, adapters merged) and its preprocessing into `folder`."""

    @abstractmethod
    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens what `save` wrote with every library that users will open it with.

        Args:
            place: The folder, or the hub id that it was pushed to.
            revision: Commit on the hub.

        Returns:
            A function inputs -> `reference_outputs` for each library by name, independent of this object.
        """

    @property
    def sklearn_head(self) -> SklearnHead | None:
        """The head, where scikit-learn computes it."""
        return next((module for module in self.net.modules() if isinstance(module, SklearnHead)), None)

    def use_sklearn_head(self, head: SklearnHead) -> None:
        """Puts `head` in the place of the network's one linear layer, and leaves everything else as it is."""
        (name,) = self.head_modules
        self.net.set_submodule(name, head)

    def reference_outputs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns what the stock network computes in eval mode: logits [B, K] (or what is `compared` [B, …]).

        Under a classic head they are features [B, D]: no stock class holds such a head, so what is saved is the network
        without one, and the head beside it.
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
        """Returns the names of the outputs as the stock library recorded them, or [] where it has none."""
        return []

    @property
    def joins_vectors(self) -> bool:
        """Whether the head takes vectors of several encoders, which `vectors` gives."""
        return False

    def vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns what the encoders make of a batch, side by side [B, D]; the model takes it as the input `vectors`."""
        raise NotImplementedError

    @property
    def stem(self) -> tuple[str, ...]:
        """Stock names of the layers that read pixels, as timm names them."""
        first = (getattr(self.net, "pretrained_cfg", None) or {}).get("first_conv") or ()
        return (first,) if isinstance(first, str) else tuple(first)

    @property
    def build_args(self) -> dict[str, Any]:
        """Arguments beside the name that rebuild the same architecture."""
        return {}

    @abstractmethod
    def build_untrained(self) -> nn.Module:
        """Returns the stock network as built before training, for an adapter to be loaded onto."""

    def original_name(self, name: str) -> str:
        """Returns the name that a module or parameter of this model has in the stock network."""
        name = name.removeprefix("net.").removeprefix("base_model.model.")
        return name.replace(".modules_to_save.default", "").replace(".original_module", "").replace(".base_layer", "")

    def in_head(self, name: str) -> bool:
        """Whether a module or parameter (by its name in this model or in the stock network) belongs to the head."""
        return self.under(name, self.head_modules)

    def under(self, name: str, modules: Iterable[str]) -> bool:
        """Whether a module or parameter is one of some modules (by their stock names) or inside of one."""
        name = self.original_name(name)
        return any(name == module or name.startswith(module + ".") for module in modules)

    def in_backbone(self, name: str) -> bool:
        """Whether a module or parameter belongs to the backbone."""
        name, root = self.original_name(name), self.backbone_root
        return not self.in_head(name) and (not root or name == root or name.startswith(root + "."))

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are new with this task."""
        return [parameter for name, parameter in self.named_parameters() if self.in_head(name)]

    def train(self, mode: bool = True) -> TaskModel:
        """Sets training mode, except where the backbone must not move.

        A frozen backbone stays in eval mode whole; one that carries adapters keeps its running statistics,
        which an adapter does not save.
        """
        super().train(mode)
        if mode and self.frozen != "nothing":
            for name, module in self.named_modules():
                holds_statistics = getattr(module, "running_mean", None) is not None
                # the root's own flag steers the dropout before the head in timm's networks
                if name not in ("", "net") and self.in_backbone(name) and (self.frozen == "all" or holds_statistics):
                    module.training = False
        if mode and self.still:
            for name, module in self.named_modules():
                module.training &= not self.under(name, self.still)
        return self


def compared_outputs(outputs: Any, names: Sequence[str]) -> Tensor:
    """Returns one of a model's outputs as it is, or several side by side [B, …], flattened per row."""
    if len(names) == 1:
        return outputs[names[0]]
    return torch.cat([outputs[name].flatten(1) for name in names], 1)
