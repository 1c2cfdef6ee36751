"""Real disks that are full, read-only or over quota: one error, exit status 2, last checkpoint intact."""

import os
import subprocess
import time

import pytest
from forked import NO_REPORT
from test_crash_recovery import steps_of
from test_resume import assert_equal

from hftl.run_folder.checkpoint import Checkpoints


@pytest.fixture
def disk(tmp_path):
    """Factory of small disks (tmpfs)."""
    disks = []

    def make(size):
        folder = tmp_path / f"disk{len(disks)}"
        folder.mkdir()
        if (
            os.geteuid() != 0
            or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode
        ):
            pytest.skip("mounting a tmpfs needs root")
        disks.append(folder)
        return folder

    yield make
    for folder in disks:
        subprocess.run(["umount", "-l", folder], check=True)


FULL = "No space left on device"
READ_ONLY = "mount --bind {0} {0}; for i in $(seq 50); do mount -o remount,ro,bind {0} && exit; sleep 0.1; done; exit 1"


def failures(disk, out):
    """Returns (fault, expected output) by name, in the order of the stages of a run."""
    checkpoints, message = out / "checkpoints", "CheckpointError: checkpoint: step"
    return {
        "quota": (("at_step", (2, "limit_file_size", 100_000)), [message, "File too large", "is intact"]),
        "save": (("at_step", (4, "fill", str(disk), 150_000)), [message, FULL, f"'{checkpoints}'", "is intact"]),
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
        "save_run": (
            ("at_call", ("hftl.artifacts.save_run.save_artifact", "", "fill", str(disk), 30_000)),
            ["DiskError: ", FULL, str(out)],
        ),
    }


def fail_at_each(names, forks, text_flags, disk, tmp_path, processes=1, **settings):
    """Injects disk failures in sequence, resumes the run after each fix, and compares with the reference."""
    small, logs = disk("8m"), tmp_path / "logs"
    out, slowest = small / "run", 0.0
    reference = forks.start(text_flags(tmp_path / "reference", **settings), logs, faults=NO_REPORT, processes=processes)
    assert set(reference.wait()) == {0}, reference.output()
    for name in names:
        fault, expected = failures(small, out)[name]
        attempt = forks.start(text_flags(out, **settings), logs, faults=[*NO_REPORT, fault], processes=processes)
        statuses = attempt.wait(60)
        slowest = max(slowest, time.monotonic() - attempt.started)
        output = attempt.output()
        assert statuses == [2] * processes, (name, statuses, output)
        assert all(words in output for words in expected) and "Traceback" not in output, (name, output)
        assert "Exception ignored" not in output, (name, output)
        for rank in range(1, processes):
            assert "Error" not in attempt.output(rank), (name, attempt.output(rank))  # logged once
        subprocess.run(["umount", out / "checkpoints"], capture_output=True)
        (small / "ballast").unlink(missing_ok=True)
        # temporary files cannot be removed from a read-only disk; the next run removes them
        assert name == "read-only" or not list(out.rglob("*.partial")), name
        assert not steps_of(out) or Checkpoints(out / "checkpoints", 2).newest()
    resumed = forks.start(text_flags(out, **settings), logs, faults=NO_REPORT, processes=processes)
    assert set(resumed.wait()) == {0}, resumed.output()
    assert_equal(out, tmp_path / "reference")
    print(f"\ndisks: {', '.join(names)} on {processes} process(es), slowest end after {slowest:.1f} s; bitwise equal")


@pytest.mark.slow
def test_disk_failure_in_save_preserves_results(forks, text_flags, disk, tmp_path):
    fail_at_each(["save", "save_run"], forks, text_flags, disk, tmp_path)


@pytest.mark.slow
def test_disk_failure_at_any_stage_preserves_results(forks, text_flags, disk, tmp_path):
    fail_at_each(list(failures(tmp_path, tmp_path)), forks, text_flags, disk, tmp_path)


@pytest.mark.slow
def test_disk_failure_on_main_process_ends_both_processes(forks, text_flags, disk, tmp_path):
    names = ["quota", "save", "read-only", "best", "save_run"]
    fail_at_each(names, forks, text_flags, disk, tmp_path, processes=2, **{"train.batch_size_per_device": 3})


@pytest.mark.slow
def test_history_write_failure_ends_run(forks, text_flags, disk, tmp_path):
    small, logs = disk("8m"), tmp_path / "logs"
    settings = {"train.max_steps": 60, "train.logging_steps": 1, "train.eval_steps": 60, "checkpoint.save_steps": 30}
    fault = ("at_step", (32, "fill", str(small), 0))
    statuses, output = forks.run(text_flags(small / "run", **settings), logs, faults=[*NO_REPORT, fault], processes=2)
    assert statuses == [2, 2] and "Traceback" not in output, output
    assert "CheckpointError: history: the record of step" in output and FULL in output
    assert steps_of(small / "run") == [30]


def test_fit_rejects_disk_without_space_for_checkpoints(forks, text_flags, disk, tmp_path):
    small = disk("1m")
    statuses, output = forks.run(text_flags(small / "run"), tmp_path / "logs", faults=NO_REPORT)
    assert statuses == [2], output
    assert "2 + 1 checkpoints of 367 kB (weights, best weights, optimizer) need 1.1 MB" in output, output
    assert (
        "are free. Free disk space, lower checkpoint.total_limit" in output
        and f"'{small / 'run' / 'checkpoints'}'" in output
    )
    assert "step 1/" not in output and not steps_of(small / "run")
    statuses, output = forks.run(
        text_flags(small / "run", **{"checkpoint.total_limit": 1}), tmp_path / "logs", faults=NO_REPORT
    )
    assert statuses == [0], output


def test_features_on_full_disk_raise_and_leave_no_files(disk, monkeypatch, texts, tiny_bert):
    """With a memory-mapped file on a full disk, the process would end by SIGBUS."""
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
