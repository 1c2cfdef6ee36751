"""Launch of recipes and jobs in separate processes."""

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
    """Runs jobs of tests/job.py in sequence with gloo, and returns their output.

    Args:
        processes: Number of processes.
        jobs: Name, specification and output folder of each job.
        timeout: Seconds.
        forks: Fork server (tests/forked.py) that starts the processes instead of torchrun.
        logs: Folder for the output of the processes; needed with `forks`.
    """
    arguments = json.dumps([[job, spec, str(out)] for job, spec, out in jobs])
    # `accelerate launch` sets it; it must not override the accumulation of the run
    environment = {**ENV, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
    if forks is not None:
        words = ["python", ROOT / "tests" / "job.py", arguments]
        statuses, output = forks.command(words, logs, timeout, processes, **environment)
        assert statuses == [0] * processes, output[-6000:]
        return output
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, "--master_port", free_port(), str(ROOT / "tests" / "job.py"), arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def flags(source, model, output, method="full", **settings) -> list[str]:
    """Returns the command-line flags of a recipe; `train__lr=0` becomes `--train.lr=0`."""
    values = {
        "data.source": source,
        "model.name": model,
        "output_dir": output,
        "adapt.method": method,
        "train.trackers": "[tensorboard]",
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    return [f"--{name}={value}" for name, value in values.items()]


@contextmanager
def stopping_after(step: int | None):
    """Makes the last process send itself a SIGTERM during `step`, which becomes the last one."""
    from hftl.training import fit

    set_rates = fit.set_rates

    def set_rates_and_stop(optimizer, config, done, total):
        last = int(os.environ.get("WORLD_SIZE", "1")) - 1
        if int(os.environ.get("RANK", "0")) == last and step is not None and done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return set_rates(optimizer, config, done, total)

    fit.set_rates = set_rates_and_stop
    try:
        yield
    finally:
        fit.set_rates = set_rates
