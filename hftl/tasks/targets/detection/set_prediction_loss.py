"""Set prediction loss: each true box is matched to one query, all other queries are background.

Terms, weights and both matchers are those of the losses in transformers. Those normalize by the number of boxes in the
batch, so the loss of an image depends on the other images. Here each image is normalized by its own boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

L1, GIOU = 5.0, 2.0
"""Weights of the box terms; the class term has weight 1 (DETR, https://arxiv.org/abs/2005.12872, section A.4)."""
ALPHA, GAMMA = 0.75, 2.0
"""Varifocal loss (https://arxiv.org/abs/2008.13367) as in RT-DETR: background has weight alpha * score ** gamma."""
NO_OBJECT = 0.1
"""Weight of unmatched queries in the cross entropy of DETR."""


def set_loss(outputs: Mapping[str, Tensor], labels: Sequence[Mapping[str, Tensor]], num_classes: int) -> Tensor:
    """Returns the loss of each image [B], divided by its number of boxes (at least 1).

    The class term is the varifocal loss for K outputs per query (RT-DETR, D-FINE, Deformable DETR). It is the cross
    entropy for K + 1 outputs, of which the last is "no object" (DETR, YOLOS). If `layer_logits` and `layer_boxes` are
    present, the earlier layers are matched and trained in the same way.

    Args:
        outputs: `logits` [B, Q, K or K + 1] and `pred_boxes` [B, Q, 4] (center, width and height in 0..1) of the last
            layer; `layer_logits` [B, L, Q, K] and `layer_boxes` [B, L, Q, 4] of the earlier layers.
        labels: `class_labels` [N] int64 and `boxes` [N, 4] (as `pred_boxes`) of each image; N may be 0.
        num_classes: K.
    """
    logits, boxes = outputs["logits"].float()[:, None], outputs["pred_boxes"].float()[:, None]
    if "layer_logits" in outputs:
        logits = torch.cat([outputs["layer_logits"].float(), logits], 1)
        boxes = torch.cat([outputs["layer_boxes"].float(), boxes], 1)
    has_no_object = logits.shape[-1] == num_classes + 1
    return torch.stack([_image_loss(*image, has_no_object) for image in zip(logits, boxes, labels, strict=True)])


def _image_loss(logits: Tensor, boxes: Tensor, label: Mapping[str, Tensor], has_no_object: bool) -> Tensor:
    """Returns the loss of an image, summed over L layers with logits [L, Q, K] and boxes [L, Q, 4]."""
    from torchvision.ops import box_convert, generalized_box_iou_loss

    if not (logits.isfinite().all() and boxes.isfinite().all()):
        # the matchers would raise; the training loop reports step and rows of a NaN loss
        return (logits.sum() + boxes.sum()) * torch.nan
    classes, true_boxes = label["class_labels"], label["boxes"].to(boxes)
    layer, query, target = _match(logits, boxes, classes, true_boxes, has_no_object)
    matched, expected = boxes[layer, query], true_boxes[target]
    corners, true_corners = box_convert(matched, "cxcywh", "xyxy"), box_convert(expected, "cxcywh", "xyxy")
    box_loss = L1 * (matched - expected).abs().sum() + GIOU * generalized_box_iou_loss(
        corners, true_corners, reduction="sum", eps=0.0
    )
    num_boxes = max(len(classes), 1)
    if has_no_object:
        # this cross entropy is a mean over queries, so it is not divided by the number of boxes
        return _cross_entropy(logits, layer, query, classes[target]) + box_loss / num_boxes
    iou = _paired_iou(corners.detach(), true_corners)
    return (_varifocal(logits, layer, query, classes[target], iou) + box_loss) / num_boxes


@torch.no_grad()
def _match(
    logits: Tensor, boxes: Tensor, classes: Tensor, true_boxes: Tensor, has_no_object: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns layer, query and true box of each matched pair [L * min(N, Q)], by the matchers of transformers."""
    targets = [{"class_labels": classes, "boxes": true_boxes}] * len(logits)
    pairs = _matcher(has_no_object)({"logits": logits, "pred_boxes": boxes}, targets)
    layer = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(pairs)])
    columns = layer, torch.cat([query for query, _ in pairs]), torch.cat([target for _, target in pairs])
    layer, query, target = (column.to(logits.device) for column in columns)
    return layer, query, target


@cache
def _matcher(has_no_object: bool) -> Any:
    """Returns the Hungarian matcher with the costs that these model families share."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    if has_no_object:
        return HungarianMatcher(class_cost=1.0, bbox_cost=L1, giou_cost=GIOU)
    costs = {"matcher_class_cost": 2.0, "matcher_bbox_cost": L1, "matcher_giou_cost": GIOU}
    focal = {"use_focal_loss": True, "matcher_alpha": 0.25, "matcher_gamma": GAMMA}
    return RTDetrHungarianMatcher(SimpleNamespace(**costs, **focal))


def _varifocal(logits: Tensor, layer: Tensor, query: Tensor, classes: Tensor, iou: Tensor) -> Tensor:
    """Returns the summed varifocal loss.

    The target of a matched query is the IoU with its box. The target of other queries is 0, weighted by confidence.
    """
    score = torch.zeros_like(logits)
    score[layer, query, classes] = iou
    matched = torch.zeros_like(logits)
    matched[layer, query, classes] = 1.0
    weight = ALPHA * logits.detach().sigmoid() ** GAMMA * (1 - matched) + score
    return functional.binary_cross_entropy_with_logits(logits, score, weight, reduction="sum")


def _cross_entropy(logits: Tensor, layer: Tensor, query: Tensor, classes: Tensor) -> Tensor:
    """Returns the weighted mean cross entropy over the queries of each layer, summed over layers."""
    background = logits.shape[-1] - 1
    targets = torch.full(logits.shape[:2], background, device=logits.device)
    targets[layer, query] = classes
    weight = torch.ones(background + 1, device=logits.device)
    weight[background] = NO_OBJECT
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight, reduction="none")
    return (losses.view_as(targets).sum(1) / weight[targets].sum(1)).sum()


def _paired_iou(boxes: Tensor, true_boxes: Tensor) -> Tensor:
    """Returns the IoU [N] of pairs of boxes x0 y0 x1 y1 [N, 4]."""
    from torchvision.ops import box_iou

    return box_iou(boxes, true_boxes).diagonal()
