"""The protocol of a task: what one problem says about itself. Everything else in hftl is shared.

Any object with these members is a task; no registration, no base class. `SupervisedTask` is the quickest way
to one: it joins how rows become inputs (`ImageInputs`, `TextInputs`) with what is learnt from them (a `Target`).

Shapes: B batch, T tokens, C channels, H W height and width, D feature size, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from hftl.data.loader import Example, Rows
from hftl.data.quarantine import BadRows, judge_rows
from hftl.data.source import Splits
from hftl.errors import DataError
from hftl.evaluation.metrics import Metric
from hftl.models.parts import HeadSpec

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Any]
"""`inputs` (what the model takes, by name), `labels`, and from the loader `index` [B] and `weight` [B]."""
Outputs = Mapping[str, Tensor]


class Task(Protocol):
    """What one problem says about itself."""

    @property
    def name(self) -> str:
        """What a saved model calls this task."""
        ...

    @property
    def modality(self) -> str:
        """`image` or `text`: which defaults apply."""
        ...

    @property
    def head(self) -> HeadSpec:
        """The stock class and the head that the model needs."""
        ...

    @property
    def best_metric(self) -> str:
        """Metric on validation that chooses the weights to keep; larger is better unless it is `loss`."""
        ...

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> Rows:
        """Returns the rows of one split as examples. `seed` None means evaluation: nothing random."""
        ...

    def collate(self, examples: list[Example]) -> Batch:
        """Returns `inputs` and `labels` of one batch; labels are absent for rows that have none."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Returns the loss of each example [B], so that weighting and uneven batches come out right."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """Returns fresh accumulators."""
        ...

    def decode(self, outputs: Outputs) -> list[dict[str, Any]]:
        """Returns one row a person can read for each example."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, as JSON values."""
        ...


class Inputs(Protocol):
    """How rows become model inputs."""

    @property
    def modality(self) -> str:
        """As `Task.modality`."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What was found wrong with the data, a sentence each."""
        ...

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> Rows:
        """As `Task.encode`; columns in `keep` stay in the examples."""
        ...

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Returns the model's inputs by name."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as JSON values."""
        ...


class Target(Protocol):
    """What is learnt: labels, head, loss and metrics."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that `labels` reads."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """What was found wrong with the data, a sentence each."""
        ...

    @property
    def best_metric(self) -> str:
        """As `Task.best_metric`."""
        ...

    def head(self, stock: str) -> HeadSpec:
        """Returns the head for a stock class."""
        ...

    def labels(self, examples: list[Example]) -> Tensor | None:
        """Returns the labels of a batch, or None where the rows have none."""
        ...

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Returns the loss of each example [B]."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """Returns fresh accumulators."""
        ...

    def decode(self, outputs: Outputs) -> list[dict[str, Any]]:
        """Returns one row a person can read for each example."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as JSON values."""
        ...


class SupervisedTask:
    """Inputs and a target, joined. Built-in tasks and most of yours are this class with a constructor of their own.

    Inputs and targets that have the method of `hftl.data.quarantine.Judge` are asked which rows cannot be used.

    Raises:
        DataError: Everything that inputs and target found wrong with the data.
    """

    name: str
    stock: str

    def __init__(self, inputs: Inputs, target: Target) -> None:
        if inputs.problems or target.problems:
            raise DataError(*inputs.problems, *target.problems)
        self.inputs = inputs
        self.target = target
        self.modality = inputs.modality
        self.head = target.head(self.stock)
        self.best_metric = target.best_metric

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> Rows:
        """See `Task.encode`."""
        return self.inputs.encode(dataset, processor, seed, max_length, self.target.columns)

    def collate(self, examples: list[Example]) -> Batch:
        """See `Task.collate`."""
        batch: Batch = {"inputs": self.inputs.collate(examples)}
        labels = self.target.labels(examples)
        return batch if labels is None else batch | {"labels": labels}

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """See `Task.loss`."""
        return self.target.loss(outputs, batch["labels"])

    def metrics(self) -> Sequence[Metric]:
        """See `Task.metrics`."""
        return self.target.metrics()

    def decode(self, outputs: Outputs) -> list[dict[str, Any]]:
        """See `Task.decode`."""
        return self.target.decode(outputs)

    def bad_rows(self, splits: Splits) -> BadRows:
        """Returns the rows that inputs or target cannot use, for `data.on_error skip`."""
        return judge_rows(splits, [self.inputs, self.target])

    def state(self) -> dict[str, Any]:
        """See `Task.state`."""
        return {"inputs": self.inputs.state(), "target": self.target.state()}


def check_splits(splits: Splits, check: Any) -> list[str]:
    """Returns the sentences of `check(dataset, split)` over all splits."""
    return [problem for split, dataset in splits.items() for problem in check(dataset, split)]
