"""Segmentation models: any timm network as the backbone of transformers' UPerNet (Xiao et al. 2018, arXiv:1807.10221).

UPerNet, because it is the stock class that takes any backbone and trains on few images. Of its kin, Segformer and
BEiT know their own backbones only; MaskFormer and its successors match masks to queries, which takes long schedules;
DPT wants token grids of one size.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hftl.config.schema import ModelConfig, RunConfig
from hftl.errors import ModelError, first_line
from hftl.models import timm_files
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, ReloadedModel, Source, TaskModel
from hftl.preprocessing.joint_transforms import GeometryProcessor

__all__ = ["build", "name_problem", "open_saved"]

_ROOT = "backbone"
_HEADS = ("decode_head", "auxiliary_head")
_POOL_SCALES = (2, 3, 6)
"""Without the published 1: a batch norm over one value a picture fails in training on a batch of one picture, and is
noise on a batch of few."""
_LEVELS = 4
"""Feature maps that are decoded."""
_NO_FEATURES = ("in_chans", "global_pool", "drop_rate", "drop_path_rate")
"""Arguments of timm's networks that change nothing about feature maps in evaluation, or that TimmBackbone holds."""


class SegmentationModel(TaskModel):
    """UPerNet on a timm backbone."""

    modality = "image"

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` and `auxiliary_logits` [B, K, H, W] from `pixel_values` [B, C, H, W].

        The stock class computes the auxiliary logits for its own loss alone, and keeps them to itself.
        """
        pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        net = self.net  # peft's wrapper passes these names on
        features = net.backbone(pixels).feature_maps
        found = {"logits": net.decode_head(features)}
        if net.auxiliary_head is not None:
            found["auxiliary_logits"] = net.auxiliary_head(features)
        size = pixels.shape[2:]
        return {
            name: functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            for name, logits in found.items()
        }

    def save(self, folder: Path) -> None:
        """Writes weights, config and the stock image processor."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save(folder)

    def loaders(self, place: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Opens with transformers' `AutoModelForSemanticSegmentation`, which builds the backbone by timm."""
        from transformers import AutoModelForSemanticSegmentation

        with quiet():
            net = AutoModelForSemanticSegmentation.from_pretrained(
                place, revision=revision, trust_remote_code=False, use_safetensors=True
            ).eval()
        return {"transformers": lambda inputs: net(**inputs).logits}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Returns the same class with the checkpoint's backbone and untrained heads."""
        net = self.net.get_base_model() if self.adapted else self.net
        backbone = _features(self.source.name, self.source.pretrained, net.config.backbone_config.out_indices)
        return _network(net.config, backbone)


def name_problem(config: ModelConfig) -> str | None:
    """Returns what is wrong with the model section for this class, without building anything; None if nothing."""
    if config.dropout is not None:
        return "model.dropout: transformers' TimmBackbone has no dropout to set; leave it null for segmentation."
    problem = timm_files.name_problem(config)
    if problem:
        return problem
    name = timm_files.timm_name(config.name)
    if name.startswith("local-dir:"):
        own = {key: value for key, value in timm_files.recorded_args(name).items() if key not in _NO_FEATURES}
        if own:
            return (
                f"model.name: '{config.name}' was built with {own}, which transformers' TimmBackbone cannot hold; take "
                "a network with its architecture's own settings for segmentation."
            )
    return None


def build(run: RunConfig, spec: HeadSpec) -> SegmentationModel:
    """Returns the timm network `run.model.name` under a new decoder and auxiliary head of `spec.num_outputs` classes.

    Raises:
        ModelError: The name is unknown, the weights cannot be loaded, or the network has no feature maps to decode.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    name = timm_files.timm_name(config.name)
    try:
        backbone = _features(name, config.pretrained)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as a backbone: {type(error).__name__}: {first_line(error)}. "
            "Without a network, name a folder: local-dir:PATH (config.json and model.safetensors)."
        ) from error
    timm_files.check_channels_first(backbone, config.name)
    data_config = timm_files.data_config_of(backbone, config.image_size)
    _check_size(config, data_config, backbone)
    net = _network(_net_config(config, spec, backbone), backbone)
    net.to(memory_format=torch.channels_last)
    license = backbone.pretrained_cfg.get("license") if config.pretrained else None
    hub_id, revision = timm_files.origin(name, backbone)
    source = Source(name, revision, config.pretrained, "timm", hub_id, license)
    return SegmentationModel(net, GeometryProcessor(data_config, run.data.augment), source, spec, _heads(net), _ROOT)


def open_saved(folder: Path, spec: HeadSpec) -> SegmentationModel:
    """Returns the model in a folder written by `SegmentationModel.save`."""
    from transformers import UperNetForSemanticSegmentation

    with quiet():
        net = UperNetForSemanticSegmentation.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    source = Source(str(folder), None, True, "transformers")
    return SegmentationModel(net, GeometryProcessor.open(folder), source, spec, _heads(net), _ROOT)


def _features(name: str, pretrained: bool, levels: list[int] | None = None) -> Any:
    """Returns a timm network that gives feature maps, of the levels that are decoded."""
    if levels is None:
        with torch.device("meta"):
            info = timm_files.create(name, pretrained=False, features_only=True).feature_info.info
        levels = decoded_levels([level["reduction"] for level in info])
    log = logging.getLogger("timm.models._builder")
    level = log.level
    log.setLevel(logging.ERROR)  # that a classifier is not wanted is no news here
    try:
        net = timm_files.create(name, pretrained=pretrained, features_only=True, out_indices=levels)
    finally:
        log.setLevel(level)
    net.hftl_levels = levels
    return net


def decoded_levels(reductions: list[int]) -> list[int]:
    """Returns which feature maps are decoded: four at most, of stride 4 and more, or evenly spaced ones of one stride.

    Args:
        reductions: Stride of each feature map of a network, in order.
    """
    if len(set(reductions)) == 1:
        count = min(_LEVELS, len(reductions))
        return [(number + 1) * len(reductions) // count - 1 for number in range(count)]
    coarse = [number for number, stride in enumerate(reductions) if stride >= 4] or list(range(len(reductions)))
    return coarse[-_LEVELS:]


def _check_size(config: ModelConfig, data_config: dict[str, Any], backbone: Any) -> None:
    """Raises ModelError where the backbone is of a fixed size and another one is asked for."""
    channels, height, width = data_config["input_size"]
    _, own_height, own_width = backbone.pretrained_cfg["input_size"]
    if (height, width) == (own_height, own_width):
        return
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError) as error:
        raise ModelError(
            f"model.image_size: {config.name} takes {own_height} x {own_width} pixels and nothing else "
            f"({first_line(error)}), and transformers' TimmBackbone cannot be told another size; leave "
            "model.image_size null or take a convolutional network."
        ) from error


def _net_config(config: ModelConfig, spec: HeadSpec, backbone: Any) -> Any:
    from transformers import TimmBackboneConfig, UperNetConfig

    architecture = backbone.pretrained_cfg["architecture"]
    return UperNetConfig(
        backbone_config=TimmBackboneConfig(
            backbone=architecture,
            num_channels=backbone.pretrained_cfg["input_size"][0],
            out_indices=backbone.hftl_levels,  # pyright: ignore[reportCallIssue]  a property with a setter
        ),
        hidden_size=config.decoder_channels,
        auxiliary_channels=config.decoder_channels,
        pool_scales=_POOL_SCALES,
        use_auxiliary_head=len(backbone.hftl_levels) > 2,  # it reads the third map
        id2label=dict(enumerate(spec.labels)),
        label2id={label: number for number, label in enumerate(spec.labels)},
    )


def _network(config: Any, backbone: Any) -> Any:
    """Returns UPerNet with the weights of `backbone`, as timm has loaded or drawn them: transformers draws others."""
    from transformers import UperNetForSemanticSegmentation

    with quiet():
        net: Any = UperNetForSemanticSegmentation(config)
    net.backbone._backbone.load_state_dict(backbone.state_dict(), strict=True)
    convolutions = (name for name, module in net.backbone.named_modules() if isinstance(module, nn.Conv2d))
    net.pretrained_cfg = {"first_conv": f"{_ROOT}.{next(convolutions, '')}"}  # as timm's networks say it, for LoRA
    return net


def _heads(net: Any) -> tuple[str, ...]:
    return _HEADS if net.auxiliary_head is not None else _HEADS[:1]
