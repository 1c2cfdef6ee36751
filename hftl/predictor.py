"""load(): a trained model from a run folder or the hub, ready for new rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig, RunConfig, TrainConfig
from hftl.console import muted
from hftl.data.loader import Rows
from hftl.errors import DataError, nearest, shorten
from hftl.evaluation.evaluate import evaluate_rows
from hftl.models.parts import TaskModel
from hftl.publishing.artifact import load_artifact
from hftl.publishing.place import artifact_folder, find, rows_left_out, trained_data
from hftl.tasks.task import Task

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
    with muted():
        model, task = load_artifact(folder)
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
        inputs = self.task.state()["inputs"]
        return list(inputs.get("columns") or [inputs["column"]])

    def predict(self, inputs: Any, batch_size: int = 32) -> list[dict[str, Any]]:
        """Returns one readable row for each input, in order: for a classifier prediction, confidence, probabilities.

        Args:
            inputs: A list of images (PIL, paths or arrays), of texts, of pairs of texts, or of rows (mappings by
                column); or a `datasets.Dataset`. One input alone counts as a list of one.
            batch_size: Inputs at a time.

        Raises:
            DataError: The inputs do not fit the model, or an image cannot be decoded; its position and path are named.
        """
        rows = self._dataset(inputs)
        found = _Collected()
        if len(rows):
            with muted():
                encoded = self.encode(rows)
            self.run(encoded, batch_size, found)
        return [{name: value for name, value in row.items() if name not in ("row", "label")} for row in found.rows]

    def encode(self, rows: Dataset) -> Rows:
        """Returns rows as the model's examples, preprocessed as for evaluation."""
        return self.task.encode(rows, self.model.processor, None, self.data.max_length)

    def run(self, rows: Rows, batch_size: int, writer: Any = None) -> dict[str, float]:
        """Applies the model to encoded rows, shared out over the processes of a launcher where there are several.

        Args:
            rows: From `encode`.
            batch_size: Rows at a time, on each process.
            writer: Takes the predictions in order, on the main process: `write(list of rows)`, then `close()`.

        Returns:
            The metrics, where rows have labels.
        """
        from accelerate import Accelerator

        accelerator = Accelerator()
        mine = writer if accelerator.is_main_process else None
        run = RunConfig(data=self.data, train=TrainConfig(batch_size_per_device=batch_size))
        with muted():
            metrics = evaluate_rows(accelerator, self.model, self.task, rows, run, mine, collect=writer is not None)
        if mine is not None:
            mine.close()
        return metrics

    def _dataset(self, inputs: Any) -> Dataset:
        from datasets import Dataset, Features, Image

        if isinstance(inputs, Dataset):
            return inputs.select_columns(self._known(inputs.column_names))
        if isinstance(inputs, (str, Path, Mapping)) or not isinstance(inputs, Sequence):
            inputs = [inputs]
        columns = self.columns
        if inputs and isinstance(inputs[0], Mapping):
            self._known(list(inputs[0]))
            table = {name: [row[name] for row in inputs] for name in columns}
        elif len(columns) == 1:
            table = {columns[0]: list(inputs)}
        elif all(isinstance(row, (tuple, list)) and len(row) == len(columns) for row in inputs):
            table = {name: [row[position] for row in inputs] for position, name in enumerate(columns)}
        else:
            raise DataError(f"predict: this model takes {len(columns)} texts a row ({', '.join(columns)}), as tuples.")
        if self.task.modality != "image":
            strange = [type(text).__name__ for texts in table.values() for text in texts if not isinstance(text, str)]
            if strange:
                wanted = "a text" if len(columns) == 1 else f"a tuple of {len(columns)} texts"
                raise DataError(f"predict: this model takes {wanted} a row, not {strange[0]}.")
            return Dataset.from_dict(table)
        images = [str(image) if isinstance(image, Path) else image for image in table[columns[0]]]
        missing = [image for image in images if isinstance(image, str) and not Path(image).is_file()]
        if missing:
            raise DataError(f"predict: there is no file {shorten(missing, 4)}.")
        return Dataset.from_dict({columns[0]: images}, features=Features({columns[0]: Image()}))

    def _known(self, names: Sequence[str]) -> list[str]:
        missing = [name for name in self.columns if name not in names]
        if missing:
            raise DataError(
                f"predict: rows lack the column(s) {', '.join(missing)}; they have {', '.join(names)}."
                f"{nearest(missing[0], names)}"
            )
        return self.columns


class _Collected:
    """Keeps rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def close(self) -> None:
        pass
