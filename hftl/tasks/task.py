"""Protocols of tasks, inputs and targets, and `SupervisedTask`, which combines inputs and a target into a task.

Any object with the members of `Task` is a task, without registration or base class. Custom tasks usually derive from
`SupervisedTask`: inputs (`ImageInputs`, `TextInputs`) convert rows to model inputs, and a target defines labels, head,
loss, metrics and predictions.

Shapes: B batch size, T tokens, C channels, H and W height and width, D feature dimension, K outputs.
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
"""`inputs` (model inputs by name), `labels` and further entries of the task; the loader adds `index` [B] and
`weight` [B]. Each entry is a tensor with first dimension B or a list of B items, so that batches can be split."""
Outputs = Mapping[str, Tensor]
"""Model outputs by name; the first dimension of each tensor is B."""


class Task(Protocol):
    """Definition of a machine learning problem: inputs, labels, head, loss, metrics and predictions."""

    @property
    def name(self) -> str:
        """Name of the task in configurations and saved models."""
        ...

    @property
    def modality(self) -> str:
        """`image`, `text` or `image_text`; selects the default settings."""
        ...

    @property
    def head(self) -> HeadSpec:
        """Model class and head specification."""
        ...

    @property
    def best_metric(self) -> str:
        """Validation metric that selects the best checkpoint; its direction is that of `larger_is_better`."""
        ...

    def encode(self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None) -> Examples:
        """Returns one example per row of a split.

        Args:
            dataset: Rows of one split.
            processor: Image processor or tokenizer of the model.
            seed: Seed of random augmentation in training; None for evaluation, which is deterministic.
            max_length: Maximum number of tokens; None for the model's limit.
        """
        ...

    def collate(self, examples: list[Example]) -> Batch:
        """Returns a batch with `inputs`, and `labels` if the examples have labels."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Returns the loss per example [B]; hftl weights and averages it over batches and processes."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """Returns new metric accumulators."""
        ...

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """Returns one readable prediction per example: JSON values with the same keys for all examples."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the JSON values from which `hftl.tasks.registry.restore` reconstructs the task."""
        ...


@runtime_checkable
class ThresholdTuning(Protocol):
    """Task or target with parameters that are tuned on validation after training (decision thresholds)."""

    def tune_thresholds(self, metrics: Sequence[Metric]) -> None:
        """Tunes the parameters, which `state` includes; the result is the same on all processes.

        Args:
            metrics: Accumulators of `metrics()` over the complete validation split.
        """
        ...


class Inputs(Protocol):
    """Conversion of rows to model inputs."""

    @property
    def column_types(self) -> Mapping[str, str]:
        """Input columns in model order -> `image`, `text`, `words`, `number` or `category`."""
        ...

    @property
    def modality(self) -> str:
        """See `Task.modality`."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Error messages of data validation, one per problem."""
        ...

    def encode(
        self, dataset: Dataset, processor: Any, seed: int | None, max_length: int | None, keep: Sequence[str]
    ) -> Examples:
        """See `Task.encode`; examples also contain the columns in `keep`."""
        ...

    def collate(self, examples: list[Example]) -> dict[str, Tensor]:
        """Returns model inputs by name."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments as JSON values."""
        ...


class Target(Protocol):
    """Training target: labels, head, loss, metrics and predictions."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns that `labels` reads."""
        ...

    @property
    def problems(self) -> Sequence[str]:
        """Error messages of data validation, one per problem."""
        ...

    @property
    def best_metric(self) -> str:
        """See `Task.best_metric`."""
        ...

    def head(self, model_class: str) -> HeadSpec:
        """Returns the head specification for a model class."""
        ...

    def labels(self, examples: list[Example]) -> Tensor | list[Any] | None:
        """Returns the labels of a batch, or None for examples without labels."""
        ...

    def loss(self, outputs: Outputs, labels: Any) -> Tensor:
        """Returns the loss per example [B]."""
        ...

    def metrics(self) -> Sequence[Metric]:
        """Returns new metric accumulators."""
        ...

    def decode(self, outputs: Outputs, batch: Batch) -> list[dict[str, Any]]:
        """See `Task.decode`."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the constructor's arguments as JSON values."""
        ...


class SupervisedTask:
    """Task that combines inputs and a target; base class of built-in tasks and of most custom tasks.

    Inputs and targets that implement `hftl.data.validation.RowValidator` report invalid rows for `data.on_error skip`.

    The capabilities beyond training and evaluation are those that both the target (`info`, a `TargetInfo` of
    `hftl.tasks.capabilities`) and the inputs (`capabilities`) declare; a target without `info` has none.

    Attributes:
        name: Name of the task in configurations and saved models.
        model_class: Model class to build (`HeadSpec.model_class`).
        pipeline_tag: Task name on the Hub; empty for `name` with dashes.
        primary_metrics: Metrics listed first in logs, model cards and comparisons, in order; those of the target
            have precedence.
        defaults: Default settings of `train` by adaptation method (`full`, `frozen`, `lora`, `scratch`); they have
            precedence over the defaults of the modality.
        usage: Python code for the model card that loads the saved model without hftl, with `{place}` for its path or
            repo id; empty for a transformers pipeline.

    Args:
        inputs: Conversion of rows to model inputs.
        target: Labels, head, loss, metrics and predictions.

    Raises:
        DataError: All problems of inputs and target.
    """

    name: str
    model_class: str
    pipeline_tag: ClassVar[str] = ""
    primary_metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    defaults: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    usage: str = ""
    inputs_type: ClassVar[Any]
    """Class of the inputs, which `restored` needs."""
    target_types: ClassVar[tuple[type, ...]] = ()
    """Classes of supported targets."""

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
        """Tunes the target on validation if it implements `ThresholdTuning`."""
        if isinstance(self.target, ThresholdTuning):
            self.target.tune_thresholds(metrics)

    @property
    def column_types(self) -> Mapping[str, str]:
        """See `Inputs.column_types`."""
        return self.inputs.column_types

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns of `column_types` that may be missing at inference."""
        return tuple(getattr(self.inputs, "optional", ()))

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Capabilities of target and inputs beyond training and evaluation."""
        return supported(self.target, self.inputs)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the loss of a row depends on the other rows of its micro-batch on all processes."""
        return bool(getattr(self.target, "depends_on_batch", False))

    def invalid_rows(self, splits: Splits) -> InvalidRows:
        """Returns the rows that are invalid for inputs or target, for `data.on_error skip`."""
        return validate_rows(splits, [self.inputs, self.target])

    def state(self) -> dict[str, Any]:
        """See `Task.state`."""
        return {"inputs": self.inputs.state(), "target": self.target.state()}

    @classmethod
    def make_target(cls, state: dict[str, Any]) -> Target:
        """Returns the target from its `state()`, without data."""
        raise NotImplementedError(f"{cls.__name__}: make_target() is not implemented; loading saved models needs it")

    @classmethod
    def restored(cls, state: dict[str, Any]) -> SupervisedTask:
        """Returns the task from its `state()`, without data."""
        task = cls.__new__(cls)
        SupervisedTask.__init__(task, cls.inputs_type(**state["inputs"]), cls.make_target(state["target"]))
        return task


def primary_metrics(task: Task) -> tuple[str, ...]:
    """Returns the metrics listed first in logs and model cards."""
    return tuple(getattr(task, "primary_metrics", (task.best_metric,)))


def is_logged(name: str, task: Task) -> bool:
    """Whether a metric is logged during the run; the files of the run contain all metrics."""
    return name in ("loss", task.best_metric, *primary_metrics(task))


def input_column_types(task: Task) -> dict[str, str]:
    """Returns the types of the input columns of a task; see `Inputs.column_types`."""
    return dict(getattr(task, "column_types", {}))


def optional_columns(task: Task) -> tuple[str, ...]:
    """Returns the columns that may be missing at inference, if the model was trained with missing inputs."""
    return tuple(getattr(getattr(task, "inputs", None), "optional", ()))


def larger_is_better(task: Task, metric: str) -> bool:
    """Whether larger values of a metric are better: not for `loss` and metrics in `smaller_is_better`."""
    smaller = {name for accumulator in task.metrics() for name in getattr(accumulator, "smaller_is_better", ())}
    return metric != "loss" and metric not in smaller


def is_row_fraction(task: Task, metric: str) -> bool:
    """Whether a metric is a fraction of rows, whose standard error follows from the number of rows."""
    return any(metric in getattr(accumulator, "row_fractions", ()) for accumulator in task.metrics())


def check_splits(splits: Splits, check: Any) -> list[str]:
    """Returns the error messages of `check(dataset, split)` for all splits."""
    return [problem for split, dataset in splits.items() for problem in check(dataset, split)]
