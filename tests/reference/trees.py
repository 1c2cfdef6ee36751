"""Runs of all cells with the hftl of a tree, in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .broken_inputs import make_broken, write_broken
from .cells import make_runs
from .material import write_material
from .renames import TABLE

ROOT = Path(__file__).parents[2]
PLACES = {"material": "material", "broken": "broken", "runs": "runs"}
"""Relative to the working directory of the worker, so that records hold no absolute path."""
LIMIT = 1500
"""Seconds after which a worker is ended."""


def start(tree: Path, folder: Path, only: list[str] | None = None) -> subprocess.Popen[bytes]:
    """Starts the worker for a tree.

    Args:
        tree: Root of a checkout.
        folder: Empty folder for inputs, run folders, caches and the result.
        only: Names of cells; all by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_material(folder / "material")
    write_broken(folder / "material", folder / "broken")
    cells = [cell for cell in [*make_runs(PLACES), *make_broken(PLACES)] if not only or cell["name"] in only]
    wanted = {"tree": str(tree), "renames": TABLE.read_text(), "cells": cells}
    (folder / "cells.json").write_text(json.dumps(wanted))
    worker = Path(__file__).with_name("worker.py")
    with (folder / "worker.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(worker), "cells.json", "result.json"],
            cwd=folder,
            env=environment(tree, folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """Returns the variables of a worker: one thread, CPU, no network, separate caches."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    fixed = {
        "PYTHONPATH": str(tree),
        "PYTHONHASHSEED": "0",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf_home"),
        "HFTL_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    return {**inherited, **threads, **fixed}


def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Waits for a worker and returns its result.

    Raises:
        RuntimeError: The worker failed.
    """
    try:
        status = process.wait(LIMIT)
    finally:
        process.kill()
    if status:
        raise RuntimeError(f"the worker ended with status {status}:\n{(folder / 'worker.log').read_text()[-4000:]}")
    return json.loads((folder / "result.json").read_text())


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """Yields a temporary git worktree of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True, capture_output=True)
