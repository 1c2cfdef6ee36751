"""Baselines of semantic segmentation: majority class per pixel position, per color, and a linear decoder.

Usage: python -m benchmarks segmentation DATA MODEL [--image_size 144 192] [--epochs 20] [--seeds 0 1 2]
Baselines are evaluated as in the recipe: on test, in the original size of the masks, by the same metrics.

position  the majority class of the training masks at each pixel position
color     the majority class of each of 16 x 16 x 16 colors in the training images
linear    one 1 x 1 convolution on the standardized feature maps of the frozen backbone (those that UPerNet decodes),
          resized to the size of the second map; AdamW, no augmentation
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hftl
from hftl.loading.loader import Examples
from hftl.tasks.semantic_segmentation import SemanticSegmentation
from hftl.tasks.targets.segmentation.target import IGNORED

Predict = Callable[[Tensor], Tensor]
"""pixel_values [B, C, H, W] -> scores [B, K, h, w]."""
_COLORS = 16
"""Number of levels per color channel."""


def batches(task: SemanticSegmentation, examples: Examples, size: int = 16) -> Iterator[dict[str, Any]]:
    """Yields batches in the order of the examples."""
    for start in range(0, len(examples), size):
        yield task.collate(examples.fetch(range(start, min(start + size, len(examples))), 0))


def evaluate(task: SemanticSegmentation, examples: Examples, predict: Predict) -> dict[str, float]:
    """Returns the task's metrics."""
    (metric,) = task.metrics()
    for batch in batches(task, examples):
        metric.update({"logits": predict(batch["inputs"]["pixel_values"])}, batch)
    return metric.compute()


def resized_masks(batch: dict[str, Any]) -> Tensor:
    """Returns the masks of a batch, resized to its images [B, H, W]."""
    size = batch["inputs"]["pixel_values"].shape[2:]
    masks = [functional.interpolate(mask[None, None].float(), size, mode="nearest-exact") for mask in batch["labels"]]
    return torch.cat(masks)[:, 0].long()


def majority_baselines(task: SemanticSegmentation, train: Examples) -> dict[str, Predict]:
    """Returns the baselines `position` and `color`, which predict each pixel independently."""
    classes = len(task.target.names)
    position_counts: Any = 0
    color_counts = torch.zeros(_COLORS**3, classes)
    for batch in batches(task, train):
        masks = resized_masks(batch)
        one_hot = functional.one_hot(masks.clamp(min=0), classes) * (masks != IGNORED)[..., None]
        position_counts = position_counts + one_hot.sum(0)
        colors = _color_indices(batch["inputs"]["pixel_values"])
        color_counts.index_add_(0, colors.ravel(), one_hot.reshape(-1, classes).float())
    position_scores = position_counts.permute(2, 0, 1).float()
    return {
        "position": lambda pixels: position_scores.expand(len(pixels), -1, -1, -1),
        "color": lambda pixels: color_counts[_color_indices(pixels)].permute(0, 3, 1, 2),
    }


def _color_indices(pixels: Tensor) -> Tensor:
    """Returns the color index of each pixel [B, H, W] in [0, 4096); normalized values are clamped to [-3, 3]."""
    levels = ((pixels + 3) / 6 * _COLORS).long().clamp(0, _COLORS - 1)
    return (levels[:, 0] * _COLORS + levels[:, 1]) * _COLORS + levels[:, 2]


class LinearDecoder(nn.Module):
    """One linear layer per pixel on the feature maps of a frozen backbone."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.standard = nn.BatchNorm2d(sum(backbone.channels), affine=False)
        self.linear = nn.Conv2d(sum(backbone.channels), classes, 1)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Returns all feature maps, resized to the second one and concatenated [B, C, h, w]."""
        maps = self.backbone(pixels).feature_maps
        size = maps[1].shape[2:]
        return torch.cat([functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], 1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, K, h, w]."""
        return self.linear(self.standard(features))


def train_linear(task: SemanticSegmentation, train: Examples, backbone: Any, epochs: int, seed: int) -> Predict:
    """Returns a linear decoder trained on precomputed features."""
    torch.manual_seed(seed)
    decoder = LinearDecoder(backbone, len(task.target.names))
    cached = [
        (decoder.features(batch["inputs"]["pixel_values"]), resized_masks(batch)) for batch in batches(task, train)
    ]
    optimizer = torch.optim.AdamW([*decoder.linear.parameters()], lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(cached))
    for _ in range(epochs):
        for index in torch.randperm(len(cached)).tolist():
            features, masks = cached[index]
            logits = functional.interpolate(decoder.train()(features), masks.shape[1:], mode="bilinear")
            decoder.backbone.eval()
            functional.cross_entropy(logits, masks, ignore_index=IGNORED).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    decoder.eval()
    return torch.no_grad()(lambda pixels: decoder(decoder.features(pixels)))


def main(argv: Sequence[str]) -> None:
    """Prints mean IoU and pixel accuracy of each baseline."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks segmentation")
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--image_size", nargs=2, type=int, default=[144, 192])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(argv)
    run = hftl.RunConfig(
        data=hftl.DataConfig(source=options.data, augment=hftl.AugmentConfig(1, 0, 0)),
        model=hftl.ModelConfig(name=options.model, image_size=options.image_size),
    )
    run, splits, task = hftl.setup_run(run, SemanticSegmentation)
    model = hftl.build_model(run, task.head)
    train, test = (task.encode(splits[split], model.processor, None, None) for split in ("train", "test"))
    baselines = majority_baselines(task, train)
    for seed in options.seeds:
        baselines[f"linear, seed {seed}"] = train_linear(task, train, model.net.backbone, options.epochs, seed)
    for name, predict in baselines.items():
        metrics = evaluate(task, test, predict)
        print(f"{name:<16} mean_iou {metrics['mean_iou']:.3f}  pixel_accuracy {metrics['pixel_accuracy']:.3f}")
