"""export: a saved model as an ONNX graph or a torch.export program, compared with the trained model and measured."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hftl.artifacts.export_card import describe_inputs, write_export_card
from hftl.artifacts.export_checks import SIZES, RealRows, format_table, largest_differences, metrics_of, milliseconds
from hftl.artifacts.exporters import FILES, INT8, Compute, format_problem, open_onnx, open_torch, quantize, write
from hftl.artifacts.labeled_data import labelled_rows
from hftl.artifacts.locate import artifact_folder, find, rows_left_out, trained_data
from hftl.artifacts.save_model import load_model_and_task, read_task, refuse_different
from hftl.errors import ArtifactError, ConfigError, first_line
from hftl.logging import log, suppress_logs
from hftl.models.task_model import TaskModel
from hftl.tasks.capabilities import Capability
from hftl.tasks.registry import unsupported
from hftl.tasks.task import Task

REPORT = "export.json"
_NOT_COPIED = ("README.md", "hftl.json", "hftl_config.yaml", "model.safetensors.index.json")


def export_folder(
    path: str | Path,
    format: str = "onnx",
    output: str | Path | None = None,
    *,
    source: str | None = None,
    split: str = "test",
    rows: int = 100,
    int8: bool = True,
    revision: str | None = None,
) -> dict[str, Any]:
    """Exports a saved model for serving, compares it with the trained one on real rows, and measures it on a split.

    Args:
        path: Run folder, its model/ folder, or a hub id.
        format: `onnx` (for onnxruntime) or `torch` (a torch.export program).
        output: Folder to write; `export/FORMAT` in the run folder by default. Needed for a hub id.
        source: As `data.source`; the data that the run was trained on by default.
        split: `train`, `validation` or `test`.
        rows: How many rows are compared, spread evenly over the split.
        int8: Whether onnx is written with dynamically quantized weights too.
        revision: Branch, tag or commit of a hub id.

    Returns:
        What `export.json` holds. `files` has for each file its size in MB, the largest difference between its logits
        and the trained model's, its metrics on the split, and its median latency in ms at 1 and at 32 rows.

    Raises:
        ConfigError: The format cannot be written here, or `output` holds something else.
        DataError: The data cannot be read, or have labels that the model does not know.
        ArtifactError: The model does not open or cannot be exported, or the export computes something else than
            the trained model; then its files stay, without `export.json`.
    """
    source_folder, target = _checked_folders(path, revision, format, output)
    model, task = load_model_and_task(source_folder)
    _refuse(model, path)
    data = trained_data(source_folder)
    dataset = labelled_rows(task, data, source, split, rows_left_out(source_folder))
    with suppress_logs():
        encoded = task.encode(dataset, model.processor, None, data.max_length)
    real = RealRows(task, encoded, rows)
    names = list(real.inputs(real.sample, 1))
    folder = _clear(target)
    opened, not_quantized = _write(model, real, folder, format, int8)
    differences = _compare(model, real, opened, folder, split)
    metrics = {name: metrics_of(compute, model, real, data) for name, compute in opened.items()}
    latency = milliseconds(opened, real)
    report: dict[str, Any] = {
        "format": format,
        "labels": list(task.head.labels),
        "inputs": describe_inputs(model, names, data.max_length),
        "measured_on": {
            "source": source or data.source,
            "split": split,
            "rows": len(encoded),
            "rows_compared": len(real.sample),
        },
        "measured_by": {"runtime": _runtime(format), "threads": torch.get_num_threads()},
        "files": {
            name: {"megabytes": round((folder / name).stat().st_size / 1e6, 2), "largest_difference": differences[name]}
            | {f"{split}/{metric}": value for metric, value in metrics[name].items()}
            | latency[name]
            for name in opened
        },
    } | ({"not_quantized": not_quantized} if not_quantized else {})
    _finish(source_folder, folder, model, task, report)
    log(format_table(report, f"{split}/{task.best_metric}"))
    log(f"export: {folder}")
    return report


def _checked_folders(
    path: str | Path, revision: str | None, format: str, output: str | Path | None
) -> tuple[Path, Path]:
    """Returns the folder of the saved model and the one to write, after all checks that need no model.

    Raises:
        ConfigError: The format, the output or the task does not allow the export.
    """
    problem = format_problem(format)
    if problem:
        raise ConfigError(problem)
    if output is None and not Path(path).exists():
        raise ConfigError(f"--output: say which folder receives the export of '{path}'.")
    source_folder = artifact_folder(find(path, revision))
    target = Path(output) if output is not None else _default_folder(source_folder, format)
    _check_folder(target)
    problem = unsupported(read_task(source_folder), Capability.EXPORT)
    if problem:
        raise ConfigError(problem)
    return source_folder, target


def _refuse(model: TaskModel, path: str | Path) -> None:
    if model.sklearn_head is not None:
        raise ConfigError(
            f"export: the head of '{path}' is a scikit-learn {model.sklearn_head.kind}, which has no graph. "
            "Linear ones are (adapt.probe.classifier logistic, linear_svm, ridge or lda)."
        )


def _finish(source: Path, folder: Path, model: TaskModel, task: Task, report: dict[str, Any]) -> None:
    """Writes what stands beside the graph: preprocessing, a README that serves it, and last the report."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_COPIED:
            shutil.copy(file, folder)
    write_export_card(folder, model, task, report)
    # last, so that nobody takes an unfinished or refused folder for a good one
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


def _default_folder(folder: Path, format: str) -> Path:
    return (folder.parent if folder.name == "model" else folder) / "export" / format


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"--output: '{folder}' is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).is_file() and not _files(folder):
        raise ConfigError(f"--output: '{folder}' holds something that is not an export; name another folder.")


def _files(folder: Path) -> list[Path]:
    """Returns what an earlier export left in a folder, finished or not."""
    return [folder / name for name in (*FILES.values(), INT8, REPORT) if (folder / name).is_file()]


def _clear(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in _files(folder):
        file.unlink()
    return folder


def _write(
    model: TaskModel, real: RealRows, folder: Path, format: str, int8: bool
) -> tuple[dict[str, Compute], str | None]:
    """Writes the graph(s); returns what each file computes, and why there is none of int8 if that did not work."""
    file = folder / FILES[format]
    write(model, real.inputs(real.sample * 2, 2), file, format)
    try:
        opened = {file.name: open_onnx(file) if format == "onnx" else open_torch(file)}
    except Exception as error:
        raise ArtifactError(f"{file} was written but does not open: {first_line(error)}") from error
    if format != "onnx" or not int8:
        return opened, None
    try:
        quantize(file, folder / INT8)
        compute = open_onnx(folder / INT8)
        compute(real.inputs(real.sample, 1))
    except Exception as error:  # onnxruntime lacks integer kernels for some operations; fp32 is what was asked for
        (folder / INT8).unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {first_line(error)}"
        log(f"export: no {INT8}: onnxruntime cannot quantize or run this network in int8 ({reason})")
        return opened, reason
    return opened | {INT8: compute}, None


def _compare(
    model: TaskModel, real: RealRows, opened: dict[str, Compute], folder: Path, split: str
) -> dict[str, float]:
    """Returns the largest logit difference of each file; only int8 may be further off than rounding."""
    sizes = ", ".join(map(str, SIZES))
    try:
        differences, scale = largest_differences(model, opened, real)
    except Exception as error:
        raise ArtifactError(
            f"{folder} was written but does not run on every batch ({sizes} rows; traced with 2): {first_line(error)}"
        ) from error
    for name, difference in differences.items():
        log(
            f"export: {folder / name}: largest logit difference to the trained model {difference:.2g} "
            f"(logits up to {scale:.2g}), on {len(real.sample)} {split} rows in batches of {sizes}"
        )
    refuse_different({name: value for name, value in differences.items() if name != INT8}, scale, folder)
    return differences


def _runtime(format: str) -> str:
    package = "onnxruntime" if format == "onnx" else "torch"
    return f"{package} {version(package)}"
