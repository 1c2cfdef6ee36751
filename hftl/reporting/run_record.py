"""Record of a run, read from its folder; the single source of model cards, pushes and reports."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hftl.errors import ArtifactError, first_line, nearest
from hftl.renames import upgrade_record, upgrade_settings
from hftl.tasks.capabilities import Capability
from hftl.tasks.predictions import ClassPredictions, Predictions, codes, needed_columns, read_predictions

DESCRIPTION = "hftl.json"
"""File in `model/` and `adapter/`: task, labels, head and base model. Written last: marks the folder as verified."""
COMPARISON = "compare.json"
"""File of a comparison and of its selected run: results of the training methods, and the conclusion."""
REQUIRED_FILES = ("config.yaml", "metrics.json", "report.json")
_MAX_BATCH_VALUES = 2_000_000
"""Probabilities per batch when reading predictions: 16 MB."""


class RunRecord:
    """Contents of one run folder.

    Raises:
        ArtifactError: The folder is not a finished run, or one of its files cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in REQUIRED_FILES if not (self.folder / name).is_file()]
        if missing:
            raise ArtifactError(_not_a_run(self.folder, missing))
        self.name = self.folder.resolve().name
        self.settings = self._settings()
        """Configuration as `{"train.lr": 3e-4, …}`; runs of other versions of hftl may have other settings."""
        self.metrics: dict[str, float | None] = self._json("metrics.json")
        self.facts: dict[str, Any] = self._json("report.json")
        self.environment: dict[str, Any] = self._json("environment.json")
        self.description: dict[str, Any] = self._json(f"model/{DESCRIPTION}")
        self.comparison: dict[str, Any] = self._json(COMPARISON)
        self.history = self._history()

    @property
    def task(self) -> str:
        """Name of the task; empty if the model was not saved."""
        return self.description.get("task", "")

    @property
    def parts(self) -> list[str]:
        """Names of verified artifacts: `model` and `adapter`."""
        return [part for part in ("model", "adapter") if (self.folder / part / DESCRIPTION).is_file()]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the outputs; empty except for single-label classification."""
        head = self.description.get("head", {})
        return head.get("labels", []) if head.get("problem_type") == "single_label_classification" else []

    @property
    def labels(self) -> list[str]:
        """Names of classes, or of labels of multi-label classification, in the order of the outputs."""
        head = self.description.get("head", {})
        return self.classes or (
            head.get("labels", []) if head.get("problem_type") == "multi_label_classification" else []
        )

    @property
    def primary_metrics(self) -> tuple[str, ...]:
        """Metrics that are listed first, in order."""
        return tuple(self.description.get("primary_metrics", ("accuracy", "macro_f1")))

    def supports(self, capability: Capability) -> bool:
        """Whether the task of the run supports a capability that uses its predictions."""
        listed = self.description.get("capabilities")
        # 0.1.0 did not write capabilities; all its tasks with readable predictions supported these
        return bool(needed_columns(self.description.get("head", {}))) if listed is None else capability in listed

    @property
    def splits(self) -> list[str]:
        """Evaluated splits, in the order of the metrics."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.metrics if "/" in name))

    @property
    def main_split(self) -> str | None:
        """Split of the reported metrics: test, or the first evaluated split."""
        return "test" if "test" in self.splits else next(iter(self.splits), None)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of one quantity of history.jsonl."""
        points = [(record["step"], record[name]) for record in self.history if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    @cached_property
    def answers(self) -> Mapping[str, Predictions]:
        """Targets and predictions by split; empty if the run wrote none, or of an unsupported task."""
        return read_predictions(self.description, self._columns, lambda columns: self._batches(columns, 100_000))

    @property
    def class_predictions(self) -> dict[str, ClassPredictions]:
        """True and predicted classes by split; empty except for single-label classification."""
        return {split: each for split, each in self.answers.items() if isinstance(each, ClassPredictions)}

    def intervals(self, split: str) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals of the metrics of a split whose values in metrics.json the predictions reproduce."""
        if split not in self.answers or not self.supports(Capability.INTERVALS):
            return {}
        predictions = self.answers[split]
        reproduced = []
        for name, computed in predictions.computed().items():
            recorded = self.metrics.get(f"{split}/{name}")
            if recorded is not None and np.isclose(recorded, computed, 1e-9, 1e-9):
                reproduced.append(name)
        intervals = predictions.intervals()
        return {name: intervals[name] for name in reproduced if name in intervals}

    def probabilities(self, split: str) -> Iterator[tuple[Any, Any]]:
        """Yields batches of probabilities [n, K] and true classes [n] of a split."""
        count = len(self.classes)
        if not count or not {"split", "label", "probabilities"} <= set(self._columns):
            return
        import pyarrow as pa

        for batch in self._batches(("split", "label", "probabilities"), max(_MAX_BATCH_VALUES // count, 1)):
            batch = batch.filter(pa.array(np.array(batch.column("split").to_pylist()) == split))
            labels = codes(batch.column("label"), self.classes)
            flat = batch.column("probabilities").flatten().to_numpy(zero_copy_only=False)
            if len(labels) and len(flat) == len(labels) * count:
                yield flat.reshape(-1, count)[labels >= 0], labels[labels >= 0]

    def masks(self, split: str, rows: Collection[int]) -> dict[int, str]:
        """Returns predicted masks (PNG, base64) by row number, for `rows` of a split; empty for other tasks."""
        if not {"split", "row", "mask_png"} <= set(self._columns):
            return {}
        records = (row for batch in self._batches(("split", "row", "mask_png"), 100) for row in batch.to_pylist())
        return {row["row"]: row["mask_png"] for row in records if row["split"] == split and row["row"] in rows}

    @cached_property
    def _columns(self) -> list[str]:
        from pyarrow.parquet import read_schema

        return read_schema(self._predictions).names if self._predictions.is_file() else []

    @property
    def _predictions(self) -> Path:
        return self.folder / "predictions.parquet"

    def _batches(self, columns: tuple[str, ...], rows: int) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(self._predictions) as file:
            yield from file.iter_batches(rows, columns=list(columns))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return upgrade_record(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ArtifactError(f"{path} is not valid JSON: {error}.") from error

    def _settings(self) -> dict[str, Any]:
        import yaml

        path = self.folder / "config.yaml"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ArtifactError(f"{path} is not valid YAML: {first_line(error)}.") from error
        return upgrade_settings(_flat(values)) if isinstance(values, dict) else {}

    def _history(self) -> list[dict[str, Any]]:
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ArtifactError(f"{path} is not valid JSON lines: {error}.") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings as one dict with dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _not_a_run(folder: Path, missing: list[str]) -> str:
    """Returns the error message for a folder that is missing or lacks files."""
    if folder.is_dir():
        return f"'{folder}' is not a finished run: {', '.join(missing)} missing."
    parent = folder.parent
    hint = nearest(folder.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    return f"run folder '{folder}' does not exist.{hint}"
