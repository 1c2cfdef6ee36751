"""load(): a trained model from a run folder or the hub, ready for new rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.locate import artifact_folder, find, rows_left_out, trained_data
from hftl.artifacts.save_model import load_model_and_task
from hftl.config.schema import DataConfig, RunConfig, TrainConfig
from hftl.data.paths import IMAGES
from hftl.errors import DataError, nearest, shorten
from hftl.evaluation.evaluate import evaluate_rows
from hftl.inference.zero_shot import Labelled, Texts, embed_texts, images_alone, prompts
from hftl.launcher import build_accelerator
from hftl.loading.loader import Examples
from hftl.logging import suppress_logs
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task, input_column_types, optional_columns

if TYPE_CHECKING:
    from datasets import Dataset


def load(place: str | Path, revision: str | None = None, subfolder: str = "") -> Predictor:
    """Returns a trained model with its preprocessing and labels.

    Args:
        place: Run folder, `model/` or `adapter/` folder of one, or the hub id of a model that hftl pushed.
        revision: Branch, tag or commit on the hub.
        subfolder: Folder inside the hub repository: `adapter` opens the adapter on its recorded base model.

    Raises:
        ArtifactError: There is no such model, or it is incomplete, or its base model does not open.
    """
    folder = artifact_folder(find(place, revision, subfolder))
    with suppress_logs():
        model, task = load_model_and_task(folder)
    return Predictor(model, task, trained_data(folder), rows_left_out(folder))


class Predictor:
    """A trained model, ready for new rows.

    Attributes:
        model: In eval mode.
        task: How rows become inputs, and outputs readable rows.
        data: The data section of the run that trained it.
        left_out: The rows of those data that the run could not use, by split and number.
    """

    def __init__(
        self, model: TaskModel, task: Task, data: DataConfig, left_out: Mapping[str, Mapping[int, Any]] | None = None
    ) -> None:
        self.model = model
        self.task = task
        self.data = data
        self.left_out = left_out or {}

    @property
    def labels(self) -> list[str]:
        """Names of the outputs, in order."""
        return list(self.task.head.labels)

    @property
    def columns(self) -> list[str]:
        """The columns that rows are read from."""
        return list(input_column_types(self.task))

    def predict(
        self, inputs: Any, batch_size: int = 32, labels: Sequence[str] | None = None, template: str | None = None
    ) -> list[dict[str, Any]]:
        """Returns one readable row for each input, in order: for a classifier prediction, confidence, probabilities.

        Args:
            inputs: A list of images (PIL, paths or arrays), of texts, of tuples where the model takes several columns,
                or of rows (mappings by column); or a `datasets.Dataset`. One input alone counts as a list of one.
                Where the model can do without the others, one column's inputs alone.
            batch_size: Inputs at a time.
            labels: For a model that compares images with texts: labels in words, of which each image gets one.
            template: Such as `a photo of a {}`: the text for each label.

        Raises:
            DataError: The inputs do not fit the model, or an image cannot be decoded; its position and path are named.
        """
        rows = self._dataset(inputs)
        found = _Collected()
        writer = found if labels is None else Labelled(found, self.texts(prompts(labels, template), labels))
        if len(rows):
            with suppress_logs():
                encoded = self.encode(rows if labels is None else images_alone(self.task, rows))
            self.run(encoded, batch_size, writer)
        return [{name: value for name, value in row.items() if name not in ("row", "label")} for row in found.rows]

    def texts(self, texts: Sequence[str], names: Sequence[str]) -> Texts:
        """Returns texts in the space that the model has for images and texts; see `hftl.inference.zero_shot`."""
        with suppress_logs():
            return embed_texts(self.model.eval(), self.task, texts, names, self.data.max_length)

    def encode(self, rows: Dataset) -> Examples:
        """Returns rows as the model's examples, preprocessed as for evaluation."""
        return self.task.encode(rows, self.model.processor, None, self.data.max_length)

    def run(self, rows: Examples, batch_size: int, writer: Any = None) -> dict[str, float]:
        """Applies the model to encoded rows, shared out over the processes of a launcher where there are several.

        Args:
            rows: From `encode`.
            batch_size: Rows at a time, on each process.
            writer: Takes the predictions in order, on the main process: `write(list of rows)`, then `close()`.

        Returns:
            The metrics, where rows have labels.
        """
        accelerator = build_accelerator()
        mine = writer if accelerator.is_main_process else None
        run = RunConfig(data=self.data, train=TrainConfig(batch_size_per_device=batch_size))
        with suppress_logs():
            metrics = evaluate_rows(accelerator, self.model, self.task, rows, run, mine, collect=writer is not None)
        if mine is not None:
            mine.close()
        return metrics

    def _dataset(self, inputs: Any) -> Dataset:
        from datasets import Dataset, Image

        if isinstance(inputs, Dataset):
            return inputs.select_columns(self._known(inputs.column_names))
        if isinstance(inputs, (str, Path, Mapping)) or not isinstance(inputs, Sequence):
            inputs = [inputs]
        columns = self.columns
        if inputs and isinstance(inputs[0], Mapping):
            self._known(list(inputs[0]))
            table = {name: [row.get(name) for row in inputs] for name in columns}
        elif alone := self._alone(inputs):
            table = {alone: list(inputs)}
        elif all(isinstance(row, (tuple, list)) and len(row) == len(columns) for row in inputs):
            table = {name: [row[position] for row in inputs] for position, name in enumerate(columns)}
        else:
            raise DataError(f"predict: this model takes {self._wanted()} a row ({', '.join(columns)}).")
        kinds = {name: kind for name, kind in input_column_types(self.task).items() if name in table}
        for name, kind in kinds.items():
            if kind == "image":
                table[name] = _images(table[name])
            elif kind == "text":
                may_lack = name in optional_columns(self.task)
                strange = [
                    type(text).__name__
                    for text in table[name]
                    if not isinstance(text, str) and not (may_lack and text is None)
                ]
                if strange:
                    raise DataError(f"predict: this model takes {self._wanted()} a row, not {strange[0]}.")
        rows = Dataset.from_dict(table)
        for name, kind in kinds.items():
            rows = rows.cast_column(name, Image()) if kind == "image" else rows
        return rows

    def _alone(self, inputs: Sequence[Any]) -> str | None:
        """Returns the column that inputs belong to which are no tuples, where the model can do without the others."""
        kinds, optional = input_column_types(self.task), optional_columns(self.task)
        if len(kinds) == 1:
            return next(iter(kinds))
        if any(isinstance(value, (tuple, list)) for value in inputs):
            return None
        files = "image" in kinds.values()
        texts = [isinstance(value, str) and not (files and Path(value).suffix.lower() in IMAGES) for value in inputs]
        kind = "text" if all(texts) else "image" if not any(texts) else None
        column = next((name for name, of in kinds.items() if of == kind), None)
        return column if all(name in optional for name in kinds if name != column) else None

    def _wanted(self) -> str:
        """Returns what a row of inputs is, in words."""
        kinds = list(input_column_types(self.task).values())
        if len(kinds) == 1:
            return {"image": "an image", "words": "a list of words"}.get(kinds[0], f"a {kinds[0]}")
        return f"a tuple of {len(kinds)} texts" if set(kinds) == {"text"} else f"a tuple of {', '.join(kinds)}"

    def _known(self, names: Sequence[str]) -> list[str]:
        optional = optional_columns(self.task)
        missing = [name for name in self.columns if name not in names and name not in optional]
        if not missing and optional and not set(names) & set(self.columns):
            missing = self.columns
        if missing:
            raise DataError(
                f"predict: rows lack the column(s) {', '.join(missing)}; they have {', '.join(names)}."
                f"{nearest(missing[0], names)}"
            )
        return [name for name in self.columns if name in names]


def _images(given: Sequence[Any]) -> list[Any]:
    """Returns images with paths as text, for `datasets.Image`.

    Raises:
        DataError: A path leads to no file.
    """
    images = [str(image) if isinstance(image, Path) else image for image in given]
    missing = [image for image in images if isinstance(image, str) and not Path(image).is_file()]
    if missing:
        raise DataError(f"predict: there is no file {shorten(missing, 4)}.")
    return images


class _Collected:
    """Keeps rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def close(self) -> None:
        pass
