"""Pictures beside their masks, for tasks that say something of each pixel."""

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

_PICTURES = 8
_SIDE = 176
"""Pixels of the longer side."""


def masks(run: Run) -> Section | None:
    """A few pictures, evenly spaced over the main split: what is labelled, and what the model sees."""
    split, target = run.record.main_split, run.record.described.get("state", {}).get("target", {})
    if split is None or split not in run.rows.splits or run.rows.image_column is None or "numbers" not in target:
        return None
    rows = run.rows.splits[split]
    chosen = np.unique(np.linspace(0, len(rows) - 1, _PICTURES).astype(int)).tolist()
    predicted = run.record.masks(split, chosen)
    if not predicted or target["column"] not in rows.features:
        return None
    colours = {number: _colour(place) for place, number in enumerate(target["numbers"])}
    limit = run.rows.max_pixels
    images, true = (run.rows.stored(rows, column, chosen) for column in (run.rows.image_column, target["column"]))
    shown = [
        ExampleGroup(
            [
                Card(f"row {row}", thumbnail(image, limit)),
                Card("labelled", _drawn(mask, colours, limit)),
                Card("predicted", _drawn({"bytes": base64.b64decode(predicted[row])}, colours, limit)),
            ],
            "",
        )
        for row, image, mask in zip(chosen, images, true, strict=True)
        if row in predicted
    ]
    note = Note(f"{len(shown)} of {len(rows)} pictures of {split}; void is black.")
    legend = Figures([Figure(_legend(target["classes"], list(colours.values())), "Classes")])
    return Section("Masks", [ExampleGroups(shown), note, legend])


def _legend(names: list[str], colours: list[tuple[int, int, int]]) -> str:
    lines = [
        f'<rect y="{20 * line}" width="14" height="14" fill="rgb{colour}"/>'
        f'<text x="22" y="{20 * line + 12}" font-size="12" fill="currentColor">{escape(name)}</text>'
        for line, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]
    size = f'width="300" height="{20 * len(lines)}" viewBox="0 0 300 {20 * len(lines)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="classes">{"".join(lines)}</svg>'


def _drawn(stored: Any, colours: dict[int, tuple[int, int, int]], limit: int) -> str | None:
    """Returns a mask in colours as a data URI; None where it cannot be read."""
    from PIL import Image

    try:
        numbers = decode_indices(stored, limit)
    except DataError:
        return None
    pixels = np.zeros((*numbers.shape, 3), np.uint8)
    for number, colour in colours.items():
        pixels[numbers == number] = colour
    return _data_uri(Image.fromarray(pixels))


def _data_uri(picture: Image) -> str:
    from PIL.Image import Resampling

    picture.thumbnail((_SIDE, _SIDE), Resampling.NEAREST)  # nearest: colours in between would be no class
    out = BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _colour(place: int) -> tuple[int, int, int]:
    """Returns a colour of its own for each class: hues a golden section apart, in three brightnesses."""
    red, green, blue = colorsys.hsv_to_rgb(place * 0.618034 % 1, 0.65, (0.95, 0.75, 0.55)[place % 3])
    return round(255 * red), round(255 * green), round(255 * blue)
