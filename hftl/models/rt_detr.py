"""RT-DETR (Zhao et al. 2023, https://arxiv.org/abs/2304.08069) of transformers with a timm backbone.

Chosen among transformers' detectors because it trains from a pretrained backbone alone: it proposes boxes at every
position of the feature maps, and the decoder refines the best ones. DETR and YOLOS start from learned queries, which
need hundreds of epochs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hftl.config.schema import ModelConfig
from hftl.errors import ModelError, first_line
from hftl.logging import log
from hftl.models.suppress_warnings import quiet
from hftl.models.task_model import HeadSpec, Source
from hftl.models.timm_files import check_channels_first, create, data_config_of, origin, recorded_args, timm_name

STRIDES = (8, 16, 32)
_ROOT = "model.backbone"
_SPECIAL_INIT = re.compile(r"sampling_offsets|attention_weights|class_embed|enc_score_head|bbox_embed\.\d+\.layers\.2$")
"""Linear layers for which the transformers class has a special initialization (a grid, zeros, a prior)."""
_PRIOR = 0.05
"""Initial score of every class: few queries match an object (RetinaNet, https://arxiv.org/abs/1708.02002, 4.1)."""


@dataclass(frozen=True)
class RTDetr:
    """RT-DETR network with the arguments of `TaskModel` that describe it."""

    net: Any
    source: Source
    data_config: dict[str, Any]
    head: list[str]
    root: str = _ROOT


def build_rt_detr(config: ModelConfig, spec: HeadSpec) -> RTDetr:
    """Builds RT-DETR with the timm backbone `config.name`; all other layers are new.

    Raises:
        ModelError: The weights cannot be loaded, or the backbone has no feature maps of the required strides.
    """
    from transformers import RTDetrForObjectDetection

    name = timm_name(config.name)
    backbone, levels = _feature_maps(config, name)
    data_config = data_config_of(backbone, config.image_size)
    _check_size(config, data_config["input_size"][1:], [stride for _, _, stride in levels])
    with quiet():
        net: Any = RTDetrForObjectDetection(_config(config, spec, backbone.pretrained_cfg["architecture"], levels))
    _initialize(net)
    _load_backbone(net.get_submodule(_ROOT).model._backbone, backbone, config.name, recorded_args(name))
    net.pretrained_cfg = {"first_conv": _first_convolution(net)}  # same entry as in timm networks, used by LoRA
    license = backbone.pretrained_cfg.get("license") if config.pretrained else None
    hub_id, revision = origin(name, backbone)
    source = Source(name, revision, config.pretrained, "timm", hub_id, license)
    return RTDetr(net, source, data_config, _new_modules(net))


def _check_size(config: ModelConfig, sides: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ModelError if the feature maps do not align, or have fewer positions than `num_queries`."""
    coarsest = strides[-1]
    if len(strides) > 1 and any(side % coarsest for side in sides):
        raise ModelError(
            f"model.image_size: {list(sides)} is not a multiple of {coarsest}, the coarsest stride, so upsampled "
            f"feature maps would not align. Set {[-(-side // coarsest) * coarsest for side in sides]}."
        )
    positions = sum(math.prod(-(-side // stride) for side in sides) for stride in strides)
    if config.detector.num_queries > positions:
        raise ModelError(
            f"model.detector.num_queries: {config.detector.num_queries} exceeds the {positions} feature positions of "
            f"an image of {sides[0]} x {sides[1]} pixels (strides {', '.join(map(str, strides))}). Decrease it, or "
            "increase model.image_size or model.detector.num_feature_levels."
        )


def _feature_maps(config: ModelConfig, name: str) -> tuple[Any, list[tuple[int, int, int]]]:
    """Returns the backbone, and the index, channels and stride of each feature map used."""
    required = STRIDES[-config.detector.num_feature_levels :]
    try:
        with quiet(), torch.device("meta"):
            info = create(name, pretrained=False, features_only=True).feature_info
        strides = info.reduction()
        indices = [
            max(i for i, stride in enumerate(strides) if stride == level) for level in required if level in strides
        ]
        if len(indices) < len(required):
            raise ModelError(
                f"model.name: '{config.name}' has feature maps of strides {', '.join(map(str, strides))}; detection "
                f"needs {', '.join(map(str, required))}. Choose a hierarchical network (ResNet, ConvNeXt, MobileNet), "
                "or decrease model.detector.num_feature_levels."
            )
        with quiet():
            backbone = create(name, pretrained=config.pretrained, features_only=True, out_indices=tuple(indices))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as a backbone: {type(error).__name__}: {first_line(error)}"
        ) from error
    check_channels_first(backbone, config.name)
    channels = backbone.feature_info.channels()
    return backbone, list(zip(indices, channels, required, strict=True))


def _config(config: ModelConfig, spec: HeadSpec, backbone: str, levels: list[tuple[int, int, int]]) -> Any:
    from transformers import RTDetrConfig, TimmBackboneConfig

    backbone_config = TimmBackboneConfig(backbone=backbone)
    backbone_config.out_indices = [index for index, _, _ in levels]
    detector, num_levels = config.detector, len(levels)
    d_model, heads = detector.d_model, max(1, detector.d_model // 32)
    return RTDetrConfig(
        backbone_config=backbone_config,
        # transformers' frozen batch norm drops the activations inside timm's batch norms; hftl freezes them itself
        freeze_backbone_batch_norms=False,
        **label_mappings(spec),
        encoder_in_channels=[channels for _, channels, _ in levels],
        feat_strides=[stride for _, _, stride in levels],
        encode_proj_layers=[num_levels - 1],
        num_feature_levels=num_levels,
        d_model=d_model,
        encoder_hidden_dim=d_model,
        decoder_in_channels=[d_model] * num_levels,
        encoder_ffn_dim=2 * d_model,
        decoder_ffn_dim=2 * d_model,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        hidden_expansion=0.5,
        decoder_layers=detector.decoder_layers,
        num_queries=detector.num_queries,
        dropout=config.dropout or 0.0,
        # denoising queries need labels in the forward pass, and their padding makes losses depend on other images
        num_denoising=0,
        initializer_bias_prior_prob=_PRIOR,
    )


def label_mappings(spec: HeadSpec) -> dict[str, Any]:
    """Returns transformers' `id2label` and `label2id`; unnamed classes are named by their index."""
    names = spec.labels or [str(index) for index in range(spec.num_outputs)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _load_backbone(target: nn.Module, backbone: nn.Module, name: str, arguments: dict[str, Any]) -> None:
    """Copies the weights of `backbone` into `target`, which TimmBackbone builds without the recorded `arguments`."""
    try:
        target.load_state_dict(backbone.state_dict(), strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"model.name: '{name}' was built with custom arguments ({', '.join(arguments)}), which transformers' "
            "TimmBackbone does not support. Choose a network with default arguments."
        ) from error
    if arguments and repr(target) != repr(backbone):
        log(
            f"model: backbone built without {', '.join(f'{key}={value}' for key, value in arguments.items())}, which "
            "transformers' TimmBackbone does not support; features differ slightly from those in pretraining"
        )


def _initialize(net: nn.Module) -> None:
    """Initializes the new layers as in the original RT-DETR.

    transformers draws weights, including batch norm scales, from N(0, 0.01), which assumes that a checkpoint is loaded
    next; a dozen such layers reduce features to zero.
    """
    for name, module in net.named_modules():
        if name.startswith(_ROOT + "."):
            continue
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and not _SPECIAL_INIT.search(name):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _first_convolution(net: Any) -> str:
    modules = net.get_submodule(_ROOT).named_modules()
    return next((f"{_ROOT}.{name}" for name, module in modules if isinstance(module, nn.Conv2d)), "")


def _new_modules(net: Any) -> list[str]:
    """Returns the names of the modules outside the backbone; module lists are expanded, as peft cannot copy them."""
    names = []
    for name, module in net.model.named_children():
        is_list = isinstance(module, nn.ModuleList)
        children = [f"{name}.{child}" for child, _ in module.named_children()] if is_list else [name]
        names += [f"model.{child}" for child in children if f"model.{name}" != _ROOT]
    return names
