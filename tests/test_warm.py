"""A command forked from a warm Python is what it is when started cold: what it sees, what it leaves, how it ends."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from conftest import ENVIRONMENT, TINY, children, wait_for
from warm import Warm

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux alone")

SEES = """
import json, os, signal, sys, tempfile, threading
where = {"argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ)}
streams = [(s.fileno(), s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)]
handlers = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
descriptors = sorted(os.listdir("/proc/self/fd"))[:4]  # the fourth is the listing itself
print(json.dumps([where, streams, handlers, blocked, descriptors, tempfile.gettempdir(), threading.active_count()]))
"""
ENDS = {
    "returns": "print('done', end='')",
    "number": "raise SystemExit(3)",
    "nothing": "import sys; sys.exit()",
    "text": "raise SystemExit('why')",
    "error": "raise ValueError('why')",
    "interrupt": "raise KeyboardInterrupt",
    "at_exit": "import atexit; atexit.register(print, 'last')",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "terminated": "import os; os.kill(os.getpid(), 15)",
    "leaves": "import os; os._exit(7)",
    "full": "import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('lost'); sys.exit(2)",
    "interrupt_late": "import atexit; print('x'); atexit.register(print, 'last'); raise KeyboardInterrupt",
}


def cold(argv, **kwargs):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300, **kwargs)


def test_a_fork_sees_what_a_cold_start_sees(warm, tmp_path):
    env = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path), "ONE_OF": "its own"}
    kwargs = {"cwd": tmp_path, "env": env, "stdin": subprocess.DEVNULL}
    assert warm.run(["-c", SEES, "a", "-b"], **kwargs).stdout == cold(["-c", SEES, "a", "-b"], **kwargs).stdout


@pytest.mark.parametrize("program", ENDS.values(), ids=ENDS)
def test_a_fork_ends_as_a_cold_start_ends(program, warm, tmp_path):
    ours, theirs = warm.run(["-c", program], cwd=tmp_path), cold(["-c", program], cwd=tmp_path, env=ENVIRONMENT)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_a_warm_run_leaves_the_bytes_of_a_cold_one(warm, tmp_path):
    argv = ["-m", "cm_train.commands.train", "mode=ict", *TINY, "backbone.dropout=0.2", "dataset.hflip=true"]
    left = []
    for name, run in (("warm", warm.run), ("cold", cold)):
        (tmp_path / name).mkdir()
        done = run(argv, cwd=tmp_path / name, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        files = sorted(f for f in (tmp_path / name).rglob("*") if f.suffix in (".safetensors", ".pt", ".png", ".yaml"))
        left.append({f.relative_to(tmp_path / name): hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert len(left[0]) > 5
    assert left[0] == left[1]


def test_ranks_of_a_warm_command_are_its_own_children(warm, tmp_path):
    argv = ["-m", "cm_train.commands.train", "mode=ict", *TINY, "steps=100000", "devices=2", "log_every=1"]
    process = warm.popen(argv, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        metrics = tmp_path / "runs" / "digits-ict" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
        ranks = children(process.pid)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 3
    assert len(ranks) == 2
    assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks)


def test_what_a_fork_can_not_obey_is_refused(warm):
    with pytest.raises(AssertionError, match="cold"):
        warm.run(["-c", ""], env={**ENVIRONMENT, "OMP_NUM_THREADS": "2"})
    with pytest.raises(AssertionError, match="cold"):
        warm.run(["-c", ""], env={**ENVIRONMENT, "LC_ALL": "C.UTF-8" if ENVIRONMENT.get("LC_ALL") == "C" else "C"})


def test_a_server_that_is_gone_is_said():
    """Not by a process of number 0, whose group is this very one."""
    gone = Warm(ENVIRONMENT)
    gone._server.kill()
    gone._server.wait()
    with pytest.raises((RuntimeError, OSError)):
        gone.run(["-c", ""])
