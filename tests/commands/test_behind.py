"""Writing in another thread: in order, all of it, and with the errors that it had."""

import contextlib
import threading
import time

import pytest

from cm_train.commands.behind import Behind, ahead
from conftest import wait_for


def put_all(written, error):
    def write(i):
        time.sleep(0.002)
        written.append(i)

    with Behind(write) as behind:
        for i in range(10):
            behind.put(i)
        if error:
            raise error


def test_all_is_written_in_order_by_the_end_whatever_ends_it():
    for error in (None, RuntimeError, SystemExit):
        written: list[int] = []
        with contextlib.nullcontext() if error is None else pytest.raises(error):
            put_all(written, error)
        assert written == [*range(10)]


def test_what_goes_wrong_reaches_the_caller_once_and_nothing_is_written_after_it():
    written: list[int] = []

    def write(i):
        if i == 2:
            raise OSError("full")
        written.append(i)

    asked = iter(range(1000))
    with pytest.raises(OSError, match="full"), Behind(write) as behind:
        [behind.put(i) or time.sleep(0.001) for i in asked]
    assert written == [0, 1] and next(asked) < 999
    with pytest.raises(OSError, match="full"), Behind(write) as behind:  # in the last one
        behind.put(2)


def test_no_more_than_a_few_wait():
    go, begun = threading.Event(), []
    thread = threading.Thread(target=lambda: [behind.put(i) or begun.append(i) for i in range(20)])
    with Behind(lambda i: go.wait(60)) as behind:
        thread.start()
        time.sleep(0.2)
        assert len(begun) <= 3
        go.set()
        thread.join()
    assert begun == [*range(20)]


def test_who_quits_at_once_does_not_wait():
    hangs = threading.Event()
    behind = Behind(lambda: hangs.wait(60)).__enter__()
    behind.put()
    behind.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert behind._thread.is_alive()
    hangs.set()
    behind.__exit__(None, None, None)


def test_ahead_makes_one_more_than_is_asked_for_in_another_thread():
    made, threads = [], set()

    def make(i):
        made.append(i)
        threads.add(threading.current_thread())
        if i == 5:
            raise ValueError("five")
        return i * i

    for i, (item, square) in enumerate(ahead(make, range(4))):
        assert (item, square) == (i, i * i)
        wait_for(lambda i=i: made == [*range(min(i + 2, 4))])
    assert threading.current_thread() not in threads
    assert list(ahead(make, [])) == []
    with pytest.raises(ValueError, match="five"):
        list(ahead(make, range(9)))
