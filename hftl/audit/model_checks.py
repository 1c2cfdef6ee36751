"""Checks that require a model: truncated texts, label errors and outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.audit.class_balance import Labels
from hftl.audit.finding import Entry, Finding, Numbering
from hftl.audit.label_errors import FOLDS, likely_wrong, out_of_fold
from hftl.audit.outliers import FENCE, NEIGHBOR, REFERENCE, distance_limit, distances, reference_rows
from hftl.audit.text_normalization import text_rows
from hftl.config.schema import ModelConfig, RunConfig
from hftl.data.splits import Splits
from hftl.errors import FeatureError
from hftl.features.cache import compute_features
from hftl.launcher import build_accelerator
from hftl.logging import suppress_logs
from hftl.models.build import build_model
from hftl.models.task_model import HeadSpec, TaskModel
from hftl.preprocessing.tokenization import token_limit
from hftl.tasks.inputs import ImageInputs, TextInputs
from hftl.tasks.targets.single_label.target import SingleLabelTarget
from hftl.tasks.task import Inputs, SupervisedTask

if TYPE_CHECKING:
    from hftl.features.cache import Features


class _InputTask(SupervisedTask):
    """Task that encodes model inputs and ignores labels."""

    name = "features"

    def __init__(self, inputs: Inputs, model_class: str) -> None:
        self.model_class = model_class
        super().__init__(inputs, SingleLabelTarget("", ["0", "1"], [0, 1]))


class ModelChecks:
    """Pretrained model and the valid rows of all splits.

    Args:
        splits: All rows; lenient.
        name: As `model.name`.
        images: Whether the inputs are images.
        unusable: Row numbers of invalid inputs, by split.

    Raises:
        ModelError: The model cannot be found or built.
    """

    def __init__(self, splits: Splits, name: str, images: bool, unusable: dict[str, list[int]]) -> None:
        with suppress_logs():
            inputs = ImageInputs.find(splits) if images else TextInputs.find(splits)
        model_class = "timm" if images else "AutoModelForSequenceClassification"
        self.splits, self.name = splits, name
        self.run = RunConfig(splits.config, ModelConfig(name=name))
        self.task = _InputTask(inputs, model_class)
        self.model: TaskModel = build_model(self.run, HeadSpec(model_class, 2))
        self.usable = {
            split: np.delete(np.arange(len(rows)), unusable.get(split, [])) for split, rows in splits.items()
        }

    def too_long(self) -> Finding:
        """Returns the texts with more tokens than the model accepts."""
        limit = token_limit(self.model.processor, self.splits.config.max_length)
        entries, fractions = [], []
        for split, rows in self.splits.items():
            lengths = self._token_counts(split, rows)
            long = np.flatnonzero(lengths > limit)
            fractions.append(f"{len(long) / max(len(rows), 1):.1%} of {split} (longest {lengths.max(initial=0):,})")
            entries += [
                Entry(split, row, f"{lengths[row]:,} tokens", score=float(lengths[row])) for row in long.tolist()
            ]
        description = f"{self.name} truncates rows after {limit:,} tokens. Truncated: {', '.join(fractions)}."
        return Finding("too_long", description, tuple(entries))

    def _token_counts(self, split: str, rows: Any) -> Any:
        counts, position = np.zeros(len(rows), np.int64), 0
        for batch in text_rows(rows, self.task.inputs.columns):  # pyright: ignore[reportAttributeAccessIssue]
            texts = [list(column) for column in zip(*batch, strict=True)]
            encoded = self.model.processor(*texts, truncation=False, return_attention_mask=False, verbose=False)
            counts[position : position + len(batch)] = [len(ids) for ids in encoded["input_ids"]]
            position += len(batch)
        return counts

    def features(self) -> dict[str, Any] | str:
        """Returns the features of the valid rows of each split, [n, D]; an error message if they cannot be computed."""
        accelerator = build_accelerator()
        features: dict[str, Features] = {}
        model = self.model.to(accelerator.device)
        try:
            for split, rows in self.splits.items():
                if len(self.usable[split]):
                    valid = rows.select(self.usable[split]) if len(self.usable[split]) < len(rows) else rows
                    features[split] = compute_features(accelerator, model, self.task, valid, self.run, split=split)
        except FeatureError as error:
            return str(error)
        return {split: split_features.values for split, split_features in features.items()}


def label_errors(
    features: dict[str, Any], usable: dict[str, Any], labels: Labels, numbering: Numbering, first_duplicates: Any
) -> Finding:
    """Returns likely label errors of all splits, the most likely first.

    Args:
        features: Features of the valid rows by split, [n, D].
        usable: Row numbers of the valid rows by split, [n].
        labels: Labels of all rows.
        numbering: Row numbers over all splits.
        first_duplicates: Number of the first duplicate of each row, [N].
    """
    if labels.why_not:
        return Finding("label_errors", f"Not checked: {labels.why_not}.", checked=False)
    numbers = np.concatenate([usable[split] + numbering.of_split(split).start for split in features])
    codes = labels.codes[numbers]
    distinct = np.unique(first_duplicates[numbers])  # duplicates are in one fold
    counts = np.bincount(labels.codes[distinct][labels.codes[distinct] >= 0], minlength=len(labels.names))
    scored = (codes >= 0) & (counts[codes] >= FOLDS)
    present = np.unique(codes[scored])
    if len(present) < 2:
        return Finding(
            "label_errors",
            f"Not checked: requires two classes with at least {FOLDS} distinct rows each.",
            checked=False,
        )
    stacked = _StackedArrays([features[split] for split in features])
    positions = np.flatnonzero(scored)
    scored_numbers = numbers[positions]
    dense_codes = np.searchsorted(present, codes[positions])
    duplicates = first_duplicates[scored_numbers]
    first_position = {int(number): position for position, number in reversed(list(enumerate(duplicates)))}
    first_positions = np.array([first_position[int(number)] for number in duplicates])
    probabilities = out_of_fold(_RowSubset(stacked, positions), dense_codes, first_positions)
    entries = []
    for position in likely_wrong(probabilities, dense_codes).tolist():
        label, predicted = dense_codes[position], int(probabilities[position].argmax())
        self_confidence = float(probabilities[position, label])
        why = (
            f"label '{labels.names[present[label]]}' ({self_confidence:.2f}), predicted "
            f"'{labels.names[present[predicted]]}' ({probabilities[position, predicted]:.2f})"
        )
        address = numbering.address(int(scored_numbers[position]))
        entries.append(Entry(*address, why, score=round(self_confidence, 4)))
    unscored = int((~scored).sum())
    skipped = f" Skipped {unscored:,} rows of rarer classes or without a label." if unscored else ""
    description = (
        "Ranked by the out-of-fold probability of the label, from a logistic regression on the features "
        f"({FOLDS} folds over all splits). Confident learning estimates the number of errors. Review the rows before "
        f"changing labels.{skipped}"
    )
    return Finding("label_errors", description, tuple(entries))


def outliers(features: dict[str, Any], usable: dict[str, Any]) -> Finding:
    """Returns the rows far from the training rows, the most distant first.

    Args:
        features: Features of the valid rows by split, [n, D].
        usable: Row numbers of the valid rows by split, [n].
    """
    train = features.get("train")
    if train is None or len(train) <= NEIGHBOR:
        return Finding("outliers", f"Not checked: requires more than {NEIGHBOR} training rows.", checked=False)
    sampled = reference_rows(len(train))
    reference = np.asarray(train[sampled])
    own_positions = np.full(len(train), -1)
    own_positions[sampled] = np.arange(len(sampled))
    by_split = {
        split: distances(rows, reference, own_positions if split == "train" else None)
        for split, rows in features.items()
    }
    limit = distance_limit(by_split["train"])
    entries = [
        Entry(split, int(usable[split][row]), f"distance {values[row]:.3f}", score=round(float(values[row]), 4))
        for split, values in by_split.items()
        for row in np.flatnonzero(values > limit + 1e-6).tolist()
    ]
    entries.sort(key=lambda entry: -(entry.score or 0))
    sample = f" of {REFERENCE:,} sampled ones" if len(train) > REFERENCE else ""
    description = (
        f"Distance of L2-normalized features to the {NEIGHBOR}th nearest training row{sample}. Listed: distances above "
        f"{limit:.3f}, {FENCE:g} interquartile ranges above the third quartile of train."
    )
    return Finding("outliers", description, tuple(entries))


class _StackedArrays:
    """Concatenated arrays, without a copy in memory."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays
        self.starts = np.cumsum([0, *(len(array) for array in arrays)])

    def __getitem__(self, rows: Any) -> Any:
        values = np.empty((len(rows), self.arrays[0].shape[1]), np.float32)
        for array, start, end in zip(self.arrays, self.starts[:-1], self.starts[1:], strict=True):
            inside = (rows >= start) & (rows < end)
            values[inside] = array[rows[inside] - start]
        return values


class _RowSubset:
    """Rows of stacked arrays, by position."""

    def __init__(self, stacked: _StackedArrays, positions: Any) -> None:
        self.stacked, self.positions = stacked, positions

    def __getitem__(self, rows: Any) -> Any:
        return self.stacked[self.positions[rows]]
