"""Joint transforms of images, masks and boxes, for segmentation and detection.

The full image is resized to the model input without preserving its aspect ratio or cropping: labels at the border are
kept, and one factor per side maps predictions back to the image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.config.schema import AugmentConfig, DataConfig
from hftl.errors import ArtifactError
from hftl.loading.loader import Example
from hftl.preprocessing.image_transforms import ImageProcessor, ImageRows

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

PROCESSOR_FILE = "preprocessor_config.json"
_RATIO = 4 / 3
"""Largest change of the aspect ratio by a random crop."""
_MIN_VISIBLE = 0.25
"""Smallest visible fraction of a box after a random crop; boxes below are dropped."""


@dataclass(frozen=True)
class Places:
    """Annotations of one image.

    Attributes:
        mask: Value of each pixel [H, W], uint8 or int64.
        boxes: Corners x0 y0 x1 y1 [N, 4] in pixels, float32; the image spans 0..W and 0..H.
    """

    mask: Tensor | None = None
    boxes: Tensor | None = None


@dataclass(frozen=True)
class Transformed:
    """Model input with the transformed annotations.

    Attributes:
        pixel_values: Normalized image [C, H, W], float32.
        mask: Mask [H, W] at the size of `pixel_values`.
        boxes: Corners x0 y0 x1 y1 [M, 4] in pixels of `pixel_values`, with M <= N.
        kept: Indices [M] of the remaining boxes among the N original boxes, int64.
    """

    pixel_values: Tensor
    mask: Tensor | None = None
    boxes: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class GeometryTransform:
    """Transform of a PIL image and its `Places`: random crop, flip and color jitter with `augment`, else a resize.

    Masks are resized with nearest-exact interpolation, images with antialiasing.
    """

    size: tuple[int, int]
    """Height and width of the model input."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentConfig | None

    def __call__(self, image: Image, places: Places | None = None) -> Transformed:
        """Applies the same geometric transform to the image and its annotations."""
        from torchvision.transforms.v2 import ColorJitter, functional

        places = places or Places()
        pixels = functional.pil_to_tensor(image)
        height, width = pixels.shape[-2:]
        crop = self._sample_crop(height, width)
        flip = self.augment is not None and bool(torch.rand(1) < self.augment.hflip)
        pixels = self._resize(pixels, crop, self.interpolation, flip)
        if self.augment is not None and self.augment.color_jitter:
            pixels = ColorJitter(*[self.augment.color_jitter] * 3)(pixels)
        # in 0..255, as the fused rescale and normalize of transformers: equal results
        mean, std = ([255.0 * value for value in values] for values in (self.mean, self.std))
        pixel_values = functional.normalize(pixels.float(), mean, std)
        mask = places.mask
        if mask is not None:
            mask = self._resize(mask[None], crop, "nearest-exact", flip)[0]
        if places.boxes is None:
            return Transformed(pixel_values, mask)
        return Transformed(pixel_values, mask, *self._transform_boxes(places.boxes, (height, width), crop, flip))

    def _sample_crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of the crop; the full image without augmentation."""
        from torchvision.transforms.v2 import RandomResizedCrop

        if self.augment is None or self.augment.crop_scale >= 1:
            return 0, 0, height, width
        ratio = width / height
        sampler = RandomResizedCrop(self.size, (self.augment.crop_scale, 1.0), (ratio / _RATIO, ratio * _RATIO))
        crop = sampler.make_params([torch.empty(1, height, width, device="meta")])
        return crop["top"], crop["left"], crop["height"], crop["width"]

    def _resize(self, pixels: Tensor, crop: tuple[int, int, int, int], interpolation: str, flip: bool) -> Tensor:
        """Returns the crop of a tensor [C, H, W], resized to the model input and optionally flipped."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        cropped = functional.crop(pixels, *crop)
        resized = functional.resize(cropped, list(self.size), InterpolationMode(interpolation), antialias=True)
        return functional.horizontal_flip(resized) if flip else resized

    def _transform_boxes(
        self, boxes: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int], flip: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the remaining boxes and their indices.

        torchvision's own box transforms do not report the visible fraction of a box.
        """
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import BoundingBoxes

        original: Any = BoundingBoxes(boxes.reshape(-1, 4).float(), format="XYXY", canvas_size=size)  # pyright: ignore
        cropped = functional.clamp_bounding_boxes(functional.crop(original, *crop))
        resized = functional.resize(cropped, list(self.size))
        if flip:
            resized = functional.horizontal_flip(resized)
        resized = resized.as_subclass(Tensor)
        is_visible = _area(cropped) >= _MIN_VISIBLE * _area(original)
        remaining = (is_visible & ((resized[:, 2:] - resized[:, :2]) >= 1).all(-1)).nonzero()[:, 0]
        return resized[remaining], remaining


def _area(boxes: Tensor) -> Tensor:
    boxes = boxes.as_subclass(Tensor)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@dataclass(frozen=True)
class GeometryProcessor(ImageProcessor):
    """Image preprocessing of segmentation and detection models.

    Attributes:
        model_class: Image processor class of transformers, such as `SegformerImageProcessor` or
            `RTDetrImageProcessor`.
        options: Further arguments of that class.
    """

    model_class: str = "SegformerImageProcessor"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        height, width = self.data_config["input_size"][1:]
        return height, width

    def transform(self, training: bool) -> GeometryTransform:
        """Returns the transform of an image and its annotations; random if `training`."""
        config = self.data_config
        return GeometryTransform(
            self.size,
            config["interpolation"],
            tuple(config["mean"]),
            tuple(config["std"]),
            self.augment if training else None,
        )

    def save(self, folder: Path) -> None:
        """Saves the transformers image processor, whose images equal those of `transform(False)` up to 1e-5.

        This holds for transformers with torchvision. Without it, resizing uses Pillow, whose rounding differs by up to
        1/255 before normalization.
        """
        import transformers
        from PIL.Image import Resampling

        height, width = self.size
        processor = getattr(transformers, self.model_class)(
            do_resize=True,
            size={"height": height, "width": width},
            resample=int(Resampling[self.data_config["interpolation"].upper()]),
            do_rescale=True,
            do_normalize=True,
            image_mean=list(self.data_config["mean"]),
            image_std=list(self.data_config["std"]),
            **self.options,
        )
        processor.save_pretrained(folder)

    @classmethod
    def open(cls, folder: Path) -> GeometryProcessor:
        """Loads the processor saved by `save`, without augmentation.

        Raises:
            ArtifactError: The file is missing or invalid.
        """
        from PIL.Image import Resampling

        try:
            saved = json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8"))
            mean, size = saved["image_mean"], saved["size"]
            config = {
                "input_size": (len(mean), size["height"], size["width"]),
                "interpolation": Resampling(saved["resample"]).name.lower(),
                "mean": tuple(mean),
                "std": tuple(saved["image_std"]),
            }
            model_class = saved["image_processor_type"]
            options = {name: saved[name] for name in ("do_pad",) if name in saved}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / PROCESSOR_FILE} is damaged: {type(error).__name__}: {error}") from error
        return cls(config, AugmentConfig(crop_scale=1, hflip=0, color_jitter=0), model_class, options)


class GeometryRows(ImageRows):
    """Rows of a dataset with an image column and annotations; both are decoded when fetched.

    Args:
        dataset: Rows; columns that `find_places` does not use pass through unchanged.
        column: Image column.
        processor: Preprocessing of the backbone.
        training_seed: Seed of the augmentation, or None for the deterministic evaluation transform.
        find_places: Returns the annotations of a row from its other columns and the (height, width) of its image. A
            `DataError` of this function is raised again with split and row.
        max_pixels: Largest width x height of an image.
        split: Split name, for messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        processor: GeometryProcessor,
        training_seed: int | None,
        find_places: Callable[[dict[str, Any], tuple[int, int]], Places | None],
        max_pixels: int = DataConfig.max_pixels,
        split: str = "",
    ) -> None:
        super().__init__(dataset, column, processor, training_seed, max_pixels, split)
        self.find_places = find_places

    def example(self, image: Image, values: dict[str, Any]) -> Example:
        """Returns `pixel_values` [C, H, W], image `size` (H, W), `places` (original) and `moved` (transformed)."""
        size = (image.height, image.width)
        places = self.find_places(values, size)
        transformed = self.transform(image, places)
        return values | {
            "pixel_values": transformed.pixel_values,
            "size": size,
            "places": places,
            "moved": transformed,
        }


def augment_problems(augment: AugmentConfig) -> Sequence[str]:
    """Returns one problem if `data.augment` has transforms that do not support masks and boxes."""
    if augment.auto_augment is None:
        return []
    return [
        f"data.augment.auto_augment: '{augment.auto_augment}' does not transform masks and boxes; allowed: null, with "
        "crop_scale, hflip and color_jitter. Set null."
    ]
