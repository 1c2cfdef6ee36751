"""What takes a model to see: texts it would cut off, labels that contradict its features, rows far from all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hftl.audit.class_balance import Labels
from hftl.audit.finding import Entry, Finding, Numbering
from hftl.audit.label_errors import FOLDS, likely_wrong, out_of_fold
from hftl.audit.outliers import FENCE, NEIGHBOUR, REFERENCE, distances, far_limit, reference_rows
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


class _Unlabelled(SupervisedTask):
    """Rows as inputs of a model, whatever their labels are."""

    name = "features"

    def __init__(self, inputs: Inputs, model_class: str) -> None:
        self.model_class = model_class
        super().__init__(inputs, SingleLabelTarget("", ["0", "1"], [0, 1]))


class ModelChecks:
    """A model and the rows it looks at.

    Args:
        splits: All rows; lenient.
        name: As `model.name`.
        images: Whether the rows are images.
        unusable: Numbers of the rows that cannot be inputs, by split.

    Raises:
        ModelError: The model cannot be found or built.
    """

    def __init__(self, splits: Splits, name: str, images: bool, unusable: dict[str, list[int]]) -> None:
        with suppress_logs():
            inputs = ImageInputs.find(splits) if images else TextInputs.find(splits)
        model_class = "timm" if images else "AutoModelForSequenceClassification"
        self.splits, self.name = splits, name
        self.run = RunConfig(splits.config, ModelConfig(name=name))
        self.task = _Unlabelled(inputs, model_class)
        self.model: TaskModel = build_model(self.run, HeadSpec(model_class, 2))
        self.usable = {
            split: np.delete(np.arange(len(rows)), unusable.get(split, [])) for split, rows in splits.items()
        }

    def too_long(self) -> Finding:
        """Returns the texts that have more tokens than the model reads."""
        limit = token_limit(self.model.processor, self.splits.config.max_length)
        entries, shares = [], []
        for split, rows in self.splits.items():
            lengths = self._token_counts(split, rows)
            long = np.flatnonzero(lengths > limit)
            shares.append(f"{len(long) / max(len(rows), 1):.1%} of {split} (longest {lengths.max(initial=0):,})")
            entries += [
                Entry(split, row, f"{lengths[row]:,} tokens", score=float(lengths[row])) for row in long.tolist()
            ]
        sentence = (
            f"{self.name} reads {limit:,} tokens of a row; what stands after them is cut off. Cut: {', '.join(shares)}."
        )
        return Finding("too_long", sentence, tuple(entries))

    def _token_counts(self, split: str, rows: Any) -> Any:
        counts, position = np.zeros(len(rows), np.int64), 0
        for batch in text_rows(rows, self.task.inputs.columns):  # pyright: ignore[reportAttributeAccessIssue]
            texts = [list(column) for column in zip(*batch, strict=True)]
            encoded = self.model.processor(*texts, truncation=False, return_attention_mask=False, verbose=False)
            counts[position : position + len(batch)] = [len(ids) for ids in encoded["input_ids"]]
            position += len(batch)
        return counts

    def features(self) -> dict[str, Any] | str:
        """Returns the features of the usable rows of each split [n, D]; a sentence that says why where that failed."""
        accelerator = build_accelerator()
        found: dict[str, Features] = {}
        model = self.model.to(accelerator.device)
        try:
            for split, rows in self.splits.items():
                if len(self.usable[split]):
                    chosen = rows.select(self.usable[split]) if len(self.usable[split]) < len(rows) else rows
                    found[split] = compute_features(accelerator, model, self.task, chosen, self.run, split=split)
        except FeatureError as error:
            return str(error)
        return {split: features.values for split, features in found.items()}


def label_errors(
    features: dict[str, Any], usable: dict[str, Any], labels: Labels, numbering: Numbering, twins: Any
) -> Finding:
    """Returns the rows whose labels are likely wrong, in all splits, the likeliest first.

    Args:
        features: Of the usable rows of each split [n, D].
        usable: Row numbers of these [n].
        labels: Of all rows.
        numbering: Of all rows.
        twins: The first row that each row is the same as, [N].
    """
    if labels.why_not:
        return Finding("label_errors", f"Not looked for: {labels.why_not}.", looked=False)
    numbers = np.concatenate([usable[split] + numbering.of_split(split).start for split in features])
    codes = labels.codes[numbers]
    different = np.unique(twins[numbers])  # copies are in one fold
    counts = np.bincount(labels.codes[different][labels.codes[different] >= 0], minlength=len(labels.names))
    judged = (codes >= 0) & (counts[codes] >= FOLDS)
    present = np.unique(codes[judged])
    if len(present) < 2:
        return Finding(
            "label_errors",
            f"Not looked for: it takes two classes with at least {FOLDS} different rows each.",
            looked=False,
        )
    stacked = _Stacked([features[split] for split in features])
    positions = np.flatnonzero(judged)
    chosen = numbers[positions]
    dense = np.searchsorted(present, codes[positions])
    first = {int(number): place for place, number in reversed(list(enumerate(twins[chosen])))}
    own = np.array([first[int(number)] for number in twins[chosen]])
    probabilities = out_of_fold(_Rows(stacked, positions), dense, own)
    entries = []
    for place in likely_wrong(probabilities, dense).tolist():
        guess, given = int(probabilities[place].argmax()), float(probabilities[place, dense[place]])
        names = labels.names[present[dense[place]]], labels.names[present[guess]]
        why = f"labelled '{names[0]}' ({given:.2f}), looks like '{names[1]}' ({probabilities[place, guess]:.2f})"
        entries.append(Entry(*numbering.address(int(chosen[place])), why, score=round(given, 4)))
    left = int((~judged).sum())
    unjudged = f" {left:,} rows of rarer classes or without a label were not judged." if left else ""
    sentence = (
        "Ranked by the probability of the label as a logistic regression gives it that was fitted to other rows' "
        f"features ({FOLDS} folds over all splits together); their number is estimated by confident learning. Look at "
        f"them before you believe it.{unjudged}"
    )
    return Finding("label_errors", sentence, tuple(entries))


def outliers(features: dict[str, Any], usable: dict[str, Any]) -> Finding:
    """Returns the rows far from the training rows, the farthest first."""
    train = features.get("train")
    if train is None or len(train) <= NEIGHBOUR:
        return Finding("outliers", f"Not looked for: it takes more than {NEIGHBOUR} training rows.", looked=False)
    chosen = reference_rows(len(train))
    reference = np.asarray(train[chosen])
    own = np.full(len(train), -1)
    own[chosen] = np.arange(len(chosen))
    far = {split: distances(rows, reference, own if split == "train" else None) for split, rows in features.items()}
    limit = far_limit(far["train"])
    entries = [
        Entry(split, int(usable[split][place]), f"distance {found[place]:.3f}", score=round(float(found[place]), 4))
        for split, found in far.items()
        for place in np.flatnonzero(found > limit + 1e-6).tolist()
    ]
    entries.sort(key=lambda entry: -(entry.score or 0))
    drawn = f" of {REFERENCE:,} drawn at random" if len(train) > REFERENCE else ""
    sentence = (
        f"Distance of a row's features, at unit length, to its {NEIGHBOUR}th nearest training row{drawn}; listed are "
        f"those beyond {limit:.3f}, {FENCE:g} interquartile ranges above the third quartile of train."
    )
    return Finding("outliers", sentence, tuple(entries))


class _Stacked:
    """Arrays one after the other without a copy in memory."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __getitem__(self, rows: Any) -> Any:
        out = np.empty((len(rows), self.parts[0].shape[1]), np.float32)
        for part, start, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            inside = (rows >= start) & (rows < end)
            out[inside] = part[rows[inside] - start]
        return out


class _Rows:
    """Some rows of stacked arrays, by position."""

    def __init__(self, stacked: _Stacked, positions: Any) -> None:
        self.stacked, self.positions = stacked, positions

    def __getitem__(self, rows: Any) -> Any:
        return self.stacked[self.positions[rows]]
