"""RT-DETR (Zhao et al. 2023, https://arxiv.org/abs/2304.08069) of transformers over a timm backbone.

Chosen among transformers' detectors for what it takes to train one from a backbone alone: it proposes boxes at every
place of the feature maps and lets the decoder refine the best, so that queries have somewhere to begin, where DETR and
YOLOS learn them in hundreds of epochs.
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
_OWN_START = re.compile(r"sampling_offsets|attention_weights|class_embed|enc_score_head|bbox_embed\.\d+\.layers\.2$")
"""Linear layers of the stock class with an initialisation that means something (a grid, zeros, a prior)."""
_PRIOR = 0.05
"""Score of every class at the start: few queries hold an object (RetinaNet, https://arxiv.org/abs/1708.02002, 4.1)."""


@dataclass(frozen=True)
class RTDetr:
    """The network and what is known of it: see `TaskModel`, whose arguments these are."""

    net: Any
    source: Source
    data_config: dict[str, Any]
    head: list[str]
    root: str = _ROOT


def build_rt_detr(config: ModelConfig, spec: HeadSpec) -> RTDetr:
    """Returns RT-DETR over the timm network `config.name`, all of it new but the backbone.

    Raises:
        ModelError: The weights cannot be loaded, or the network has no feature maps of several strides.
    """
    from transformers import RTDetrForObjectDetection

    name = timm_name(config.name)
    body, levels = _feature_maps(config, name)
    data_config = data_config_of(body, config.image_size)
    _check_size(config, data_config["input_size"][1:], [stride for _, _, stride in levels])
    with quiet():
        net: Any = RTDetrForObjectDetection(_config(config, spec, body.pretrained_cfg["architecture"], levels))
    _initialise(net)
    _fill(net.get_submodule(_ROOT).model._backbone, body, config.name, recorded_args(name))
    net.pretrained_cfg = {"first_conv": _first_convolution(net)}  # as timm's networks say it, for LoRA
    license = body.pretrained_cfg.get("license") if config.pretrained else None
    hub_id, revision = origin(name, body)
    source = Source(name, revision, config.pretrained, "timm", hub_id, license)
    return RTDetr(net, source, data_config, _new_modules(net))


def _check_size(config: ModelConfig, sides: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ModelError where maps do not fit each other, or have fewer places than proposals to choose from them."""
    coarsest = strides[-1]
    if len(strides) > 1 and any(side % coarsest for side in sides):
        raise ModelError(
            f"model.image_size: {list(sides)} is not a multiple of {coarsest}, the coarsest stride: feature maps would "
            f"not fit when one is enlarged to the next; take {[-(-side // coarsest) * coarsest for side in sides]}."
        )
    places = sum(math.prod(-(-side // stride) for side in sides) for stride in strides)
    if config.detector.num_queries > places:
        raise ModelError(
            f"model.detector.num_queries: {config.detector.num_queries} proposals, but an image of {sides[0]} x "
            f"{sides[1]} pixels has {places} places (strides {', '.join(map(str, strides))}); lower it, or raise "
            "model.image_size or model.detector.num_feature_levels."
        )


def _feature_maps(config: ModelConfig, name: str) -> tuple[Any, list[tuple[int, int, int]]]:
    """Returns the backbone, and index, channels and stride of each feature map that is used."""
    wanted = STRIDES[-config.detector.num_feature_levels :]
    try:
        with quiet(), torch.device("meta"):
            info = create(name, pretrained=False, features_only=True).feature_info
        strides = info.reduction()
        indices = [max(i for i, stride in enumerate(strides) if stride == each) for each in wanted if each in strides]
        if len(indices) < len(wanted):
            raise ModelError(
                f"model.name: '{config.name}' has feature maps of the strides {', '.join(map(str, strides))}; "
                f"detection needs {', '.join(map(str, wanted))} (a network that is finer at first, as ResNet, ConvNeXt "
                "or MobileNet; or fewer of them: model.detector.num_feature_levels)."
            )
        with quiet():
            body = create(name, pretrained=config.pretrained, features_only=True, out_indices=tuple(indices))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name: '{config.name}' cannot be built as a backbone: {type(error).__name__}: {first_line(error)}"
        ) from error
    check_channels_first(body, config.name)
    channels = body.feature_info.channels()
    return body, list(zip(indices, channels, wanted, strict=True))


def _config(config: ModelConfig, spec: HeadSpec, backbone: str, levels: list[tuple[int, int, int]]) -> Any:
    from transformers import RTDetrConfig, TimmBackboneConfig

    backbone_config = TimmBackboneConfig(backbone=backbone)
    backbone_config.out_indices = [index for index, _, _ in levels]
    wanted, count = config.detector, len(levels)
    width, heads = wanted.d_model, max(1, wanted.d_model // 32)
    return RTDetrConfig(
        backbone_config=backbone_config,
        # its frozen kind drops the activations that timm's batch norms hold; hftl keeps them frozen by itself
        freeze_backbone_batch_norms=False,
        **label_names(spec),
        encoder_in_channels=[channels for _, channels, _ in levels],
        feat_strides=[stride for _, _, stride in levels],
        encode_proj_layers=[count - 1],
        num_feature_levels=count,
        d_model=width,
        encoder_hidden_dim=width,
        decoder_in_channels=[width] * count,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        hidden_expansion=0.5,
        decoder_layers=wanted.decoder_layers,
        num_queries=wanted.num_queries,
        dropout=config.dropout or 0.0,
        # denoising queries are made of the labels, which no forward pass of hftl sees; and their padding would let an
        # image's loss depend on how many boxes its neighbours have
        num_denoising=0,
        initializer_bias_prior_prob=_PRIOR,
    )


def label_names(spec: HeadSpec) -> dict[str, Any]:
    """Returns transformers' entries for the classes; where only their number is known, numbers name them."""
    names = spec.labels or [str(number) for number in range(spec.num_outputs)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def _fill(backbone: nn.Module, body: nn.Module, name: str, own: dict[str, Any]) -> None:
    """Gives the backbone, which is built by its architecture's name alone, the weights of `body`."""
    try:
        backbone.load_state_dict(body.state_dict(), strict=True)
    except RuntimeError as error:
        raise ModelError(
            f"model.name: '{name}' is built with arguments of its own ({', '.join(own)}), which transformers' "
            "TimmBackbone cannot keep; take a network with its architecture's own settings."
        ) from error
    if own and repr(backbone) != repr(body):
        log(
            f"model: the backbone is built without {', '.join(f'{key}={value}' for key, value in own.items())}, which "
            "transformers' TimmBackbone cannot keep: its features differ a little from those it was trained to give"
        )


def _initialise(net: nn.Module) -> None:
    """Draws the new layers as RT-DETR's authors do.

    transformers draws weights, and even the scales of batch norms, from N(0, 0.01), fit for weights that are loaded
    next: through a dozen such layers nothing is left of the features.
    """
    for name, module in net.named_modules():
        if name.startswith(_ROOT + "."):
            continue
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and not _OWN_START.search(name):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _first_convolution(net: Any) -> str:
    body = net.get_submodule(_ROOT).named_modules()
    return next((f"{_ROOT}.{name}" for name, module in body if isinstance(module, nn.Conv2d)), "")


def _new_modules(net: Any) -> list[str]:
    """Returns the modules outside of the backbone, the items of lists one by one (peft cannot copy a list)."""
    found = []
    for name, module in net.model.named_children():
        whole = not isinstance(module, nn.ModuleList)
        items = [name] if whole else [f"{name}.{item}" for item, _ in module.named_children()]
        found += [f"model.{item}" for item in items if f"model.{name}" != _ROOT]
    return found
