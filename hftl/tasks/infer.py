"""Which task of ours fits some data, where nobody has named one."""

from __future__ import annotations

from collections.abc import Callable

from hftl.console import muted
from hftl.data.columns import find_column, find_text_columns
from hftl.data.source import Splits
from hftl.errors import DataError
from hftl.tasks.image_classification import ImageClassification
from hftl.tasks.task import SupervisedTask
from hftl.tasks.text_classification import TextClassification


def infer_task(splits: Splits) -> Callable[[Splits], SupervisedTask]:
    """Returns the class of task whose inputs the columns of `splits` hold: images before texts.

    Raises:
        DataError: There is neither an image column nor a text column.
    """
    features, config = splits["train"].features, splits.config
    problems: list[str] = []
    with muted():
        try:
            find_column("image", features, config.image_column)
            return ImageClassification
        except DataError as error:
            problems += error.problems
        try:
            find_text_columns(features, config.text_column, config.text_pair_column)
            return TextClassification
        except DataError as error:
            problems += error.problems
    raise DataError(*problems)
