"""Verified model saving: files are reloaded with timm, transformers and peft, and logits compared."""

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
"""Largest accepted logit difference in float32, relative to the largest absolute logit (absolute below 1)."""
SAMPLE = "sample.safetensors"
"""File in the run folder: model inputs of the compared rows, and their logits. Never pushed, as it contains data."""


def save_artifact(model: TaskModel, task: Task, run: RunConfig, sample: Examples, folder: Path) -> dict[str, float]:
    """Writes `folder/model` (a timm or transformers class, adapters merged) and, for LoRA, `folder/adapter`.

    Merges the adapters into `model.net`.

    Args:
        model: Trained model on any device; compared in float32 on the CPU.
        task: Task, saved for `hftl.load`.
        run: Resolved configuration, written next to the weights.
        sample: Encoded rows for the comparison; the first 8 are used.
        folder: The run folder.

    Returns:
        The largest absolute logit difference per library, as `part/library`. With a scikit-learn head, the libraries
        load the backbone and features are compared; `model/head` compares the logits of the reloaded head.

    Raises:
        ArtifactError: A library cannot load the folder, or its logits differ. The files stay.
    """
    model.cpu().float().eval().to(memory_format=torch.contiguous_format)  # safetensors stores no other layout
    inputs = task.collate(sample.fetch(list(range(min(8, len(sample)))), 0))["inputs"]
    expected = model.reference_outputs(inputs)
    fold_scale(model)
    _save_sample(inputs, expected, folder)
    loaders: dict[str, Callable[[], dict[str, ReloadedModel]]] = {}
    if model.adapted:
        if model.source.pretrained:  # random base weights are not saved, so an adapter on them is useless
            _save_adapter(model, folder / "adapter")
            loaders["adapter"] = lambda: load_adapter(model, base, folder / "adapter")
            base = model.build_untrained()
        model.net, model.adapted = model.net.merge_and_unload(), False
    model.frozen = "nothing"
    (folder / "model").mkdir(parents=True, exist_ok=True)
    model.save(folder / "model")
    loaders["model"] = lambda: model.loaders(folder / "model")
    differences: dict[str, float] = {}
    for part, reload in loaders.items():
        differences |= compare_logits(reload, inputs, expected, folder / part, part)
    if model.sklearn_head is not None:
        differences |= _save_sklearn_head(model.sklearn_head, expected, folder / "model")
    for part in loaders:  # written last: marks the folders as verified
        _write_description(model, task, run, folder / part)
    return differences


def compare_logits(
    reload: Callable[[], dict[str, ReloadedModel]],
    inputs: dict[str, Tensor],
    expected: Tensor,
    location: str | Path,
    part: str,
) -> dict[str, float]:
    """Returns the largest absolute difference from `expected` per library, as `part/library`.

    Args:
        reload: Loads the saved model, one per library.
        inputs: Model inputs of the compared rows.
        expected: Logits of the trained model.
        location: Folder or repo id with revision, for messages.
        part: `model` or `adapter`.

    Raises:
        ArtifactError: A library cannot load the model, or its logits differ.
    """
    try:
        models = reload()
    except Exception as error:
        raise ArtifactError(f"{location} was written but cannot be loaded: {type(error).__name__}: {error}") from error
    differences = {}
    for library, reloaded in models.items():
        with torch.no_grad():
            difference = float((reloaded(inputs) - expected).abs().max())
        differences[f"{part}/{library}"] = difference
        log(f"save: verified {location} with {library}; largest logit difference {difference:.2g}")
    raise_if_different(differences, float(expected.abs().max()), location)
    return differences


def raise_if_different(differences: dict[str, float], scale: float, location: str | Path) -> None:
    """Raises ArtifactError if a difference exceeds `TOLERANCE` or is NaN.

    Args:
        differences: Largest absolute logit difference by name.
        scale: Largest absolute logit of the trained model.
        location: Folder or repo id, for the message.
    """
    limit = TOLERANCE * max(scale, 1.0)
    exceeded = [f"{name} {value:.3g}" for name, value in differences.items() if not value <= limit]
    if exceeded:
        raise ArtifactError(
            f"{location}: the saved model differs from the trained model: largest logit difference "
            f"{', '.join(exceeded)}; allowed: {limit:.1g}. The files are kept; report this with the name of the model."
        )


def _save_sklearn_head(head: SklearnHead, features: Tensor, folder: Path) -> dict[str, float]:
    """Writes and reloads a scikit-learn head, and compares its logits on the same `features` [B, D].

    Raises:
        ArtifactError: The head cannot be loaded, or its logits differ.
    """
    save_head(head, folder)
    expected = head(features)
    difference = float((open_head(folder)(features) - expected).abs().max())
    log(f"save: verified {folder / HEAD} with hftl; largest logit difference {difference:.2g}")
    raise_if_different({"model/head": difference}, float(expected.abs().max()), folder / HEAD)
    return {"model/head": difference}


def read_sample(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs and `TaskModel.reference_outputs` of the verification of a run folder.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    from safetensors.torch import load_file

    try:
        stored = load_file(folder / SAMPLE)
        return {name.partition(".")[2]: value for name, value in stored.items() if "." in name}, stored["logits"]
    except Exception as error:
        raise ArtifactError(f"'{folder}': {SAMPLE} is missing or damaged: {first_line(error)}") from error


def load_model_and_task(folder: str | Path) -> tuple[TaskModel, Task]:
    """Returns the model and the task of a run folder, or of its `model/` or `adapter/` folder.

    Adapters are merged into their base model, which is loaded by its recorded name and revision.

    Raises:
        ArtifactError: The folder was not saved by hftl or is incomplete, or the base model cannot be loaded.
    """
    folder = artifact_folder(folder)
    description, spec, task = _read_description(folder)
    if (folder / "adapter_config.json").is_file():
        return _load_merged_adapter(folder, description, spec), task
    model = open_model(folder, spec, classic=description.get("sklearn_head") is not None)
    labels = model.original_labels()
    if spec.labels and labels and labels != list(spec.labels) and model.sklearn_head is None:
        raise ArtifactError(
            f"{folder}: config.json has the labels {shorten(labels, 6)}, but {DESCRIPTION} has "
            f"{shorten(spec.labels, 6)}: the folder contains files of two runs."
        )
    return model, task


def read_task(folder: str | Path) -> Task:
    """Returns the task of a saved model without loading its weights.

    Raises:
        ArtifactError: The folder was not saved by hftl, or its description is damaged.
    """
    return _read_description(artifact_folder(folder))[2]


def build_base_network(folder: Path) -> Any:
    """Returns the base network of the adapter in `folder`, loaded by its recorded name and revision.

    Raises:
        ArtifactError: The base model cannot be loaded, or has another architecture.
    """
    description, spec, _ = _read_description(folder)
    return _build_base_model(folder, description, spec).net


def _load_merged_adapter(folder: Path, description: dict[str, Any], spec: HeadSpec) -> TaskModel:
    if not (folder / "adapter_model.safetensors").is_file():
        raise ArtifactError(f"{folder}: adapter_model.safetensors is missing; pickle files (.bin) are never loaded.")
    model = _build_base_model(folder, description, spec)
    try:
        adapted = load_adapted_net(model.net, folder)
    except Exception as error:
        raise ArtifactError(
            f"{folder} does not match the base model '{description['base_model']['name']}': "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    model.net = adapted.merge_and_unload()
    return model.eval()


def _build_base_model(folder: Path, description: dict[str, Any], spec: HeadSpec) -> TaskModel:
    base = description["base_model"]
    run = load_saved_config(folder / CONFIG)
    try:
        with suppress_logs():
            model = build_model(replace(run, model=_at_revision(run.model, base)), spec)
    except HftlError as error:
        name = f"{base['name']}" + (f" at revision {base['revision']}" if base.get("revision") else "")
        raise ArtifactError(
            f"{folder}: the base model '{name}' of this adapter cannot be loaded: {error} "
            "Provide the base model, or load the merged model next to the adapter."
        ) from error
    size = sum(parameter.numel() for parameter in model.parameters())
    if size != base.get("parameters", size):
        raise ArtifactError(
            f"{folder} is an adapter of a model with {base['parameters']:,} parameters, but the base model "
            f"'{base['name']}' has {size:,}: its architecture differs."
        )
    return model


def _read_description(folder: Path) -> tuple[dict[str, Any], HeadSpec, Task]:
    try:
        description = upgrade_record(json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
        spec = HeadSpec.from_json(description["head"])
        return description, spec, restore(description["task"], description["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / DESCRIPTION} is damaged: {type(error).__name__}: {error}") from error


def _at_revision(config: Any, base: dict[str, Any]) -> Any:
    """Returns the model section of a run, pinned to the recorded commit of the base model."""
    config = replace(config, trust_remote_code=False)  # a saved folder must not enable its own remote code
    text_encoder = base.get("text_source") or {}
    if text_encoder.get("hub_id") and text_encoder.get("revision"):
        config = replace(config, revision=text_encoder["revision"])
    if not base.get("hub_id") or not base.get("revision"):
        return config
    if base["library"] == "timm":
        return replace(config, name=f"hf-hub:{base['hub_id']}@{base['revision']}")
    return replace(config, revision=base["revision"])


def load_adapted_net(base: Any, path_or_repo_id: str | Path, **options: Any) -> Any:
    """Returns the `peft.PeftModel` of `base` with an adapter from a folder or repo; every tensor must match."""
    import warnings

    import peft

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        net = peft.PeftModel.from_pretrained(base, path_or_repo_id, **options).eval()
    return net


def load_adapter(model: TaskModel, base: Any, path_or_repo_id: str | Path, **options: Any) -> dict[str, ReloadedModel]:
    """Returns the adapter loaded by peft on the network `base`, called through the forward method of `model`."""
    reloaded = copy(model)
    reloaded._modules = {}  # the shallow copy would share the modules of `model`
    reloaded.net = load_adapted_net(base, path_or_repo_id, **options)
    return {"peft": lambda inputs: compared_outputs(reloaded.forward(inputs), model.compared)}


def _save_adapter(model: TaskModel, folder: Path) -> None:
    model.net.save_pretrained(folder, save_embedding_layers=False)
    config = getattr(model.net.get_base_model(), "config", None)
    if config is not None and hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)  # labels, and the modeling file of the pooled text model


def _save_sample(inputs: dict[str, Tensor], logits: Tensor, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"inputs.{name}": value for name, value in inputs.items()} | {"logits": logits}
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, folder / SAMPLE)


def _write_description(model: TaskModel, task: Task, run: RunConfig, folder: Path) -> None:
    """Writes hftl.json (task, head, base model), required by `hftl.load`, and the run configuration."""
    base = asdict(model.source) | {
        "arguments": model.build_args,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    description = {
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
        redact_tokens(json.dumps(description, indent=2, ensure_ascii=False)), encoding="utf-8"
    )
