"""What a finished run left in its folder: the one source of cards, reports and pushes, now or a year later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hftl.config.parse import load
from hftl.config.schema import RunConfig
from hftl.errors import ArtifactError, HftlError

DESCRIPTION = "hftl.json"
"""In `model/` and `adapter/`: task, labels, head and base model. Written last, so its presence means verified."""


@dataclass(frozen=True)
class Record:
    """A run folder, read."""

    folder: Path
    config: RunConfig
    described: dict[str, Any]
    """`hftl.json`: task, state, head, base_model, method."""
    metrics: dict[str, float]
    report: dict[str, Any]
    environment: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """Names of the outputs, in order."""
        return self.described["head"]["labels"]

    @property
    def parts(self) -> list[str]:
        """`model`, and `adapter` where there is one."""
        return [part for part in ("model", "adapter") if (self.folder / part / DESCRIPTION).is_file()]

    @cached_property
    def confusion(self) -> Any:
        """Counts [K, K] of the test rows (rows: true class), or None where predictions are not of one class each."""
        path = self.folder / "predictions.parquet"
        if not path.is_file() or not self.labels:
            return None
        import pyarrow.parquet as pq

        from hftl.evaluation.intervals import confusion_matrix

        if not {"label", "prediction"} <= set(pq.read_schema(path).names):
            return None
        rows = pq.read_table(path, columns=["label", "prediction"], filters=[("split", "==", "test")])
        number = {label: position for position, label in enumerate(self.labels)}
        true, predicted = ([number[name] for name in rows[column].to_pylist()] for column in ("label", "prediction"))
        return confusion_matrix(true, predicted, len(number)) if true else None


def read_record(folder: str | Path) -> Record:
    """Returns what a run left in `folder`.

    Raises:
        ArtifactError: It is not the folder of a finished, verified run.
    """
    folder = Path(folder)
    if not (folder / "model" / DESCRIPTION).is_file():
        what = "holds a run that did not finish" if (folder / "config.yaml").is_file() else "is not a run folder"
        raise ArtifactError(f"'{folder}' {what}: there is no model/{DESCRIPTION}, which is written last.")
    try:
        parts = {
            name: json.loads((folder / file).read_text(encoding="utf-8"))
            for name, file in {
                "described": f"model/{DESCRIPTION}",
                "metrics": "metrics.json",
                "report": "report.json",
                "environment": "environment.json",
            }.items()
        }
        return Record(folder, load(folder / "config.yaml"), **parts)
    except (OSError, ValueError, HftlError) as error:
        raise ArtifactError(f"'{folder}' is incomplete or damaged: {type(error).__name__}: {error}") from error
