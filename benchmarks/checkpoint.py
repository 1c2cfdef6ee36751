"""How long training stands still for a save of its state: copied and written in the background, or written at once.

`python -m benchmarks checkpoint [--model minilm|resnet] [--method full|lora|frozen] [--rounds 7]` saves the whole state
of a training (weights, AdamW's two moments, generators, history) after a few steps, with the code that `fit` uses, in
wall time of one thread. The plain writing of the same tensors, as a loop with `save_file` would do it, stands beside.
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
    """Prints milliseconds that training stands still, milliseconds until the state is on disk, and bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "resnet"), default="minilm")
    parser.add_argument("--method", choices=("full", "lora", "frozen"), default="full")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run, kind = _text(Path(folder)) if args.model == "minilm" else _image(Path(folder))
        keeper, training = _trained(replace(run, adapt=replace(run.adapt, method=args.method)), kind)
        rows = [_round(keeper, training, Path(folder)) for _ in range(args.rounds + 1)][1:]  # the first warms up
        size = sum(file.stat().st_size for file in next(keeper.store.folder.glob("step-*")).iterdir())
    names = ("stands still, background", "until it is on disk", "plain save_file, no fsync")
    found = {name: statistics.median(row[i] for row in rows) * 1e3 for i, name in enumerate(names)}
    print(f"\n{'save of ' + format(size / 1e6, '.1f') + ' MB':<28} ms (median of {len(rows)})")
    for name, value in found.items():
        print(f"{name:<28} {value:.1f}")
    background, foreground, plain = found.values()
    print(f"in the background training stands still for {background / foreground:.3f} of a save in the foreground")
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


def _trained(run: Any, kind: Any) -> tuple[Any, Any]:
    """Trains for three steps, and returns what the loop saves with, and what it saves."""
    import hftl
    from hftl.logging import suppress_logs
    from hftl.training import fit as loop

    caught: list[Any] = []

    class Caught(loop.Checkpointer):
        def check_disk_space(self, training: Any) -> None:
            caught.extend((self, training))

    with suppress_logs():
        run, splits, task = hftl.setup_run(replace(run, train=replace(run.train, max_steps=3)), kind)
        accelerator = hftl.create_accelerator(run)
        model = hftl.build_model(run, task.head)
        hftl.adapt(model, run.adapt)
        original, loop.Checkpointer = loop.Checkpointer, Caught
        try:
            hftl.fit(accelerator, model, task, splits, run)
        finally:
            loop.Checkpointer = original
    used, training = caught
    keeper = original(used.accelerator, run, used.store.folder.parent / "saves")
    return keeper, training


def _round(keeper: Any, training: Any, folder: Path) -> tuple[float, float, float]:
    """Returns seconds of standing still, seconds until the state is on disk, and those of a plain save."""
    from safetensors.torch import save_file

    from hftl.training.training_state import optimizer_tensors, trainable_state

    training.recorder.history.steps += 1
    started = time.perf_counter()
    keeper.save(training)
    still = time.perf_counter() - started
    keeper.flush(training)
    on_disk = time.perf_counter() - started
    started = time.perf_counter()
    for number, tensors in enumerate(
        (trainable_state(training.model), optimizer_tensors(training.model, training.optimizer))
    ):
        save_file({name: each.detach().contiguous() for name, each in tensors.items()}, folder / f"plain{number}")
    return still, on_disk, time.perf_counter() - started


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
