"""Images -> pixel_values where the labels are places in the picture: masks and boxes move with the pixels.

The whole picture is resized to the model's input, whatever its shape (no centre crop, as classification has): what a
label says about the margin stays in sight, and one factor for each side leads back.
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

STOCK_FILE = "preprocessor_config.json"
_RATIO = 4 / 3
"""Largest stretch of a random crop in either direction, relative to the shape of the picture."""
_VISIBLE = 0.25
"""Share of a box that a random crop must leave; what shows less is a part that nobody would have labelled."""


@dataclass(frozen=True)
class Places:
    """What is labelled in one picture.

    Attributes:
        mask: A value for each pixel [H, W], uint8 or int64.
        boxes: Corners x0 y0 x1 y1 [N, 4] in pixels, float32; the picture spans 0..W and 0..H.
    """

    mask: Tensor | None = None
    boxes: Tensor | None = None


@dataclass(frozen=True)
class Moved:
    """A picture as the model takes it, and its labels in the same frame.

    Attributes:
        pixel_values: Normalised image [C, H, W], float32.
        mask: As `Places.mask`, at the size of `pixel_values`.
        boxes: As `Places.boxes`, in pixels of `pixel_values`, [M, 4] with M <= N.
        kept: Which of the N boxes these are [M], int64: labels of the others go with their boxes.
    """

    pixel_values: Tensor
    mask: Tensor | None = None
    boxes: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class GeometryTransform:
    """PIL image and `Places` -> `Moved`. With `augment`: random crop, flip and colours, else a plain resize.

    Masks are resized to the nearest pixel centre, images with antialiasing.
    """

    size: tuple[int, int]
    """Height and width of the input."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: AugmentConfig | None

    def __call__(self, image: Image, places: Places | None = None) -> Moved:
        """Returns the picture and its places, moved alike."""
        from torchvision.transforms.v2 import ColorJitter, functional

        places = places or Places()
        pixels = functional.pil_to_tensor(image)
        height, width = pixels.shape[-2:]
        crop = self._crop(height, width)
        flip = self.augment is not None and bool(torch.rand(1) < self.augment.hflip)
        pixels = self._resize(pixels, crop, self.interpolation, flip)
        if self.augment is not None and self.augment.color_jitter:
            pixels = ColorJitter(*[self.augment.color_jitter] * 3)(pixels)
        # in 0..255, so that transformers' processors, which fold the two divisions into one, give the same numbers
        mean, std = ([255.0 * value for value in values] for values in (self.mean, self.std))
        pixel_values = functional.normalize(pixels.float(), mean, std)
        mask = places.mask
        if mask is not None:
            mask = self._resize(mask[None], crop, "nearest-exact", flip)[0]
        if places.boxes is None:
            return Moved(pixel_values, mask)
        return Moved(pixel_values, mask, *self._move_boxes(places.boxes, (height, width), crop, flip))

    def _crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of what is kept of a picture."""
        from torchvision.transforms.v2 import RandomResizedCrop

        if self.augment is None or self.augment.crop_scale >= 1:
            return 0, 0, height, width
        shape = width / height
        chosen = RandomResizedCrop(self.size, (self.augment.crop_scale, 1.0), (shape / _RATIO, shape * _RATIO))
        crop = chosen.make_params([torch.empty(1, height, width, device="meta")])
        return crop["top"], crop["left"], crop["height"], crop["width"]

    def _resize(self, pixels: Tensor, crop: tuple[int, int, int, int], interpolation: str, flip: bool) -> Tensor:
        """Returns the crop of a tensor [C, H, W] at the size of the input."""
        from torchvision.transforms.v2 import InterpolationMode, functional

        cut = functional.crop(pixels, *crop)
        resized = functional.resize(cut, list(self.size), InterpolationMode(interpolation), antialias=True)
        return functional.horizontal_flip(resized) if flip else resized

    def _move_boxes(
        self, boxes: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int], flip: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns the boxes that stay, and their numbers.

        Not torchvision's own boxes: those do not tell how much of each the crop has cut away.
        """
        from torchvision.transforms.v2 import functional
        from torchvision.tv_tensors import BoundingBoxes

        boxed: Any = BoundingBoxes(boxes.reshape(-1, 4).float(), format="XYXY", canvas_size=size)  # pyright: ignore
        cut = functional.clamp_bounding_boxes(functional.crop(boxed, *crop))
        moved = functional.resize(cut, list(self.size))
        if flip:
            moved = functional.horizontal_flip(moved)
        moved = moved.as_subclass(Tensor)
        stays = (_area(cut) >= _VISIBLE * _area(boxed)) & ((moved[:, 2:] - moved[:, :2]) >= 1).all(-1)
        kept = stays.nonzero()[:, 0]
        return moved[kept], kept


def _area(boxes: Tensor) -> Tensor:
    boxes = boxes.as_subclass(Tensor)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


@dataclass(frozen=True)
class GeometryProcessor(ImageProcessor):
    """As `ImageProcessor`, for pictures with masks or boxes.

    Attributes:
        model_class: transformers' image processor, such as `SegformerImageProcessor` or `RTDetrImageProcessor`.
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
        """Returns the transform of an image and its places; random when `training`."""
        config = self.data_config
        return GeometryTransform(
            self.size,
            config["interpolation"],
            tuple(config["mean"]),
            tuple(config["std"]),
            self.augment if training else None,
        )

    def save(self, folder: Path) -> None:
        """Writes the stock image processor, whose images equal those of `transform(False)` up to 1e-5.

        transformers with torchvision computes the same; without, it resizes with Pillow, which rounds differently:
        up to one in 255 before normalisation.
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
        """Returns the processor that `save` wrote; nothing is random until it is given an `augment`.

        Raises:
            ArtifactError: The file is missing or says something else.
        """
        from PIL.Image import Resampling

        try:
            saved = json.loads((folder / STOCK_FILE).read_text(encoding="utf-8"))
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
            raise ArtifactError(f"{folder / STOCK_FILE} is damaged: {type(error).__name__}: {error}") from error
        return cls(config, AugmentConfig(crop_scale=1, hflip=0, color_jitter=0), model_class, options)


class GeometryRows(ImageRows):
    """Rows of a data set with an image column and places in those images; both are decoded when fetched.

    Args:
        dataset: Rows; columns that `find_places` does not use pass through unchanged.
        column: The image column.
        processor: The backbone's expectations.
        training_seed: As for `ImageRows`.
        find_places: Takes the row's other columns, and height and width of its image. A `DataError` that it raises is
            given the row's number.
        max_pixels: As for `ImageRows`.
        split: As for `ImageRows`.
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
        """Returns `pixel_values` [C, H, W], `size` (height, width of the image), its `places`, and how they `moved`."""
        size = (image.height, image.width)
        places = self.find_places(values, size)
        moved = self.transform(image, places)
        return values | {"pixel_values": moved.pixel_values, "size": size, "places": places, "moved": moved}


def augment_problems(augment: AugmentConfig) -> Sequence[str]:
    """Returns what of `data.augment` masks and boxes cannot follow."""
    if augment.auto_augment is None:
        return []
    return [
        f"data.augment.auto_augment: '{augment.auto_augment}' shears and shifts pixels, and masks and boxes would stay "
        "behind; allowed here: null, with crop_scale, hflip and color_jitter."
    ]
