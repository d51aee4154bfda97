import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cm_train.core import signals
from cm_train.core.signals import EARLY, StopFlag, answered
from conftest import wait_for


def test_stop_flag_is_set_by_each_signal_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU):
        with StopFlag() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            assert stop.caught == {number}
    assert signal.getsignal(signal.SIGTERM) == before


def test_hangup_stays_ignored_where_nohup_has_said_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_later_sigint_quits_at_once(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_signals_within_a_second_are_one(first):
    """As a terminal's wrapper sends them: to the group, and to the process once more."""
    with StopFlag() as stop:
        for number in (first, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop()


def test_stop_flag_keeps_the_reserve_before_its_deadline():
    stop = StopFlag(deadline=time.monotonic() + 100)
    assert not stop()
    assert not stop(reserve_s=50)
    assert stop(reserve_s=101)


def test_stop_flag_heeds_its_file(tmp_path):
    stop = StopFlag(file=tmp_path / "stop")
    assert not stop()
    (tmp_path / "stop").touch()
    assert stop()


def test_a_signal_that_was_blocked_until_the_handler_stood_is_heeded():
    """As a rank inherits it: what came while Python was starting is not lost, and did not end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, EARLY)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # a test runner may have threads that block nothing
        with StopFlag() as stop:
            assert stop()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(EARLY)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_first_signal_is_answered_at_once_and_the_others_are_not(capfd):
    with StopFlag(), answered():
        os.kill(os.getpid(), signal.SIGCONT)  # nothing to do with it
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: not [t for t in threading.enumerate() if t.name == "signals"], patience_s=10)
    assert capfd.readouterr().err == "stopping as soon as everything is saved; Ctrl-C again quits without\n"


def test_answer_does_not_wait_for_the_main_thread(tmp_path):
    """Python's handlers run between two of its instructions; a backward pass is one of them, and may take minutes."""
    script = (
        "import ctypes, signal; from cm_train.core.signals import StopFlag, answered\n"
        "with StopFlag() as stop, answered():\n"
        "    print('ready', flush=True)\n"
        "    libc, left = ctypes.CDLL(None), 30\n"
        "    while left: left = libc.sleep(left)\n"  # without its lock, and in no instruction of Python
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "stopping as soon as everything is saved\n"
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_answering_ends_with_its_context_and_leaves_no_trace(capfd):
    handles = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    before = signal.set_wakeup_fd(-1)
    for _ in range(3):
        with StopFlag(), answered():
            pass
    assert signal.set_wakeup_fd(before) == -1
    assert not [t for t in threading.enumerate() if t.name == "signals"]
    assert handles is None or len(os.listdir("/proc/self/fd")) == handles
    assert capfd.readouterr().err == ""


def test_other_ranks_and_quiet_commands_answer_nothing(capfd, monkeypatch):
    monkeypatch.setenv("CM_TRAIN_QUIET", "1")
    with StopFlag(), answered():
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.delenv("CM_TRAIN_QUIET")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with StopFlag(), answered():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
