"""The best weights so far: what training can change, as safetensors in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
    """

    def __init__(self, accelerator: Accelerator, model: TaskModel, folder: Path, larger_is_better: bool) -> None:
        self.accelerator = accelerator
        self.model = model
        self.file = folder / "checkpoints" / "best" / "weights.safetensors"
        self.sign = 1 if larger_is_better else -1
        self.score: tuple[float, float] | None = None
        self.since = 0
        """Evaluations since the best one."""

    def offer(self, value: float, loss: float) -> bool:
        """Keeps the current weights if `value` is the best so far; the lower loss decides between equals.

        Equal values are common: a validation split of 77 rows has 78 possible accuracies.

        Returns:
            Whether they were kept.
        """
        score = (self.sign * value, -loss)
        if self.score is not None and not score > self.score:
            self.since += 1
            return False
        self.score, self.since = score, 0
        if self.accelerator.is_main_process:
            from safetensors.torch import save_file

            self.file.parent.mkdir(parents=True, exist_ok=True)
            aside = self.file.with_suffix(".partial")
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self._moving().items()}, aside)
            aside.replace(self.file)
        return True

    def restore(self) -> None:
        """Puts the best weights back, on all processes."""
        if self.score is None:
            return
        from accelerate.utils import broadcast
        from safetensors.torch import load_file

        saved = load_file(self.file) if self.accelerator.is_main_process else {}
        with torch.no_grad():
            for name, tensor in self._moving().items():
                if name in saved:
                    tensor.copy_(saved[name])
                if self.accelerator.num_processes > 1:
                    tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))

    def _moving(self) -> dict[str, Tensor]:
        """Returns what training can change: parameters that learn, and all buffers."""
        learning = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return learning | dict(self.model.named_buffers())
