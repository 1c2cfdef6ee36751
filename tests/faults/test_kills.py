"""A run that is killed at any moment and started again ends as the one that was left alone."""

import json
import os
import random
import re
import shutil
import time

import pytest
from forked import QUIET
from test_resume import assert_equal

from hftl.run_folder.checkpoint import Checkpoints


def steps_of(folder):
    """Steps of the states that have their name."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial")


def kill_often(kills, forks, text_flags, tmp_path, seed):
    """Kills runs at random moments, from the very start to the last file, until there were enough; compares each."""
    rng, logs = random.Random(seed), tmp_path / "logs"
    began = time.monotonic()
    whole = forks.start(text_flags(tmp_path / "whole"), logs, faults=QUIET)
    assert whole.wait() == [0]
    duration = time.monotonic() - whole.started
    killed = in_a_save = runs = attempts = 0
    while killed < kills:
        runs += 1
        out, done = tmp_path / f"run{runs}", False
        while not done:
            attempt = forks.start(text_flags(out), logs, faults=QUIET)
            attempts += 1
            if killed < kills:
                time.sleep(rng.uniform(0, duration))
                attempt.send(9)
            status = attempt.wait()[0]
            if status == 0:
                duration = min(duration, time.monotonic() - attempt.started)  # the first one warmed up
            assert status in (0, -9), attempt.said()
            done = status == 0
            killed += not done
            in_a_save += not done and any(out.rglob("*.partial"))
        assert_equal(out, tmp_path / "whole")
    print(
        f"\nkills: {killed} of {attempts} processes killed, {in_a_save} while a file was being written, {runs} runs "
        f"finished, all bitwise equal; {time.monotonic() - began:.0f} s"
    )


@pytest.mark.slow
def test_killed_at_random_moments(forks, text_flags, tmp_path):
    kill_often(3, forks, text_flags, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_200_random_moments(forks, text_flags, tmp_path):
    kill_often(200, forks, text_flags, tmp_path, seed=0)


STEP = r"step-\d+'"  # a state that has its name
CRASHES = [
    ("hftl.run_folder.checkpoint.Checkpoints.save", "", 2, "before"),
    ("pathlib.Path.mkdir", r"step-\d+\.partial", 2, "after"),
    ("safetensors.torch.save_file", r"partial/weights", 2, "half"),
    ("os.rename", STEP, 2, "before"),
    ("os.rename", STEP, 2, "after"),
    ("shutil.rmtree", STEP, 1, "half"),
    ("os.replace", "best/weights", 1, "before"),
    ("pathlib.Path.write_text", r"history.jsonl.partial", 1, "half"),
    # the rest is for the slow suite
    ("hftl.run_folder.checkpoint._link", "", 2, "before"),
    ("hftl.run_folder.checkpoint._link", "", 2, "after"),
    ("safetensors.torch.save_file", r"partial/weights", 2, "after"),
    ("safetensors.torch.save_file", r"partial/optimizer", 2, "half"),
    ("safetensors.torch.save_file", r"partial/optimizer", 2, "after"),
    ("pathlib.Path.write_text", r"state.json", 2, "half"),
    ("pathlib.Path.write_text", r"state.json", 2, "after"),
    ("hftl.run_folder.checkpoint.sync", r"state.json", 2, "after"),
    ("pathlib.Path.write_text", r"manifest.json.partial", 2, "half"),
    ("os.replace", r"manifest.json", 2, "before"),
    ("os.replace", r"manifest.json", 2, "after"),
    ("hftl.run_folder.checkpoint.sync", r"checkpoints'", 2, "before"),
    ("shutil.rmtree", STEP, 1, "before"),
    ("shutil.rmtree", STEP, 1, "after"),
    ("safetensors.torch.save_file", r"best/weights", 1, "half"),
    ("os.replace", "best/weights", 1, "after"),
    ("os.replace", r"history.jsonl", 1, "before"),
    ("os.replace", r"history.jsonl", 1, "after"),
    ("os.replace", r"config.yaml", 1, "before"),
    ("shutil.copyfile", r"best", 1, "half"),
]
"""(function, arguments, call, moment): see breaks.crash. Every point of a save, and of what a resume writes."""


def crash_at_each(points, forks, text_flags, tmp_path):
    """One run that crashes at all points in turn; each time the newest state that has its name is gone on from."""
    out, logs, steps = tmp_path / "run", tmp_path / "logs", 2 * len(points) + 8
    more = {"train.max_steps": steps, "train.eval_steps": 1}
    assert forks.run(text_flags(tmp_path / "whole", **more), logs, faults=QUIET)[0] == [0]
    assert forks.run(text_flags(out, **more), logs, faults=[*QUIET, ("crash", ("os.rename", STEP, 3, "after"))])[0] == [
        9
    ]
    for point in points:
        before = steps_of(out)
        statuses, said = forks.run(text_flags(out, **more), logs, faults=[*QUIET, ("crash", point)])
        assert statuses == [9], (point, said)
        assert f"going on after step {before[-1]} " in said or "going on" not in said, (point, said)
        assert steps_of(out)[-1] >= before[-1], point
    left = [str(path) for path in out.rglob("*.partial") if path.parent.suffix != ".partial"]
    newest = steps_of(out)[-1]
    statuses, said = forks.run(text_flags(out, **more), logs, faults=QUIET)
    assert statuses == [0] and f"going on after step {newest} " in said, said
    assert all(f"resume: {path} was not finished when the run ended" in said for path in left)
    assert_equal(out, tmp_path / "whole")
    print(f"\ncrashes: {len(points)} points, each time the newest complete state was used; bitwise equal at the end")


def test_a_crash_at_points_of_a_save_leaves_the_older_state(forks, text_flags, tmp_path):
    crash_at_each(CRASHES[:8:2], forks, text_flags, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_crash_at_every_point_of_a_save_leaves_the_older_state(forks, text_flags, tmp_path):
    crash_at_each(CRASHES, forks, text_flags, tmp_path)


def test_a_crash_while_an_unfinished_run_is_cleared_can_be_gone_on_from(forks, text_flags, tmp_path):
    """A run that was killed before its first save is begun anew; nothing of it may stand in the way."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    never = {"train.max_steps": 2, "checkpoint.save_steps": "null", "train.eval_steps": 1}
    stops = ("hftl.run_folder.checkpoint.Checkpoints.save", "", 1, "before")
    for crash in (stops, ("shutil.rmtree", "checkpoints", 1, "after"), ("os.replace", "config.yaml", 1, "before")):
        assert forks.run(text_flags(out, **never), logs, faults=[*QUIET, ("crash", crash)])[0] == [9]
        assert (out / "config.yaml").is_file()
    statuses, said = forks.run(text_flags(out, **never), logs, faults=QUIET)
    assert statuses == [0] and "going on" not in said, said


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(file, bytes(content))


def _replace(file, content):
    file.unlink()  # another inode: `best` has names elsewhere
    file.write_bytes(content)


FILES = ("weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json")
DAMAGES = {
    **{f"a byte of {name} flipped": (lambda f, name=name: flip(f / name), "SHA-256 differs") for name in FILES},
    **{
        f"{name} cut": (lambda f, n=name: _replace(f / n, (f / n).read_bytes()[:-7]), "bytes instead of")
        for name in FILES
    },
    **{f"{name} deleted": (lambda f, n=name: (f / n).unlink(), f"{name} is missing") for name in FILES},
    "a file emptied": (lambda f: _replace(f / "weights.safetensors", b""), "has 0 bytes instead of"),
    "manifest deleted": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest emptied": (lambda f: _replace(f / "manifest.json", b""), "manifest.json is damaged"),
    "manifest cut": (lambda f: _replace(f / "manifest.json", b'{"files": {"weights'), "manifest.json is damaged"),
    "manifest of another kind": (lambda f: _replace(f / "manifest.json", b"[1, 2]"), "manifest.json is damaged"),
    "manifest without files": (lambda f: _replace(f / "manifest.json", b'{"files": {}}'), "state.json is missing"),
    "manifest not UTF-8": (lambda f: _replace(f / "manifest.json", b"\xff\xfe\x00"), "manifest.json is damaged"),
    "manifest a folder": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "manifest.json is damaged",
    ),
    "a folder in place of a file": (
        lambda f: ((f / "optimizer.safetensors").unlink(), (f / "optimizer.safetensors").mkdir()),
        "optimizer.safetensors",
    ),
    "folder emptied": (lambda f: [file.unlink() for file in f.iterdir()], "manifest.json is missing"),
    "a file in place of the folder": (lambda f: (shutil.rmtree(f), f.write_text("")), "is damaged"),
}


@pytest.fixture(scope="session")
def _halted(forks, tmp_path_factory):
    return tmp_path_factory.mktemp("halted")


@pytest.fixture
def halted(_halted, forks, text_flags):
    """A run folder with two states, whose process was killed; and the flags that go on, given a copy of it."""
    if not any(_halted.iterdir()):
        crash = ("crash", ("os.rename", STEP, 6, "after"))
        assert forks.run(text_flags(_halted / "run"), _halted / "logs", faults=[*QUIET, crash])[0] == [9]
        assert forks.run(text_flags(_halted / "whole"), _halted / "logs", faults=QUIET)[0] == [0]
    return _halted


def test_a_damaged_state_is_passed_over_with_its_reason(halted, tmp_path, capsys):
    older, newest = steps_of(halted / "run")[-2:]
    for number, (name, (damage, reason)) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        shutil.copytree(halted / "run" / "checkpoints", folder)
        damaged = folder / f"step-{newest:08d}"
        damage(damaged)
        assert Checkpoints(folder, 2).newest() == folder / f"step-{older:08d}", name
        said = capsys.readouterr().out
        assert f"resume: {damaged} is passed over: " in said and reason in said, (name, said)


def test_no_byte_of_a_state_can_change_unnoticed(halted, tmp_path, capsys):
    """Any byte of the manifest too: what it says is either the same, or does not hold."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(halted / "run" / "checkpoints", folder)
    newest = folder / f"step-{steps_of(halted / 'run')[-1]:08d}"
    rng = random.Random(0)
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for position in rng.sample(range(len(content)), 30):
            changed = bytearray(content)
            changed[position] ^= 1 << rng.randrange(8)
            _replace(file, bytes(changed))
            found = Checkpoints(folder, 2).newest()
            try:
                same = json.loads(bytes(changed)) == json.loads(content)
            except ValueError:
                same = False
            assert same or found != newest, (file.name, position)
        _replace(file, content)
    assert Checkpoints(folder, 2).newest() == newest


def test_runs_go_on_from_the_state_before_a_damaged_one_or_from_the_beginning(halted, forks, text_flags, tmp_path):
    steps = steps_of(halted / "run")
    older = steps[-2]
    for damaged in (steps[-1:], steps):
        out = tmp_path / str(len(damaged))
        shutil.copytree(halted / "run", out)
        for step in damaged:
            flip(out / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")
        statuses, said = forks.run(text_flags(out), tmp_path / "logs", faults=QUIET)
        assert statuses == [0], said
        assert said.count("is passed over: optimizer.safetensors is not what was written") == len(damaged)
        if len(damaged) == 1:
            assert f"going on after step {older} " in said
        else:
            assert f"WARNING: none of the {len(steps)} state(s) is whole; training starts FROM THE BEGINNING" in said
        assert_equal(out, halted / "whole")


def test_states_that_the_disk_does_not_give_are_not_given_up(halted, tmp_path, monkeypatch):
    """A disk that fails for now is no reason to begin anew, and to delete what may be whole."""
    from hftl.errors import CheckpointError

    def failing(path, *args, **kwargs):
        raise OSError(5, os.strerror(5), str(path))

    folder = tmp_path / "checkpoints"
    shutil.copytree(halted / "run" / "checkpoints", folder)
    monkeypatch.setattr("pathlib.Path.read_text", failing)
    with pytest.raises(CheckpointError, match=re.escape(os.strerror(5))):
        Checkpoints(folder, 2).newest()
    assert steps_of(tmp_path) == steps_of(halted / "run")
