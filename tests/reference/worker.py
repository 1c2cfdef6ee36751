"""Runs cells with the hftl of one tree: `python worker.py CELLS.json OUT.json`, with PYTHONPATH set to the tree.

The file always comes from the newest tree. It uses what all trees have: `recipes/`, `hftl.run_recipe` and
`hftl.HftlError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import platform
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from renames import Renames

RUN_FILES = {"history": "history.jsonl", "metrics": "metrics.json", "predictions": "predictions.parquet"}


def main(cells_file: str, out_file: str) -> None:
    """Runs all cells and writes their results after each."""
    wanted = json.loads(Path(cells_file).read_text())
    tree, renames = Path(wanted["tree"]), Renames(wanted["renames"])
    import hftl

    if not Path(hftl.__file__).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"hftl comes from {hftl.__file__}, not from {tree}")
    import torch

    torch.set_num_threads(1)
    known = known_settings(hftl.RunConfig)
    result: dict[str, Any] = {"machine": machine(), "settings": sorted(map(renames.current, known)), "cells": {}}
    for cell in wanted["cells"]:
        started = time.monotonic()
        found = run_cell(cell, tree, renames, known)
        result["cells"][cell["name"]] = found | {"seconds": round(time.monotonic() - started, 2)}
        Path(out_file).write_text(json.dumps(result))


def machine() -> dict[str, Any]:
    """Returns what the bits of a result depend on."""
    from importlib.metadata import version

    import torch

    libraries = (
        "torch",
        "torchvision",
        "timm",
        "transformers",
        "peft",
        "accelerate",
        "scikit-learn",
        "numpy",
        "pillow",
    )
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def known_settings(config: type, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Returns the settings of nested dataclasses with the values of those that are `Literal`s."""
    hints, out = get_type_hints(config), {}
    for item in dataclasses.fields(config):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            out |= known_settings(kind, f"{prefix}{item.name}.")
        else:
            out[prefix + item.name] = tuple(map(str, literals(kind)))
    return out


def literals(kind: Any) -> tuple[Any, ...]:
    """Returns the values of every `Literal` inside a type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for inner in get_args(kind) if not isinstance(inner, str) for value in literals(inner))


def run_cell(cell: dict, tree: Path, renames: Renames, known: dict) -> dict[str, Any]:
    """Runs a recipe as the command line does; returns its problems, or what the run folder holds."""
    import hftl

    recipe = load_recipe(tree, cell["recipe"])
    flags = renames.for_tree(cell["flags"], known)
    problems: list[Any] = []
    error = ""

    def run_main(run: Any) -> None:
        try:
            recipe.main(run)
        except hftl.HftlError as failure:
            problems.extend(failure.problems)

    folder = Path(cell["flags"]["output_dir"])
    existed = folder.exists()
    log = Path(cell["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.argv = [f"{cell['recipe']}.py", *(f"--{name}={value}" for name, value in flags.items())]
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            hftl.run_recipe(run_main, recipe.DEFAULTS, recipe.__doc__)
        except (Exception, SystemExit):
            error = traceback.format_exc()
    reset_accelerate()
    listed = [{"setting": getattr(each, "setting", None), "message": str(each)} for each in problems]
    found = {"problems": listed, "error": error}
    return found | (read_folder(folder, renames) if folder.is_dir() and not existed else {})


def load_recipe(tree: Path, name: str) -> Any:
    """Returns a recipe of the tree as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", tree / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def reset_accelerate() -> None:
    """Lets the next cell build its own Accelerator."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def read_folder(folder: Path, renames: Renames) -> dict[str, Any]:
    """Returns settings, records, metrics, files and hashes of a run folder, in new names."""
    import yaml

    paths = {renames.current(name): path for name, path in listed_files(folder).items()}
    found: dict[str, Any] = {"files": sorted(paths)}
    texts = {kind: paths[name] for kind, name in RUN_FILES.items() if name in paths}
    if "config.yaml" in paths:
        found["settings"] = renames.settings(dict(flat(yaml.safe_load(paths["config.yaml"].read_text()))))
    if "history" in texts:
        records = [json.loads(line) for line in texts["history"].read_text().splitlines()]
        found["history"] = [{renames.current(key): value for key, value in record.items()} for record in records]
    if "metrics" in texts:
        found["metrics"] = {renames.current(k): v for k, v in json.loads(texts["metrics"].read_text()).items()}
    if "predictions" in texts:
        found["predictions"] = hash_columns(texts["predictions"], renames)
    found["weights"] = hash_tensors(paths, renames)
    return found


def listed_files(folder: Path) -> dict[str, Path]:
    """Returns files by relative path, without the times and process numbers in names of TensorBoard's."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = re.sub(r"events\.out\.tfevents\.\S+", "events.out.tfevents", str(path.relative_to(folder)))
            out[re.sub(r"/\d+\.\d+/", "/TIME/", name)] = path
    return out


def flat(values: dict, prefix: str = "") -> Any:
    """Yields dotted names and values of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def hash_columns(path: Path, renames: Renames) -> dict[str, str]:
    """Returns SHA-256 of each column's values."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    values = {name: repr(table[name].to_pylist()).encode() for name in table.column_names}
    return {renames.current(name): hashlib.sha256(value).hexdigest() for name, value in values.items()}


def hash_tensors(paths: dict[str, Path], renames: Renames) -> dict[str, str]:
    """Returns SHA-256 of type, shape and bytes of each final tensor (model and adapter)."""
    from safetensors.torch import load_file

    out = {}
    for name, path in paths.items():
        if path.suffix == ".safetensors" and name.partition("/")[0] in ("model", "adapter"):
            for key, tensor in load_file(path).items():
                content = f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()
                out[f"{name}:{renames.current(key)}"] = hashlib.sha256(content).hexdigest()
    return out


if __name__ == "__main__":
    main(*sys.argv[1:])
