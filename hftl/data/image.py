"""Images -> pixel_values, by the backbone's own data configuration (timm)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.config.schema import AugmentConfig
from hftl.data.loader import Example
from hftl.errors import DataError, shorten

if TYPE_CHECKING:
    from datasets import Dataset


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
    """

    lengths = None

    def __init__(self, dataset: Dataset, column: str, processor: ImageProcessor, training_seed: int | None) -> None:
        from datasets import Image

        self.dataset = dataset.cast_column(column, Image(decode=False))
        self.decoder = Image(mode=processor.mode)
        self.column = column
        self.seed = training_seed
        self.transform = processor.transform(training_seed is not None)

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, rows: Sequence[int], epoch: int) -> list[Example]:
        """Returns examples with `pixel_values` [C, H, W] float32 in place of the image column."""
        table = self.dataset[list(rows)]
        columns = [name for name in table if name != self.column]
        examples = []
        with untouched_rng():
            for position, row in enumerate(rows):
                image = self._decode(table[self.column][position], row)
                if self.seed is not None:
                    seed_for_sample(self.seed, epoch, row)
                pixels = self.transform(image)
                examples.append({"pixel_values": pixels} | {name: table[name][position] for name in columns})
        return examples

    def _decode(self, value: Any, row: int) -> Any:
        """Returns the PIL image of `value`, the library's dict of path and bytes, or None where there is no image."""
        try:
            return self.decoder.decode_example(value)
        except Exception as error:
            where = (value or {}).get("path") or "stored in the table"
            raise DataError(f"row {row}: the image ({where}) cannot be decoded: {error}") from error


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


def unreadable_images(dataset: Dataset, column: str, split: str) -> list[str]:
    """Returns a sentence when images of a split are missing or not images. Only headers are read."""
    from datasets import Image

    rows = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    bad: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(rows), 1000):
            values = rows[start : start + 1000][column]
            for offset, reason in enumerate(pool.map(_header_problem, values)):
                if reason:
                    bad.append(
                        f"row {start + offset} ({(values[offset] or {}).get('path') or 'in the table'}): {reason}"
                    )
    if not bad:
        return []
    return [f"data.source: {split} has {len(bad)} unreadable image(s): {shorten(bad, 5)}. Repair or remove them."]


def _header_problem(value: dict[str, Any] | None) -> str | None:
    from PIL import Image as PILImage

    if value is None:
        return "no image"
    try:
        source = BytesIO(value["bytes"]) if value.get("bytes") is not None else Path(value["path"])
        with PILImage.open(source):
            return None
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
