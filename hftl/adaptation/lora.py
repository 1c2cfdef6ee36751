"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) by peft: in the backbone only, the head trains beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from hftl.config.schema import LoraConfig
from hftl.errors import AdaptError, nearest, shorten
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import TaskModel


def add_lora(
    model: TaskModel, config: LoraConfig, within: Sequence[str] = (), whole: Sequence[str] = ()
) -> tuple[str, ...]:
    """Wraps `model.net` by peft and returns the stock names of the adapted layers.

    Args:
        model: Changed in place.
        config: What the adapters are.
        within: Modules of the backbone that get adapters; all of it where none are named.
        whole: Modules of the backbone that train whole beside the head, and are saved with it.

    Raises:
        AdaptError: A pattern matches no layer of the backbone, or the backbone has none that can be adapted.
    """
    import peft

    targets = find_targets(model, config.target_modules, within)
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        lora_dropout=config.dropout,
        target_modules=list(targets),
        modules_to_save=[*model.head_modules, *whole],
        bias="none",
    )
    with quiet():
        model.net = peft.get_peft_model(model.net, settings)
    model.adapted = True
    model.net.peft_config["default"].base_model_name_or_path = model.source.name
    model.net.peft_config["default"].revision = model.source.revision
    model.frozen = "statistics"
    _verify(model, targets, whole)
    return targets


def find_targets(model: TaskModel, patterns: Sequence[str] | None, within: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the stock names of the backbone layers to adapt.

    Args:
        model: Before peft.
        patterns: Each is a layer's name, the end of one (after a dot), or a regular expression for the whole
            name. None means every dense linear and convolution but the first layer (patch or stem), where
            there is nothing to share, and depthwise ones, which a low-rank update cannot make smaller.
        within: As `add_lora`.

    Raises:
        AdaptError: As `add_lora`; all patterns without a match in one message.
    """
    layers = {model.original_name(name): module for name, module in model.named_modules() if _adaptable(module)}
    layers = {
        name: module
        for name, module in layers.items()
        if model.in_backbone(name) and (not within or model.under(name, within))
    }
    if patterns is None:
        first = model.stem
        chosen = [name for name, module in layers.items() if name not in first and getattr(module, "groups", 1) == 1]
        if not chosen:
            raise AdaptError(
                f"adapt.lora: {model.source.name} has no linear or convolution layer that can take an update; "
                "use full or frozen."
            )
        return tuple(chosen)
    chosen, problems = [], []
    for pattern in patterns:
        matching = [name for name in layers if _matches(pattern, name)]
        chosen += [name for name in matching if name not in chosen]
        if not matching:
            tails = sorted({name.rpartition(".")[2] for name in layers})
            problems.append(
                f"adapt.lora.target_modules: '{pattern}' matches no linear or convolution layer in the backbone of "
                f"{model.source.name} (found: {shorten(tails)}).{nearest(pattern, [*tails, *layers], 3)}"
            )
    if problems:
        raise AdaptError(*problems)
    return tuple(chosen)


def _adaptable(module: nn.Module) -> bool:
    """Whether an update can be merged into the layer's weight.

    Not into layers that change their weight before using it (weight standardisation), nor into convolutions that pad
    by hand unless there is nothing to pad.
    """
    kind = type(module)
    if isinstance(module, nn.Conv2d):
        return kind.forward is nn.Conv2d.forward or (kind.__name__ == "Conv2dSame" and module.kernel_size == (1, 1))
    return isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _verify(model: TaskModel, targets: tuple[str, ...], whole: Sequence[str]) -> None:
    """Peft matches names by their ends and ignores what matches nothing: hold it to the exact layers and head."""
    adapted = {
        model.original_name(name).partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name
    }
    learning = {
        model.original_name(name) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name
    }
    stray = {name for name in learning if not model.in_head(name) and not model.under(name, whole)}
    if adapted != set(targets) or stray or (model.head_modules and not learning):
        wrong = sorted((adapted ^ set(targets)) | stray)
        raise AdaptError(
            f"adapt.lora: peft would adapt other layers than asked for ({shorten(wrong)}). "
            "Name the layers by regular expressions that match whole names."
        )
