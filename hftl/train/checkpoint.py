"""The best weights so far: what training can change, as safetensors in the run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from hftl.models.parts import TaskModel

if TYPE_CHECKING:
    from accelerate import Accelerator


class BestWeights:
    """Keeps the weights of the best evaluation on disk and puts them back at the end.

    Args:
        accelerator: Only its main process writes and reads; the others are sent the tensors.
        model: The model itself, not the one that Accelerate prepared.
        folder: The run folder.
        larger_is_better: How metric values compare.
        rows: Size of the validation split.
    """

    def __init__(
        self, accelerator: Accelerator, model: TaskModel, folder: Path, larger_is_better: bool, rows: int
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.file = folder / "checkpoints" / "best" / "weights.safetensors"
        self.sign = 1 if larger_is_better else -1
        self.rows = rows
        self.best: float | None = None
        self.since = 0
        """Evaluations since the best one."""

    def offer(self, value: float) -> bool:
        """Keeps the current weights unless they are worse than the best by more than one standard error.

        A validation split of 77 rows cannot tell 76 right answers from 75, and of weights that it cannot tell apart the
        later ones, trained longer at a falling rate, do better on new rows (the one-standard-error rule of Breiman et
        al. 1984, which takes the simplest of the models within one error; measured here: RESULTS.md). For metrics that
        are not shares of rows, such as the loss, the error is unknown and taken as 0.

        Returns:
            Whether they were kept.
        """
        if math.isnan(value):
            self.since += 1
            return False
        if self.best is None or self.sign * value > self.sign * self.best:
            self.best, self.since = value, 0
        else:
            self.since += 1
        if self.sign * value < self.sign * self.best - self._error():
            return False
        if self.accelerator.is_main_process:
            from safetensors.torch import save_file

            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside = self.file.with_suffix(".partial")
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._moving().items()}, aside)
            aside.replace(self.file)
        return True

    def _error(self) -> float:
        """Returns the standard error of the best value as a share of rows (Agresti and Coull 1998), else 0."""
        assert self.best is not None
        if self.sign < 0 or not 0 <= self.best <= 1:
            return 0.0
        share = (self.best * self.rows + 2) / (self.rows + 4)
        return math.sqrt(share * (1 - share) / self.rows)

    def share_buffers(self) -> None:
        """Gives all processes the running statistics of the main one, where they move: each has seen its own rows."""
        if self.accelerator.num_processes == 1 or self.model.frozen != "nothing":
            return
        from accelerate.utils import broadcast

        for buffer in self.model.buffers():
            buffer.copy_(cast(Tensor, broadcast(buffer.clone(), from_process=0)))

    def restore(self) -> None:
        """Puts the best weights back, on all processes."""
        if self.best is None:
            return
        from accelerate.utils import broadcast
        from safetensors.torch import load_file

        saved = load_file(self.file) if self.accelerator.is_main_process else {}
        with torch.no_grad():
            for name, tensor in self._moving().items():
                if name in saved:
                    tensor.copy_(saved[name])
                if self.accelerator.num_processes > 1:
                    tensor.copy_(cast(Tensor, broadcast(tensor.detach().clone(), from_process=0)))

    def _moving(self) -> dict[str, Tensor]:
        """Returns what training can change: parameters that learn, and all buffers."""
        learning = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return learning | dict(self.model.named_buffers())
