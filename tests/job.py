"""Jobs for the launcher: `torchrun --nproc_per_node N tests/job.py '[[NAME, SPEC, OUT], …]'`.

Each job writes JSON or tensors to OUT. One launch runs several jobs, since startup takes longer than most jobs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def gradient(spec: dict, out: Path) -> None:
    """Saves the gradients that the optimizer uses in the first two steps, by parameter name."""
    import torch
    from safetensors.torch import save_file
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import hftl

    run, splits, task, _ = _open(spec)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    steps: list[dict[str, torch.Tensor]] = []

    def record(optimizer, *_):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        grads = {
            names[id(p)]: p.grad.clone(memory_format=torch.contiguous_format)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        steps.append(grads)

    hook = register_optimizer_step_pre_hook(record)
    history = hftl.fit(accelerator, model, task, splits, run)
    hook.remove()
    if accelerator.is_main_process:
        for number, grads in enumerate(steps):
            save_file(grads, out / f"step{number}.safetensors")
        (out / "lrs.json").write_text(
            json.dumps([record.get("lr/head") for record in history.records if "lr/head" in record])
        )


def recipe(spec: dict, out: Path) -> None:
    """Runs the main function of a recipe; with `stop_after`, one process receives a SIGTERM in that step."""
    from conftest import load_recipe
    from fault_injection import skip_report
    from launch import stopping_after

    from hftl.errors import Stopped

    skip_report()
    run, _, _, _ = _open(spec, setup=False)
    stop_after = spec.get("stop_after")
    with stopping_after(stop_after):
        try:
            load_recipe(spec["recipe"]).main(run)
            assert not stop_after, "it did not stop"
        except Stopped:
            assert stop_after


def faulty(spec: dict, out: Path) -> None:
    """Trains with injected NaN losses or OOM errors; saves the result and the weights."""
    import torch
    from safetensors.torch import save_file

    import hftl
    from hftl.training.training_state import trainable_state

    run, splits, task, _ = _open(spec)
    accelerator = hftl.create_accelerator(run)
    model = hftl.build_model(run, task.head)
    hftl.adapt(model, run.adapt)
    loss, forward, calls = task.loss, model.forward, []

    def nan_loss(outputs, batch):
        bad = torch.isin(batch["index"], torch.tensor(spec.get("nan_rows", []))) & model.training
        return torch.where(bad, torch.nan, loss(outputs, batch))

    def oom_forward(inputs):
        rows = len(next(iter(inputs.values())))
        limit = spec.get("train_limit" if model.training else "eval_limit", rows)
        if rows > limit and (spec.get("on_rank") in (None, accelerator.process_index)):
            raise torch.OutOfMemoryError("out of memory (injected)")
        calls.append((model.training, rows))
        return forward(inputs)

    task.loss, model.forward = nan_loss, oom_forward
    result = {"error": None}
    try:
        history = hftl.fit(accelerator, model, task, splits, run)
        result |= {"steps": history.steps, "skipped": history.skipped}
    except hftl.HftlError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["rows"] = sorted({rows for training, rows in calls if training})
    (out / f"result{accelerator.process_index}.json").write_text(json.dumps(result))
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in trainable_state(model).items()}
    save_file(weights, out / f"weights{accelerator.process_index}.safetensors")


def _open(spec: dict, setup: bool = True):
    import hftl
    from hftl.config.parse import parse_config
    from hftl.tasks.registry import TASKS

    run = parse_config(hftl.RunConfig(), spec["flags"])
    kind = TASKS[spec["recipe"]]
    return (*hftl.setup_run(run, kind), kind) if setup else (run, None, None, kind)


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
