"""Choice of the label target: single-label, multi-label or regression."""

from __future__ import annotations

from typing import Any

from hftl.config.schema import ProblemType
from hftl.data.columns import arrow_column, find_column
from hftl.data.label_columns import named_columns
from hftl.data.splits import Splits
from hftl.errors import DataError
from hftl.logging import log
from hftl.tasks.targets.multi_label import target as multi_label
from hftl.tasks.targets.multi_label.target import MultiLabelTarget
from hftl.tasks.targets.regression import target as regression
from hftl.tasks.targets.regression.target import RegressionTarget
from hftl.tasks.targets.single_label.target import SingleLabelTarget

LabelTarget = SingleLabelTarget | MultiLabelTarget | RegressionTarget
SINGLE = "single_label_classification"
TARGETS: dict[str, type[LabelTarget]] = {
    SINGLE: SingleLabelTarget,
    multi_label.PROBLEM: MultiLabelTarget,
    regression.PROBLEM: RegressionTarget,
}
_NAMES = {
    SINGLE: "single-label classification",
    multi_label.PROBLEM: "multi-label classification",
    regression.PROBLEM: "regression",
}
MAX_CLASS_VALUES = 20
"""Whole numbers with at most this many distinct values are classes."""
_MIN_ROWS_PER_CLASS = 2
"""Mean number of training rows per distinct whole number below which more values than that are regression targets."""


def find_target(splits: Splits) -> LabelTarget:
    """Returns the target that `data.problem_type` names, or that fits the labels, and logs the choice.

    Errors in the data are collected in the target's `problems`.
    """
    config = splits.config
    try:
        problem, reason = choose_problem(splits)
    except DataError as error:
        target = SingleLabelTarget("label", [], [])
        target.problems = error.problems
        return target
    log(f"data: {_NAMES[problem]} ({reason})")
    target = TARGETS[problem].find(splits)
    if problem == SINGLE and (config.label_columns or config.label_separator):
        target.problems.append(
            "data.problem_type: 'single_label_classification' takes one label column. Set data.label_column and remove "
            "data.label_columns and data.label_separator."
        )
    if problem == regression.PROBLEM and config.label_separator:
        target.problems.append("data.label_separator: does not apply to regression. Remove it.")
    if problem != SINGLE and config.max_train_samples_per_class is not None:
        target.problems.append(
            f"data.max_train_samples_per_class: applies to single-label classification, not to {_NAMES[problem]}. "
            "Remove it."
        )
    return target


def restore_target(state: dict[str, Any]) -> LabelTarget:
    """Returns a target from its `state()`."""
    return TARGETS[state.get("problem_type", SINGLE)](**state)


def choose_problem(splits: Splits) -> tuple[ProblemType, str]:
    """Returns the problem type under transformers' name, and the reason.

    Strings, booleans and named classes are single-label. Lists and separated strings are multi-label. Numbers with
    fractions are regression. Up to `MAX_CLASS_VALUES` distinct whole numbers are classes. More of them are classes
    only if labels.json names them, or if they count from 0 nearly without gaps with a few rows each. The reason of a
    choice between whole numbers includes the setting that overrides it.

    Raises:
        DataError: No label column fits, or several fit equally well.
    """
    config, train = splits.config, splits["train"]
    if config.label_columns and config.label_column:
        raise DataError("data.label_columns: conflicts with data.label_column. Set only one.")
    if config.problem_type != "auto":
        return config.problem_type, "data.problem_type"
    if config.label_columns:
        named_columns(train.features, config.label_columns)
        values = [set(arrow_column(train, name).unique().to_pylist()) for name in config.label_columns]
        if all(distinct - {None} <= {0, 1} for distinct in values):
            return "multi_label_classification", "data.label_columns hold zeros and ones"
        return "regression", "data.label_columns hold numbers"
    if config.label_separator:
        return "multi_label_classification", "data.label_separator"
    column = find_column("label", train.features, config.label_column).name
    feature = train.features[column]
    dtype = str(getattr(feature, "dtype", ""))
    if getattr(feature, "feature", None) is not None:
        return "multi_label_classification", f"column '{column}' holds lists"
    if type(feature).__name__ == "ClassLabel" or not ("int" in dtype or "float" in dtype):
        return SINGLE, f"column '{column}' holds {'named classes' if dtype == 'int64' else dtype or 'strings'}"
    return _numeric_problem(splits, column)


def _numeric_problem(splits: Splits, column: str) -> tuple[ProblemType, str]:
    """Returns the problem type of a numeric label column, and the reason."""
    distinct = [value for value in arrow_column(splits["train"], column).unique().to_pylist() if value is not None]
    whole = [int(value) for value in distinct if value - value == 0 and float(value).is_integer()]
    if any(value - value == 0 and not float(value).is_integer() for value in distinct):
        return "regression", f"column '{column}' holds numbers with fractions"
    count, rows = len(whole), len(splits["train"])
    fact = f"column '{column}' holds {count} distinct whole numbers"
    names = splits.class_names or []
    if whole and names and 0 <= min(whole) and max(whole) < len(names):
        return SINGLE, f"{fact} with names in labels.json"
    if count <= MAX_CLASS_VALUES:
        return SINGLE, f"{fact}; for quantities set --data.problem_type regression"
    dense = 0 <= min(whole) and max(whole) < 2 * count
    if dense and rows >= _MIN_ROWS_PER_CLASS * count:
        return SINGLE, f"{fact} from {min(whole)}; for quantities set --data.problem_type regression"
    gaps = "with gaps" if not dense else f"in {rows} rows"
    return "regression", f"{fact} {gaps}; for classes set --data.problem_type {SINGLE}"
