"""Training state as tensors and JSON values: weights, optimizer, random generators."""

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
    """Returns everything that training can change: trainable parameters and all buffers, by name."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trainable | dict(model.named_buffers())


def is_finite(model: TaskModel) -> bool:
    """Whether all trainable weights and running statistics are finite."""
    return all(
        bool(tensor.isfinite().all()) for tensor in trainable_state(model).values() if tensor.is_floating_point()
    )


def frozen_fingerprint(model: TaskModel) -> str:
    """Returns a hash of the frozen weights, which checkpoints do not contain.

    It detects another model or revision, but not every possible change (`torch.hash_tensor` is an XOR).
    """
    trainable = trainable_state(model)
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in trainable:
            digest.update(f"{name} {tuple(parameter.shape)} {torch.hash_tensor(parameter.detach()).item()}\n".encode())
    return digest.hexdigest()


def broadcast(accelerator: Accelerator, targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copies `sources`, needed on the main process only, into `targets` on all processes, by name."""
    from accelerate.utils import broadcast

    with torch.no_grad():
        for name, tensor in targets.items():
            if accelerator.is_main_process:
                tensor.copy_(sources[name])
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
    """Restores the result of `optimizer_tensors`; `saved` is needed on the main process only."""
    from accelerate.utils import broadcast_object_list

    parameters = dict(model.named_parameters())
    layout = {key: (value.shape, value.dtype) for key, value in saved.items()}
    layout = broadcast_object_list([layout])[0] if accelerator.num_processes > 1 else layout
    state: dict[str, Tensor] = {}
    for key, (shape, dtype) in layout.items():
        name, _, entry = key.rpartition("|")
        parameter = parameters[name]
        # fused kernels need moments with the memory layout of their parameter
        is_moment = shape == parameter.shape and entry != "step"
        device = parameter.device if is_moment or accelerator.device.type != "cpu" else torch.device("cpu")
        value = (
            torch.empty_like(parameter, dtype=dtype) if is_moment else torch.empty(shape, dtype=dtype, device=device)
        )
        optimizer.state[parameter][entry] = state[key] = value
    broadcast(accelerator, state, saved)


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the random generators of this process, as JSON values."""
    generator = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**generator, "state": {**generator["state"], "key": generator["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def load_random_state(device: torch.device, state: dict[str, Any]) -> None:
    """Restores the result of `random_state`."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)
