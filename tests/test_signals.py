import os
import signal
import time

import pytest

from cm_train.signals import StopFlag


def test_stop_flag_is_set_by_each_signal_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        with StopFlag() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_sigint_quits_at_once():
    with StopFlag():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_flag_keeps_the_reserve_before_its_deadline():
    stop = StopFlag(deadline=time.time() + 100)
    assert not stop()
    assert not stop(reserve_s=50)
    assert stop(reserve_s=101)


def test_stop_flag_heeds_its_file(tmp_path):
    stop = StopFlag(file=tmp_path / "stop")
    assert not stop()
    (tmp_path / "stop").touch()
    assert stop()
