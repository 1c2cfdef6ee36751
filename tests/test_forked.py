"""Fork server of the tests (forked.py): isolation of requests after failures."""

import os
import signal

import forked
import pytest
from forked import Forks


@pytest.fixture(scope="module")
def server():
    """Separate server without preloaded libraries."""
    forks = Forks(preload=False)
    yield forks
    forks.close()


def echo(forks, logs, word, **options):
    return forks.command(["python", "-c", f"import sys; print('{word}'); sys.exit({len(word)})"], logs, **options)


def test_request_after_late_answer_gets_its_own(server, tmp_path, monkeypatch):
    assert echo(server, tmp_path, "a") == ([1], "a\n")
    os.kill(server.server.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch, pytest.raises(TimeoutError):
        patch.setattr(forked, "ANSWER_S", 0.1)
        echo(server, tmp_path, "bb")
    os.kill(server.server.pid, signal.SIGCONT)
    for _ in range(2):
        assert echo(server, tmp_path, "ccc", processes=2) == ([3, 3], "ccc\n")


def test_wait_past_timeout_kills_processes(server, tmp_path):
    attempt = server.start_command(
        ["python", "-c", "import time; print('begun', flush=True); time.sleep(600)"], tmp_path
    )
    attempt.until("begun")
    with pytest.raises(AssertionError, match="still running after 0.1 s:\nbegun"):
        attempt.wait(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(attempt.pids[0], 0)
    assert echo(server, tmp_path, "ddd") == ([3], "ddd\n")


@pytest.mark.parametrize("without_hftl", [False, True])
def test_lost_server_is_replaced(without_hftl, server, tmp_path):
    os.kill(server.server.pid, signal.SIGKILL)
    assert echo(server, tmp_path, "ee", without_hftl=without_hftl) == ([2], "ee\n")


def test_server_lost_during_request_fails_it_alone(server, tmp_path):
    code = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"
    with pytest.raises(EOFError):
        server.command(["python", "-c", code], tmp_path)
    assert server.running is None
    assert echo(server, tmp_path, "f") == ([1], "f\n")
