"""The commands `evaluate` and `predict`: a trained model on labelled rows or on new ones, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hftl.artifacts.labeled_data import labelled_rows
from hftl.config.schema import DataConfig
from hftl.data.source import IMAGES, TABLES, load_splits
from hftl.errors import DataError, nearest
from hftl.evaluation.evaluate import TableWriter
from hftl.inference.predictor import load
from hftl.inference.zero_shot import Labelled, Ranked, images_alone, prompts
from hftl.launcher import require_group
from hftl.logging import log, suppress_logs
from hftl.redaction import sanitize
from hftl.tasks.task import Task, input_column_types, optional_columns

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_saved(
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
    require_group()
    _check_output(output)
    predictor = load(place, revision)
    rows = labelled_rows(predictor.task, predictor.data, source, split, predictor.left_out)
    with TableWriter(Path(output)) if output else nullcontext() as table:
        metrics = predictor.run(predictor.encode(rows), batch_size, table)
    return {f"{split}/{name}": value for name, value in metrics.items()}


def predict_to_file(
    place: str,
    given: str,
    pair: str | None = None,
    batch_size: int = 32,
    output: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    template: str | None = None,
    query: str | None = None,
) -> None:
    """Applies a saved model to an image, a folder of images, a text, or a table, and writes a row for each.

    Args:
        place: Run folder, its model/ folder, or a hub id.
        given: A file, a folder, or the text itself.
        pair: The second text of a pair.
        batch_size: Rows at a time, on each process.
        output: File for the predictions (.parquet, .csv or .jsonl), or a folder for them and for the pictures that the
            model makes (masks); the terminal by default.
        revision: Branch, tag or commit of a hub id.
        labels: For a model that compares images with texts: labels in words, of which each image gets one.
        template: The text for each label, with `{}` where it goes.
        query: Likewise one text: images are listed by how near they are to it.

    Raises:
        ArtifactError: The model does not open.
        DataError: The input does not fit the model, or holds an image that cannot be decoded, which is named: a table
            with a row for each input has no place for one that was not looked at.
    """
    require_group()
    in_folder = output is not None and not Path(output).suffix
    if not in_folder:
        _check_output(output)
    if labels and query or template and not labels:
        raise DataError("predict: give --labels (with a --template where there is one) or --query, not both.")
    predictor = load(place, revision)
    texts = None
    if labels is not None:
        texts = predictor.texts(prompts(labels, template), labels)
    elif query is not None:
        texts = predictor.texts([query], [query])
    with suppress_logs():  # what is printed is the table
        rows, names = _rows_to_predict(predictor.task, given, pair)
        encoded = predictor.encode(rows if texts is None else images_alone(predictor.task, rows))
    file = Path(output, "predictions.jsonl") if output and in_folder else output and Path(output)
    if file and in_folder:
        file.parent.mkdir(parents=True, exist_ok=True)
    with TableWriter(file) if file else nullcontext(_Terminal()) as table:
        writer: Any = _Named(_Pictures(table, file.parent) if file and in_folder else table, names)
        if texts is not None:
            writer = Labelled(writer, texts) if query is None else Ranked(writer, texts)
        predictor.run(encoded, batch_size, writer)
    if output:
        log(f"{len(rows)} predictions in {output}")


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

    kinds, optional = input_column_types(task), optional_columns(task)
    needed, required = list(kinds), {name for name in kinds if name not in optional}
    columns = [name for name, kind in kinds.items() if kind in ("text", "words")]
    image = next((name for name, kind in kinds.items() if kind == "image"), None)
    path = Path(given)
    if image and required <= {image} and (path.is_dir() or path.suffix.lower() in IMAGES):
        if not path.exists():
            raise DataError(f"INPUT: there is no file '{given}'.{_sibling(path)}")
        files = sorted(str(f) for f in path.rglob("*") if f.suffix.lower() in IMAGES) if path.is_dir() else [given]
        if not files:
            raise DataError(f"INPUT: no images in '{given}'.")
        return Dataset.from_dict({image: files}).cast_column(image, Image()), files
    if path.suffix.lower() in TABLES and path.is_file():
        data = DataConfig(source=given, validation_fraction=0.0, image_column=image)
        rows = load_splits(data)["train"]  # one file is one split
        missing = [name for name in needed if name not in rows.features and name not in optional]
        there = [name for name in needed if name in rows.features]
        if missing or not there:
            raise DataError(
                f"INPUT: '{given}' lacks column(s) {', '.join(missing or needed)}. Columns: {', '.join(rows.features)}."
            )
        return rows.select_columns(there), None
    if needed != [image] and not (columns and required <= set(columns)):
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(f"INPUT: give a table ({', '.join(TABLES)}) with the columns {listed}.{_sibling(path)}")
    if not columns:
        state = "is not" if path.exists() else "does not exist; give"
        allowed = f"an image, a folder of images or a table ({', '.join(TABLES)})"
        raise DataError(f"INPUT: '{given}' {state} {allowed}.{_sibling(path)}")
    is_one_word = len(given.split()) == 1 and len(given) < 255
    if is_one_word and (path.suffix.lower() in TABLES or path.exists()):
        state = "is not a table" if path.exists() else "does not exist"
        raise DataError(f"INPUT: '{given}' {state}; give a text, or a table ({', '.join(TABLES)}).{_sibling(path)}")
    texts = [given] if pair is None else [given, pair]
    if len(texts) > len(columns) or not required <= set(columns[: len(texts)]):
        wanted = "a pair of texts: INPUT and --pair" if len(columns) == 2 else "one text"
        raise DataError(f"INPUT: this model takes {wanted}.")
    return Dataset.from_dict({name: [text] for name, text in zip(columns, texts, strict=False)}), None


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


class _Pictures:
    """Writes the pictures in rows (`…_png`, in base64) to files of their own, whose names take their place."""

    def __init__(self, writer: Any, folder: Path) -> None:
        self.writer, self.folder = writer, folder
        self.taken: set[str] = set()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Writes pictures, and passes rows on."""
        from base64 import b64decode

        out = []
        for row in rows:
            row, stem = dict(row), Path(row.get("input", f"{row['row']:06d}")).stem
            stem = f"{stem}-{row['row']}" if stem in self.taken else stem  # of two folders
            self.taken.add(stem)
            for name in [name for name in row if name.endswith("_png")]:
                file = self.folder / f"{stem}.{name.removesuffix('_png')}.png"  # never the name of an input
                file.write_bytes(b64decode(row[name]))
                row[name] = file.name
            out.append(row)
        self.writer.write(out)

    def close(self) -> None:
        """Finishes the table."""
        self.writer.close()


def _cell(value: Any) -> str:
    """Returns a value as one cell of a line, whatever its text would tell the terminal."""
    return sanitize(str(value)).replace("\t", " ").replace("\n", " ")


def _joined(value: Any) -> Any:
    """Returns a list of names, of a few numbers or of records (boxes, entities) as one text, others as they are."""
    if not isinstance(value, list) or not all(isinstance(item, (str, float, dict)) for item in value):
        return value
    texts = [" ".join(map(_short, item.values())) if isinstance(item, dict) else _short(item) for item in value]
    return ", ".join(texts) or "none"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


class _Terminal:
    """Prints rows as tab-separated columns."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Prints rows under the columns of the first one, which a header names."""
        for row in rows:
            cells = {name: _joined(value) for name, value in row.items()}
            if not self.columns:
                shown = [name for name, value in cells.items() if not isinstance(value, list)]
                self.columns = [name for name in shown if name != "probabilities" and not name.endswith("_png")]
                print("\t".join(self.columns))
            print("\t".join(_cell(_short(cells.get(name, ""))) for name in self.columns))

    def close(self) -> None:
        """Nothing to finish."""
