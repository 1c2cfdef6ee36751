"""Rows of the data in reports: reloaded from the source, verified against the predictions, counted and displayed."""

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

MAX_ERRORS = 24
"""Maximum number of errors on a page."""
MAX_MEASURED_ROWS = 2000
"""Maximum number of rows for statistics of text length or image size."""
_MAX_TEXT_LENGTH = 400
_THUMBNAIL = 176
"""Longer side of a thumbnail in pixels."""


class ReportRows:
    """Data of a run.

    Args:
        record: Record of the run.
        splits: Rows by split, if already loaded; None loads `data.source` of the run.
        show_rows: Whether rows may be displayed; False for a page that is published.
    """

    def __init__(self, record: RunRecord, splits: Mapping[str, Dataset] | None = None, show_rows: bool = True) -> None:
        self.record = record
        self.missing = ""
        """Reason for missing rows; empty if rows are available."""
        self.splits: dict[str, Dataset] = {}
        if not show_rows:
            self.missing = "This page contains no rows of the data, as it is meant for publication."
            return
        try:
            self.splits = dict(splits or _load(record))
        except Exception as error:  # each data library raises its own errors
            reason = str(error) if isinstance(error, HftlError) else f"{type(error).__name__}: {first_line(error)}"
            self.missing = f"The data cannot be loaded: {reason} Run `hftl report` in the working directory of the run."
            return
        if not self._matches_record():
            self.missing = "The data cannot be displayed: the source has changed since the run."
            self.splits = {}

    @property
    def image_column(self) -> str | None:
        """Image column; None for tasks without images."""
        return next((name for name in self._inputs() if self._holds_images(name)), None)

    @property
    def text_columns(self) -> list[str]:
        """Text columns."""
        return [name for name in self._inputs() if not self._holds_images(name)]

    def class_counts(self) -> dict[str, Any]:
        """Returns the number of rows per class [K] by split; from report.json or predictions if rows are missing."""
        target = self.record.description.get("state", {}).get("target", {})
        column, values = target.get("column"), target.get("values")
        has_labels = values is not None and all(column in rows.features for rows in self.splits.values())
        if not self.splits or not has_labels or not self.record.classes:
            recorded = self.record.facts.get("classes", {})
            if recorded and self.record.labels:
                labels = self.record.labels
                return {split: np.array([counts[name] for name in labels]) for split, counts in recorded.items()}
            return {split: each.confusion.sum(1) for split, each in self.record.class_predictions.items()}
        class_counts = {}
        for split, rows in self.splits.items():
            entries = arrow_column(rows, column).value_counts().to_pylist()
            counts = {entry["values"]: entry["counts"] for entry in entries}
            class_counts[split] = np.array([counts.get(value, 0) for value in values or ()])
        return class_counts

    def sizes(self, split: str) -> tuple[str, dict[str, Any], int]:
        """Returns image sizes or text lengths of at most `MAX_MEASURED_ROWS` evenly spaced rows.

        Returns:
            The unit, the values by name, and the number of measured rows.
        """
        rows = self.splits[split]
        count = min(len(rows), MAX_MEASURED_ROWS)
        numbers = np.unique(np.linspace(0, len(rows) - 1, count).astype(int)).tolist()
        if self.image_column:
            stored = self.stored(rows, self.image_column, numbers)
            sizes = [size for image in stored if (size := _image_size(image, self.max_pixels))]
            return "pixels", {"width": [w for w, _ in sizes], "height": [h for _, h in sizes]}, len(sizes)
        columns = self.text_columns
        table = rows.select_columns(columns)[numbers]
        return "words", {name: [len(_text(value).split()) for value in table[name]] for name in columns}, len(numbers)

    def examples(self, split: str, positions: Any) -> list[Example]:
        """Returns examples of a split, by their positions in `RunRecord.answers`."""
        predictions = self.record.answers[split]
        numbers = predictions.rows[positions].tolist()
        words = [predictions.words(position) for position in positions]
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
        """Limit `data.max_pixels` of the run, in pixels per image."""
        return self.record.settings.get("data.max_pixels") or DataConfig.max_pixels

    def _inputs(self) -> list[str]:
        """Returns the input columns of the task that exist in the data."""
        if not self.splits:
            return []
        features = next(iter(self.splits.values())).features
        return [name for name in _strings(self.record.description.get("state", {}).get("inputs")) if name in features]

    def _holds_images(self, name: str) -> bool:
        kind = type(next(iter(self.splits.values())).features[name]).__name__
        # columns of image paths have a string type; image tasks have no text columns
        return kind == "Image" or self.record.task.startswith("image") and "text" not in self.record.task

    def stored(self, rows: Dataset, column: str, numbers: list[int]) -> list[Any]:
        """Returns the undecoded images of the rows `numbers`."""
        from datasets import Image

        return rows.select_columns([column]).cast_column(column, Image(decode=False))[numbers][column]

    def _matches_record(self) -> bool:
        """Whether the lengths of splits match report.json, and the labels of rows those of the predictions."""
        recorded = self.record.facts.get("rows", {})
        if any(len(rows) != recorded.get(split, len(rows)) for split, rows in self.splits.items()):
            return False
        for split, predictions in self.record.answers.items():
            if split not in self.splits or predictions.rows.max(initial=0) >= len(self.splits[split]):
                return False
            labels = self._labels(self.splits[split].select(predictions.rows))
            if labels is None or not np.array_equal(labels, predictions.labels):
                return False
        return True

    def _labels(self, rows: Dataset) -> Any:
        """Returns the encoded labels of rows; None if the target cannot encode them."""
        target = restore_target(self.record.description["state"]["target"])
        if not set(target.columns) <= set(rows.features):
            return None
        values = [arrow_column(rows, name).to_pylist() for name in target.columns]
        try:
            labels = target.labels([dict(zip(target.columns, row, strict=True)) for row in zip(*values, strict=True)])
        except (KeyError, TypeError, ValueError):  # the label is unknown to the model
            return None
        return None if labels is None else labels.numpy()


def largest_errors(record: RunRecord, split: str) -> tuple[Any, int, str]:
    """Returns the largest errors of a split.

    Returns:
        Positions in `record.answers[split]` of at most `MAX_ERRORS` errors, the number of all errors, and the order.
    """
    predictions = record.answers[split]
    if isinstance(predictions, ClassPredictions):
        is_wrong = predictions.labels != predictions.predictions
        errors, order = np.where(is_wrong, predictions.confidences, 0), "most confident"
    elif isinstance(predictions, MultiLabelPredictions):
        errors, order = (predictions.labels != predictions.predictions).sum(1), "most wrong labels"
    else:
        errors, order = cast(RegressionPredictions, predictions).errors, "largest"
    wrong = np.nonzero(errors)[0]
    return wrong[np.argsort(-errors[wrong], kind="stable")][:MAX_ERRORS], len(wrong), order


def _load(record: RunRecord) -> Mapping[str, Dataset]:
    from dataclasses import fields

    from hftl.data.source import load_splits
    from hftl.data.validation import read_quarantine

    # settings renamed by other versions of hftl are ignored; the comparison of labels detects different rows
    values = {item.name: record.settings.get(f"data.{item.name}") for item in fields(DataConfig)}
    with suppress_logs():
        config = DataConfig(**{name: value for name, value in values.items() if value is not None})
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
    """Returns a cell as text; lists of words are joined by spaces, None is an empty string."""
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def shortened(value: Any) -> str:
    """Returns a text, truncated for display on a page."""
    text = _text(value)
    return text if len(text) <= _MAX_TEXT_LENGTH else text[:_MAX_TEXT_LENGTH] + " …"


def _image_size(stored: Stored, max_pixels: int) -> tuple[int, int] | None:
    try:
        return check_header(stored, max_pixels)
    except DataError:
        return None  # unreadable images are skipped: the report is still useful


def thumbnail(stored: Stored, max_pixels: int) -> str | None:
    """Returns a JPEG thumbnail as a data URI; None if the image cannot be read."""
    try:
        image = decode_image(stored, "RGB", max_pixels)
    except DataError:
        return None
    if max(image.size) < _THUMBNAIL // 2:  # enlarge tiny images by an integer factor, without interpolation
        scale = _THUMBNAIL // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), 0)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = BytesIO()
    image.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
