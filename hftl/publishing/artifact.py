"""Saved means verified: what is written is opened again by the libraries that users will use, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.config.parse import dump
from hftl.config.schema import RunConfig
from hftl.console import say
from hftl.errors import ArtifactError
from hftl.models.build import open_model
from hftl.models.parts import HeadSpec, TaskModel
from hftl.models.quiet import quiet
from hftl.tasks import restore
from hftl.tasks.task import Task

if TYPE_CHECKING:
    from hftl.data.loader import Rows

TOLERANCE = 1e-4
"""Largest accepted difference between logits, relative to the largest logit (or absolute below 1), in float32."""
DESCRIPTION = "hftl.json"


def save_artifact(model: TaskModel, task: Task, run: RunConfig, sample: Rows, folder: Path) -> dict[str, float]:
    """Writes `folder/model` (stock, adapters merged) and, where there are adapters, `folder/adapter`.

    Afterwards `model.net` is the stock network: adapters are merged into it.

    Args:
        model: On any device; compared in float32 on the CPU.
        task: Travels along, so that hftl can open the folder again.
        run: Resolved configuration, written beside the weights.
        sample: Encoded rows for the comparison; the first 8 are used.
        folder: The run folder.

    Returns:
        The largest difference between the trained model's logits and those of each reader, by name.

    Raises:
        ArtifactError: A reader cannot open the folder, or computes something else. The files stay.
    """
    model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # safetensors stores no other layout
    inputs = task.collate(sample.fetch(list(range(min(8, len(sample)))), 0))["inputs"]
    with torch.no_grad():
        expected = model(inputs)["logits"]
    readers: dict[str, Callable[[], dict[str, Callable[[dict[str, Tensor]], Tensor]]]] = {}
    if model.adapted:
        if model.source.pretrained:  # an adapter on random weights opens nowhere
            _save_adapter(model, folder / "adapter")
            readers["adapter"] = lambda: _adapter_readers(model, fresh, folder / "adapter")
            fresh = model.fresh()
        model.net, model.adapted = model.net.merge_and_unload(), False
    model.frozen = "nothing"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    model.save(folder / "model")
    readers["model"] = lambda: model.readers(folder / "model")
    differences = {}
    for part, opened in readers.items():
        for name, reader in _open(opened, folder / part).items():
            with torch.no_grad():
                difference = float((reader(inputs) - expected).abs().max())
            differences[f"{part}/{name}"] = difference
            say(f"publish: {folder / part} opens with {name}; largest logit difference {difference:.2g}")
    _refuse(differences, float(expected.abs().max()), folder)
    for part in readers:  # last, so that hftl opens nothing that was refused
        _describe(model, task, run, folder / part)
    return differences


def load_artifact(path: str | Path) -> tuple[TaskModel, Task]:
    """Returns the model and the task in a run folder, or in the `model/` folder of one.

    Raises:
        ArtifactError: There is no model that hftl saved, or it is incomplete.
    """
    folder = Path(path)
    folder = folder / "model" if (folder / "model" / DESCRIPTION).is_file() else folder
    if not (folder / DESCRIPTION).is_file():
        raise ArtifactError(
            f"'{path}' is neither a run folder nor a model folder of hftl: no {DESCRIPTION} there or in model/."
        )
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    task = restore(described["task"], described["state"])
    spec = HeadSpec(**described["head"] | {"labels": tuple(described["head"]["labels"])})
    return open_model(folder, spec), task


def _save_adapter(model: TaskModel, folder: Path) -> None:
    model.net.save_pretrained(folder, save_embedding_layers=False)
    config = getattr(model.net.get_base_model(), "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)  # labels, and for our pooled class the file that defines it


def _adapter_readers(model: TaskModel, fresh: Any, folder: Path) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    import peft

    with quiet():
        net = peft.PeftModel.from_pretrained(fresh, folder).eval()
    opened = type(model).__new__(type(model))
    torch.nn.Module.__init__(opened)
    opened.net = net
    return {"peft": lambda inputs: opened.forward(inputs)["logits"]}


def _describe(model: TaskModel, task: Task, run: RunConfig, folder: Path) -> None:
    """Writes what hftl needs to open the folder again, and the configuration that made it."""
    head = {
        "stock": model.spec.stock,
        "num_outputs": model.spec.num_outputs,
        "labels": list(model.spec.labels),
        "problem_type": model.spec.problem_type,
    }
    base = {"name": model.source.name, "revision": model.source.revision, "pretrained": model.source.pretrained}
    described = {"task": task.name, "state": task.state(), "head": head, "base_model": base, "method": run.adapt.method}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "hftl_config.yaml").write_text(dump(run))


def _open(opened: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    try:
        return opened()
    except Exception as error:
        raise ArtifactError(f"{folder} was written but does not open: {type(error).__name__}: {error}") from error


def _refuse(differences: dict[str, float], scale: float, folder: Path) -> None:
    limit = TOLERANCE * max(scale, 1.0)
    wrong = [f"{name} {value:.3g}" for name, value in differences.items() if not value <= limit]
    if wrong:
        raise ArtifactError(
            f"{folder}: what was saved is not what was trained: largest logit difference {', '.join(wrong)} "
            f"(allowed {limit:.1g}). The files are kept; please report this with the model's name."
        )
