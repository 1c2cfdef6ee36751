"""Crash recovery: kills, crashes at every point of a save, and damaged checkpoints."""

import json
import os
import random
import re
import shutil
import time

import pytest
from forked import NO_REPORT
from test_resume import assert_equal

from hftl.run_folder.checkpoint import Checkpoints


def steps_of(folder):
    """Returns the steps of complete checkpoints."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".partial")


def kill_often(kills, forks, text_flags, tmp_path, seed):
    """Kills runs at random moments from start to end, resumes them, and compares each with the reference."""
    rng, logs = random.Random(seed), tmp_path / "logs"
    started = time.monotonic()
    reference = forks.start(text_flags(tmp_path / "reference"), logs, faults=NO_REPORT)
    assert reference.wait() == [0]
    duration = time.monotonic() - reference.started
    killed = killed_in_write = runs = attempts = 0
    while killed < kills:
        runs += 1
        out, done = tmp_path / f"run{runs}", False
        while not done:
            attempt = forks.start(text_flags(out), logs, faults=NO_REPORT)
            attempts += 1
            if killed < kills:
                time.sleep(rng.uniform(0, duration))
                attempt.send(9)
            status = attempt.wait()[0]
            if status == 0:
                duration = min(duration, time.monotonic() - attempt.started)  # the first run includes the warm-up
            assert status in (0, -9), attempt.output()
            done = status == 0
            killed += not done
            killed_in_write += not done and any(out.rglob("*.partial"))
        assert_equal(out, tmp_path / "reference")
    print(
        f"\nkills: {killed} of {attempts} processes killed, {killed_in_write} during a file write, {runs} runs "
        f"finished, all bitwise equal; {time.monotonic() - started:.0f} s"
    )


@pytest.mark.slow
def test_kill_at_random_moments_preserves_results(forks, text_flags, tmp_path):
    kill_often(3, forks, text_flags, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_200_kills_at_random_moments_preserve_results(forks, text_flags, tmp_path):
    kill_often(200, forks, text_flags, tmp_path, seed=0)


STEP = r"step-\d+'"  # a complete checkpoint
CRASHES = [
    ("hftl.run_folder.checkpoint.Checkpoints.save", "", 2, "before"),
    ("pathlib.Path.mkdir", r"step-\d+\.partial", 2, "after"),
    ("safetensors.torch.save_file", r"partial/weights", 2, "half"),
    ("os.rename", STEP, 2, "before"),
    ("os.rename", STEP, 2, "after"),
    ("shutil.rmtree", STEP, 1, "half"),
    ("os.replace", "best/weights", 1, "before"),
    ("pathlib.Path.write_text", r"history.jsonl.partial", 1, "half"),
    # the slow suite has the following ones too
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
"""Arguments of `fault_injection.crash`: every point of a save and of the writes of a resume."""


def crash_at_each(points, forks, text_flags, tmp_path):
    """Crashes one run at all points in sequence; each time it resumes from the newest complete checkpoint."""
    out, logs, steps = tmp_path / "run", tmp_path / "logs", 2 * len(points) + 8
    settings = {"train.max_steps": steps, "train.eval_steps": 1}
    assert forks.run(text_flags(tmp_path / "reference", **settings), logs, faults=NO_REPORT)[0] == [0]
    crash = ("crash", ("os.rename", STEP, 3, "after"))
    assert forks.run(text_flags(out, **settings), logs, faults=[*NO_REPORT, crash])[0] == [9]
    for point in points:
        before = steps_of(out)
        statuses, output = forks.run(text_flags(out, **settings), logs, faults=[*NO_REPORT, ("crash", point)])
        assert statuses == [9], (point, output)
        assert f"resumed after step {before[-1]} " in output or "resumed after" not in output, (point, output)
        assert steps_of(out)[-1] >= before[-1], point
    incomplete = [str(path) for path in out.rglob("*.partial") if path.parent.suffix != ".partial"]
    newest = steps_of(out)[-1]
    statuses, output = forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)
    assert statuses == [0] and f"resumed after step {newest} " in output, output
    assert all(f"resume: removed incomplete {path}" in output for path in incomplete)
    assert_equal(out, tmp_path / "reference")
    print(f"\ncrashes: {len(points)} points, each resumed from the newest complete checkpoint; bitwise equal")


def test_crash_during_save_preserves_previous_checkpoint(forks, text_flags, tmp_path):
    crash_at_each(CRASHES[:8:2], forks, text_flags, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_crash_at_every_save_point_preserves_checkpoint(forks, text_flags, tmp_path):
    crash_at_each(CRASHES, forks, text_flags, tmp_path)


def test_crash_while_clearing_run_folder_allows_restart(forks, text_flags, tmp_path):
    """A run killed before its first checkpoint restarts, whatever files it left."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    settings = {"train.max_steps": 2, "checkpoint.save_steps": "null", "train.eval_steps": 1}
    before_save = ("hftl.run_folder.checkpoint.Checkpoints.save", "", 1, "before")
    clearing = ("shutil.rmtree", "checkpoints", 1, "after"), ("os.replace", "config.yaml", 1, "before")
    for crash in (before_save, *clearing):
        assert forks.run(text_flags(out, **settings), logs, faults=[*NO_REPORT, ("crash", crash)])[0] == [9]
        assert (out / "config.yaml").is_file()
    statuses, output = forks.run(text_flags(out, **settings), logs, faults=NO_REPORT)
    assert statuses == [0] and "resumed after" not in output, output


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(file, bytes(content))


def _replace(file, content):
    file.unlink()  # a new inode, since `best` has hard links
    file.write_bytes(content)


FILES = ("weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json")
DAMAGES = {
    **{f"a byte of {name} flipped": (lambda f, name=name: flip(f / name), "has another SHA-256") for name in FILES},
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
    """Folder with a killed run with two checkpoints (`run`) and its uninterrupted reference (`reference`)."""
    if not any(_halted.iterdir()):
        crash = ("crash", ("os.rename", STEP, 6, "after"))
        assert forks.run(text_flags(_halted / "run"), _halted / "logs", faults=[*NO_REPORT, crash])[0] == [9]
        assert forks.run(text_flags(_halted / "reference"), _halted / "logs", faults=NO_REPORT)[0] == [0]
    return _halted


def test_newest_skips_damaged_checkpoint_and_logs_reason(halted, tmp_path, capsys):
    older, newest = steps_of(halted / "run")[-2:]
    for number, (name, (damage, reason)) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        shutil.copytree(halted / "run" / "checkpoints", folder)
        damaged = folder / f"step-{newest:08d}"
        damage(damaged)
        assert Checkpoints(folder, 2).newest() == folder / f"step-{older:08d}", name
        output = capsys.readouterr().out
        assert f"resume: skipped damaged checkpoint {damaged}: " in output and reason in output, (name, output)


def test_checkpoint_detects_any_byte_change(halted, tmp_path, capsys):
    """A changed byte of the manifest either keeps its meaning or invalidates the checkpoint."""
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
            valid = Checkpoints(folder, 2).newest()
            try:
                same = json.loads(bytes(changed)) == json.loads(content)
            except ValueError:
                same = False
            assert same or valid != newest, (file.name, position)
        _replace(file, content)
    assert Checkpoints(folder, 2).newest() == newest


def test_resume_skips_damaged_checkpoints_or_restarts(halted, forks, text_flags, tmp_path):
    steps = steps_of(halted / "run")
    older = steps[-2]
    for damaged in (steps[-1:], steps):
        out = tmp_path / str(len(damaged))
        shutil.copytree(halted / "run", out)
        for step in damaged:
            flip(out / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors")
        statuses, output = forks.run(text_flags(out), tmp_path / "logs", faults=NO_REPORT)
        assert statuses == [0], output
        assert output.count(": optimizer.safetensors has another SHA-256 than in manifest.json") == len(damaged)
        if len(damaged) == 1:
            assert f"resumed after step {older} " in output
        else:
            assert f"WARNING: all {len(steps)} checkpoint(s) are damaged; training restarts from step 0" in output
        assert_equal(out, halted / "reference")


def test_newest_on_unreadable_disk_raises_and_keeps_files(halted, tmp_path, monkeypatch):
    """A temporary disk failure neither restarts training nor deletes checkpoints that may be valid."""
    from hftl.errors import CheckpointError

    def failing(path, *args, **kwargs):
        raise OSError(5, os.strerror(5), str(path))

    folder = tmp_path / "checkpoints"
    shutil.copytree(halted / "run" / "checkpoints", folder)
    monkeypatch.setattr("pathlib.Path.read_text", failing)
    with pytest.raises(CheckpointError, match=re.escape(os.strerror(5))):
        Checkpoints(folder, 2).newest()
    assert steps_of(tmp_path) == steps_of(halted / "run")
