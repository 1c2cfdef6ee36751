"""Section of semantic segmentation: images with true and predicted masks."""

from __future__ import annotations

import base64
import colorsys
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.data.image_decoding import decode_indices
from hftl.errors import DataError
from hftl.html.blocks import Card, ExampleGroup, ExampleGroups, Figure, Figures, Note, Section
from hftl.reporting.examples import thumbnail
from hftl.reporting.run_view import Run

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_EXAMPLES = 8
_MASK_SIZE = 176
"""Longer side of a mask in pixels."""


def segmentation_examples(run: Run) -> Section | None:
    """Returns evenly spaced images of the main split with true and predicted masks; None for other tasks."""
    split, target = run.record.main_split, run.record.description.get("state", {}).get("target", {})
    if split is None or split not in run.rows.splits or run.rows.image_column is None or "numbers" not in target:
        return None
    rows = run.rows.splits[split]
    numbers = np.unique(np.linspace(0, len(rows) - 1, _MAX_EXAMPLES).astype(int)).tolist()
    predicted = run.record.masks(split, numbers)
    if not predicted or target["column"] not in rows.features:
        return None
    colors = {value: _color(index) for index, value in enumerate(target["numbers"])}
    limit = run.rows.max_pixels
    images, true = (run.rows.stored(rows, column, numbers) for column in (run.rows.image_column, target["column"]))
    groups = [
        ExampleGroup(
            [
                Card(f"row {row}", thumbnail(image, limit)),
                Card("target", _colorize(mask, colors, limit)),
                Card("prediction", _colorize({"bytes": base64.b64decode(predicted[row])}, colors, limit)),
            ],
            "",
        )
        for row, image, mask in zip(numbers, images, true, strict=True)
        if row in predicted
    ]
    note = Note(f"{len(groups)} of {len(rows)} images of {split}; void is black.")
    legend = Figures([Figure(_legend(target["classes"], list(colors.values())), "Classes")])
    return Section("Segmentation examples", [ExampleGroups(groups), note, legend])


def _legend(names: list[str], colors: list[tuple[int, int, int]]) -> str:
    lines = [
        f'<rect y="{20 * line}" width="14" height="14" fill="rgb{color}"/>'
        f'<text x="22" y="{20 * line + 12}" font-size="12" fill="currentColor">{escape(name)}</text>'
        for line, (name, color) in enumerate(zip(names, colors, strict=True))
    ]
    size = f'width="300" height="{20 * len(lines)}" viewBox="0 0 300 {20 * len(lines)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="classes">{"".join(lines)}</svg>'


def _colorize(stored: Any, colors: dict[int, tuple[int, int, int]], limit: int) -> str | None:
    """Returns a colored mask as a data URI; None if the mask cannot be read."""
    from PIL import Image

    try:
        mask = decode_indices(stored, limit)
    except DataError:
        return None
    pixels = np.zeros((*mask.shape, 3), np.uint8)
    for value, color in colors.items():
        pixels[mask == value] = color
    return _data_uri(Image.fromarray(pixels))


def _data_uri(image: Image) -> str:
    from PIL.Image import Resampling

    image.thumbnail((_MASK_SIZE, _MASK_SIZE), Resampling.NEAREST)  # interpolated colors match no class
    out = BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _color(index: int) -> tuple[int, int, int]:
    """Returns the color of a class: hues spaced by the golden ratio, in three brightness levels."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, (0.95, 0.75, 0.55)[index % 3])
    return round(255 * red), round(255 * green), round(255 * blue)
