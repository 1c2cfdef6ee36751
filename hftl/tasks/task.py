"""The protocol of a task: what one problem says about itself. Everything else in hftl is shared.

Any object with these members is a task; no registration, no base class. `SupervisedTask` is the quickest way
to one: it joins how rows become inputs (`ImageInputs`, `TextInputs`) with what is learnt from them (a `Target`).

Shapes: B batch, T tokens, C channels, H W height and width, D feature size, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from hftl.data.splits import Splits
from hftl.data.validation import InvalidRows, validate_rows
from hftl.errors import ConfigError, DataError
from hftl.loading.loader import Example, Examples
from hftl.models.task_model import HeadSpec
from hftl.renames import renamed_members
from hftl.tasks.capabilities import Capability, supported
from hftl.tasks.metrics import Metric

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Any]
"""`inputs` (what the model takes, by name), `labels`, whatever else a task puts beside them; from the loader `index`
[B] and `weight` [B]. Each entry is a tensor with B first or a list of B items: it is cut by rows."""
Outputs = Mapping[str, Tensor]
"""What the model computes, by name; each tensor has B first."""


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
        """Metric on validation that chooses the weights to keep; which way is better, `larger_is_better` says."""
        ...

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> Examples:
        """Returns the rows of one split as examples, one for each row. `seed` None: evaluation, nothing random."""
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

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns one row a person can read for each example: JSON values, the same keys in every row."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, as JSON values."""
        ...


@runtime_checkable
class ThresholdTuning(Protocol):
    """A task with something that validation chooses after training, such as thresholds; it travels in `state`."""

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Chooses from what `metrics()` have seen of the whole validation split; the same on all processes."""
        ...


class Inputs(Protocol):
    """How rows become model inputs."""

    @property
    def column_types(self) -> Mapping[str, str]:
        """What each column that is read holds, in reading order: `image`, `text`, `words`, `number` or `category`."""
        ...

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
    ) -> Examples:
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

    def head(self, model_class: str) -> HeadSpec:
        """Returns the head for a stock class."""
        ...

    def labels(self, examples: list[Example]) -> Tensor | list[Any] | None:
        """Returns the labels of a batch, or None where the rows have none."""
        ...

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns the loss of each example [B]."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """Returns fresh accumulators."""
        ...

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns one row a person can read for each example: JSON values, the same keys in every row."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments, as JSON values."""
        ...


class SupervisedTask:
    """Inputs and a target, joined. Built-in tasks and most of yours are this class with a constructor of their own.

    Inputs and targets that have the method of `hftl.data.validation.RowValidator` are asked which rows cannot be used.

    What works beyond training and evaluation is what a target declares in its `info` (`TargetInfo` of
    `hftl.tasks.capabilities`), as far as its inputs have it among their `capabilities`; nothing without an `info`.

    Attributes:
        name: What a saved model calls this task.
        model_class: The class to build (`HeadSpec.model_class`).
        pipeline_tag: What the hub calls this task; empty: the name with dashes.
        shown: Metrics that a line, a card or a comparison names first, in order; the target's own, where it has some.
        defaults: Settings of `train` by way of adapting (`full`, `frozen`, `lora`, `scratch`), before those of the
            modality.
        usage: Python that uses a saved model without hftl, for its card, with `{place}` where the model is; empty: a
            pipeline of the hub's task.

    Raises:
        DataError: Everything that inputs and target found wrong with the data.
    """

    name: str
    model_class: str
    pipeline_tag: ClassVar[str] = ""
    primary_metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    defaults: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    usage: str = ""
    inputs_type: ClassVar[Any]
    """Class of the inputs, for tasks that `restore` opens without data."""
    target_types: ClassVar[tuple[type, ...]] = ()
    """Classes of targets that the task may have."""

    def __init__(self, inputs: Inputs, target: Target) -> None:
        renamed = renamed_members((type(self), inputs, target))
        if renamed:
            raise ConfigError(*renamed)
        if inputs.problems or target.problems:
            raise DataError(*inputs.problems, *target.problems)
        self.inputs = inputs
        self.target = target
        self.modality = inputs.modality
        self.head = target.head(self.model_class)
        self.best_metric = target.best_metric
        self.primary_metrics = getattr(target, "primary_metrics", self.primary_metrics)

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> Examples:
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

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """See `Task.decode`."""
        return self.target.decode(outputs, batch)

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Lets validation choose what the target leaves open, if anything; see `ThresholdTuning`."""
        if isinstance(self.target, ThresholdTuning):
            self.target.tune_thresholds(metrics)

    @property
    def column_types(self) -> Mapping[str, str]:
        """See `Inputs.column_types`."""
        return self.inputs.column_types

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns of `column_types` that a row may lack when a trained model is used."""
        return tuple(getattr(self.inputs, "optional", ()))

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What works for this target on these inputs, beyond training and evaluation."""
        return supported(self.target, self.inputs)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the loss of a row depends on the other rows of its micro-batch, on all processes."""
        return bool(getattr(self.target, "depends_on_batch", False))

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows that inputs or target cannot use, for `data.on_error skip`."""
        return validate_rows(splits, [self.inputs, self.target])

    def state(self) -> dict[str, Any]:
        """See `Task.state`."""
        return {"inputs": self.inputs.state(), "target": self.target.state()}

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> Target:
        """Returns the target whose `state()` this was, without any data."""
        raise NotImplementedError(f"{cls.__name__} does not say how its target is restored")

    @classmethod
    def restored(cls, state: dict[str, Any]) -> SupervisedTask:
        """Returns the task whose `state()` this was, without any data."""
        task = cls.__new__(cls)
        SupervisedTask.__init__(task, cls.inputs_type(**state["inputs"]), cls.make_target(state["target"]))
        return task


def primary_metrics(task: Task) -> tuple[str, ...]:
    """Returns the metrics that a line or a card names first."""
    return tuple(getattr(task, "primary_metrics", (task.best_metric,)))


def is_logged(name: str, task: Task) -> bool:
    """Whether one of the task's numbers is said while a run goes on; all of them are on file."""
    return name in ("loss", task.best_metric, *primary_metrics(task))


def input_column_types(task: Task) -> dict[str, str]:
    """Returns what each column that a task reads holds, in reading order; see `Inputs.column_types`."""
    return dict(getattr(task, "column_types", {}))


def optional_columns(task: Task) -> tuple[str, ...]:
    """Returns the columns that a row may lack, as far as the model has learnt to do without them."""
    return tuple(getattr(getattr(task, "inputs", None), "optional", ()))


def larger_is_better(task: Task, metric: str) -> bool:
    """Whether a larger value of one of the task's numbers is better: not of `loss` or of what a metric calls errors."""
    errors = {name for each in task.metrics() for name in getattr(each, "smaller_is_better", ())}
    return metric != "loss" and metric not in errors


def is_row_fraction(task: Task, metric: str) -> bool:
    """Whether one of the task's numbers is a share of the rows, so that their number gives its standard error."""
    return any(metric in getattr(each, "row_fractions", ()) for each in task.metrics())


def check_splits(splits: Splits, check: Any) -> list[str]:
    """Returns the sentences of `check(dataset, split)` over all splits."""
    return [problem for split, dataset in splits.items() for problem in check(dataset, split)]
