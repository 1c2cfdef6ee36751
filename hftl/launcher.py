"""Checks of the launcher: processes without a process group, and the CPU threads per process."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hftl.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_MARKS = ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "TORCHELASTIC_RUN_ID")
"""Environment variables that only `accelerate launch` or `torchrun` sets."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that limit threads."""
_CGROUPS = Path("/sys/fs/cgroup")
_thread_counts = (0, 0)
"""CPU threads of torch before a run in this process, and as set by the run."""


def launch_problem() -> str | None:
    """Returns why Accelerate would not create a process group, with the command that does; None if it would.

    On CPUs, Accelerate creates a process group only if ACCELERATE_USE_CPU is true; otherwise each process trains alone
    in the same run folder. `accelerate launch` starts one CPU process for any `--num_processes`. No device is used.
    """
    world = max(map(_positive, ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")))
    # `accelerate launch` sets MASTER_PORT for several processes only; torchrun sets it for one process too
    suspicious = world == 1 and "MASTER_PORT" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    launcher = _launcher() if suspicious else None
    several_requested = launcher is not None and "MASTER_PORT" not in launcher[0]
    if world == 1 and not several_requested:
        return None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # an uninitialized state: reading its device creates no process group
    device = "cpu" if use_cpu else PartialState.__new__(PartialState).default_device.type
    if device not in ("cpu", "mps") or (use_cpu and world > 1):
        return None
    number = str(world) if world > 1 else "N"
    command = f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {number} {shlex.join(_own_command())}"
    if world == 1:
        return (
            "--num_processes: is larger than 1, but accelerate launch starts only one process on a CPU. "
            f"Run `{command}`."
        )
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", number) == number
    instruction = f"Run `{command}`." if one_machine else "Set it on all machines."
    return (
        f"ACCELERATE_USE_CPU: not true, so Accelerate would create no process group for the {world} processes on this "
        f"device ({device}); allowed: true. {instruction}"
    )


def require_group() -> None:
    """Rejects processes for which Accelerate would not create a process group.

    Raises:
        ConfigError: `launch_problem` returned a message.
    """
    problem = launch_problem()
    if problem:
        raise ConfigError(problem)


def build_accelerator(num_threads: int | None = None, **options: Any) -> Accelerator:
    """Creates the Accelerator of this process and sets its CPU threads.

    Args:
        num_threads: CPU threads, at least 1. None keeps the current number, unless only the launcher has limited it.
        options: Arguments of `Accelerator`.

    Raises:
        ConfigError: Accelerate would not create a process group for the processes.
    """
    from accelerate import Accelerator

    require_group()
    accelerator = Accelerator(**options)
    set_cpu_threads(num_threads)
    return accelerator


def set_cpu_threads(num_threads: int | None = None) -> None:
    """Sets the CPU threads of torch and of numeric libraries such as OpenBLAS and OpenMP.

    Args:
        num_threads: CPU threads, at least 1. None keeps the current number, unless only the launcher has limited it.
    """
    global _thread_counts
    import torch

    now = torch.get_num_threads()
    before = _thread_counts[0] if now == _thread_counts[1] else now  # an earlier run may have changed it
    launched = launched_threads() if num_threads is None and before == 1 else None
    number = num_threads or launched or before
    if number != now:
        from threadpoolctl import threadpool_limits  # dependency of scikit-learn

        torch.set_num_threads(number)
        threadpool_limits(number)
    if launched:
        os.environ["OMP_NUM_THREADS"] = str(launched)  # for libraries imported later
    _thread_counts = before, number


def launched_threads() -> int | None:
    """Returns the CPU threads of this process if only the launcher has limited them (to 1), else None."""
    launcher = _launcher()
    if launcher is None or not launcher[0].keys().isdisjoint(_THREADS):
        return None
    if any(word.replace("-", "_").startswith("__num_cpu_threads") for word in launcher[1]):
        return None
    return max(1, usable_cores() // _positive("LOCAL_WORLD_SIZE"))


def threads_option(options: Sequence[str]) -> list[str]:
    """Returns the option that divides the cores among the processes; `accelerate launch` sets 1 thread by default.

    Args:
        options: Options of `accelerate launch`. The list is empty if neither they nor the configuration file set the
            number of processes; each process then sets its threads itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config_file", "num_processes", "num_machines", "num_cpu_threads_per_process"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    values = vars(parser.parse_known_args(list(options))[0])
    if values["num_cpu_threads_per_process"] or not os.environ.keys().isdisjoint(_THREADS):
        return []
    try:
        file = yaml.safe_load(Path(values["config_file"]).read_text(encoding="utf-8")) if values["config_file"] else {}
        processes = int(values["num_processes"] or file["num_processes"])
        machines = int(values["num_machines"] or file.get("num_machines") or 1)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return []  # accelerate reports invalid options
    return ["--num_cpu_threads_per_process", str(max(1, usable_cores() * max(1, machines) // max(1, processes)))]


def usable_cores() -> int:
    """Returns the number of physical cores that this process may use, at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        import psutil

        return psutil.cpu_count(logical=False) or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), int(_cpu_quota(len(cores)))))


def _cpu_quota(cores: int) -> float:
    """Returns the CPU quota of a container or batch job (cgroup v2) in cores, at most `cores`."""
    quota = float(cores)
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = _CGROUPS.joinpath(*(line.removeprefix("0::/") for line in lines if line.startswith("0::")))
        for folder in (group, *group.parents):
            if folder.is_relative_to(_CGROUPS) and (folder / "cpu.max").is_file():
                limit, period = (folder / "cpu.max").read_text().split()
                quota = quota if limit == "max" else min(quota, int(limit) / int(period))
    return quota


def _launcher() -> tuple[dict[str, str], list[str]] | None:
    """Returns environment and command line of the launcher that started this process, or None without a launcher.

    The launcher is the nearest ancestor without the variables that launchers set. Variables missing from its own
    environment are its defaults, not set by the user.
    """
    import psutil  # dependency of accelerate

    if os.environ.keys().isdisjoint(_MARKS):
        return None
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            environment = process.environ()
            if environment.keys().isdisjoint(_MARKS):
                return environment, process.cmdline()
    return None


def _own_command() -> list[str]:
    """Returns the arguments of the Python command of this process: script or module, and its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # run as a script, a package's __main__.py would shadow modules of the standard library by its folder
    start = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return [*start, *sys.argv[1:]]


def _positive(variable: str) -> int:
    """Returns the value of an integer environment variable of a launcher, at least 1."""
    value = os.environ.get(variable, "")
    return max(1, int(value)) if value.isdecimal() else 1
