"""Restart of a run if `data.on_error skip` now skips rows that its checkpoints were trained on."""

from __future__ import annotations

from typing import Any

from hftl.config.parse import load_saved_config
from hftl.config.schema import RunConfig
from hftl.data.source import load_splits
from hftl.data.validation import InvalidRows
from hftl.errors import HftlError
from hftl.logging import log, suppress_logs
from hftl.run_folder.checkpoint import Checkpoints, read_state
from hftl.run_folder.folder import MARKER, finished_metrics, get_run_folder, resumes
from hftl.training.checkpointer import data_fingerprint


def restarts(run: RunConfig, bad: InvalidRows, rows: Any = None) -> bool:
    """Whether the run in the folder restarts from step 0 because rows that it was trained on are now skipped.

    Row order, validation split and metrics depend on the remaining rows, so training cannot resume exactly from a
    checkpoint with more training rows. It can if only test rows are skipped, or rows of a validation split that was
    never evaluated. A checkpoint of other data is not replaced: `fit` rejects it.

    Args:
        run: The configuration before `resume_problems` has compared its settings.
        bad: The skipped rows.
        rows: In-memory rows that replace `run.data.source`.
    """
    folder = get_run_folder(run)
    counts = {split: len(bad.get(split, ())) for split in ("train", "validation")}
    if not any(counts.values()) or not resumes(run) or finished_metrics(run) is not None:
        return False
    try:
        if load_saved_config(folder / MARKER).data.on_error == "skip":
            return False
        newest = Checkpoints(folder / "checkpoints", run.checkpoint.total_limit).newest()
    except HftlError:
        return False  # reported by `resume_problems` or `fit`
    if newest is None:
        return False
    state = read_state(newest)
    history = state.get("recorder", {}).get("history", {})
    if not counts["train"] and not history.get("best"):
        return False
    with suppress_logs():
        all_rows = load_splits(run.data, rows=rows)["train"]
    if state.get("data") != data_fingerprint(all_rows):
        return False
    skipped = " and ".join(f"{count} {split} row(s)" for split, count in counts.items() if count)
    log(
        f"resume: {skipped} of the checkpoint after step {history.get('steps')} are now skipped "
        "(data.on_error skip); training restarts from step 0"
    )
    return True
