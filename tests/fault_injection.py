"""Faults injected into processes of tests/forked.py."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from pathlib import Path


def skip_report() -> None:
    """Skips report.html, which takes as long as the rest of a small run."""
    import hftl.artifacts.save_run

    hftl.artifacts.save_run._render_report = lambda *_: None


def crash(target: str, pattern: str, nth: int, when: str) -> None:
    """Ends the process without cleanup at the `nth` call of a function whose arguments match a pattern.

    Args:
        target: Qualified name, such as `os.rename` or `pathlib.Path.mkdir`.
        pattern: Regular expression, searched in the arguments.
        nth: Number of the matching call, from 1.
        when: `before` the call, `after` it, or `half` with half of the file written or of the folder deleted.
    """
    owner, name, original = _find(target)
    calls = 0

    def crashing(*args, **kwargs):
        nonlocal calls
        matches = re.search(pattern, repr(args))
        calls += bool(matches)
        if not matches or calls != nth:
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        elif when == "half":
            path = [arg for arg in args if isinstance(arg, Path)][-1]
            if path.is_dir():
                for file in sorted(path.iterdir())[::2]:
                    file.unlink()
            else:
                original(*args, **kwargs)
                os.truncate(path, path.stat().st_size // 2)
        os._exit(9)

    setattr(owner, name, crashing)


def pause(target: str, pattern: str, marker: str, seconds: float) -> None:
    """Makes the first matching call create the file `marker` and sleep for some seconds."""
    import time

    owner, name, original = _find(target)

    def pausing(*args, **kwargs):
        if re.search(pattern, repr(args)) and not Path(marker).exists():
            Path(marker).touch()
            time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(owner, name, pausing)


def at_step(step: int, fault: str, *arguments) -> None:
    """Injects another fault, such as `fill` or `shell`, after `step` steps."""
    from hftl.run_folder.history import Recorder

    advance = Recorder.advance

    def advancing(recorder, loss):
        advance(recorder, loss)
        if recorder.history.steps == step:
            globals()[fault](*arguments)

    Recorder.advance = advancing


def at_call(target: str, pattern: str, fault: str, *arguments) -> None:
    """Injects another fault before a matching call."""
    owner, name, original = _find(target)

    def calling(*args, **kwargs):
        if re.search(pattern, repr(args)):
            globals()[fault](*arguments)
        return original(*args, **kwargs)

    setattr(owner, name, calling)


def fill(folder: str, leave: int) -> None:
    """Fills the disk of `folder` except for `leave` bytes."""
    free = shutil.disk_usage(folder).free
    if free > leave:
        with (Path(folder) / "ballast").open("ab") as ballast:
            ballast.write(bytes(free - leave))


def shell(command: str) -> None:
    """Runs a command."""
    import subprocess

    subprocess.run(command, shell=True, check=True)


def limit_file_size(size: int) -> None:
    """Limits files of this process to `size` bytes, as a quota does."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _find(target: str):
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1], getattr(owner, parts[-1])
    raise LookupError(target)
