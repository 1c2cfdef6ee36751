"""Cache key of features: hashes of the backbone, of custom task code and of JSON values."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hftl.models.task_model import TaskModel
from hftl.tasks.task import Task


def hash_task_code(task: Task) -> list[str] | None:
    """Returns names and source hashes of the classes of a custom task, [] for tasks of hftl; None without a file."""
    hashes = []
    for component in (task, getattr(task, "inputs", None), getattr(task, "target", None)):
        cls = type(component)
        if component is None or cls.__module__.split(".")[0] == "hftl":
            continue
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        if file is None or not Path(file).is_file():
            return None
        hashes.append(f"{cls.__qualname__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}")
    return hashes


def hash_backbone(model: TaskModel) -> str:
    """Returns a hash of the backbone: all weights and buffers, modules and configuration.

    Excludes head and dropout, which do not change features.
    """
    from xxhash import xxh3_128  # SHA-256 would take as long as the forward passes of 100 rows

    digest = xxh3_128()
    net = model.net
    modules = [
        f"{name} {type(module).__qualname__} {module.extra_repr()}"
        for name, module in net.named_modules()
        if not model.in_head(name) and not isinstance(module, nn.modules.dropout._DropoutNd)
    ]
    config: Any = getattr(net, "config", None)
    # timm networks have no configuration, and their pooling is not visible in their modules
    attributes = [getattr(net, name, None) for name in ("hftl_build_args", "pretrained_cfg", "global_pool")]
    architecture = [modules, attributes if config is None else _without_head(config.to_dict())]
    digest.update(json.dumps([type(net).__qualname__, architecture], default=repr, sort_keys=True).encode())
    tensors = [*net.named_parameters(), *net.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        if not model.in_head(name):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_head(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a transformers configuration without the entries of head, dropout and origin."""
    excluded = ("label", "problem_type", "dropout", "_name_or_path", "transformers_version", "architectures", "dtype")
    return {
        key: _without_head(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not any(word in key for word in excluded)
    }


def hash_json(value: Any) -> str:
    """Returns a hash of a JSON value, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
