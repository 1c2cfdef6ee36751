"""Recipes and jobs in processes of their own, under the real launcher."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENV = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(processes: int, jobs: list[tuple[str, dict, Path]], timeout: float = 280, forks=None, logs=None) -> str:
    """Runs jobs of tests/job.py, one after the other, on gloo; returns what they printed.

    With `forks` the processes are forked from a server (tests/forked.py) instead of started by torchrun, and `logs` is
    the folder that gets what they print.
    """
    listed = json.dumps([[job, spec, str(out)] for job, spec, out in jobs])
    # what `accelerate launch` would set: it must not overrule the run's own accumulation
    environment = {**ENV, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    if forks is not None:
        words = ["python", ROOT / "tests" / "job.py", listed]
        statuses, said = forks.command(words, logs, timeout, processes, **environment)
        assert statuses == [0] * processes, said[-6000:]
        return said
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, "--master_port", free_port(), str(ROOT / "tests" / "job.py"), listed],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def flags(source, model, output, method="full", **more) -> list[str]:
    """Returns the flags of a recipe; `train__lr=0` is `--train.lr=0`."""
    settings = {
        "data.source": source,
        "model.name": model,
        "output_dir": output,
        "adapt.method": method,
        "train.trackers": "[tensorboard]",
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [f"--{name}={value}" for name, value in settings.items()]


@contextmanager
def stopping_after(step: int | None):
    """The last process sends itself a SIGTERM in the middle of a step, so that this one is the last."""
    from hftl.training import fit

    set_rates = fit.set_rates

    def stopping(optimizer, config, done, total):
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if int(os.environ.get("RANK", "0")) == last and step is not None and done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return set_rates(optimizer, config, done, total)

    fit.set_rates = stopping
    try:
        yield
    finally:
        fit.set_rates = set_rates
