"""Export of a saved model to ONNX or torch.export, verified against the trained model and benchmarked."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hftl.artifacts.export_card import describe_inputs, write_export_card
from hftl.artifacts.export_checks import (
    BATCH_SIZES,
    SampledRows,
    evaluate_exported,
    format_table,
    max_logit_differences,
    measure_latency,
)
from hftl.artifacts.exporters import FILES, INT8, Compute, format_problem, open_onnx, open_torch, quantize, write
from hftl.artifacts.labeled_data import labeled_rows
from hftl.artifacts.locate import artifact_folder, locate_model, quarantined_rows, training_data_config
from hftl.artifacts.save_model import load_model_and_task, raise_if_different, read_task
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
    """Exports a saved model for serving, compares its logits with the trained model, and evaluates it on a split.

    Args:
        path: Run folder, its model/ folder, or a repo id.
        format: `onnx` (for onnxruntime) or `torch` (a torch.export program).
        output: Output folder; default `export/FORMAT` in the run folder. Required for a repo id.
        source: Data source, like `data.source`; None uses the training data of the run.
        split: `train`, `validation` or `test`.
        rows: Number of compared rows, evenly spaced over the split.
        int8: Whether to write an additional ONNX file with dynamically quantized weights.
        revision: Branch, tag or commit of a repo id.

    Returns:
        The content of `export.json`. `files` lists per file its size in MB, the largest absolute difference between
        its logits and those of the trained model, its metrics on the split, and its median latency in ms for batches
        of 1 and 32 rows.

    Raises:
        ConfigError: The format is not available on this machine, or `output` contains other files.
        DataError: The data cannot be read, or contain labels that are unknown to the model.
        ArtifactError: The model cannot be loaded or exported, or the logits of the export differ from those of the
            trained model. In the last case the files stay, without `export.json`.
    """
    source_folder, target = _resolve_folders(path, revision, format, output)
    model, task = load_model_and_task(source_folder)
    if model.sklearn_head is not None:
        raise ConfigError(
            f"export: the head of '{path}' is the scikit-learn classifier '{model.sklearn_head.kind}', which cannot be "
            "exported. Set adapt.probe.classifier to logistic, linear_svm, ridge or lda."
        )
    data = training_data_config(source_folder)
    dataset = labeled_rows(task, data, source, split, quarantined_rows(source_folder))
    with suppress_logs():
        encoded = task.encode(dataset, model.processor, None, data.max_length)
    sampled = SampledRows(task, encoded, rows)
    names = list(sampled.inputs(sampled.sample, 1))
    folder = _clear(target)
    exports, not_quantized = _write(model, sampled, folder, format, int8)
    differences = _compare(model, sampled, exports, folder, split)
    metrics = {name: evaluate_exported(compute, model, sampled, data) for name, compute in exports.items()}
    latency = measure_latency(exports, sampled)
    report: dict[str, Any] = {
        "format": format,
        "labels": list(task.head.labels),
        "inputs": describe_inputs(model, names, data.max_length),
        "measured_on": {
            "source": source or data.source,
            "split": split,
            "rows": len(encoded),
            "rows_compared": len(sampled.sample),
        },
        "measured_by": {"runtime": _runtime(format), "threads": torch.get_num_threads()},
        "files": {
            name: {"megabytes": round((folder / name).stat().st_size / 1e6, 2), "largest_difference": differences[name]}
            | {f"{split}/{metric}": value for metric, value in metrics[name].items()}
            | latency[name]
            for name in exports
        },
    } | ({"not_quantized": not_quantized} if not_quantized else {})
    _finish(source_folder, folder, model, task, report)
    log(format_table(report, f"{split}/{task.best_metric}"))
    log(f"export: saved to {folder}")
    return report


def _resolve_folders(
    path: str | Path, revision: str | None, format: str, output: str | Path | None
) -> tuple[Path, Path]:
    """Returns the folder of the saved model and the output folder, after all checks that do not load the model.

    Raises:
        ConfigError: The format or the output folder is invalid, or the task does not support exports.
    """
    problem = format_problem(format)
    if problem:
        raise ConfigError(problem)
    if output is None and not Path(path).exists():
        raise ConfigError(f"--output: required for repo id '{path}'. Pass a folder.")
    source_folder = artifact_folder(locate_model(path, revision))
    target = Path(output) if output is not None else _default_folder(source_folder, format)
    _check_folder(target)
    problem = unsupported(read_task(source_folder), Capability.EXPORT)
    if problem:
        raise ConfigError(problem)
    return source_folder, target


def _finish(source: Path, folder: Path, model: TaskModel, task: Task, report: dict[str, Any]) -> None:
    """Writes the other files of an export: preprocessing, README with serving code, and the report."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_COPIED:
            shutil.copy(file, folder)
    write_export_card(folder, model, task, report)
    # written last: marks the export as complete and verified
    (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")


def _default_folder(folder: Path, format: str) -> Path:
    return (folder.parent if folder.name == "model" else folder) / "export" / format


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ConfigError(f"--output: '{folder}' is a file. Pass a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).is_file() and not _exported_files(folder):
        raise ConfigError(f"--output: '{folder}' contains files that are not an export. Pass another folder.")


def _exported_files(folder: Path) -> list[Path]:
    """Returns the files of an earlier complete or incomplete export in a folder."""
    return [folder / name for name in (*FILES.values(), INT8, REPORT) if (folder / name).is_file()]


def _clear(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in _exported_files(folder):
        file.unlink()
    return folder


def _write(
    model: TaskModel, sampled: SampledRows, folder: Path, format: str, int8: bool
) -> tuple[dict[str, Compute], str | None]:
    """Writes the exported files.

    Returns:
        A callable per written file, and the reason for a missing int8 file (None without a failure).
    """
    file = folder / FILES[format]
    write(model, sampled.inputs(sampled.sample * 2, 2), file, format)
    try:
        exports = {file.name: open_onnx(file) if format == "onnx" else open_torch(file)}
    except Exception as error:
        raise ArtifactError(f"{file} was written but cannot be loaded: {first_line(error)}") from error
    if format != "onnx" or not int8:
        return exports, None
    try:
        quantize(file, folder / INT8)
        compute = open_onnx(folder / INT8)
        compute(sampled.inputs(sampled.sample, 1))
    except Exception as error:  # onnxruntime lacks integer kernels for some operators; the fp32 export is valid
        (folder / INT8).unlink(missing_ok=True)
        reason = f"{type(error).__name__}: {first_line(error)}"
        log(f"export: skipped {INT8}: onnxruntime cannot quantize or run this model in int8 ({reason})")
        return exports, reason
    return exports | {INT8: compute}, None


def _compare(
    model: TaskModel, sampled: SampledRows, exports: dict[str, Compute], folder: Path, split: str
) -> dict[str, float]:
    """Returns the largest logit difference of each file; only int8 may exceed the rounding tolerance."""
    sizes = ", ".join(map(str, BATCH_SIZES))
    try:
        differences, scale = max_logit_differences(model, exports, sampled)
    except Exception as error:
        raise ArtifactError(
            f"{folder} was written but fails on some batch sizes (tested: {sizes}; traced with 2): {first_line(error)}"
        ) from error
    for name, difference in differences.items():
        log(
            f"export: {folder / name}: largest logit difference to the trained model {difference:.2g} "
            f"(logits up to {scale:.2g}), on {len(sampled.sample)} {split} rows in batches of {sizes}"
        )
    raise_if_different({name: value for name, value in differences.items() if name != INT8}, scale, folder)
    return differences


def _runtime(format: str) -> str:
    package = "onnxruntime" if format == "onnx" else "torch"
    return f"{package} {version(package)}"
