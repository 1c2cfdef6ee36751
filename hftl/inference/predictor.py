"""Inference with a saved model from a run folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.locate import artifact_folder, locate_model, quarantined_rows, training_data_config
from hftl.artifacts.save_model import load_model_and_task
from hftl.config.schema import DataConfig, RunConfig, TrainConfig
from hftl.data.paths import IMAGES
from hftl.errors import DataError, nearest, shorten
from hftl.evaluation.evaluate import evaluate_rows
from hftl.inference.zero_shot import LabelWriter, TextEmbeddings, embed_texts, prompts, select_images
from hftl.launcher import build_accelerator
from hftl.loading.loader import Examples
from hftl.logging import suppress_logs
from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task, input_column_types, optional_columns

if TYPE_CHECKING:
    from datasets import Dataset


def load(path_or_repo_id: str | Path, revision: str | None = None, subfolder: str = "") -> Predictor:
    """Loads a saved model with its preprocessing and labels.

    Args:
        path_or_repo_id: Run folder, its `model/` or `adapter/` folder, or the repo id of a model pushed by hftl.
        revision: Branch, tag or commit on the Hub.
        subfolder: Subfolder of the repository; `adapter` loads the adapter on its recorded base model.

    Returns:
        The predictor; the model is in eval mode.

    Raises:
        ArtifactError: The model does not exist or is incomplete, or its base model cannot be loaded.
    """
    folder = artifact_folder(locate_model(path_or_repo_id, revision, subfolder))
    with suppress_logs():
        model, task = load_model_and_task(folder)
    return Predictor(model, task, training_data_config(folder), quarantined_rows(folder))


class Predictor:
    """Saved model with its task, for predictions on new rows.

    Attributes:
        model: Model in eval mode.
        task: Task that encodes rows and decodes model outputs.
        data: Data section of the training run.
        left_out: Rows quarantined by the training run, by split and row number.
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
        """Label names, in the order of the model outputs."""
        return list(self.task.head.labels)

    @property
    def columns(self) -> list[str]:
        """Input columns."""
        return list(input_column_types(self.task))

    def predict(
        self, inputs: Any, batch_size: int = 32, labels: Sequence[str] | None = None, template: str | None = None
    ) -> list[dict[str, Any]]:
        """Returns one prediction per input, in order; of classifiers: prediction, confidence and probabilities.

        Args:
            inputs: A list of images (PIL, paths or arrays), of texts, of tuples (for several input columns), or of
                mappings by column; or a `datasets.Dataset`. A single input is treated as a list of one. If the other
                columns are optional, a list of values of one column.
            batch_size: Inputs per batch.
            labels: Candidate labels of zero-shot classification, for image-text retrieval models.
            template: Prompt of each label, such as `a photo of a {}`.

        Returns:
            A dict per input.

        Raises:
            DataError: The inputs do not match the model, or an image cannot be decoded; the message contains its
                position and path.
        """
        rows = self._to_dataset(inputs)
        collected = _ListWriter()
        writer: Any = collected
        if labels is not None:
            writer = LabelWriter(collected, self.embed_texts(prompts(labels, template), labels))
        if len(rows):
            with suppress_logs():
                encoded = self.encode(rows if labels is None else select_images(self.task, rows))
            self.run(encoded, batch_size, writer)
        return [{name: value for name, value in row.items() if name not in ("row", "label")} for row in collected.rows]

    def embed_texts(self, texts: Sequence[str], names: Sequence[str]) -> TextEmbeddings:
        """Returns text embeddings in the joint image-text space; see `hftl.inference.zero_shot.embed_texts`."""
        with suppress_logs():
            return embed_texts(self.model.eval(), self.task, texts, names, self.data.max_length)

    def encode(self, rows: Dataset) -> Examples:
        """Returns rows as model examples, with evaluation preprocessing."""
        return self.task.encode(rows, self.model.processor, None, self.data.max_length)

    def run(self, rows: Examples, batch_size: int, writer: Any = None) -> dict[str, float]:
        """Runs the model on encoded rows, distributed over the processes of the launcher.

        Args:
            rows: Encoded rows, from `encode`.
            batch_size: Rows per batch and process.
            writer: Receives the predictions in order, on the main process: `write(list of rows)`, then `close()`.

        Returns:
            The metrics by name; empty for rows without labels.
        """
        accelerator = build_accelerator()
        main_writer = writer if accelerator.is_main_process else None
        run = RunConfig(data=self.data, train=TrainConfig(batch_size_per_device=batch_size))
        with suppress_logs():
            metrics = evaluate_rows(
                accelerator, self.model, self.task, rows, run, main_writer, collect=writer is not None
            )
        if main_writer is not None:
            main_writer.close()
        return metrics

    def _to_dataset(self, inputs: Any) -> Dataset:
        """Returns inputs of any accepted form as a `datasets.Dataset` with the input columns."""
        from datasets import Dataset, Image

        if isinstance(inputs, Dataset):
            return inputs.select_columns(self._present_columns(inputs.column_names))
        if isinstance(inputs, (str, Path, Mapping)) or not isinstance(inputs, Sequence):
            inputs = [inputs]
        columns = self.columns
        if inputs and isinstance(inputs[0], Mapping):
            self._present_columns(list(inputs[0]))
            table = {name: [row.get(name) for row in inputs] for name in columns}
        elif column := self._single_column(inputs):
            table = {column: list(inputs)}
        elif all(isinstance(row, (tuple, list)) and len(row) == len(columns) for row in inputs):
            table = {name: [row[position] for row in inputs] for position, name in enumerate(columns)}
        else:
            raise DataError(f"predict: this model takes {self._expected()} per row ({', '.join(columns)}).")
        types = {name: kind for name, kind in input_column_types(self.task).items() if name in table}
        for name, kind in types.items():
            if kind == "image":
                table[name] = _image_paths_as_text(table[name])
            elif kind == "text":
                allows_none = name in optional_columns(self.task)
                invalid = [
                    type(text).__name__
                    for text in table[name]
                    if not isinstance(text, str) and not (allows_none and text is None)
                ]
                if invalid:
                    raise DataError(f"predict: this model takes {self._expected()} per row, not {invalid[0]}.")
        rows = Dataset.from_dict(table)
        for name, kind in types.items():
            rows = rows.cast_column(name, Image()) if kind == "image" else rows
        return rows

    def _single_column(self, inputs: Sequence[Any]) -> str | None:
        """Returns the column of inputs that are not tuples; None if further columns are required or it is ambiguous."""
        types, optional = input_column_types(self.task), optional_columns(self.task)
        if len(types) == 1:
            return next(iter(types))
        if any(isinstance(value, (tuple, list)) for value in inputs):
            return None
        has_images = "image" in types.values()
        is_text = [
            isinstance(value, str) and not (has_images and Path(value).suffix.lower() in IMAGES) for value in inputs
        ]
        input_type = "text" if all(is_text) else "image" if not any(is_text) else None
        column = next((name for name, kind in types.items() if kind == input_type), None)
        return column if all(name in optional for name in types if name != column) else None

    def _expected(self) -> str:
        """Returns a description of one row of inputs, for messages."""
        types = list(input_column_types(self.task).values())
        if len(types) == 1:
            return {"image": "an image", "words": "a list of words"}.get(types[0], f"a {types[0]}")
        return f"a tuple of {len(types)} texts" if set(types) == {"text"} else f"a tuple of {', '.join(types)}"

    def _present_columns(self, names: Sequence[str]) -> list[str]:
        """Returns the input columns among `names`.

        Raises:
            DataError: A required column is missing.
        """
        optional = optional_columns(self.task)
        missing = [name for name in self.columns if name not in names and name not in optional]
        if not missing and optional and not set(names) & set(self.columns):
            missing = self.columns
        if missing:
            raise DataError(
                f"predict: rows lack the column(s) {', '.join(missing)}. Columns: {', '.join(names)}."
                f"{nearest(missing[0], names)}"
            )
        return [name for name in self.columns if name in names]


def _image_paths_as_text(images: Sequence[Any]) -> list[Any]:
    """Returns images with paths converted to strings, as expected by `datasets.Image`.

    Raises:
        DataError: A file does not exist.
    """
    images = [str(image) if isinstance(image, Path) else image for image in images]
    missing = [image for image in images if isinstance(image, str) and not Path(image).is_file()]
    if missing:
        raise DataError(f"predict: file(s) {shorten(missing, 4)} do not exist.")
    return images


class _ListWriter:
    """Writer that collects rows in a list."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows

    def close(self) -> None:
        pass
