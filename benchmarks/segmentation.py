"""What segmentation must beat: the commonest class of each place, of each colour, and a linear decoder.

Usage: python -m benchmarks segmentation DATA MODEL [--image_size 144 192] [--epochs 20] [--seeds 0 1 2]
Each baseline is measured as the recipe measures a model: at the masks' own size, by the same metrics, on test.

place   the commonest class of the training masks at each place of the picture
colour  the commonest class of each of 16 x 16 x 16 colours in the training pictures
linear  one 1 x 1 convolution on the standardised feature maps of the frozen backbone that UPerNet decodes too, brought
        to the size of the second one; AdamW, no augmentation
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
_COLOURS = 16


def batches(task: SemanticSegmentation, rows: Examples, size: int = 16) -> Iterator[dict[str, Any]]:
    """Yields the rows in order."""
    for start in range(0, len(rows), size):
        yield task.collate(rows.fetch(range(start, min(start + size, len(rows))), 0))


def measured(task: SemanticSegmentation, rows: Examples, predict: Predict) -> dict[str, float]:
    """Returns the task's metrics."""
    (metric,) = task.metrics()
    for batch in batches(task, rows):
        metric.update({"logits": predict(batch["inputs"]["pixel_values"])}, batch)
    return metric.compute()


def at_input_size(batch: dict[str, Any]) -> Tensor:
    """Returns the masks of a batch at the size of its images [B, H, W]."""
    size = batch["inputs"]["pixel_values"].shape[2:]
    masks = [functional.interpolate(mask[None, None].float(), size, mode="nearest-exact") for mask in batch["labels"]]
    return torch.cat(masks)[:, 0].long()


def by_place_and_colour(task: SemanticSegmentation, train: Examples) -> dict[str, Predict]:
    """Returns the two baselines that look at no neighbouring pixel."""
    classes = len(task.target.names)
    places: Any = 0
    colours = torch.zeros(_COLOURS**3, classes)
    for batch in batches(task, train):
        masks = at_input_size(batch)
        one_hot = functional.one_hot(masks.clamp(min=0), classes) * (masks != IGNORED)[..., None]
        places = places + one_hot.sum(0)
        cells = _cells(batch["inputs"]["pixel_values"])
        colours.index_add_(0, cells.ravel(), one_hot.reshape(-1, classes).float())
    by_place = places.permute(2, 0, 1).float()
    return {
        "place": lambda pixels: by_place.expand(len(pixels), -1, -1, -1),
        "colour": lambda pixels: colours[_cells(pixels)].permute(0, 3, 1, 2),
    }


def _cells(pixels: Tensor) -> Tensor:
    """Returns the number of each pixel's colour [B, H, W]; normalised values lie within -3..3."""
    steps = ((pixels + 3) / 6 * _COLOURS).long().clamp(0, _COLOURS - 1)
    return (steps[:, 0] * _COLOURS + steps[:, 1]) * _COLOURS + steps[:, 2]


class LinearDecoder(nn.Module):
    """One linear layer a pixel on the feature maps of a frozen backbone."""

    def __init__(self, backbone: Any, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.standard = nn.BatchNorm2d(sum(backbone.channels), affine=False)
        self.linear = nn.Conv2d(sum(backbone.channels), classes, 1)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Returns all maps at the size of the second one, one after the other [B, C, h, w]."""
        maps = self.backbone(pixels).feature_maps
        size = maps[1].shape[2:]
        return torch.cat([functional.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], 1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits [B, K, h, w]."""
        return self.linear(self.standard(features))


def fitted(task: SemanticSegmentation, train: Examples, backbone: Any, epochs: int, seed: int) -> Predict:
    """Returns a linear decoder that was trained on features computed once."""
    torch.manual_seed(seed)
    decoder = LinearDecoder(backbone, len(task.target.names))
    seen = [(decoder.features(batch["inputs"]["pixel_values"]), at_input_size(batch)) for batch in batches(task, train)]
    optimizer = torch.optim.AdamW([*decoder.linear.parameters()], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(seen))
    for _ in range(epochs):
        for number in torch.randperm(len(seen)).tolist():
            features, masks = seen[number]
            logits = functional.interpolate(decoder.train()(features), masks.shape[1:], mode="bilinear")
            decoder.backbone.eval()
            functional.cross_entropy(logits, masks, ignore_index=IGNORED).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    decoder.eval()
    return torch.no_grad()(lambda pixels: decoder(decoder.features(pixels)))


def main(words: Sequence[str]) -> None:
    """Prints a line for each baseline."""
    parser = argparse.ArgumentParser(prog="benchmarks segmentation")
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--image_size", nargs=2, type=int, default=[144, 192])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(words)
    run = hftl.RunConfig(
        data=hftl.DataConfig(source=options.data, augment=hftl.AugmentConfig(1, 0, 0)),
        model=hftl.ModelConfig(name=options.model, image_size=options.image_size),
    )
    run, splits, task = hftl.setup_run(run, SemanticSegmentation)
    model = hftl.build_model(run, task.head)
    train, test = (task.encode(splits[split], model.processor, None, None) for split in ("train", "test"))
    found = by_place_and_colour(task, train)
    for seed in options.seeds:
        found[f"linear, seed {seed}"] = fitted(task, train, model.net.backbone, options.epochs, seed)
    for name, predict in found.items():
        metrics = measured(task, test, predict)
        print(f"{name:<16} mean_iou {metrics['mean_iou']:.3f}  pixel_accuracy {metrics['pixel_accuracy']:.3f}")
