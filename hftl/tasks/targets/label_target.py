"""What is learnt from the labels of a row: one class, any number of labels, or numbers; chosen in one place."""

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
_WORDS = {SINGLE: "one class a row", multi_label.PROBLEM: "any number of labels a row", regression.PROBLEM: "numbers"}
FEW_VALUES = 20
"""So many different whole numbers, or fewer, are taken for classes."""
_ROWS_EACH = 2
"""Training rows for each different number, on average, below which many whole numbers are no classes."""


def find_target(splits: Splits) -> LabelTarget:
    """Returns what `data.problem_type` names, or what the labels look like, and says which and why.

    What is wrong with the data goes into the target's `problems`.
    """
    config = splits.config
    try:
        problem, why = choose_problem(splits)
    except DataError as error:
        found = SingleLabelTarget("label", [], [])
        found.problems = error.problems
        return found
    log(f"data: {_WORDS[problem]} ({why})")
    found = TARGETS[problem].find(splits)
    if problem == SINGLE and (config.label_columns or config.label_separator):
        found.problems.append(
            "data.problem_type: one class a row stands in one column; name it with data.label_column, and leave out "
            "data.label_columns and data.label_separator."
        )
    if problem == regression.PROBLEM and config.label_separator:
        found.problems.append("data.label_separator: numbers are not separated; leave it out.")
    if problem != SINGLE and config.max_train_samples_per_class is not None:
        found.problems.append(f"data.max_train_samples_per_class: is for one class a row, not for {_WORDS[problem]}.")
    return found


def restore_target(state: dict[str, Any]) -> LabelTarget:
    """Returns a target from its `state()`."""
    return TARGETS[state.get("problem_type", SINGLE)](**state)


def choose_problem(splits: Splits) -> tuple[ProblemType, str]:
    """Returns what the labels are, by transformers' name, and the reason.

    Texts, truth values and named classes are classes; lists and separated texts any number of labels; numbers with
    fractions a regression. Whole numbers may be either: up to `FEW_VALUES` different ones are classes, more of them
    only where they are named in labels.json, or count from 0 nearly without gaps with a few rows each. That guess is
    said, with the setting that decides it.

    Raises:
        DataError: There is no label column, or there are several.
    """
    config, train = splits.config, splits["train"]
    if config.label_columns and config.label_column:
        raise DataError("data.label_columns: names labels as data.label_column does; say one of them.")
    if config.problem_type != "auto":
        return config.problem_type, "data.problem_type"
    if config.label_columns:
        named_columns(train.features, config.label_columns)
        values = [set(arrow_column(train, name).unique().to_pylist()) for name in config.label_columns]
        if all(seen - {None} <= {0, 1} for seen in values):
            return "multi_label_classification", "data.label_columns hold zeros and ones"
        return "regression", "data.label_columns hold numbers"
    if config.label_separator:
        return "multi_label_classification", "data.label_separator"
    column = find_column("label", train.features, config.label_column).name
    feature = train.features[column]
    kind = str(getattr(feature, "dtype", ""))
    if getattr(feature, "feature", None) is not None:
        return "multi_label_classification", f"column '{column}' holds lists"
    if type(feature).__name__ == "ClassLabel" or not ("int" in kind or "float" in kind):
        return SINGLE, f"column '{column}' holds {'named classes' if kind == 'int64' else kind or 'texts'}"
    return _of_numbers(splits, column)


def _of_numbers(splits: Splits, column: str) -> tuple[ProblemType, str]:
    seen = [value for value in arrow_column(splits["train"], column).unique().to_pylist() if value is not None]
    whole = [int(value) for value in seen if value - value == 0 and float(value).is_integer()]
    if any(value - value == 0 and not float(value).is_integer() for value in seen):
        return "regression", f"column '{column}' holds numbers with fractions"
    count, rows = len(whole), len(splits["train"])
    about = f"column '{column}' holds {count} different whole numbers"
    names = splits.class_names or []
    if whole and names and 0 <= min(whole) and max(whole) < len(names):
        return SINGLE, f"{about}, which labels.json names"
    if count <= FEW_VALUES:
        return SINGLE, f"{about}; where they are amounts, say --data.problem_type regression"
    dense = 0 <= min(whole) and max(whole) < 2 * count
    if dense and rows >= _ROWS_EACH * count:
        return (
            SINGLE,
            f"{about} that count from {min(whole)}; where they are amounts, say --data.problem_type regression",
        )
    gaps = "with gaps" if not dense else f"on {rows} rows"
    return "regression", f"{about} {gaps}; where they are classes, say --data.problem_type {SINGLE}"
