"""The commands `evaluate` and `predict`: a trained model on labelled rows or on new ones, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.config.schema import DataConfig
from hftl.console import muted, say
from hftl.data.source import IMAGES, TABLES, load_splits
from hftl.errors import DataError, nearest
from hftl.evaluation.evaluate import TableWriter
from hftl.predictor import load
from hftl.publishing.labelled import labelled_rows
from hftl.shown import shown
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_place(
    place: str,
    source: str | None = None,
    split: str = "test",
    batch_size: int = 32,
    output: str | None = None,
    revision: str | None = None,
) -> dict[str, float]:
    """Returns the metrics of a saved model on one split.

    Args:
        place: Run folder, its model/ folder, or a hub id.
        source: As `data.source`; the data that the run was trained on by default.
        split: `train`, `validation` or `test`.
        batch_size: Rows at a time, on each process.
        output: File for the predictions, by ending: .parquet, .csv or .jsonl.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ArtifactError: The model does not open.
        DataError: The data does not, or has labels that the model does not know.
    """
    _check_output(output)
    predictor = load(place, revision)
    rows = labelled_rows(predictor.task, predictor.data, source, split, predictor.left_out)
    with TableWriter(Path(output)) if output else nullcontext() as table:
        metrics = predictor.run(predictor.encode(rows), batch_size, table)
    return {f"{split}/{name}": value for name, value in metrics.items()}


def predict_to_table(
    place: str,
    given: str,
    pair: str | None = None,
    batch_size: int = 32,
    output: str | None = None,
    revision: str | None = None,
) -> None:
    """Applies a saved model to an image, a folder of images, a text, or a table, and writes a row for each.

    Args:
        place: Run folder, its model/ folder, or a hub id.
        given: A file, a folder, or the text itself.
        pair: The second text of a pair.
        batch_size: Rows at a time, on each process.
        output: File for the predictions (.parquet, .csv or .jsonl); the terminal by default.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ArtifactError: The model does not open.
        DataError: The input does not fit the model, or holds an image that cannot be decoded, which is named: a table
            with a row for each input has no place for one that was not looked at.
    """
    _check_output(output)
    predictor = load(place, revision)
    with muted():  # what is printed is the table
        rows, names = _rows_to_predict(predictor.task, given, pair)
        encoded = predictor.encode(rows)
    with TableWriter(Path(output)) if output else nullcontext(_Terminal()) as table:
        predictor.run(encoded, batch_size, _Named(table, names))
    if output:
        say(f"{len(rows)} predictions in {output}")


def _check_output(output: str | None) -> None:
    if output is None:
        return
    path, allowed = Path(output), (".parquet", ".csv", ".jsonl")
    if path.suffix not in allowed:
        raise DataError(f"--output: '{output}' must end in {', '.join(allowed)}.{nearest(path.suffix, allowed)}")
    if not path.parent.is_dir():
        raise DataError(f"--output: there is no folder '{path.parent}'.")


def _rows_to_predict(task: Task, given: str, pair: str | None) -> tuple[Dataset, Sequence[str] | None]:
    """Returns the rows, and a name for each where they have one (file names)."""
    from datasets import Dataset, Image

    inputs = task.state()["inputs"]
    path = Path(given)
    if task.modality == "image" and (path.is_dir() or path.suffix.lower() in IMAGES):
        if not path.exists():
            raise DataError(f"INPUT: there is no file '{given}'.{_sibling(path)}")
        files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [given]
        if not files:
            raise DataError(f"INPUT: no images in '{given}'.")
        return Dataset.from_dict({inputs["column"]: files}).cast_column(inputs["column"], Image()), files
    if path.suffix.lower() in TABLES and path.is_file():
        column = inputs["column"] if task.modality == "image" else None
        data = DataConfig(source=given, validation_fraction=0.0, image_column=column)
        rows = load_splits(data)["train"]  # one file is one split
        needed = inputs.get("columns") or [inputs["column"]]
        missing = [name for name in needed if name not in rows.features]
        if missing:
            raise DataError(
                f"INPUT: '{given}' lacks column(s) {', '.join(missing)}. Columns: {', '.join(rows.features)}."
            )
        return rows.select_columns(needed), None
    if task.modality == "image":
        state = "is not" if path.exists() else "does not exist; give"
        allowed = f"an image, a folder of images or a table ({', '.join(TABLES)})"
        raise DataError(f"INPUT: '{given}' {state} {allowed}.{_sibling(path)}")
    is_one_word = len(given.split()) == 1 and len(given) < 255
    if is_one_word and (path.suffix.lower() in TABLES or path.exists()):
        state = "is not a table" if path.exists() else "does not exist"
        raise DataError(f"INPUT: '{given}' {state}; give a text, or a table ({', '.join(TABLES)}).{_sibling(path)}")
    columns = inputs["columns"]
    texts = [given] if pair is None else [given, pair]
    if len(texts) != len(columns):
        wanted = "a pair of texts: INPUT and --pair" if len(columns) == 2 else "one text"
        raise DataError(f"INPUT: this model takes {wanted}.")
    return Dataset.from_dict({name: [text] for name, text in zip(columns, texts, strict=True)}), None


def _sibling(path: Path) -> str:
    """Returns a hint at a like name beside a path that does not exist."""
    missing = not path.exists() and path.parent.is_dir()
    return nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if missing else ""


class _Named:
    """Adds the name of each row, and leaves the long list of probabilities to files."""

    def __init__(self, writer: Any, names: Sequence[str] | None) -> None:
        self.writer, self.names = writer, names

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Passes rows on."""
        self.writer.write([{"input": self.names[row["row"]]} | row for row in rows] if self.names else rows)

    def close(self) -> None:
        """Finishes the table."""
        self.writer.close()


def _cell(value: Any) -> str:
    """Returns a value as one cell of a line, whatever its text would tell the terminal."""
    return shown(str(value)).replace("\t", " ").replace("\n", " ")


class _Terminal:
    """Prints rows as tab-separated columns."""

    def __init__(self) -> None:
        self.started = False

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Prints rows; the first ones with a header."""
        for row in rows:
            cells = {name: value for name, value in row.items() if not isinstance(value, list)}
            if not self.started:
                print("\t".join(cells))
                self.started = True
            print("\t".join(f"{value:.4f}" if isinstance(value, float) else _cell(value) for value in cells.values()))

    def close(self) -> None:
        """Nothing to finish."""
