"""Everything that the future of a training depends on, as tensors and JSON values, and back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from hftl.models.task_model import TaskModel

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def trainable_state(model: TaskModel) -> dict[str, Tensor]:
    """Returns what training can change: parameters that learn, and all buffers."""
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return learning | dict(model.named_buffers())


def is_finite(model: TaskModel) -> bool:
    """Whether all weights and running statistics are numbers."""
    return all(
        bool(tensor.isfinite().all()) for tensor in trainable_state(model).values() if tensor.is_floating_point()
    )


def frozen_fingerprint(model: TaskModel) -> str:
    """Returns a hash of the weights that training does not change: a checkpoint holds only the others.

    It tells another model or another revision, not every change that one could make up (`torch.hash_tensor` is an XOR).
    """
    moved = trainable_state(model)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in moved:
            digest.update(f"{name} {tuple(parameter.shape)} {torch.hash_tensor(parameter.detach()).item()}\n".encode())
    return digest.hexdigest()


def broadcast(accelerator: Accelerator, into: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies tensors, which only the main process has, into those of all processes, by name."""
    from accelerate.utils import broadcast

    with torch.no_grad():
        for name, tensor in into.items():
            if accelerator.is_main_process:
                tensor.copy_(saved[name])
            if accelerator.num_processes > 1:
                tensor.copy_(cast(Tensor, broadcast(tensor.detach().clone(), from_process=0)))


def optimizer_tensors(model: TaskModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's tensors as `PARAMETER|NAME`, such as `net.fc.weight|exp_avg`."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    accelerator: Accelerator, model: TaskModel, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` returned; `saved` is needed on the main process alone."""
    from accelerate.utils import broadcast_object_list

    parameters = dict(model.named_parameters())
    layout = {key: (value.shape, value.dtype) for key, value in saved.items()}
    layout = broadcast_object_list([layout])[0] if accelerator.num_processes > 1 else layout
    state: dict[str, Tensor] = {}
    for key, (shape, dtype) in layout.items():
        name, _, kind = key.rpartition("|")
        parameter = parameters[name]
        # moments lie in memory as their parameter does: the fused kernels go through both side by side
        same = shape == parameter.shape and kind != "step"
        device = parameter.device if same or accelerator.device.type != "cpu" else torch.device("cpu")
        value = torch.empty_like(parameter, dtype=dtype) if same else torch.empty(shape, dtype=dtype, device=device)
        optimizer.state[parameter][kind] = state[key] = value
    broadcast(accelerator, state, saved)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns this process's random generators, as JSON values."""
    generator = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**generator, "state": {**generator["state"], "key": generator["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def load_random_state(device: torch.device, state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
