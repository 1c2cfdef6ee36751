"""Jobs for the launcher: `torchrun --nproc_per_node N tests/job.py '[[NAME, SPEC, OUT], …]'`.

Each job leaves JSON or tensors in OUT. One launch does several, since starting costs more than most jobs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def gradient(spec: dict, out: Path) -> None:
    """Saves the gradient of the first two optimizer steps, by stock name, as the optimizer sees it."""
    import torch
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import hftl

    run, splits, task, kind = _open(spec)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    steps: list[dict[str, torch.Tensor]] = []

    def keep(optimizer, *_):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        grads = {
            names[id(p)]: p.grad.clone(memory_format=torch.contiguous_format)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        steps.append(grads)

    hook = register_optimizer_step_pre_hook(keep)
    history = hftl.fit(accelerator, model, task, splits, run)
    hook.remove()
    if accelerator.is_main_process:
        for number, grads in enumerate(steps):
            save_file(grads, out / f"step{number}.safetensors")
        (out / "lrs.json").write_text(
            json.dumps([record.get("lr/head") for record in history.records if "lr/head" in record])
        )


def recipe(spec: dict, out: Path) -> None:
    """Runs a recipe's main; with `stop_after`, one process is sent a SIGTERM when it has done that many steps."""
    from breaks import no_pictures
    from conftest import load_recipe
    from launch import stopping_after

    from hftl.errors import Stopped

    no_pictures()
    run, _, _, _ = _open(spec, prepared=False)
    wanted = spec.get("stop_after")
    with stopping_after(wanted):
        try:
            load_recipe(spec["recipe"]).main(run)
            assert not wanted, "it did not stop"
        except Stopped:
            assert wanted


def faulty(spec: dict, out: Path) -> None:
    """Trains while losses of rows become NaN or memory is short; leaves what happened and the weights."""
    import torch
    from safetensors.torch import save_file

    import hftl
    from hftl.training.training_state import trainable_state

    run, splits, task, _ = _open(spec)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    loss, forward, calls = task.loss, model.forward, []

    def poisoned(outputs, batch):
        bad = torch.isin(batch["index"], torch.tensor(spec.get("poison", []))) & model.training
        return torch.where(bad, torch.nan, loss(outputs, batch))

    def cramped(inputs):
        rows = len(next(iter(inputs.values())))
        most = spec.get("fits_training" if model.training else "fits_evaluation", rows)
        if rows > most and (spec.get("on_rank") in (None, accelerator.process_index)):
            raise torch.OutOfMemoryError("out of memory (injected)")
        calls.append((model.training, rows))
        return forward(inputs)

    task.loss, model.forward = poisoned, cramped
    found = {"error": None}
    try:
        history = hftl.fit(accelerator, model, task, splits, run)
        found |= {"steps": history.steps, "skipped": history.skipped}
    except hftl.HftlError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["rows"] = sorted({rows for training, rows in calls if training})
    (out / f"found{accelerator.process_index}.json").write_text(json.dumps(found))
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in trainable_state(model).items()}
    save_file(weights, out / f"weights{accelerator.process_index}.safetensors")


def _open(spec: dict, prepared: bool = True):
    import hftl
    from hftl.config.parse import parse_config
    from hftl.tasks.registry import TASKS

    run = parse_config(hftl.RunConfig(), spec["flags"])
    kind = TASKS[spec["recipe"]]
    return (*hftl.setup_run(run, kind), kind) if prepared else (run, None, None, kind)


if __name__ == "__main__":
    from accelerate.state import AcceleratorState, GradientState

    from hftl.logging import leave_process_group

    try:
        for job, spec, out in json.loads(sys.argv[1]):
            Path(out).mkdir(parents=True, exist_ok=True)
            {"gradient": gradient, "recipe": recipe, "faulty": faulty}[job](spec, Path(out))
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
    finally:
        leave_process_group()
