"""Disks that are full, read-only or over quota, for real: a sentence, status 2, the last good state intact."""

import os
import subprocess
import time

import pytest
from forked import QUIET
from test_kills import steps_of
from test_resume import assert_equal

from hftl.run_folder.checkpoint import Checkpoints


@pytest.fixture
def disk(tmp_path):
    """Makes small disks: tmpfs of some bytes."""
    made = []

    def make(size):
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode
        ):
            pytest.skip("mounting a small disk needs root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


FULL = "No space left on device"
READ_ONLY = "mount --bind {0} {0}; for i in $(seq 50); do mount -o remount,ro,bind {0} && exit; sleep 0.1; done; exit 1"


def failures(disk, out):
    """(fault, what is said) by name, in the order in which a run meets them."""
    checkpoints, state = out / "checkpoints", "CheckpointError: checkpoint: the state after step"
    return {
        "quota": (("at_step", (2, "limit_file_size", 100_000)), [state, "File too large", "is intact"]),
        "save": (("at_step", (4, "fill", str(disk), 150_000)), [state, FULL, f"'{checkpoints}'", "is intact"]),
        "read-only": (
            ("at_step", (5, "shell", READ_ONLY.format(checkpoints))),
            ["CheckpointError: checkpoint: ", "Read-only file system"],
        ),
        "best": (
            ("at_call", ("safetensors.torch.save_file", "best/weights", "fill", str(disk), 20_000)),
            ["CheckpointError: checkpoint: best weights cannot be written", FULL, "best/weights.safetensors"],
        ),
        "start": (("at_call", ("hftl.run.setup.make_folder", "", "fill", str(disk), 0)), ["DiskError: ", FULL]),
        "predictions": (
            ("at_call", ("hftl.evaluation.evaluate.TableWriter.write", "", "fill", str(disk), 0)),
            ["DiskError: ", FULL],
        ),
        "publish": (
            ("at_call", ("hftl.artifacts.save_run.save_artifact", "", "fill", str(disk), 30_000)),
            ["DiskError: ", FULL, str(out)],
        ),
    }


def fail_at_each(names, forks, text_flags, disk, tmp_path, processes=1, **more):
    """One run meets one failing disk after the other, is started again when it is mended, and ends bitwise equal."""
    small, logs = disk("8m"), tmp_path / "logs"
    out, slowest = small / "run", 0.0
    whole = forks.start(text_flags(tmp_path / "whole", **more), logs, faults=QUIET, processes=processes)
    assert set(whole.wait()) == {0}, whole.said()
    for name in names:
        fault, expected = failures(small, out)[name]
        attempt = forks.start(text_flags(out, **more), logs, faults=[*QUIET, fault], processes=processes)
        statuses = attempt.wait(60)
        slowest = max(slowest, time.monotonic() - attempt.started)
        said = attempt.said()
        assert statuses == [2] * processes, (name, statuses, said)
        assert all(words in said for words in expected) and "Traceback" not in said, (name, said)
        assert "Exception ignored" not in said, (name, said)
        for rank in range(1, processes):
            assert "Error" not in attempt.said(rank), (name, attempt.said(rank))  # said once
        subprocess.run(["umount", out / "checkpoints"], capture_output=True)
        (small / "ballast").unlink(missing_ok=True)
        # what was begun before the disk became read-only cannot be removed from it; the next run does
        assert name == "read-only" or not list(out.rglob("*.partial")), name
        assert not steps_of(out) or Checkpoints(out / "checkpoints", 2).newest()
    again = forks.start(text_flags(out, **more), logs, faults=QUIET, processes=processes)
    assert set(again.wait()) == {0}, again.said()
    assert_equal(out, tmp_path / "whole")
    print(f"\ndisks: {', '.join(names)} on {processes} process(es), slowest end after {slowest:.1f} s; bitwise equal")


@pytest.mark.slow
def test_a_disk_that_fails_in_a_save_or_in_publish(forks, text_flags, disk, tmp_path):
    fail_at_each(["save", "publish"], forks, text_flags, disk, tmp_path)


@pytest.mark.slow
def test_a_disk_that_fails_anywhere(forks, text_flags, disk, tmp_path):
    fail_at_each(list(failures(tmp_path, tmp_path)), forks, text_flags, disk, tmp_path)


@pytest.mark.slow
def test_a_disk_that_fails_on_the_main_of_two_processes_ends_both_with_one_message(forks, text_flags, disk, tmp_path):
    names = ["quota", "save", "read-only", "best", "publish"]
    fail_at_each(names, forks, text_flags, disk, tmp_path, processes=2, **{"train.batch_size_per_device": 3})


@pytest.mark.slow
def test_a_history_that_cannot_grow_ends_the_run(forks, text_flags, disk, tmp_path):
    small, logs = disk("8m"), tmp_path / "logs"
    more = {"train.max_steps": 60, "train.logging_steps": 1, "train.eval_steps": 60, "checkpoint.save_steps": 30}
    fault = ("at_step", (32, "fill", str(small), 0))
    statuses, said = forks.run(text_flags(small / "run", **more), logs, faults=[*QUIET, fault], processes=2)
    assert statuses == [2, 2] and "Traceback" not in said, said
    assert "CheckpointError: history: the record of step" in said and FULL in said
    assert steps_of(small / "run") == [30]


def test_a_run_whose_states_have_no_room_is_refused_before_its_first_step(forks, text_flags, disk, tmp_path):
    small = disk("1m")
    statuses, said = forks.run(text_flags(small / "run"), tmp_path / "logs", faults=QUIET)
    assert statuses == [2], said
    assert "2 + 1 states of 367 kB (weights, best weights, optimizer) need 1.1 MB" in said, said
    assert "are free. Make room, lower checkpoint.total_limit" in said and f"'{small / 'run' / 'checkpoints'}'" in said
    assert "step 1/" not in said and not steps_of(small / "run")
    statuses, said = forks.run(
        text_flags(small / "run", **{"checkpoint.total_limit": 1}), tmp_path / "logs", faults=QUIET
    )
    assert statuses == [0], said


def test_features_that_have_no_room_are_an_error_and_leave_nothing(disk, monkeypatch, texts, tiny_bert):
    """A mapped file would end the process by SIGBUS where its disk is full."""
    from accelerate import Accelerator

    import hftl
    from hftl.errors import FeatureError
    from hftl.features.cache import compute_features

    folder = disk("16k")
    (folder / "other").write_bytes(bytes(8192))
    monkeypatch.setenv("HFTL_CACHE", str(folder))
    run = hftl.RunConfig(hftl.DataConfig(source=str(texts)), hftl.ModelConfig(name=tiny_bert, pooling="mean"))
    splits = hftl.load_splits(run.data)
    task = hftl.TextClassification(splits)
    model = hftl.build_model(run, task.head)
    with pytest.raises(FeatureError, match="No space left.*HFTL_CACHE"):
        compute_features(Accelerator(), model, task, splits["train"], run)
    assert not list((folder / "features").glob("*.growing"))
