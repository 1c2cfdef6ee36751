"""What a run left on disk, read back: the one source of cards, pushes and reports, now or a year later."""

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
"""In `model/` and `adapter/`: task, labels, head and base model. Written last, so its presence means verified."""
COMPARISON = "compare.json"
"""In the folder of a comparison, and in that of the run it kept: ways of training side by side, and the verdict."""
NEEDED = ("config.yaml", "metrics.json", "report.json")
_VALUES_AT_A_TIME = 2_000_000
"""Probabilities held at once while a predictions file is read: 16 MB."""


class RunRecord:
    """One run folder.

    Raises:
        ArtifactError: The folder holds no finished run, or one of its files cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in NEEDED if not (self.folder / name).is_file()]
        if missing:
            raise ArtifactError(_no_run(self.folder, missing))
        self.name = self.folder.resolve().name
        self.settings = self._settings()
        """The configuration as `{"train.lr": 3e-4, …}`; also that of another version of hftl, with other settings."""
        self.metrics: dict[str, float | None] = self._json("metrics.json")
        self.facts: dict[str, Any] = self._json("report.json")
        self.environment: dict[str, Any] = self._json("environment.json")
        self.described: dict[str, Any] = self._json(f"model/{DESCRIPTION}")
        self.comparison: dict[str, Any] = self._json(COMPARISON)
        self.history = self._history()

    @property
    def task(self) -> str:
        """Name of the task; empty where the model was not saved."""
        return self.described.get("task", "")

    @property
    def parts(self) -> list[str]:
        """Verified artifacts: `model`, and `adapter` where there is one."""
        return [part for part in ("model", "adapter") if (self.folder / part / DESCRIPTION).is_file()]

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the outputs; empty where a row does not have exactly one class."""
        head = self.described.get("head", {})
        return head.get("labels", []) if head.get("problem_type") == "single_label_classification" else []

    @property
    def labels(self) -> list[str]:
        """Names of classes, or of labels of which a row may have any number, in the order of the outputs."""
        head = self.described.get("head", {})
        return self.classes or (
            head.get("labels", []) if head.get("problem_type") == "multi_label_classification" else []
        )

    @property
    def primary_metrics(self) -> tuple[str, ...]:
        """The metrics that are named first, in order."""
        return tuple(self.described.get("primary_metrics", ("accuracy", "macro_f1")))

    def supports(self, capability: Capability) -> bool:
        """Whether the task of the run supports a capability that takes its predictions."""
        listed = self.described.get("capabilities")
        # 0.1.0 listed none: there every task whose predictions can be read had all of these
        return bool(needed_columns(self.described.get("head", {}))) if listed is None else capability in listed

    @property
    def splits(self) -> list[str]:
        """Splits that were measured, in the order of the metrics."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.metrics if "/" in name))

    @property
    def main_split(self) -> str | None:
        """The split that measures the model: test where there is one."""
        return "test" if "test" in self.splits else next(iter(self.splits), None)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Returns steps and values of one recorded quantity."""
        points = [(record["step"], record[name]) for record in self.history if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    @cached_property
    def answers(self) -> Mapping[str, Predictions]:
        """Truth and predictions by split; empty where the run wrote none, or none that this could read."""
        return read_predictions(self.described, self._columns, lambda columns: self._batches(columns, 100_000))

    @property
    def judged(self) -> dict[str, ClassPredictions]:
        """True and predicted classes by split; empty where a row does not have exactly one class."""
        return {split: found for split, found in self.answers.items() if isinstance(found, ClassPredictions)}

    def intervals(self, split: str) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals of the metrics that the predictions on disk give as metrics.json has them."""
        if split not in self.answers or not self.supports(Capability.INTERVALS):
            return {}
        answers = self.answers[split]
        said = {name: (self.metrics.get(f"{split}/{name}"), value) for name, value in answers.computed().items()}
        agree = [name for name, (one, other) in said.items() if one is not None and np.isclose(one, other, 1e-9, 1e-9)]
        found = answers.intervals()
        return {name: found[name] for name in agree if name in found}

    def probabilities(self, split: str) -> Iterator[tuple[Any, Any]]:
        """Yields probabilities [n, K] and true classes [n] of a split, a few rows at a time."""
        count = len(self.classes)
        if not count or not {"split", "label", "probabilities"} <= set(self._columns):
            return
        import pyarrow as pa

        for batch in self._batches(("split", "label", "probabilities"), max(_VALUES_AT_A_TIME // count, 1)):
            batch = batch.filter(pa.array(np.array(batch.column("split").to_pylist()) == split))
            labels = codes(batch.column("label"), self.classes)
            flat = batch.column("probabilities").flatten().to_numpy(zero_copy_only=False)
            if len(labels) and len(flat) == len(labels) * count:
                yield flat.reshape(-1, count)[labels >= 0], labels[labels >= 0]

    def masks(self, split: str, rows: Collection[int]) -> dict[int, str]:
        """Returns the predicted masks (PNG, base64) of some rows of a split; empty where the task predicts none."""
        if not {"split", "row", "mask_png"} <= set(self._columns):
            return {}
        listed = (row for batch in self._batches(("split", "row", "mask_png"), 100) for row in batch.to_pylist())
        return {row["row"]: row["mask_png"] for row in listed if row["split"] == split and row["row"] in rows}

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
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _no_run(folder: Path, missing: list[str]) -> str:
    if folder.is_dir():
        return f"'{folder}' is not the folder of a finished run: it has no {', '.join(missing)}."
    parent = folder.parent
    guess = nearest(folder.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    return f"there is no run folder '{folder}'.{guess}"
