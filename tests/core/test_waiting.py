import threading
import time

import pytest

from cm_train.core import waiting
from cm_train.core.waiting import Watch


@pytest.fixture
def clock(monkeypatch):
    """The system's clock, with the seconds of a suspension added at will."""
    asleep = [0.0]
    real = time.monotonic
    monkeypatch.setattr(waiting.time, "monotonic", lambda: real() + asleep[0])
    return asleep


def test_a_wait_that_takes_too_long_expires():
    expired = threading.Event()
    with Watch(0.2, expired.set).waiting():
        assert expired.wait(5)


def test_waits_that_end_in_time_never_expire():
    expired = threading.Event()
    watch = Watch(0.4, expired.set)
    for _ in range(8):
        with watch.waiting():
            time.sleep(0.1)
    assert not expired.wait(0.5)


def test_time_in_which_the_process_was_suspended_does_not_count(clock):
    expired = threading.Event()
    with Watch(1.0, expired.set).waiting():
        for _ in range(3):
            time.sleep(0.05)
            clock[0] += 1000.0
        assert not expired.wait(0.2)
        assert expired.wait(5)
