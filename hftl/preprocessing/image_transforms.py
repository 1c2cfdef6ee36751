"""Images -> pixel_values, by the backbone's own data configuration (timm)."""

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

_AT_ONCE = 64
"""Images in memory, undecoded, while all are looked at."""
_SAY_EVERY = 10.0
"""Seconds between two lines on how far that is."""


@dataclass(frozen=True)
class ImageProcessor:
    """What a timm backbone expects: `data_config` has input_size (C, H, W), interpolation, mean, std, crop_pct."""

    data_config: dict[str, Any]
    augment: AugmentConfig

    @property
    def mode(self) -> str:
        """PIL mode of the input."""
        return "L" if self.data_config["input_size"][0] == 1 else "RGB"

    def transform(self, training: bool) -> Any:
        """Returns timm's transform: PIL image -> float tensor [C, H, W]; random when `training`."""
        from timm.data import create_transform

        if not training:
            return create_transform(**self.data_config, is_training=False)
        augment = self.augment
        whole = augment.crop_scale >= 1
        shape_options: dict[str, Any] = {"scale": (augment.crop_scale, 1.0)}
        if whole:
            shape_options |= {"ratio": (1.0, 1.0)}
        config = {key: self.data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
        return create_transform(
            **config,
            is_training=True,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # pyright: ignore[reportArgumentType]  None: off
            auto_augment=augment.auto_augment,
            **shape_options,
        )


class ImageRows:
    """Rows of a data set with an image column; images are decoded when fetched.

    Args:
        dataset: Rows; all other columns pass through unchanged.
        column: The image column.
        processor: The backbone's expectations.
        training_seed: Seed of the augmentation, or None for the deterministic evaluation transform.
        max_pixels: Largest image that is decoded, width x height.
        split: Its name, for messages. Row numbers there count the rows of `dataset`, from 0.
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
        """Returns what the examples depend on, as JSON values: rows, their files as they are now, transform, seed."""
        return [
            self.dataset._fingerprint,
            _files(self.dataset, self.column),
            repr(self.transform),
            self.mode,
            self.seed,
        ]

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns an `example` for each row.

        Raises:
            RowError: An image, or what belongs to it, cannot be used; with split and row.
        """
        table = self.dataset[list(rows)]
        columns = [name for name in table if name != self.column]
        examples = []
        with untouched_rng(), quiet_pillow():
            for position, row in enumerate(rows):
                image = self._image(table[self.column][position], row, epoch)
                try:
                    examples.append(self.example(image, {name: table[name][position] for name in columns}))
                except DataError as error:
                    raise RowError(f"{self._where(row)}: {error}") from error
        return examples

    def example(self, image: Any, values: dict[str, Any]) -> Example:
        """Returns `pixel_values` [C, H, W] float32 beside the row's other columns."""
        return {"pixel_values": self.transform(image)} | values

    def pixels(self, stored: Stored, row: int, epoch: int) -> Tensor:
        """Returns the transformed image [C, H, W] of a row."""
        return self.transform(self._image(stored, row, epoch))

    def _image(self, stored: Stored, row: int, epoch: int) -> Any:
        """Returns the PIL image of a row; what is random next depends on the row and the epoch alone."""
        image = self._decode(stored, row)
        if self.seed is not None:
            seed_for_sample(self.seed, epoch, row)
        return image

    def _where(self, row: int) -> str:
        return f"{self.split} row {row}".strip()

    def _decode(self, stored: Stored, row: int) -> Any:
        """Returns the PIL image of a row, or raises a `RowError` that names it."""
        try:
            return decode_image(stored, self.mode, self.max_pixels)
        except DataError as error:
            raise RowError(f"{self._where(row)}: the image ({place(stored)}) cannot be decoded: {error}.") from error


def _files(dataset: Dataset, column: str) -> str:
    """Returns a hash of path, size and time of change of every image that lies in a file of its own."""
    digest = hashlib.sha256()
    for start in range(0, len(dataset), _AT_ONCE):
        images = arrow_column(dataset.select(range(start, min(start + _AT_ONCE, len(dataset)))), column)
        for chunk in images.chunks:
            inside = chunk.field("bytes").is_valid().to_pylist()
            for path, stored in zip(chunk.field("path").to_pylist(), inside, strict=True):
                if path and not stored:
                    with suppress(OSError):  # said, with its row, where it is opened
                        found = os.stat(path)
                        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def seed_for_sample(seed: int, epoch: int, row: int) -> None:
    """Makes what is random next depend on (seed, epoch, row) alone.

    So augmentation is the same with any number of workers and processes, and after a resume.
    """
    import torch

    mixed = int(np.random.SeedSequence([seed, epoch, row]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)  # torch.manual_seed would also reset the GPUs' generators


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leaves the process's random generators (Python, NumPy, torch on the CPU) as they were before."""
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def unreadable_images(dataset: Dataset, column: str, split: str, max_pixels: int, optional: bool = False) -> list[str]:
    """Returns a sentence when images of a split are not images, or missing unless `optional`. Headers are read only."""
    bad = [
        f"row {row} ({place(stored)}): {reason}"
        for row, stored, reason in _refused(dataset, column, lambda stored: check_header(stored, max_pixels))
        if not (optional and is_absent(stored))
    ]
    if not bad:
        return []
    return [
        f"data.source: {split} has {len(bad)} unreadable image(s): {shorten(bad, 5)}. Repair or remove them, or leave "
        "them out with --data.on_error skip."
    ]


def is_absent(stored: Stored) -> bool:
    """Whether a row has no image at all."""
    return stored is None or stored.get("path") is None and stored.get("bytes") is None


def broken_images(
    dataset: Dataset, column: str, split: str, max_pixels: int, optional: bool = False
) -> dict[int, BadRow]:
    """Returns the rows of a split whose images cannot be decoded, or are missing unless `optional`. All are decoded."""
    found = _refused(dataset, column, lambda stored: decode_image(stored, "RGB", max_pixels), progress=split)
    return {
        row: BadRow(reason, column, place(stored), (stored or {}).get("path"))
        for row, stored, reason in found
        if not (optional and is_absent(stored))
    }


def _refused(
    dataset: Dataset, column: str, look: Callable[[Stored], Any], progress: str = ""
) -> Iterator[tuple[int, Stored, str]]:
    """Yields number, image and reason of each row that `look` raises a `DataError` for; several at a time.

    Args:
        dataset: Rows of a split.
        column: The image column.
        look: Decodes an image, or a part of it.
        progress: The split as it is called in the lines said now and then; none are said without.
    """
    from datasets import Image

    def reason(stored: Stored) -> str | None:
        try:
            look(stored)
        except DataError as error:
            return str(error)
        return None

    rows = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    said = monotonic()
    with quiet_pillow(), ThreadPoolExecutor(8) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            if progress and monotonic() - said > _SAY_EVERY:
                log(f"data: {progress}: looked at {start:,} of {len(rows):,} images")
                said = monotonic()
            values = rows[start : start + _AT_ONCE][column]
            for offset, found in enumerate(pool.map(reason, values)):
                if found:
                    yield start + offset, values[offset], found
