"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) by peft: adapters in the backbone, head fully trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from hftl.config.schema import LoraConfig
from hftl.errors import AdaptError, nearest, shorten
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import TaskModel


def add_lora(
    model: TaskModel, config: LoraConfig, adapted_modules: Sequence[str] = (), trained_modules: Sequence[str] = ()
) -> tuple[str, ...]:
    """Wraps `model.net` in a peft model and returns the original names of the adapted layers.

    Args:
        model: Changed in place.
        config: Rank, scaling, dropout and target modules.
        adapted_modules: Backbone modules in which layers are adapted; empty for the whole backbone.
        trained_modules: Backbone modules that are fully trained and saved with the head (peft `modules_to_save`).

    Raises:
        AdaptError: A pattern matches no backbone layer, or no backbone layer can be adapted.
    """
    import peft

    targets = find_targets(model, config.target_modules, adapted_modules)
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        lora_dropout=config.dropout,
        target_modules=list(targets),
        modules_to_save=[*model.head_modules, *trained_modules],
        bias="none",
    )
    with quiet():
        model.net = peft.get_peft_model(model.net, settings)
    model.adapted = True
    model.net.peft_config["default"].base_model_name_or_path = model.source.name
    model.net.peft_config["default"].revision = model.source.revision
    model.frozen = "statistics"
    _verify(model, targets, trained_modules)
    return targets


def find_targets(
    model: TaskModel, patterns: Sequence[str] | None, adapted_modules: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the original names of the backbone layers to adapt.

    Args:
        model: Model before peft wraps it.
        patterns: Layer names, name suffixes after a dot, or regular expressions for full names. None selects all
            linear and convolution layers except the first layer (patch embedding or stem), which has little to
            adapt, and depthwise convolutions, for which a low-rank update saves no parameters.
        adapted_modules: Backbone modules in which layers are adapted; empty for the whole backbone.

    Raises:
        AdaptError: Patterns match no backbone layer (all of them in one error), or no layer can be adapted.
    """
    layers = {model.original_name(name): module for name, module in model.named_modules() if _adaptable(module)}
    layers = {
        name: module
        for name, module in layers.items()
        if model.in_backbone(name) and (not adapted_modules or model.under(name, adapted_modules))
    }
    if patterns is None:
        stem = model.stem
        targets = [name for name, module in layers.items() if name not in stem and getattr(module, "groups", 1) == 1]
        if not targets:
            raise AdaptError(
                f"adapt.lora: {model.source.name} has no linear or convolution layer that LoRA can adapt. "
                "Set adapt.method full or frozen."
            )
        return tuple(targets)
    targets, problems = [], []
    for pattern in patterns:
        matches = [name for name in layers if _matches(pattern, name)]
        targets += [name for name in matches if name not in targets]
        if not matches:
            suffixes = sorted({name.rpartition(".")[2] for name in layers})
            problems.append(
                f"adapt.lora.target_modules: '{pattern}' matches no linear or convolution layer in the backbone of "
                f"{model.source.name}; allowed: {shorten(suffixes)}.{nearest(pattern, [*suffixes, *layers], 3)}"
            )
    if problems:
        raise AdaptError(*problems)
    return tuple(targets)


def _adaptable(module: nn.Module) -> bool:
    """Whether a low-rank update can be merged into the layer's weight.

    It cannot for layers that transform their weight in the forward pass (weight standardization) and for convolutions
    with dynamic padding (timm `Conv2dSame`), except those with 1 x 1 kernels, which need no padding.
    """
    cls = type(module)
    if isinstance(module, nn.Conv2d):
        return cls.forward is nn.Conv2d.forward or (cls.__name__ == "Conv2dSame" and module.kernel_size == (1, 1))
    return isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _verify(model: TaskModel, targets: tuple[str, ...], trained_modules: Sequence[str]) -> None:
    """Checks that peft adapted exactly `targets`: it matches name suffixes and ignores names without a match.

    Raises:
        AdaptError: Other layers are adapted or trainable, or no head parameter is trainable.
    """
    adapted = {
        model.original_name(name).partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name
    }
    trainable = {
        model.original_name(name) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name
    }
    unexpected = {name for name in trainable if not model.in_head(name) and not model.under(name, trained_modules)}
    if adapted != set(targets) or unexpected or (model.head_modules and not trainable):
        wrong = sorted((adapted ^ set(targets)) | unexpected)
        raise AdaptError(
            f"adapt.lora.target_modules: peft adapts layers other than the selected ones ({shorten(wrong)}). "
            "Set regular expressions that match full layer names."
        )
