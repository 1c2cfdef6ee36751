"""The launcher of this process: processes that it leaves unconnected, and CPU threads that it limits."""

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
"""Variables that only a launcher sets: `accelerate launch`, `torchrun`."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user limits threads."""
_CGROUPS = Path("/sys/fs/cgroup")
_before_and_set = (0, 0)
"""Torch's CPU threads before a run of this process, and those that the run has set."""


def launch_problem() -> str | None:
    """Returns why Accelerate would not connect the processes that were requested, with the command that works.

    On CPUs, Accelerate forms a group only if ACCELERATE_USE_CPU is true; otherwise each process trains alone, in one
    run folder. `accelerate launch` starts one CPU process, whatever number it is given. No device is used here.
    """
    world = max(map(_positive, ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")))
    launcher = _launcher() if world == 1 and "MASTER_PORT" in os.environ else None
    asked = launcher is not None and "MASTER_PORT" not in launcher[0]  # which it sets for several processes
    if world == 1 and not asked:
        return None
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # a state that is not initialized: asking it for the device starts no process group
    device = "cpu" if use_cpu else PartialState.__new__(PartialState).default_device.type
    if device not in ("cpu", "mps") or (use_cpu and world > 1):
        return None
    number = str(world) if world > 1 else "N"
    command = f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {number} {shlex.join(_own_command())}"
    if world == 1:
        return (
            "--num_processes: accelerate launch was told to start several processes, but starts only one on a CPU. "
            f"Run `{command}`."
        )
    one_machine = os.environ.get("LOCAL_WORLD_SIZE", number) == number
    how = f"Run `{command}`." if one_machine else "Set it on all machines."
    return (
        f"ACCELERATE_USE_CPU: not true, so Accelerate would not connect the {world} processes on this device "
        f"({device}); allowed: true. {how}"
    )


def require_group() -> None:
    """Rejects processes that Accelerate would not connect.

    Raises:
        ConfigError: As `launch_problem` says.
    """
    problem = launch_problem()
    if problem:
        raise ConfigError(problem)


def build_accelerator(num_threads: int | None = None, **options: Any) -> Accelerator:
    """Returns the Accelerator of this process, with `options`, and sets its CPU threads.

    Args:
        num_threads: As in `set_cpu_threads`.
        options: Arguments of `Accelerator`.

    Raises:
        ConfigError: Accelerate would not connect the processes that were started.
    """
    from accelerate import Accelerator

    require_group()
    accelerator = Accelerator(**options)
    set_cpu_threads(num_threads)
    return accelerator


def set_cpu_threads(num_threads: int | None = None) -> None:
    """Sets the CPU threads of torch and of the numeric libraries.

    Args:
        num_threads: Threads, at least 1. None: as many as before, unless only the launcher has limited them.
    """
    global _before_and_set
    import torch

    now = torch.get_num_threads()
    before = _before_and_set[0] if now == _before_and_set[1] else now  # an earlier run here may have set its own
    launched = launched_threads() if num_threads is None and before == 1 else None
    number = num_threads or launched or before
    if number != now:
        from threadpoolctl import threadpool_limits  # comes with scikit-learn

        torch.set_num_threads(number)
        threadpool_limits(number)
    if launched:
        os.environ["OMP_NUM_THREADS"] = str(launched)  # for libraries that are loaded later
    _before_and_set = before, number


def launched_threads() -> int | None:
    """Returns the CPU threads for this process where only the launcher has limited them (to 1); None elsewhere."""
    launcher = _launcher()
    if launcher is None or not launcher[0].keys().isdisjoint(_THREADS):
        return None
    if any(word.replace("-", "_").startswith("__num_cpu_threads") for word in launcher[1]):
        return None
    return max(1, usable_cores() // _positive("LOCAL_WORLD_SIZE"))


def threads_option(options: Sequence[str]) -> list[str]:
    """Returns the option that gives each process its share of the cores; `accelerate launch` gives it 1 by default.

    Args:
        options: Those of `accelerate launch` so far. If neither they nor their configuration file say how many
            processes there will be, nothing is returned: each process then sets its threads itself.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config_file", "num_processes", "num_machines", "num_cpu_threads_per_process"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    given = vars(parser.parse_known_args(list(options))[0])
    if given["num_cpu_threads_per_process"] or not os.environ.keys().isdisjoint(_THREADS):
        return []
    try:
        file = yaml.safe_load(Path(given["config_file"]).read_text(encoding="utf-8")) if given["config_file"] else {}
        processes = int(given["num_processes"] or file["num_processes"])
        machines = int(given["num_machines"] or file.get("num_machines") or 1)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError):
        return []  # accelerate rejects what is wrong with them
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
    """Returns the cores' worth of time that a container or batch job grants (cgroup v2), at most `cores`."""
    quota = float(cores)
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = _CGROUPS.joinpath(*(line.removeprefix("0::/") for line in lines if line.startswith("0::")))
        for folder in (group, *group.parents):
            if folder.is_relative_to(_CGROUPS) and (folder / "cpu.max").is_file():
                granted, period = (folder / "cpu.max").read_text().split()
                quota = quota if granted == "max" else min(quota, int(granted) / int(period))
    return quota


def _launcher() -> tuple[dict[str, str], list[str]] | None:
    """Returns environment and command line of the launcher that started this process; None without one.

    It is the nearest ancestor that was itself started without the variables that launchers add. What it passes on
    without having received it is its own default, and not the user's choice.
    """
    import psutil  # comes with accelerate

    if os.environ.keys().isdisjoint(_MARKS):
        return None
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            environment = process.environ()
            if environment.keys().isdisjoint(_MARKS):
                return environment, process.cmdline()
    return None


def _own_command() -> list[str]:
    """Returns the script or module of this process, and its arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # a package's __main__.py would not start as a script: its folder would hide modules of the standard library
    start = ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]
    return [*start, *sys.argv[1:]]


def _positive(variable: str) -> int:
    """Returns the number in an environment variable of a launcher, at least 1."""
    value = os.environ.get(variable, "")
    return max(1, int(value)) if value.isdecimal() else 1
