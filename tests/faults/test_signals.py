"""Stop signals: all processes stop after the same step, save a checkpoint and exit with status 75."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from forked import NO_REPORT
from launch import ENV, ROOT, free_port
from test_crash_recovery import steps_of
from test_resume import assert_equal

from hftl.training.signals import ECHO_S

BOUND_S = 20
"""Maximum seconds from signal to exit on a busy machine; printed values are far below."""


def stop(attempt, number, **target):
    """Sends a signal; returns the exit statuses and the seconds until all processes have ended."""
    sent = time.monotonic()
    attempt.send(number, **target)
    statuses = attempt.wait(BOUND_S)
    return statuses, time.monotonic() - sent


STAGES = {
    "setup": ("hftl.run.setup.load_usable_splits", ""),
    "evaluation during training": ("hftl.training.validation.evaluate_rows", ""),
    "last evaluation during training": ("hftl.training.validation.evaluate_rows", ""),
    "evaluate": ("hftl.evaluation.evaluate.TableWriter.write", ""),
    "save": ("hftl.artifacts.save_run.save_artifact", ""),
}


def test_stop_signal_at_any_stage_preserves_results(forks, text_flags, tmp_path):
    """Stops one run in training, then in all other stages, and resumes it until it is complete."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    settings = {"train.max_steps": 24}
    assert forks.run(text_flags(tmp_path / "reference", **settings), logs, faults=NO_REPORT)[0] == [0]
    slowest = 0.0
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        attempt = forks.start(text_flags(out, **settings), logs, faults=NO_REPORT)
        attempt.until("train/loss")
        statuses, seconds = stop(attempt, number)
        slowest = max(slowest, seconds)
        assert statuses == [75], (name, attempt.output())
        output = attempt.output()
        message = rf"Stopped: stopped \({name}\) after step (\d+) of 24; the checkpoint is saved"
        step = int(re.search(message, output)[1])
        assert steps_of(out)[-1] == step and "Traceback" not in output
    for stage in ("setup", "evaluation during training", "evaluate", "save"):
        marker = tmp_path / stage
        attempt = forks.start(
            text_flags(out, **settings), logs, faults=[*NO_REPORT, ("pause", (*STAGES[stage], str(marker), 0.5))]
        )
        attempt.until_exists(marker)
        statuses, seconds = stop(attempt, signal.SIGTERM)
        slowest = max(slowest, seconds)
        output = attempt.output()
        assert statuses == [75] and "Stopped: stopped (SIGTERM)" in output, (stage, output)
        assert "Traceback" not in output, (stage, output)
    statuses, output = forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)
    assert statuses == [0] and "resumed after step 24 " in output, output
    assert_equal(out, tmp_path / "reference")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    statuses, output = forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)
    assert statuses == [0] and "is complete; nothing to do" in output and "train: step" not in output
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    statuses, output = forks.run(text_flags(out, **settings, **{"train.lr": 0.5}), logs, faults=NO_REPORT)
    assert statuses == [2] and "train.lr was 0.001, now 0.5" in output, output
    print(f"\nsignals: 6 stages on one process, slowest end {slowest:.2f} s after the signal; bitwise equal")


def test_signal_in_last_evaluation_exits_with_status_75(forks, text_flags, tmp_path):
    settings = {"train.max_steps": 2, "train.eval_steps": 2}
    marker = tmp_path / "marker"
    pause = ("pause", (*STAGES["last evaluation during training"], str(marker), 0.5))
    attempt = forks.start(text_flags(tmp_path / "run", **settings), tmp_path / "logs", faults=[*NO_REPORT, pause])
    attempt.until_exists(marker)
    statuses, _ = stop(attempt, signal.SIGTERM)
    assert statuses == [75] and "after step 2 of 2" in attempt.output(), attempt.output()


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "by torchrun"])
def test_second_signal_stops_immediately(launched, forks, text_flags, tmp_path):
    """Without a launcher, the second signal ends the process; under a launcher, an echo within ECHO_S is ignored."""
    marker = tmp_path / "marker"
    pause = ("pause", ("hftl.run_folder.checkpoint.Checkpoints._write", "", str(marker), 60))
    environment = {"TORCHELASTIC_RUN_ID": "1"} if launched else {}
    attempt = forks.start(
        text_flags(tmp_path / "run"), tmp_path / "logs", faults=[*NO_REPORT, pause], environment=environment
    )
    attempt.until("train: 13 steps")
    attempt.until_exists(marker)
    attempt.send(signal.SIGTERM)
    attempt.until("a second signal stops immediately")
    if launched:
        attempt.send(signal.SIGTERM)
        time.sleep(ECHO_S + 0.2)
        os.kill(attempt.pids[0], 0)  # the process is alive
    statuses, seconds = stop(attempt, signal.SIGTERM)
    assert statuses == [-signal.SIGTERM] and seconds < 5, (statuses, seconds)


def stop_repeatedly(count, forks, text_flags, tmp_path, seed):
    """Stops runs on two processes at random moments of training, by a signal to one rank or to both."""
    rng, logs, slowest, stopped, runs = random.Random(seed), tmp_path / "logs", 0.0, 0, 0
    settings = {
        "train.max_steps": 60,
        "train.logging_steps": 5,
        "train.eval_steps": 10,
        "train.batch_size_per_device": 3,
        "checkpoint.save_steps": 25,
    }
    reference = forks.start(text_flags(tmp_path / "reference", **settings), logs, faults=NO_REPORT, processes=2)
    reference.until("train: 60 steps")
    started = time.monotonic()
    reference.until("validation: loss")
    duration = time.monotonic() - started
    assert reference.wait() == [0, 0]
    while stopped < count:
        runs, out, done = runs + 1, tmp_path / f"run{runs}", False
        while not done:
            attempt = forks.start(text_flags(out, **settings), logs, faults=NO_REPORT, processes=2)
            if stopped < count:
                attempt.until("train/loss", "validation: loss")
                time.sleep(rng.uniform(0, 0.6 * duration))
            if stopped < count and "restored best checkpoint" not in attempt.output():  # else training has ended
                statuses, seconds = stop(attempt, signal.SIGTERM, rank=rng.choice((None, 0, 1)))
            else:
                statuses, seconds = attempt.wait(), 0.0
            output = attempt.output()
            trained = "step 60/60, validation" in output and statuses != [
                75,
                75,
            ]  # after training
            done = statuses == [0, 0] or "outside of training" in output or trained
            if not done:
                assert statuses == [75, 75] and "Traceback" not in output + attempt.output(1), (statuses, output)
                step = int(re.search(r"Stopped: .* after step (\d+) of 60; the checkpoint is saved", output)[1])
                assert steps_of(out)[-1] == step
                assert "Stopped" not in attempt.output(1)  # output once
                stopped += 1
                slowest = max(slowest, seconds)
                done = False
            elif statuses != [0, 0]:  # after training: not counted
                assert forks.run(text_flags(out, **settings), logs, faults=NO_REPORT, processes=2)[0] == [0, 0]
        assert_equal(out, tmp_path / "reference")
    print(
        f"\nsignals: {stopped} on 2 processes, {runs} runs bitwise equal; slowest end {slowest:.2f} s after the signal"
    )


def test_stop_signal_on_two_processes_preserves_results(forks, text_flags, tmp_path):
    stop_repeatedly(2, forks, text_flags, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_20_stop_signals_on_two_processes_preserve_results(forks, text_flags, tmp_path):
    stop_repeatedly(20, forks, text_flags, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_signal_to_process_group_preserves_results(number, workers, forks, text_flags, tmp_path):
    """The signal reaches data loader workers too, as Ctrl-C does."""
    settings = {"train.max_steps": 60, "data.num_workers": workers, "train.logging_steps": 5}
    logs, out = tmp_path / "logs", tmp_path / "run"
    assert forks.run(text_flags(tmp_path / "reference", **settings), logs, faults=NO_REPORT)[0] == [0]
    attempt = forks.start(text_flags(out, **settings), logs, faults=NO_REPORT)
    attempt.until("train/loss")
    statuses, _ = stop(attempt, number, group=True)
    assert statuses == [75], attempt.output()
    assert forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)[0] == [0]
    assert_equal(out, tmp_path / "reference")


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "--main_process_port"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, number, group",
    [("torchrun", signal.SIGTERM, False), ("torchrun", signal.SIGINT, True), ("accelerate", signal.SIGTERM, False)],
    ids=["torchrun-TERM-launcher", "torchrun-INT-group", "accelerate-TERM-launcher"],
)
def test_signal_to_launcher_preserves_results(launcher, number, group, text_flags, tmp_path):
    """The exit status is that of the launcher; the checkpoint is saved and the resumed run is bitwise identical."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    settings = {"train.max_steps": 60, "train.logging_steps": 5, "checkpoint.save_steps": "null"}

    def command(folder):
        launch = [sys.executable, *LAUNCHERS[launcher], free_port()]
        return [*launch, str(ROOT / "recipes" / "text_classification.py"), *text_flags(folder, **settings)]

    def start(folder, stream):
        environment = {**os.environ, **ENV}
        return subprocess.Popen(
            command(folder), stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
        )

    with log.open("w") as stream:
        launched = start(out, stream)
        wait_for(lambda: "train/loss" in log.read_text(), log)
        sent = time.monotonic()
        (os.killpg if group else os.kill)(launched.pid, number)
        status = launched.wait(60)
        wait_for(lambda: steps_of(out), log)  # `accelerate launch` ends before its process
        wait_for(lambda: "the checkpoint is saved" in log.read_text(), log)
    seconds = time.monotonic() - sent
    assert status != 0 and "Stopped: stopped (" in log.read_text(), log.read_text()
    with log.open("w") as stream:
        assert start(out, stream).wait(120) == 0, log.read_text()
        assert start(tmp_path / "reference", stream).wait(120) == 0
    assert "resumed after step" in log.read_text()
    assert_equal(out, tmp_path / "reference")
    print(f"\nsignals: {launcher}, {number.name}: launcher status {status}, saved {seconds:.1f} s after the signal")


def wait_for(condition, log, timeout=90):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_resume_auto_without_checkpoint_starts_new_run(forks, text_flags, tmp_path):
    out, logs = tmp_path / "run", tmp_path / "logs"
    settings = {"train.max_steps": 2, "checkpoint.save_steps": "null"}
    crash = ("crash", ("hftl.run_folder.checkpoint.Checkpoints.save", "", 1, "before"))
    assert forks.run(text_flags(out, **settings), logs, faults=[*NO_REPORT, crash])[0] == [9]
    statuses, output = forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)
    assert statuses == [0] and "resumed after" not in output, output
    assert json.loads((out / "report.json").read_text())["complete"]
