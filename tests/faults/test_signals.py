"""Asked to stop at any moment: all processes agree on the step, save, end with status 75; a second signal kills."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from forked import QUIET
from launch import ENV, ROOT, free_port
from test_kills import steps_of
from test_resume import assert_equal

from hftl.training.signals import ECHO_S

BOUND_S = 20
"""From signal to end, on a busy machine; the figures printed are far below."""


def stop(attempt, number, **whom):
    """Sends a signal; returns the exit statuses and the seconds until all had ended."""
    sent = time.monotonic()
    attempt.send(number, **whom)
    statuses = attempt.wait(BOUND_S)
    return statuses, time.monotonic() - sent


PLACES = {
    "prepare": ("hftl.run.setup.load_splits", ""),
    "an evaluation of fit": ("hftl.training.validation.evaluate_rows", ""),
    "the last evaluation of fit": ("hftl.training.validation.evaluate_rows", ""),
    "evaluate": ("hftl.evaluation.evaluate.TableWriter.write", ""),
    "publish": ("hftl.artifacts.save_run.save_artifact", ""),
}


def test_one_process_is_asked_to_stop_anywhere(forks, text_flags, tmp_path):
    """One run stopped in training, then in all other places, and gone on with; then it is complete."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    more = {"train.max_steps": 24}
    assert forks.run(text_flags(tmp_path / "whole", **more), logs, faults=QUIET)[0] == [0]
    slowest = 0.0
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        attempt = forks.start(text_flags(out, **more), logs, faults=QUIET)
        attempt.until("train/loss")
        statuses, seconds = stop(attempt, number)
        slowest = max(slowest, seconds)
        assert statuses == [75], (name, attempt.said())
        said = attempt.said()
        step = int(re.search(rf"Stopped: stopped \({name}\) after step (\d+) of 24; the checkpoint is saved", said)[1])
        assert steps_of(out)[-1] == step and "Traceback" not in said
    for place in ("prepare", "an evaluation of fit", "evaluate", "publish"):
        marker = tmp_path / place
        attempt = forks.start(
            text_flags(out, **more), logs, faults=[*QUIET, ("pause", (*PLACES[place], str(marker), 0.5))]
        )
        attempt.until_exists(marker)
        statuses, seconds = stop(attempt, signal.SIGTERM)
        slowest = max(slowest, seconds)
        said = attempt.said()
        assert statuses == [75] and "Traceback" not in said and "Stopped: stopped (SIGTERM)" in said, (place, said)
    statuses, said = forks.run(text_flags(out, **more), logs, faults=QUIET)
    assert statuses == [0] and "going on after step 24 " in said, said
    assert_equal(out, tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    statuses, said = forks.run(text_flags(out, **more), logs, faults=QUIET)
    assert statuses == [0] and "is complete; nothing to do" in said and "fit:" not in said
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    statuses, said = forks.run(text_flags(out, **more, **{"train.lr": 0.5}), logs, faults=QUIET)
    assert statuses == [2] and "train.lr was 0.001, now 0.5" in said, said
    print(f"\nsignals: 6 places on one process, slowest end {slowest:.2f} s after the signal; bitwise equal")


def test_a_signal_in_the_last_evaluation_is_heard(forks, text_flags, tmp_path):
    more = {"train.max_steps": 2, "train.eval_steps": 2}
    marker = tmp_path / "marker"
    pause = ("pause", (*PLACES["the last evaluation of fit"], str(marker), 0.5))
    attempt = forks.start(text_flags(tmp_path / "run", **more), tmp_path / "logs", faults=[*QUIET, pause])
    attempt.until_exists(marker)
    statuses, _ = stop(attempt, signal.SIGTERM)
    assert statuses == [75] and "after step 2 of 2" in attempt.said(), attempt.said()


@pytest.mark.parametrize("launched", [False, True], ids=["alone", "by torchrun"])
def test_a_second_signal_stops_at_once(launched, forks, text_flags, tmp_path):
    """What a launcher passes on at once is the same request; alone, the next one ends the process at once."""
    marker = tmp_path / "marker"
    pause = ("pause", ("hftl.run_folder.checkpoint.Checkpoints._write", "", str(marker), 60))
    environment = {"TORCHELASTIC_RUN_ID": "1"} if launched else {}
    attempt = forks.start(
        text_flags(tmp_path / "run"), tmp_path / "logs", faults=[*QUIET, pause], environment=environment
    )
    attempt.until("fit: 13 steps")
    attempt.until_exists(marker)
    attempt.send(signal.SIGTERM)
    attempt.until("a second signal stops immediately")
    if launched:
        attempt.send(signal.SIGTERM)
        time.sleep(ECHO_S + 0.2)
        os.kill(attempt.pids[0], 0)  # still there
    statuses, seconds = stop(attempt, signal.SIGTERM)
    assert statuses == [-signal.SIGTERM] and seconds < 5, (statuses, seconds)


def stop_often(count, forks, text_flags, tmp_path, seed):
    """Stops runs on two processes at random moments of their training: all ranks are asked, or only one."""
    rng, logs, slowest, stopped, runs = random.Random(seed), tmp_path / "logs", 0.0, 0, 0
    more = {"train.max_steps": 60, "train.logging_steps": 5, "train.eval_steps": 10, "train.batch_size_per_device": 3}
    more["checkpoint.save_steps"] = 25
    began = forks.start(text_flags(tmp_path / "whole", **more), logs, faults=QUIET, processes=2)
    began.until("fit: 60 steps")
    first = time.monotonic()
    began.until("validation: loss")
    duration = time.monotonic() - first
    assert began.wait() == [0, 0]
    while stopped < count:
        runs, out, done = runs + 1, tmp_path / f"run{runs}", False
        while not done:
            attempt = forks.start(text_flags(out, **more), logs, faults=QUIET, processes=2)
            if stopped < count:
                attempt.until("train/loss", "validation: loss")
                time.sleep(rng.uniform(0, 0.6 * duration))
            if stopped < count and "restored best checkpoint" not in attempt.said():  # else training is over
                statuses, seconds = stop(attempt, signal.SIGTERM, rank=rng.choice((None, 0, 1)))
            else:
                statuses, seconds = attempt.wait(), 0.0
            said = attempt.said()
            over = "step 60/60 validation" in said and statuses != [75, 75]  # one process alone, after training
            done = statuses == [0, 0] or "outside of training" in said or over
            if not done:
                assert statuses == [75, 75] and "Traceback" not in said + attempt.said(1), (statuses, said)
                step = int(re.search(r"Stopped: .* after step (\d+) of 60; the checkpoint is saved", said)[1])
                assert steps_of(out)[-1] == step
                assert "Stopped" not in attempt.said(1)  # said once
                stopped += 1
                slowest = max(slowest, seconds)
                done = False
            elif statuses != [0, 0]:  # too late: after training; not one of those that are counted
                assert forks.run(text_flags(out, **more), logs, faults=QUIET, processes=2)[0] == [0, 0]
        assert_equal(out, tmp_path / "whole")
    print(
        f"\nsignals: {stopped} on 2 processes, {runs} runs bitwise equal; slowest end {slowest:.2f} s after the signal"
    )


def test_two_processes_agree_on_the_step_when_one_or_both_are_asked(forks, text_flags, tmp_path):
    stop_often(2, forks, text_flags, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_are_asked_at_20_random_moments(forks, text_flags, tmp_path):
    stop_often(20, forks, text_flags, tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("number, workers", [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_to_the_whole_group(number, workers, forks, text_flags, tmp_path):
    """Ctrl-C reaches the processes that load data too."""
    more = {"train.max_steps": 60, "data.num_workers": workers, "train.logging_steps": 5}
    logs, out = tmp_path / "logs", tmp_path / "run"
    assert forks.run(text_flags(tmp_path / "whole", **more), logs, faults=QUIET)[0] == [0]
    attempt = forks.start(text_flags(out, **more), logs, faults=QUIET)
    attempt.until("train/loss")
    statuses, _ = stop(attempt, number, group=True)
    assert statuses == [75], attempt.said()
    assert forks.run(text_flags(out, **more), logs, faults=QUIET)[0] == [0]
    assert_equal(out, tmp_path / "whole")


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
def test_a_signal_to_the_real_launcher(launcher, number, group, text_flags, tmp_path):
    """The launcher's own status is not ours to choose; the state is saved, and the same command ends bitwise equal."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    more = {"train.max_steps": 60, "train.logging_steps": 5, "checkpoint.save_steps": "null"}

    def command(folder):
        start = [sys.executable, *LAUNCHERS[launcher], free_port()]
        return [*start, str(ROOT / "recipes" / "text_classification.py"), *text_flags(folder, **more)]

    def begin(folder, stream):
        environment = {**os.environ, **ENV}
        return subprocess.Popen(
            command(folder), stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
        )

    with log.open("w") as stream:
        launched = begin(out, stream)
        wait_for(lambda: "train/loss" in log.read_text(), log)
        sent = time.monotonic()
        (os.killpg if group else os.kill)(launched.pid, number)
        status = launched.wait(60)
        wait_for(lambda: steps_of(out), log)  # `accelerate launch` is gone before its process
        wait_for(lambda: "the checkpoint is saved" in log.read_text(), log)
    seconds = time.monotonic() - sent
    assert status != 0 and "Stopped: stopped (" in log.read_text(), log.read_text()
    with log.open("w") as stream:
        assert begin(out, stream).wait(120) == 0, log.read_text()
        assert begin(tmp_path / "whole", stream).wait(120) == 0
    assert "going on after step" in log.read_text()
    assert_equal(out, tmp_path / "whole")
    print(f"\nsignals: {launcher}, {number.name}: launcher's status {status}, saved {seconds:.1f} s after the signal")


def wait_for(condition, log, timeout=90):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_auto_starts_afresh_where_there_is_nothing_to_go_on_from(forks, text_flags, tmp_path):
    out, logs = tmp_path / "run", tmp_path / "logs"
    more = {"train.max_steps": 2, "checkpoint.save_steps": "null"}
    crash = ("crash", ("hftl.run_folder.checkpoint.Checkpoints.save", "", 1, "before"))
    assert forks.run(text_flags(out, **more), logs, faults=[*QUIET, crash])[0] == [9]  # a fresh folder, then no state
    statuses, said = forks.run(text_flags(out, **more), logs, faults=QUIET)
    assert statuses == [0] and "going on" not in said, said
    assert json.loads((out / "report.json").read_text())["complete"]
