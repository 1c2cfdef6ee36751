"""Image transforms: decodes images and applies the timm transforms of the backbone's data configuration."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.config.schema import AugmentConfig, DataConfig
from hftl.data.columns import arrow_column
from hftl.data.image_decoding import Stored, check_header, decode_image, place, quiet_pillow
from hftl.data.validation import BadRow
from hftl.errors import DataError, RowError, shorten
from hftl.loading.loader import Example
from hftl.logging import log

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_BATCH_SIZE = 64
"""Number of undecoded images in memory during validation."""
_LOG_INTERVAL_S = 10.0
"""Seconds between progress lines of the validation."""


@dataclass(frozen=True)
class ImageProcessor:
    """Image preprocessing of a timm backbone.

    Attributes:
        data_config: timm data configuration: input_size (C, H, W), interpolation, mean, std, crop_pct.
        augment: Training augmentation.
    """

    data_config: dict[str, Any]
    augment: AugmentConfig

    @property
    def mode(self) -> str:
        """Pillow mode of the input: `L` for one channel, else `RGB`."""
        return "L" if self.data_config["input_size"][0] == 1 else "RGB"

    def transform(self, training: bool) -> Any:
        """Returns the timm transform from a PIL image to a float tensor [C, H, W]; random if `training`."""
        from timm.data import create_transform

        if not training:
            return create_transform(**self.data_config, is_training=False)
        augment = self.augment
        crop_options: dict[str, Any] = {"scale": (augment.crop_scale, 1.0)}
        if augment.crop_scale >= 1:
            crop_options |= {"ratio": (1.0, 1.0)}
        config = {key: self.data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
        return create_transform(
            **config,
            is_training=True,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # pyright: ignore[reportArgumentType]  None: off
            auto_augment=augment.auto_augment,
            **crop_options,
        )


class ImageRows:
    """Rows of a dataset with an image column; images are decoded when fetched.

    Args:
        dataset: Rows; all other columns pass through unchanged.
        column: Image column.
        processor: Preprocessing of the backbone.
        training_seed: Seed of the augmentation, or None for the deterministic evaluation transform.
        max_pixels: Largest width x height of an image.
        split: Split name, for messages; their row numbers count the rows of `dataset`, from 0.
    """

    lengths = None

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        processor: ImageProcessor,
        training_seed: int | None,
        max_pixels: int = DataConfig.max_pixels,
        split: str = "",
    ) -> None:
        from datasets import Image

        self.dataset = dataset.cast_column(column, Image(decode=False))
        self.mode = processor.mode
        self.max_pixels = max_pixels
        self.split = split
        self.column = column
        self.seed = training_seed
        self.transform = processor.transform(training_seed is not None)

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> Any:
        """Returns the cache key of the examples, as JSON values: rows, state of image files, transform, mode, seed."""
        return [
            self.dataset._fingerprint,
            _hash_files(self.dataset, self.column),
            repr(self.transform),
            self.mode,
            self.seed,
        ]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns one `example` per row.

        Raises:
            RowError: An image or its annotation is invalid; includes split and row.
        """
        table = self.dataset[list(rows)]
        columns = [name for name in table if name != self.column]
        examples = []
        with preserve_rng_state(), quiet_pillow():
            for position, row in enumerate(rows):
                image = self._load_image(table[self.column][position], row, epoch)
                try:
                    examples.append(self.example(image, {name: table[name][position] for name in columns}))
                except DataError as error:
                    raise RowError(f"{self._describe_row(row)}: {error}") from error
        return examples

    def example(self, image: Any, values: dict[str, Any]) -> Example:
        """Returns `pixel_values` [C, H, W] float32 with the other columns of the row."""
        return {"pixel_values": self.transform(image)} | values

    def pixels(self, stored: Stored, row: int, epoch: int) -> Tensor:
        """Returns the transformed image [C, H, W] of a row."""
        return self.transform(self._load_image(stored, row, epoch))

    def _load_image(self, stored: Stored, row: int, epoch: int) -> Any:
        """Returns the PIL image of a row; seeds the random generators for its augmentation."""
        image = self._decode(stored, row)
        if self.seed is not None:
            seed_for_sample(self.seed, epoch, row)
        return image

    def _describe_row(self, row: int) -> str:
        return f"{self.split} row {row}".strip()

    def _decode(self, stored: Stored, row: int) -> Any:
        """Returns the PIL image of a row; raises a `RowError` with split and row if it is invalid."""
        try:
            return decode_image(stored, self.mode, self.max_pixels)
        except DataError as error:
            raise RowError(
                f"{self._describe_row(row)}: the image ({place(stored)}) cannot be decoded: {error}."
            ) from error


def _hash_files(dataset: Dataset, column: str) -> str:
    """Returns a hash of path, size and modification time of all image files; skips embedded images."""
    digest = hashlib.sha256()
    for start in range(0, len(dataset), _BATCH_SIZE):
        images = arrow_column(dataset.select(range(start, min(start + _BATCH_SIZE, len(dataset)))), column)
        for chunk in images.chunks:
            embedded = chunk.field("bytes").is_valid().to_pylist()
            for path, has_bytes in zip(chunk.field("path").to_pylist(), embedded, strict=True):
                if path and not has_bytes:
                    with suppress(OSError):  # reported with the row when the image is opened
                        info = os.stat(path)
                        digest.update(f"{path} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def seed_for_sample(seed: int, epoch: int, row: int) -> None:
    """Seeds the random generators (Python, NumPy, torch on the CPU) with (seed, epoch, row).

    Makes augmentation independent of the number of workers and processes, and of resuming.
    """
    import torch

    mixed = int(np.random.SeedSequence([seed, epoch, row]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed would also reset the GPUs' generators


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restores the random generators (Python, NumPy, torch on the CPU) on exit."""
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def unreadable_images(dataset: Dataset, column: str, split: str, max_pixels: int, optional: bool = False) -> list[str]:
    """Validates the image headers of a split.

    Args:
        dataset: Rows of the split.
        column: Image column.
        split: Split name, for the message.
        max_pixels: Largest width x height of an image.
        optional: Whether missing images are valid.

    Returns:
        One problem with all invalid images; [] without any.
    """
    invalid = [
        f"row {row} ({place(stored)}): {reason}"
        for row, stored, reason in _invalid_images(dataset, column, lambda stored: check_header(stored, max_pixels))
        if not (optional and is_absent(stored))
    ]
    if not invalid:
        return []
    return [
        f"data.source: {split} has {len(invalid)} unreadable image(s): {shorten(invalid, 5)}. Repair or remove them, "
        "or set --data.on_error skip."
    ]


def is_absent(stored: Stored) -> bool:
    """Whether a row has no image."""
    return stored is None or stored.get("path") is None and stored.get("bytes") is None


def broken_images(
    dataset: Dataset, column: str, split: str, max_pixels: int, optional: bool = False
) -> dict[int, BadRow]:
    """Decodes all images of a split; returns the rows whose images are invalid, or missing unless `optional`."""
    invalid = _invalid_images(dataset, column, lambda stored: decode_image(stored, "RGB", max_pixels), progress=split)
    return {
        row: BadRow(reason, column, place(stored), (stored or {}).get("path"))
        for row, stored, reason in invalid
        if not (optional and is_absent(stored))
    }


def _invalid_images(
    dataset: Dataset, column: str, validate: Callable[[Stored], Any], progress: str = ""
) -> Iterator[tuple[int, Stored, str]]:
    """Yields row number, image and reason of all images that `validate` rejects; runs in several threads.

    Args:
        dataset: Rows of a split.
        column: Image column.
        validate: Decodes the image or its header; raises `DataError` if it is invalid.
        progress: Split name in progress lines; empty disables them.
    """
    from datasets import Image

    def find_problem(stored: Stored) -> str | None:
        try:
            validate(stored)
        except DataError as error:
            return str(error)
        return None

    rows = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    logged = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start in range(0, len(rows), _BATCH_SIZE):
            if progress and monotonic() - logged > _LOG_INTERVAL_S:
                log(f"data: {progress}: checked {start:,} of {len(rows):,} images")
                logged = monotonic()
            images = rows[start : start + _BATCH_SIZE][column]
            for offset, problem in enumerate(pool.map(find_problem, images)):
                if problem:
                    yield start + offset, images[offset], problem
