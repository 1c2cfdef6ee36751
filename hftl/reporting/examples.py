"""The rows behind the numbers: opened again, checked to be the same, counted, measured and shown."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hftl.config.schema import DataConfig
from hftl.data.columns import arrow_column
from hftl.data.image_decoding import Stored, check_header, decode_image
from hftl.errors import DataError, HftlError, first_line
from hftl.html.blocks import Example
from hftl.logging import suppress_logs
from hftl.reporting.run_record import RunRecord
from hftl.tasks.predictions import ClassPredictions, MultiLabelPredictions, RegressionPredictions
from hftl.tasks.targets.label_target import restore_target

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 24
"""Errors on a page."""
SAMPLED = 2000
"""Rows whose length or size is measured."""
_TEXT = 400
_THUMBNAIL = 176
"""Pixels of the longer side."""


class ReportRows:
    """The data of a run.

    Args:
        record: What the run left.
        splits: The rows, where they are open already; otherwise the run's own `data.source` is opened.
        shown: False leaves rows out, for a page that others will read.
    """

    def __init__(self, record: RunRecord, splits: Mapping[str, Dataset] | None = None, shown: bool = True) -> None:
        self.record = record
        self.missing = ""
        """Why there are no rows to show, as a sentence; empty where there are."""
        self.splits: dict[str, Dataset] = {}
        if not shown:
            self.missing = "Rows of the data are left out of this page, since it was made to be published."
            return
        try:
            self.splits = dict(splits or _open(record))
        except Exception as error:  # a source can fail in as many ways as there are libraries below
            reason = str(error) if isinstance(error, HftlError) else f"{type(error).__name__}: {first_line(error)}"
            self.missing = (
                f"The data cannot be shown: {reason} `hftl report` looks for them as the run did: start it in the "
                "same folder."
            )
            return
        if not self._is_what_was_measured():
            self.missing = "The data cannot be shown: the source has changed since the run, so rows may be others."
            self.splits = {}

    @property
    def image_column(self) -> str | None:
        """The column with images, if any."""
        return next((name for name in self._inputs() if self._holds_images(name)), None)

    @property
    def text_columns(self) -> list[str]:
        """The columns with texts."""
        return [name for name in self._inputs() if not self._holds_images(name)]

    def class_counts(self) -> dict[str, Any]:
        """Returns the number of rows of each class [K] by split; from the predictions where the data are gone."""
        target = self.record.described.get("state", {}).get("target", {})
        column, values = target.get("column"), target.get("values")
        known = values is not None and all(column in rows.features for rows in self.splits.values())
        if not self.splits or not known or not self.record.classes:
            counted = self.record.facts.get("classes", {})
            if counted and self.record.labels:
                return {split: np.array([of[name] for name in self.record.labels]) for split, of in counted.items()}
            return {split: found.confusion.sum(1) for split, found in self.record.judged.items()}
        counts = {}
        for split, rows in self.splits.items():
            seen = {entry["values"]: entry["counts"] for entry in arrow_column(rows, column).value_counts().to_pylist()}
            counts[split] = np.array([seen.get(value, 0) for value in values or ()])
        return counts

    def sizes(self, split: str) -> tuple[str, dict[str, Any], int]:
        """Returns what was measured in at most `SAMPLED` rows: its unit, values by name, and how many rows."""
        rows = self.splits[split]
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int)).tolist()
        if self.image_column:
            sizes = [_image_size(stored, self.max_pixels) for stored in self.stored(rows, self.image_column, chosen)]
            found = [size for size in sizes if size]
            return "pixels", {"width": [w for w, _ in found], "height": [h for _, h in found]}, len(found)
        columns = self.text_columns
        table = rows.select_columns(columns)[chosen]
        return "words", {name: [len(_text(value).split()) for value in table[name]] for name in columns}, len(chosen)

    def examples(self, split: str, chosen: Any) -> list[Example]:
        """Returns rows of a split as they are shown, by their positions in `RunRecord.answers`."""
        answers = self.record.answers[split]
        numbers = answers.rows[chosen].tolist()
        words = [answers.words(place) for place in chosen]
        images: list[str | None] = [None] * len(numbers)
        texts: list[list[tuple[str, str]]] = [[] for _ in numbers]
        if self.splits:
            rows, columns = self.splits[split], self.text_columns
            if self.image_column:
                images = [
                    thumbnail(stored, self.max_pixels) for stored in self.stored(rows, self.image_column, numbers)
                ]
            if columns:
                table = rows.select_columns(columns)[numbers]
                texts = [[(name, shortened(table[name][n])) for name in columns] for n in range(len(numbers))]
        return [
            Example(
                row=number,
                label=label,
                prediction=prediction,
                confidence=confidence,
                image=image,
                texts=text,
            )
            for number, (label, prediction, confidence), image, text in zip(numbers, words, images, texts, strict=True)
        ]

    @property
    def max_pixels(self) -> int:
        """Largest image that the run decoded."""
        return self.record.settings.get("data.max_pixels") or DataConfig.max_pixels

    def _inputs(self) -> list[str]:
        """Returns the columns that the task reads as inputs, as far as the data have them."""
        if not self.splits:
            return []
        features = next(iter(self.splits.values())).features
        return [name for name in _strings(self.record.described.get("state", {}).get("inputs")) if name in features]

    def _holds_images(self, name: str) -> bool:
        kind = type(next(iter(self.splits.values())).features[name]).__name__
        # a column of paths is text by its type; a task of images alone reads no texts
        return kind == "Image" or self.record.task.startswith("image") and "text" not in self.record.task

    def stored(self, rows: Dataset, column: str, numbers: list[int]) -> list[Any]:
        """Returns a column of images as it is stored, for some rows."""
        from datasets import Image

        return rows.select_columns([column]).cast_column(column, Image(decode=False))[numbers][column]

    def _is_what_was_measured(self) -> bool:
        """Whether splits are as long as the run says, and labels of predictions are those of the rows."""
        counted = self.record.facts.get("rows", {})
        if any(len(rows) != counted.get(split, len(rows)) for split, rows in self.splits.items()):
            return False
        for split, answers in self.record.answers.items():
            if split not in self.splits or answers.rows.max(initial=0) >= len(self.splits[split]):
                return False
            found = self._labels(self.splits[split].select(answers.rows))
            if found is None or not np.array_equal(found, answers.labels):
                return False
        return True

    def _labels(self, rows: Dataset) -> Any:
        """Returns the labels of rows as the task reads them, None where it cannot."""
        target = restore_target(self.record.described["state"]["target"])
        if not set(target.columns) <= set(rows.features):
            return None
        values = [arrow_column(rows, name).to_pylist() for name in target.columns]
        try:
            found = target.labels([dict(zip(target.columns, row, strict=True)) for row in zip(*values, strict=True)])
        except (KeyError, TypeError, ValueError):  # a label that the model does not know
            return None
        return None if found is None else found.numpy()


def worst_errors(record: RunRecord, split: str) -> tuple[Any, int, str]:
    """Returns the positions in `record.answers[split]` of at most `SHOWN` wrong rows, their number and order."""
    answers = record.answers[split]
    if isinstance(answers, ClassPredictions):
        badness, how = np.where(answers.labels != answers.predictions, answers.confidences, 0), "the surest"
    elif isinstance(answers, MultiLabelPredictions):
        badness, how = (answers.labels != answers.predictions).sum(1), "those with most wrong labels"
    else:
        badness, how = cast(RegressionPredictions, answers).errors, "the largest"
    wrong = np.nonzero(badness)[0]
    return wrong[np.argsort(-badness[wrong], kind="stable")][:SHOWN], len(wrong), how


def _open(record: RunRecord) -> Mapping[str, Dataset]:
    from dataclasses import fields

    from hftl.data.source import load_splits
    from hftl.data.validation import read_quarantine

    # what another version of hftl called otherwise is left out: whether rows are the same is seen from their labels
    named = {item.name: record.settings.get(f"data.{item.name}") for item in fields(DataConfig)}
    with suppress_logs():
        config = DataConfig(**{name: value for name, value in named.items() if value is not None})
        return load_splits(config, leave_out=read_quarantine(record.folder))


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings in nested JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


def _text(value: Any) -> str:
    """Returns a cell as text: words that stand as a list with blanks between them, nothing where it is empty."""
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def shortened(value: Any) -> str:
    """Returns as much of a text as a page shows."""
    text = _text(value)
    return text if len(text) <= _TEXT else text[:_TEXT] + " …"


def _image_size(stored: Stored, max_pixels: int) -> tuple[int, int] | None:
    try:
        return check_header(stored, max_pixels)
    except DataError:
        return None  # a picture that went away is no reason to lose the page


def thumbnail(stored: Stored, max_pixels: int) -> str | None:
    """Returns an image as a small JPEG in a data URI; None where it cannot be read."""
    try:
        small = decode_image(stored, "RGB", max_pixels)
    except DataError:
        return None
    if max(small.size) < _THUMBNAIL // 2:  # pictures of few pixels are enlarged, each pixel a square
        scale = _THUMBNAIL // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), 0)
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = BytesIO()
    small.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
