"""The loss of detectors that predict a set: each true box is assigned to one query, and everything else is background.

Terms, weights and the two assignments are those that transformers trains its own detectors with; its functions take
a batch and divide by the boxes of all its images, so what an image contributes would depend on its neighbours. Here
each image is divided by its own boxes.
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
"""Weights beside the 1 of the class term (DETR, https://arxiv.org/abs/2005.12872, section A.4; kept by its heirs)."""
ALPHA, GAMMA = 0.75, 2.0
"""Varifocal loss (https://arxiv.org/abs/2008.13367) as in RT-DETR: background counts alpha * score ** gamma."""
NO_OBJECT = 0.1
"""Weight of queries without a box in the cross entropy of DETR."""


def set_loss(outputs: Mapping[str, Tensor], labels: Sequence[Mapping[str, Tensor]], num_classes: int) -> Tensor:
    """Returns the loss of each image [B], divided by the number of its boxes (at least 1).

    The class term is varifocal where there is an output per class (RT-DETR, D-FINE, Deformable DETR), and cross entropy
    where there is one more, for "no object" (DETR, YOLOS). Where `layer_logits` and `layer_boxes` are given, the layers
    before the last are assigned and trained alike.

    Args:
        outputs: `logits` [B, Q, K or K + 1] and `pred_boxes` [B, Q, 4] (centre, width and height in 0..1) of the last
            layer; `layer_logits` [B, L, Q, K] and `layer_boxes` [B, L, Q, 4] of those before.
        labels: For each image `class_labels` [N] int64 and `boxes` [N, 4] as above; N may be 0.
        num_classes: K.
    """
    logits, boxes = outputs["logits"].float()[:, None], outputs["pred_boxes"].float()[:, None]
    if "layer_logits" in outputs:
        logits = torch.cat([outputs["layer_logits"].float(), logits], 1)
        boxes = torch.cat([outputs["layer_boxes"].float(), boxes], 1)
    exclusive = logits.shape[-1] == num_classes + 1
    return torch.stack([_image_loss(*of_image, exclusive) for of_image in zip(logits, boxes, labels, strict=True)])


def _image_loss(logits: Tensor, boxes: Tensor, label: Mapping[str, Tensor], exclusive: bool) -> Tensor:
    """Returns the loss of an image, summed over L layers with logits [L, Q, K] and boxes [L, Q, 4]."""
    from torchvision.ops import box_convert, generalized_box_iou_loss

    if not (logits.isfinite().all() and boxes.isfinite().all()):
        return (logits.sum() + boxes.sum()) * torch.nan  # matchers would raise; training says step and rows
    classes, true = label["class_labels"], label["boxes"].to(boxes)
    layer, query, target = _assign(logits, boxes, classes, true, exclusive)
    matched, wanted = boxes[layer, query], true[target]
    corners, true_corners = box_convert(matched, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    place = L1 * (matched - wanted).abs().sum() + GIOU * generalized_box_iou_loss(
        corners, true_corners, reduction="sum", eps=0.0
    )
    count = max(len(classes), 1)
    if exclusive:
        # a mean over queries already, so not divided by boxes again
        return _cross_entropy(logits, layer, query, classes[target]) + place / count
    overlap = _iou(corners.detach(), true_corners)
    return (_varifocal(logits, layer, query, classes[target], overlap) + place) / count


@torch.no_grad()
def _assign(
    logits: Tensor, boxes: Tensor, classes: Tensor, true: Tensor, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns layer, query and box of each assigned pair [L * min(N, Q)], by the stock matchers."""
    targets = [{"class_labels": classes, "boxes": true}] * len(logits)
    pairs = _matcher(exclusive)({"logits": logits, "pred_boxes": boxes}, targets)
    layer = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(pairs)])
    columns = layer, torch.cat([query for query, _ in pairs]), torch.cat([target for _, target in pairs])
    layer, query, target = (column.to(logits.device) for column in columns)
    return layer, query, target


@cache
def _matcher(exclusive: bool) -> Any:
    """Returns the Hungarian matcher with the costs that all of these families share."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher
    from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

    if exclusive:
        return HungarianMatcher(class_cost=1.0, bbox_cost=L1, giou_cost=GIOU)
    costs = {"matcher_class_cost": 2.0, "matcher_bbox_cost": L1, "matcher_giou_cost": GIOU}
    focal = {"use_focal_loss": True, "matcher_alpha": 0.25, "matcher_gamma": GAMMA}
    return RTDetrHungarianMatcher(SimpleNamespace(**costs, **focal))


def _varifocal(logits: Tensor, layer: Tensor, query: Tensor, classes: Tensor, overlap: Tensor) -> Tensor:
    """Assigned queries learn the overlap with their box as their score; the others learn 0, confident ones most."""
    score = torch.zeros_like(logits)
    score[layer, query, classes] = overlap
    assigned = torch.zeros_like(logits)
    assigned[layer, query, classes] = 1.0
    weight = ALPHA * logits.detach().sigmoid() ** GAMMA * (1 - assigned) + score
    return functional.binary_cross_entropy_with_logits(logits, score, weight, reduction="sum")


def _cross_entropy(logits: Tensor, layer: Tensor, query: Tensor, classes: Tensor) -> Tensor:
    """Weighted mean over the queries of each layer, summed over layers."""
    background = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:2], background, device=logits.device)
    wanted[layer, query] = classes
    weight = torch.ones(background + 1, device=logits.device)
    weight[background] = NO_OBJECT
    losses = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight, reduction="none")
    return (losses.view_as(wanted).sum(1) / weight[wanted].sum(1)).sum()


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the overlap of each pair of boxes x0 y0 x1 y1 [N, 4]."""
    from torchvision.ops import box_iou

    return box_iou(boxes, others).diagonal()
