"""Time that saving a checkpoint blocks training: in the background, compared with a synchronous save.

`python -m benchmarks checkpoint [--model minilm|resnet] [--method full|lora|frozen] [--rounds 7]` saves complete
checkpoints (weights, both AdamW moments, random states, history) after a few steps with the code of `fit`, in
wall-clock time of one thread. The baseline writes the same tensors by `safetensors.torch.save_file`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.step_overhead import _image, _text


def main(argv: list[str]) -> None:
    """Prints milliseconds that training is blocked, milliseconds until the checkpoint is on disk, and its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "resnet"), default="minilm")
    parser.add_argument("--method", choices=("full", "lora", "frozen"), default="full")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, task_class = _text(Path(folder)) if args.model == "minilm" else _image(Path(folder))
        checkpointer, training = _train(replace(run, adapt=replace(run.adapt, method=args.method)), task_class)
        # the first round is warm-up
        rounds = [_round(checkpointer, training, Path(folder)) for _ in range(args.rounds + 1)][1:]
        size = sum(file.stat().st_size for file in next(checkpointer.store.folder.glob("step-*")).iterdir())
    names = ("training blocked, background", "until on disk", "plain save_file, no fsync")
    times = {name: statistics.median(times[i] for times in rounds) * 1e3 for i, name in enumerate(names)}
    print(f"\n{'save of ' + format(size / 1e6, '.1f') + ' MB':<28} ms (median of {len(rounds)} rounds)")
    for name, value in times.items():
        print(f"{name:<28} {value:.1f}")
    background, foreground, plain = times.values()
    print(f"a background save blocks training for {background / foreground:.3f} of the time of a synchronous save")
    result = {
        "benchmark": "checkpoint",
        "model": args.model,
        "method": args.method,
        "bytes": size,
        "ms_background": round(background, 2),
        "ms_foreground": round(foreground, 2),
        "ms_plain": round(plain, 2),
        "ratio": round(background / foreground, 4),
    }
    print(json.dumps(result))


def _train(run: Any, task_class: Any) -> tuple[Any, Any]:
    """Trains for three steps and returns a checkpointer and the state that it saves."""
    import hftl
    from hftl.logging import suppress_logs
    from hftl.training import fit as fit_module

    captured: list[Any] = []

    class CapturingCheckpointer(fit_module.Checkpointer):
        def check_disk_space(self, training: Any) -> None:
            captured.extend((self, training))

    with suppress_logs():
        run, splits, task = hftl.setup_run(replace(run, train=replace(run.train, max_steps=3)), task_class)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        original, fit_module.Checkpointer = fit_module.Checkpointer, CapturingCheckpointer
        try:
            hftl.fit(accelerator, model, task, splits, run)
        finally:
            fit_module.Checkpointer = original
    used, training = captured
    return original(used.accelerator, run, used.store.folder.parent / "saves"), training


def _round(checkpointer: Any, training: Any, folder: Path) -> tuple[float, float, float]:
    """Returns seconds that training is blocked, seconds until the checkpoint is on disk, and seconds of `save_file`."""
    from safetensors.torch import save_file

    from hftl.training.training_state import optimizer_tensors, trainable_state

    training.recorder.history.steps += 1
    started = time.perf_counter()
    checkpointer.save(training)
    blocked = time.perf_counter() - started
    checkpointer.flush(training)
    on_disk = time.perf_counter() - started
    started = time.perf_counter()
    for number, tensors in enumerate(
        (trainable_state(training.model), optimizer_tensors(training.model, training.optimizer))
    ):
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / f"plain{number}")
    return blocked, on_disk, time.perf_counter() - started


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
