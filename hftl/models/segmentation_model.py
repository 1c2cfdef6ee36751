"""Segmentation models: transformers' UPerNet (Xiao et al. 2018, arXiv:1807.10221) with any timm backbone.

UPerNet is the transformers class that takes any backbone and trains on few images. Segformer and BEiT support their own
backbones only; MaskFormer and its successors match masks to queries, which needs long schedules; DPT needs token grids
of one size.
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
"""The paper's scales without 1: batch norm over one value per image fails for a batch of one image, and is noisy for
small batches."""
_LEVELS = 4
"""Maximum number of decoded feature maps."""
_SUPPORTED_ARGUMENTS = ("in_chans", "global_pool", "drop_rate", "drop_path_rate")
"""Arguments of timm networks that TimmBackbone stores, or that do not change feature maps in eval mode."""


class SegmentationModel(TaskModel):
    """UPerNet with a timm backbone."""

    modality = "image"

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `logits` and `auxiliary_logits` [B, K, H, W] from `pixel_values` [B, C, H, W].

        Calls the modules of the transformers class directly, because it uses auxiliary logits only in its own loss and
        does not return them.
        """
        pixels = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        net = self.net  # peft's wrapper forwards attribute access
        features = net.backbone(pixels).feature_maps
        outputs = {"logits": net.decode_head(features)}
        if net.auxiliary_head is not None:
            outputs["auxiliary_logits"] = net.auxiliary_head(features)
        size = pixels.shape[2:]
        return {
            name: functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            for name, logits in outputs.items()
        }

    def save(self, folder: Path) -> None:
        """Writes weights, config and transformers image processor."""
        with quiet():
            self.net.save_pretrained(folder)
            self.processor.save(folder)

    def loaders(self, path_or_repo_id: str | Path, revision: str | None = None) -> dict[str, ReloadedModel]:
        """Loads with transformers' `AutoModelForSemanticSegmentation`, which builds the backbone with timm."""
        from transformers import AutoModelForSemanticSegmentation

        with quiet():
            net = AutoModelForSemanticSegmentation.from_pretrained(
                path_or_repo_id, revision=revision, trust_remote_code=False, use_safetensors=True
            ).eval()
        return {"transformers": lambda inputs: net(**inputs).logits}

    def original_labels(self) -> list[str]:
        """Returns transformers' `id2label` in order."""
        return [label for _, label in sorted(self.net.config.id2label.items())]

    def build_untrained(self) -> nn.Module:
        """Builds the same class with the checkpoint's backbone and untrained heads."""
        net = self.net.get_base_model() if self.adapted else self.net
        backbone = _build_backbone(self.source.name, self.source.pretrained, net.config.backbone_config.out_indices)
        return _network(net.config, backbone)


def name_problem(config: ModelConfig) -> str | None:
    """Returns an error message if a setting of the model section is invalid for segmentation, else None."""
    if config.dropout is not None:
        return "model.dropout: transformers' TimmBackbone does not support dropout. Set null for segmentation."
    problem = timm_files.name_problem(config)
    if problem:
        return problem
    name = timm_files.timm_name(config.name)
    if name.startswith("local-dir:"):
        recorded = timm_files.recorded_args(name)
        unsupported = {key: value for key, value in recorded.items() if key not in _SUPPORTED_ARGUMENTS}
        if unsupported:
            return (
                f"model.name: '{config.name}' was built with {unsupported}, which transformers' TimmBackbone does not "
                "support. Choose a network with default arguments for segmentation."
            )
    return None


def build(run: RunConfig, spec: HeadSpec) -> SegmentationModel:
    """Builds UPerNet with the timm backbone `run.model.name` and new heads for `spec.num_outputs` classes.

    Raises:
        ModelError: The name is unknown, the weights cannot be loaded, or the backbone has no suitable feature maps.
    """
    config = run.model
    problem = name_problem(config)
    if problem:
        raise ModelError(problem)
    name = timm_files.timm_name(config.name)
    try:
        backbone = _build_backbone(name, config.pretrained)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as a backbone: {type(error).__name__}: {first_line(error)}. "
            "Without network access, set local-dir:PATH, a folder with config.json and model.safetensors."
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
    """Loads a model saved by `SegmentationModel.save`."""
    from transformers import UperNetForSemanticSegmentation

    with quiet():
        net = UperNetForSemanticSegmentation.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
    source = Source(str(folder), None, True, "transformers")
    return SegmentationModel(net, GeometryProcessor.open(folder), source, spec, _heads(net), _ROOT)


def _build_backbone(name: str, pretrained: bool, levels: list[int] | None = None) -> Any:
    """Builds a timm network that returns feature maps of `levels`, by default those of `decoded_levels`."""
    if levels is None:
        with torch.device("meta"):
            info = timm_files.create(name, pretrained=False, features_only=True).feature_info.info
        levels = decoded_levels([level["reduction"] for level in info])
    log = logging.getLogger("timm.models._builder")
    level = log.level
    log.setLevel(logging.ERROR)  # hides the warning about the unused classifier weights
    try:
        net = timm_files.create(name, pretrained=pretrained, features_only=True, out_indices=levels)
    finally:
        log.setLevel(level)
    net.hftl_levels = levels
    return net


def decoded_levels(reductions: list[int]) -> list[int]:
    """Returns the indices of the feature maps to decode, at most 4.

    Selects the coarsest maps of stride 4 or more; maps of equal stride (ViT) are selected evenly spaced.

    Args:
        reductions: Stride of each feature map of a network, in order.
    """
    if len(set(reductions)) == 1:
        count = min(_LEVELS, len(reductions))
        return [(i + 1) * len(reductions) // count - 1 for i in range(count)]
    coarse = [i for i, stride in enumerate(reductions) if stride >= 4] or list(range(len(reductions)))
    return coarse[-_LEVELS:]


def _check_size(config: ModelConfig, data_config: dict[str, Any], backbone: Any) -> None:
    """Raises ModelError if the backbone has a fixed input size that differs from `model.image_size`."""
    channels, height, width = data_config["input_size"]
    _, fixed_height, fixed_width = backbone.pretrained_cfg["input_size"]
    if (height, width) == (fixed_height, fixed_width):
        return
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError) as error:
        raise ModelError(
            f"model.image_size: {config.name} has the fixed input size {fixed_height} x {fixed_width} pixels "
            f"({first_line(error)}), which transformers' TimmBackbone cannot change. Set null, or choose a "
            "convolutional network."
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
        use_auxiliary_head=len(backbone.hftl_levels) > 2,  # its input is the third feature map
        id2label=dict(enumerate(spec.labels)),
        label2id={label: index for index, label in enumerate(spec.labels)},
    )


def _network(config: Any, backbone: Any) -> Any:
    """Builds UPerNet and copies the weights of `backbone`, because transformers would initialize them differently."""
    from transformers import UperNetForSemanticSegmentation

    with quiet():
        net: Any = UperNetForSemanticSegmentation(config)
    net.backbone._backbone.load_state_dict(backbone.state_dict(), strict=True)
    convolutions = (name for name, module in net.backbone.named_modules() if isinstance(module, nn.Conv2d))
    net.pretrained_cfg = {
        "first_conv": f"{_ROOT}.{next(convolutions, '')}"
    }  # same entry as in timm networks, used by LoRA
    return net


def _heads(net: Any) -> tuple[str, ...]:
    return _HEADS if net.auxiliary_head is not None else _HEADS[:1]
