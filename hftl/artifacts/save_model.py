"""Saved means verified: what is written is opened again by the libraries that users will use, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hftl.artifacts.locate import CONFIG, artifact_folder
from hftl.config.parse import dump_config, load_saved_config
from hftl.config.schema import RunConfig
from hftl.errors import ArtifactError, HftlError, first_line, shorten
from hftl.heads.sklearn_head import FILE as HEAD
from hftl.heads.sklearn_head import SklearnHead, open_head, save_head
from hftl.hub_client import redact_tokens
from hftl.logging import log, suppress_logs
from hftl.models.build import build_model, open_model
from hftl.models.suppress_warnings import quiet
from hftl.models.target_scaling import fold_scale
from hftl.models.task_model import HeadSpec, ReloadedModel, TaskModel, compared_outputs
from hftl.renames import upgrade_record
from hftl.reporting.run_record import DESCRIPTION
from hftl.tasks.capabilities import Capability, capabilities_of
from hftl.tasks.registry import restore
from hftl.tasks.task import Task, primary_metrics

if TYPE_CHECKING:
    from hftl.loading.loader import Examples

TOLERANCE = 1e-4
"""Largest accepted difference between logits, relative to the largest logit (or absolute below 1), in float32."""
SAMPLE = "sample.safetensors"
"""In the run folder: the rows that were compared, as model inputs, with their logits. Never pushed: it is data."""


def save_artifact(model: TaskModel, task: Task, run: RunConfig, sample: Examples, folder: Path) -> dict[str, float]:
    """Writes `folder/model` (stock, adapters merged) and, where there are adapters, `folder/adapter`.

    Afterwards `model.net` is the stock network: adapters are merged into it.

    Args:
        model: On any device; compared in float32 on the CPU.
        task: Travels along, so that hftl can open the folder again.
        run: Resolved configuration, written beside the weights.
        sample: Encoded rows for the comparison; the first 8 are used.
        folder: The run folder.

    Returns:
        The largest difference between the trained model's logits and those of each reader, by name. Under a classic
        head readers open the network without it and features are compared, and hftl the head, whose logits are.

    Raises:
        ArtifactError: A reader cannot open the folder, or computes something else. The files stay.
    """
    model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # safetensors stores no other layout
    inputs = task.collate(sample.fetch(list(range(min(8, len(sample)))), 0))["inputs"]
    expected = model.reference_outputs(inputs)
    fold_scale(model)
    _save_sample(inputs, expected, folder)
    readers: dict[str, Callable[[], dict[str, ReloadedModel]]] = {}
    if model.adapted:
        if model.source.pretrained:  # an adapter on random weights opens nowhere
            _save_adapter(model, folder / "adapter")
            readers["adapter"] = lambda: adapter_reader(model, fresh, folder / "adapter")
            fresh = model.build_untrained()
        model.net, model.adapted = model.net.merge_and_unload(), False
    model.frozen = "nothing"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    model.save(folder / "model")
    readers["model"] = lambda: model.loaders(folder / "model")
    differences: dict[str, float] = {}
    for part, opened in readers.items():
        differences |= compare_logits(opened, inputs, expected, folder / part, part)
    if model.sklearn_head is not None:
        differences |= _save_classic_head(model.sklearn_head, expected, folder / "model")
    for part in readers:  # last, so that hftl opens nothing that was refused
        _describe(model, task, run, folder / part)
    return differences


def compare_logits(
    opened: Callable[[], dict[str, ReloadedModel]],
    inputs: dict[str, Tensor],
    expected: Tensor,
    place: str | Path,
    part: str,
) -> dict[str, float]:
    """Returns the largest difference from `expected` logits for each reader, as `part/reader`.

    Raises:
        ArtifactError: A reader cannot open the place, or computes something else.
    """
    try:
        readers = opened()
    except Exception as error:
        raise ArtifactError(f"{place} was written but does not open: {type(error).__name__}: {error}") from error
    differences = {}
    for name, reader in readers.items():
        with torch.no_grad():
            difference = float((reader(inputs) - expected).abs().max())
        differences[f"{part}/{name}"] = difference
        log(f"publish: {place} opens with {name}; largest logit difference {difference:.2g}")
    refuse_different(differences, float(expected.abs().max()), place)
    return differences


def refuse_different(differences: dict[str, float], scale: float, place: str | Path) -> None:
    """Raises ArtifactError where a difference is beyond `TOLERANCE` of logits as large as `scale`, or NaN."""
    limit = TOLERANCE * max(scale, 1.0)
    wrong = [f"{name} {value:.3g}" for name, value in differences.items() if not value <= limit]
    if wrong:
        raise ArtifactError(
            f"{place}: what was saved is not what was trained: largest logit difference {', '.join(wrong)} "
            f"(allowed {limit:.1g}). The files are kept; please report this with the model's name."
        )


def _save_classic_head(head: SklearnHead, features: Tensor, folder: Path) -> dict[str, float]:
    """Writes a classic head, opens it again, and compares its logits of the same `features` [B, D].

    Raises:
        ArtifactError: It does not open, or computes something else.
    """
    save_head(head, folder)
    expected = head(features)
    difference = float((open_head(folder)(features) - expected).abs().max())
    log(f"publish: {folder / HEAD} opens with hftl; largest logit difference {difference:.2g}")
    refuse_different({"model/head": difference}, float(expected.abs().max()), folder / HEAD)
    return {"model/head": difference}


def read_sample(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs and the `TaskModel.reference_outputs` that the run folder was verified with.

    Raises:
        ArtifactError: They are not there.
    """
    from safetensors.torch import load_file

    try:
        stored = load_file(folder / SAMPLE)
        return {name.partition(".")[2]: value for name, value in stored.items() if "." in name}, stored["logits"]
    except Exception as error:
        raise ArtifactError(f"'{folder}' lacks {SAMPLE}, or it is damaged: {first_line(error)}") from error


def load_model_and_task(folder: str | Path) -> tuple[TaskModel, Task]:
    """Returns the model and the task in a run folder, or in the `model/` or `adapter/` folder of one.

    Adapters are merged into their base model, which is opened by the name and revision that were recorded.

    Raises:
        ArtifactError: There is no model that hftl saved, or it is incomplete, or its base model is missing.
    """
    folder = artifact_folder(folder)
    described, spec, task = _read_description(folder)
    if (folder / "adapter_config.json").is_file():
        return _open_adapter(folder, described, spec), task
    model = open_model(folder, spec, classic=described.get("sklearn_head") is not None)
    beside = model.original_labels()
    if spec.labels and beside and beside != list(spec.labels) and model.sklearn_head is None:
        raise ArtifactError(
            f"{folder}: config.json names the labels {shorten(beside, 6)}, but {DESCRIPTION} "
            f"{shorten(spec.labels, 6)}: files of two runs are mixed here."
        )
    return model, task


def read_task(folder: str | Path) -> Task:
    """Returns the task of a saved model without opening its weights.

    Raises:
        ArtifactError: There is no model that hftl saved, or its description is damaged.
    """
    return _read_description(artifact_folder(folder))[2]


def fresh_base(folder: Path) -> Any:
    """Returns the stock network that the adapter in `folder` belongs on, by its recorded name and revision.

    Raises:
        ArtifactError: It does not open here, or is another architecture.
    """
    described, spec, _ = _read_description(folder)
    return _base_model(folder, described, spec).net


def _open_adapter(folder: Path, described: dict[str, Any], spec: HeadSpec) -> TaskModel:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ArtifactError(f"{folder} has no adapter_model.safetensors; a pickle (.bin) is never opened.")
    model = _base_model(folder, described, spec)
    try:
        opened = adapted_net(model.net, folder)
    except Exception as error:
        raise ArtifactError(
            f"{folder} does not fit the base model '{described['base_model']['name']}': "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    model.net = opened.merge_and_unload()
    return model.eval()


def _base_model(folder: Path, described: dict[str, Any], spec: HeadSpec) -> TaskModel:
    base = described["base_model"]
    run = load_saved_config(folder / CONFIG)
    try:
        with suppress_logs():
            model = build_model(replace(run, model=_at_revision(run.model, base)), spec)
    except HftlError as error:
        where = f"{base['name']}" + (f" at revision {base['revision']}" if base.get("revision") else "")
        raise ArtifactError(
            f"{folder} is an adapter of the base model '{where}', which does not open here: {error} "
            "Put the base model there, or use the merged model beside the adapter."
        ) from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size != base.get("parameters", size):
        raise ArtifactError(
            f"{folder} is an adapter of a model with {base['parameters']:,} parameters; the base model "
            f"'{base['name']}' that is found here has {size:,}: it is another architecture."
        )
    return model


def _read_description(folder: Path) -> tuple[dict[str, Any], HeadSpec, Task]:
    try:
        described = upgrade_record(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
        spec = HeadSpec.from_json(described["head"])
        return described, spec, restore(described["task"], described["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / DESCRIPTION} is damaged: {type(error).__name__}: {error}") from error


def _at_revision(config: Any, base: dict[str, Any]) -> Any:
    """Returns the model section of a run, pinned to the commit that the base model had then."""
    config = replace(config, trust_remote_code=False)  # a folder cannot say that its own code is to be trusted
    beside = base.get("text_source") or {}
    if beside.get("hub_id") and beside.get("revision"):
        config = replace(config, revision=beside["revision"])
    if not base.get("hub_id") or not base.get("revision"):
        return config
    if base["library"] == "timm":
        return replace(config, name=f"hf-hub:{base['hub_id']}@{base['revision']}")
    return replace(config, revision=base["revision"])


def adapted_net(base: Any, place: str | Path, **options: Any) -> Any:
    """Returns peft's model of `base` with the adapter in a folder or hub repository; every tensor must fit."""
    import warnings

    import peft

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        net = peft.PeftModel.from_pretrained(base, place, **options).eval()
    return net


def adapter_reader(model: TaskModel, base: Any, place: str | Path, **options: Any) -> dict[str, ReloadedModel]:
    """Opens an adapter with peft on the network `base`; `model` only says how the network is called."""
    opened = copy(model)
    opened._modules = {}  # its own, not the model's
    opened.net = adapted_net(base, place, **options)
    return {"peft": lambda inputs: compared_outputs(opened.forward(inputs), model.compared)}


def _save_adapter(model: TaskModel, folder: Path) -> None:
    model.net.save_pretrained(folder, save_embedding_layers=False)
    config = getattr(model.net.get_base_model(), "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)  # labels, and for our pooled class the file that defines it


def _save_sample(inputs: dict[str, Tensor], logits: Tensor, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"inputs.{name}": value for name, value in inputs.items()} | {"logits": logits}
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, folder / SAMPLE)


def _describe(model: TaskModel, task: Task, run: RunConfig, folder: Path) -> None:
    """Writes what hftl needs to open the folder again, and the configuration that made it."""
    base = asdict(model.source) | {
        "arguments": model.build_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    described = {
        "task": task.name,
        "pipeline_tag": getattr(task, "pipeline_tag", "") or task.name.replace("_", "-"),
        "primary_metrics": primary_metrics(task),
        "usage": getattr(task, "usage", ""),
        "capabilities": sorted(Capability(each).value for each in capabilities_of(task)),
        "state": task.state(),
        "head": asdict(model.spec),
        "base_model": base,
        "class": type(model.net).__name__,
        "method": run.adapt.method,
        "sklearn_head": model.sklearn_head.kind if model.sklearn_head is not None else None,
    }
    (folder / CONFIG).write_text(redact_tokens(dump_config(run)), encoding="utf-8")
    (folder / DESCRIPTION).write_text(
        redact_tokens(json.dumps(described, indent=2, ensure_ascii=False)), encoding="utf-8"
    )
