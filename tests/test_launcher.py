"""`hftl.launcher`: processes without a process group, and CPU threads of launched processes."""

import json
import os
import subprocess
import sys

import pytest
from accelerate import PartialState
from conftest import ROOT

from hftl import launcher
from hftl.cli.main import run_with_launcher
from hftl.launcher import launch_problem, set_cpu_threads, threads_option, usable_cores

UNCONNECTED = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
LAUNCHED = {"OMP_NUM_THREADS": "1", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
"""Variables that `accelerate launch` sets."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *LAUNCHED)
STUB = """
import json, os, subprocess, sys
program = [sys.executable, "-c", sys.argv[2]]
sys.exit(subprocess.run(program, env={**os.environ, **json.loads(sys.argv[1])}).returncode)
"""


def run_launched(code: str, user_env: dict[str, str], launcher_env: dict[str, str], *options: str) -> str:
    """Returns the output of `code` in a child of a stub launcher that has `user_env` and sets `launcher_env`."""
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", STUB, json.dumps(launcher_env), code, *options],
        env={**environment, "PYTHONPATH": str(ROOT), **user_env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Processes


def test_recipe_rejects_unconnected_cpu_processes(forks, text_flags, tmp_path):
    flags = text_flags(tmp_path / "run")
    statuses, output = forks.run(flags, tmp_path / "logs", processes=2, environment=UNCONNECTED)
    assert statuses == [2, 2], output
    command = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 text_classification.py --data.source="
    assert output.count("ACCELERATE_USE_CPU: not true") == output.count(command) == 1
    assert not (tmp_path / "run").exists() and not forks.running


@pytest.mark.parametrize("command", ["'predict', 'none', 'text'", "'evaluate', 'none'", "'features', 'a', '--model=b'"])
def test_command_rejects_unconnected_cpu_processes(command, forks, tmp_path):
    code = f"from hftl.cli.main import main; main([{command}, '--output=out.csv'])"
    words = ["python", "-c", code]
    statuses, output = forks.command(words, tmp_path / "logs", processes=2, cwd=tmp_path, **UNCONNECTED)
    assert statuses == [2, 2] and "ACCELERATE_USE_CPU: not true" in output, output


def test_launch_problem_depends_on_device_and_flag(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(PartialState, "default_device", property(lambda self: device))
    import torch

    device = torch.device("cpu")
    for world, expected in (("", None), ("1", None), ("4", "the 4 processes")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert launch_problem() is expected or expected in launch_problem()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "torchrun" not in launch_problem() and "on all machines" in launch_problem()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch_problem() is None
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    device = torch.device("cuda")
    assert launch_problem() is None


def test_launch_problem_names_processes_never_started(monkeypatch):
    user_env = {"CUDA_VISIBLE_DEVICES": ""}
    launcher_env = {**LAUNCHED, "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}
    code = "import hftl.launcher; print(hftl.launcher.launch_problem())"
    assert run_launched(code, user_env, launcher_env).startswith("--num_processes:")
    # MASTER_PORT is set by the user
    assert run_launched(code, {**user_env, "MASTER_PORT": "29500"}, launcher_env) == "None"
    # one process of torchrun is complete
    torchrun_env = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29500", "WORLD_SIZE": "1"}
    assert run_launched(code, user_env, torchrun_env) == "None"


# Threads


@pytest.mark.parametrize(
    ("user_env", "launcher_env", "options", "expected"),
    [
        ({}, LAUNCHED, [], 1.0),
        ({}, {**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}, [], 0.5),
        ({"OMP_NUM_THREADS": "1"}, LAUNCHED, [], None),
        ({"MKL_NUM_THREADS": "1"}, LAUNCHED, [], None),
        ({}, LAUNCHED, ["--num-cpu-threads-per-process=1"], None),
        ({}, {"OMP_NUM_THREADS": "1"}, [], None),
    ],
)
def test_launched_threads_replaces_only_launcher_default(user_env, launcher_env, options, expected):
    code = "import hftl.launcher; print(hftl.launcher.launched_threads())"
    assert run_launched(code, user_env, launcher_env, *options) == str(
        expected and max(1, int(usable_cores() * expected))
    )


def test_accelerate_launch_uses_all_cores(tmp_path):
    """With the real launcher, whose variables `launched_threads` depends on."""
    (tmp_path / "job.py").write_text(
        "from hftl.launcher import build_accelerator, usable_cores\n"
        "import torch\n"
        "before = torch.get_num_threads()\n"
        "build_accelerator()\n"
        "print(before, torch.get_num_threads() == usable_cores())\n"
    )
    program = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", str(tmp_path / "job.py")]
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout.split() == ["1", "True"], done.stdout + done.stderr


def test_set_cpu_threads_restores_earlier_number():
    import torch

    before = torch.get_num_threads()
    set_cpu_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    set_cpu_threads()
    assert torch.get_num_threads() == before


def test_recipe_logs_and_records_threads(forks, text_flags, tmp_path):
    flags = text_flags(tmp_path / "run", **{"train.max_steps": 1, "train.num_threads": 2})
    statuses, output = forks.run(flags, tmp_path / "logs", faults=[("skip_report", [])])
    assert statuses == [0] and output.count("2 CPU thread(s) each") == 1, output
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["cpu_threads"] == 2


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (["--num_processes=2"], {}, 4),
        (["--num_processes", "16", "--num-machines", "2"], {}, 1),
        (["--config_file", "accelerate.yaml"], {}, 8),
        (["--config_file", "accelerate.yaml", "--num_processes", "4"], {}, 2),
        (["--config_file", "absent.yaml"], {}, None),
        ([], {}, None),
        (["--num_processes=2", "--num_cpu_threads_per_process=3"], {}, None),
        (["--num_processes=2"], {"OMP_NUM_THREADS": "1"}, None),
    ],
)
def test_threads_option_divides_cores(options, environment, expected, tmp_path, monkeypatch):
    (tmp_path / "accelerate.yaml").write_text("num_processes: 1\nnum_machines: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads_option(options) == ([] if expected is None else ["--num_cpu_threads_per_process", str(expected)])


def test_hftl_run_passes_threads_to_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    command = []
    monkeypatch.setattr(os, "execv", lambda program, words: command.extend(words))
    run_with_launcher(["--num_processes=1", "text_classification", "--output_dir=x"])
    assert command[command.index("--num_cpu_threads_per_process") + 1] == str(usable_cores())


def test_cpu_quota_limits_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_CGROUPS", tmp_path)
    for content, expected in (("max 100000", 4), ("150000 100000", 1.5), ("900000 100000", 4), ("broken", 4)):
        (tmp_path / "cpu.max").write_text(content)
        assert launcher._cpu_quota(4) == expected
