"""What determines features, as hashes: the backbone, and the code of a task that is not ours."""

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


def code_identity(task: Task) -> list[str] | None:
    """Returns what tells the code of a task that is not hftl's own from another version; None where it has no file."""
    found = []
    for part in (task, getattr(task, "inputs", None), getattr(task, "target", None)):
        kind = type(part)
        if part is None or kind.__module__.split(".")[0] == "hftl":
            continue
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file is None or not Path(file).is_file():
            return None
        found.append(f"{kind.__qualname__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}")
    return found


def backbone_identity(model: TaskModel) -> str:
    """Returns a hash of the backbone: every weight and buffer, and how the network is built and wired.

    The head is left out, and so is dropout: neither plays a part in features.
    """
    from xxhash import xxh3_128  # SHA-256 would take as long as the forward passes of a hundred rows

    digest = xxh3_128()
    net = model.net
    modules = [
        f"{name} {type(module).__qualname__} {module.extra_repr()}"
        for name, module in net.named_modules()
        if not model.in_head(name) and not isinstance(module, nn.modules.dropout._DropoutNd)
    ]
    config: Any = getattr(net, "config", None)
    # timm's networks have no configuration; how they pool is not in their modules
    wiring = [getattr(net, name, None) for name in ("hftl_build_args", "pretrained_cfg", "global_pool")]
    described = [modules, wiring if config is None else _without_head(config.to_dict())]
    digest.update(json.dumps([type(net).__qualname__, described], default=repr, sort_keys=True).encode())
    tensors = [*net.named_parameters(), *net.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda entry: entry[0]):
        if not model.in_head(name):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_head(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a transformers configuration without what is about the head, dropout, or where it came from."""
    about = ("label", "problem_type", "dropout", "_name_or_path", "transformers_version", "architectures", "dtype")
    return {
        key: _without_head(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not any(word in key for word in about)
    }


def hashed(value: Any) -> str:
    """Returns a short name for JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
