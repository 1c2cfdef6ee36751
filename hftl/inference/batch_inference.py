"""Commands `evaluate` and `predict`: batch inference with a saved model, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.labeled_data import labeled_rows
from hftl.config.schema import DataConfig
from hftl.data.source import IMAGES, TABLES, load_splits
from hftl.errors import DataError, nearest
from hftl.evaluation.evaluate import TableWriter
from hftl.inference.predictor import load
from hftl.inference.zero_shot import LabelWriter, RankWriter, prompts, select_images
from hftl.launcher import require_group
from hftl.logging import log, suppress_logs
from hftl.redaction import sanitize
from hftl.tasks.task import Task, input_column_types, optional_columns

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_saved(
    path_or_repo_id: str,
    source: str | None = None,
    split: str = "test",
    batch_size: int = 32,
    output: str | None = None,
    revision: str | None = None,
) -> dict[str, float]:
    """Returns the metrics of a saved model on one split.

    Args:
        path_or_repo_id: Run folder, its model/ folder, or a repo id.
        source: Data source, like `data.source`; None uses the training data of the run.
        split: `train`, `validation` or `test`.
        batch_size: Rows per batch and process.
        output: File for the predictions: .parquet, .csv or .jsonl.
        revision: Branch, tag or commit of a repo id.

    Raises:
        ArtifactError: The model cannot be loaded.
        DataError: The data cannot be read, or contain labels that are unknown to the model.
    """
    require_group()
    _check_output(output)
    predictor = load(path_or_repo_id, revision)
    rows = labeled_rows(predictor.task, predictor.data, source, split, predictor.left_out)
    with TableWriter(Path(output)) if output else nullcontext() as table:
        metrics = predictor.run(predictor.encode(rows), batch_size, table)
    return {f"{split}/{name}": value for name, value in metrics.items()}


def predict_to_file(
    path_or_repo_id: str,
    inputs: str,
    pair: str | None = None,
    batch_size: int = 32,
    output: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    template: str | None = None,
    query: str | None = None,
) -> None:
    """Predicts an image, a folder of images, a text, or a table, and writes one row per input.

    Args:
        path_or_repo_id: Run folder, its model/ folder, or a repo id.
        inputs: A file, a folder, or the text itself.
        pair: The second text of a pair.
        batch_size: Rows per batch and process.
        output: File for the predictions (.parquet, .csv or .jsonl), or a folder for predictions.jsonl and predicted
            masks; None prints to the terminal.
        revision: Branch, tag or commit of a repo id.
        labels: Candidate labels of zero-shot classification, for image-text retrieval models.
        template: Prompt of each label; `{}` is replaced by the label.
        query: Text query, for image-text retrieval models: images are ranked by similarity to it.

    Raises:
        ArtifactError: The model cannot be loaded.
        DataError: The input does not match the model, or an image cannot be decoded. Rows are never skipped, as the
            output has one row per input.
    """
    require_group()
    is_folder = output is not None and not Path(output).suffix
    if not is_folder:
        _check_output(output)
    if labels and query or template and not labels:
        raise DataError("predict: --template needs --labels, and --labels conflicts with --query. Pass only one.")
    predictor = load(path_or_repo_id, revision)
    texts = None
    if labels is not None:
        texts = predictor.embed_texts(prompts(labels, template), labels)
    elif query is not None:
        texts = predictor.embed_texts([query], [query])
    with suppress_logs():  # standard output contains the table only
        rows, names = _rows_to_predict(predictor.task, inputs, pair)
        encoded = predictor.encode(rows if texts is None else select_images(predictor.task, rows))
    file = Path(output, "predictions.jsonl") if output and is_folder else output and Path(output)
    if file and is_folder:
        file.parent.mkdir(parents=True, exist_ok=True)
    with TableWriter(file) if file else nullcontext(_Terminal()) as table:
        writer: Any = _NameWriter(_ImageFileWriter(table, file.parent) if file and is_folder else table, names)
        if texts is not None:
            writer = LabelWriter(writer, texts) if query is None else RankWriter(writer, texts)
        predictor.run(encoded, batch_size, writer)
    if output:
        log(f"predict: wrote {len(rows)} predictions to {output}")


def _check_output(output: str | None) -> None:
    if output is None:
        return
    path, allowed = Path(output), (".parquet", ".csv", ".jsonl")
    if path.suffix not in allowed:
        raise DataError(
            f"--output: '{output}' has an invalid suffix; allowed: {', '.join(allowed)}.{nearest(path.suffix, allowed)}"
        )
    if not path.parent.is_dir():
        raise DataError(f"--output: folder '{path.parent}' does not exist.")


def _rows_to_predict(task: Task, inputs: str, pair: str | None) -> tuple[Dataset, Sequence[str] | None]:
    """Returns the rows to predict, and their file names if the input is an image or a folder of images."""
    from datasets import Dataset, Image

    types, optional = input_column_types(task), optional_columns(task)
    columns, required = list(types), {name for name in types if name not in optional}
    text_columns = [name for name, kind in types.items() if kind in ("text", "words")]
    image = next((name for name, kind in types.items() if kind == "image"), None)
    path, tables = Path(inputs), ", ".join(TABLES)
    if image and required <= {image} and (path.is_dir() or path.suffix.lower() in IMAGES):
        if not path.exists():
            raise DataError(f"INPUT: file '{inputs}' does not exist.{_suggestion(path)}")
        files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [inputs]
        if not files:
            raise DataError(f"INPUT: folder '{inputs}' contains no images.")
        return Dataset.from_dict({image: files}).cast_column(image, Image()), files
    if path.suffix.lower() in TABLES and path.is_file():
        data = DataConfig(source=inputs, validation_fraction=0.0, image_column=image)
        rows = load_splits(data)["train"]  # one file is one split
        missing = [name for name in columns if name not in rows.features and name not in optional]
        present = [name for name in columns if name in rows.features]
        if missing or not present:
            raise DataError(
                f"INPUT: '{inputs}' lacks column(s) {', '.join(missing or columns)}. "
                f"Columns: {', '.join(rows.features)}."
            )
        return rows.select_columns(present), None
    if columns != [image] and not (text_columns and required <= set(text_columns)):
        listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise DataError(
            f"INPUT: '{inputs}' is invalid. Pass a table ({tables}) with columns {listed}.{_suggestion(path)}"
        )
    if not text_columns:
        state = "is invalid" if path.exists() else "does not exist"
        raise DataError(
            f"INPUT: '{inputs}' {state}. Pass an image, a folder of images or a table ({tables}).{_suggestion(path)}"
        )
    is_one_word = len(inputs.split()) == 1 and len(inputs) < 255
    if is_one_word and (path.suffix.lower() in TABLES or path.exists()):
        state = "is not a table" if path.exists() else "does not exist"
        raise DataError(f"INPUT: '{inputs}' {state}. Pass a text or a table ({tables}).{_suggestion(path)}")
    texts = [inputs] if pair is None else [inputs, pair]
    if len(texts) > len(text_columns) or not required <= set(text_columns[: len(texts)]):
        expected = "a pair of texts: INPUT and --pair" if len(text_columns) == 2 else "one text"
        raise DataError(f"INPUT: this model takes {expected}.")
    return Dataset.from_dict({name: [text] for name, text in zip(text_columns, texts, strict=False)}), None


def _suggestion(path: Path) -> str:
    """Returns " Did you mean 'x'?" with a similar file name in the same folder, or an empty string."""
    missing = not path.exists() and path.parent.is_dir()
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if missing else ""


class _NameWriter:
    """Writer that adds a column with the file name of each row."""

    def __init__(self, writer: Any, names: Sequence[str] | None) -> None:
        self.writer, self.names = writer, names

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Adds `input` to each row if there are names, and writes the rows."""
        self.writer.write([{"input": self.names[row["row"]]} | row for row in rows] if self.names else rows)

    def close(self) -> None:
        """Closes the underlying writer."""
        self.writer.close()


class _ImageFileWriter:
    """Writer that saves base64 images in rows (`…_png`) as files and replaces them with the file names."""

    def __init__(self, writer: Any, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self.used_stems: set[str] = set()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Saves the images, and writes the rows with file names."""
        from base64 import b64decode

        out = []
        for row in rows:
            row, stem = dict(row), Path(row.get("input", f"{row['row']:06d}")).stem
            stem = f"{stem}-{row['row']}" if stem in self.used_stems else stem  # same file name in two folders
            self.used_stems.add(stem)
            for name in [name for name in row if name.endswith("_png")]:
                file = self.folder / f"{stem}.{name.removesuffix('_png')}.png"  # differs from every input name
                file.write_bytes(b64decode(row[name]))
                row[name] = file.name
            out.append(row)
        self.writer.write(out)

    def close(self) -> None:
        """Closes the underlying writer."""
        self.writer.close()


def _cell(value: Any) -> str:
    """Returns a value as one cell, without tabs, line breaks or terminal escape sequences."""
    return sanitize(str(value)).replace("\t", " ").replace("\n", " ")


def _join(value: Any) -> Any:
    """Returns a list of strings, floats or records (boxes, entities) as one string, other values unchanged."""
    if not isinstance(value, list) or not all(isinstance(item, (str, float, dict)) for item in value):
        return value
    texts = [" ".join(map(_format, item.values())) if isinstance(item, dict) else _format(item) for item in value]
    return ", ".join(texts) or "none"


def _format(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class _Terminal:
    """Writer that prints rows as tab-separated columns, without probabilities and images."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Prints rows; the first row defines the columns and the header."""
        for row in rows:
            cells = {name: _join(value) for name, value in row.items()}
            if not self.columns:
                scalars = [name for name, value in cells.items() if not isinstance(value, list)]
                self.columns = [name for name in scalars if name != "probabilities" and not name.endswith("_png")]
                print("\t".join(self.columns))
            print("\t".join(_cell(_format(cells.get(name, ""))) for name in self.columns))

    def close(self) -> None:
        """Does nothing; rows are printed immediately."""
